"""Configurations: a Pythia from its known sizes, everything else from its config.json, and models
of them without memory.

A configuration is all that a prediction needs: it names the architecture and its sizes.
transformers builds the modules from it; on torch's *meta* device they have shapes and no storage.
"""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from qlora_nb.errors import KitError
from qlora_nb.model import load
from qlora_nb.pythia import PYTHIA, pythia_size


def pythia_config(size: str) -> GPTNeoXConfig:
    """transformers' configuration of a Pythia size ("14m" … "12b"); no hub is asked.

    Raises:
        KitError: a size that does not exist.
    """
    if size not in PYTHIA:
        raise KitError("unknown Pythia size", value=size, allowed=", ".join(PYTHIA))
    shape = PYTHIA[size]
    return GPTNeoXConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=4 * shape.hidden,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.heads,
        bos_token_id=0,
        eos_token_id=0,
    )


def config_of(model_id: str):
    """The configuration behind a `model_id`: a Pythia from its known sizes, everything else from
    its config.json.
    """
    size = pythia_size(model_id)
    if size:
        return pythia_config(size)
    return load.saved_config(model_id)


def meta_model(config) -> nn.Module:
    """The model of a configuration with every tensor's shape and none of its memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
