"""Configurations: a Pythia from its known sizes, everything else from its config.json, and models
of them without memory.

A configuration is all that a prediction needs: it names the architecture and its sizes.
transformers builds the modules from it; on torch's *meta* device they have shapes and no storage.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GPTNeoXConfig,
)
from transformers.pytorch_utils import Conv1D

from qlora_nb import sources
from qlora_nb.errors import KitError, refusing
from qlora_nb.pythia import PYTHIA, pythia_size


@contextmanager
def loading(
    part: str,
    model_id: str,
    remedy: str = "needed are config.json, tokenizer and whole .safetensors files; "
    "fetch the model again if one was cut short",
) -> Iterator[None]:
    """Context in which whatever a broken file makes a library say becomes a refusal.

    transformers' warning that a model saved in 4 bit keeps its own storage is left out:
    `load.weights_of` has said so.
    """
    with warnings.catch_warnings(), refusing(f"the {part} cannot be loaded", model_id, remedy):
        warnings.filterwarnings("ignore", "You passed `quantization_config`")
        yield


def config_of(model_id: str):
    """transformers' configuration behind a `model_id`: a Pythia's from its known sizes, any other
    model's from its config.json.

    Raises:
        KitError: it cannot be read, the folder holds something else than a model in safetensors,
            or the model is none that writes text from left to right by attention.
    """
    size = pythia_size(model_id)
    if size:
        return pythia_config(size)
    path = sources.model_path(model_id)
    sources.require_safetensors(model_id)
    remedy = (
        "choose a model of a family in docs/models.md: code that comes with a model (auto_map) "
        f"is not run, and transformers {transformers.__version__} must know its model_type"
    )
    with loading("configuration", model_id, remedy):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        _require_causal(config)
    return config


def _require_causal(config) -> None:
    """Refuse a family that the kit cannot train, as far as the configuration tells."""
    kind = type(config)
    parts = config.sub_configs
    reason = ""
    if "vision_config" in parts or "audio_config" in parts:
        reason = "it takes images or sound besides text"
    elif kind not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "is_encoder_decoder", False):
        reason = "it is not made to write a text on from its beginning"
    elif kind in MODEL_FOR_MASKED_LM_MAPPING and getattr(config, "is_decoder", None) is False:
        reason = "a token sees those behind it: it is not made to write from left to right"
    elif not hasattr(config, "num_attention_heads"):
        reason = "it has no attention, so that neither its memory nor its kernels are known here"
    if reason:
        raise KitError(
            f"this model is not trained here: {reason}",
            value=config.model_type,
            remedy="choose a causal language model, see docs/models.md",
        )


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


def meta_model(config, **options) -> nn.Module:
    """The model of a configuration with every tensor's shape and none of its memory.

    GPT-2's matrices (`Conv1D`) become linear layers, as bitsandbytes makes them.

    Args:
        options: more for transformers' `from_config`, such as `dtype`.

    Raises:
        KitError: sizes that do not fit each other.
    """
    what = "transformers cannot build this model"
    with refusing(what, config.model_type, "look at its config.json"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
        for name, layer in list(model.named_modules()):
            if isinstance(layer, Conv1D):
                linear = nn.Linear(layer.nx, layer.nf, dtype=layer.weight.dtype)
                model.set_submodule(name, linear)
    return model
