"""The linear layers of a model's blocks: the ones that QLoRA quantizes and adapts.

The QLoRA paper (section 4, figure 2) finds that LoRA has to sit on every linear layer of the
transformer's blocks to match full fine-tuning. Embedding and head are not among them: they stay in
16 bit and get no adapter.
"""

from collections.abc import Sequence

import bitsandbytes as bnb
import torch
from peft.utils.integrations import dequantize_module_weight
from transformers import PreTrainedModel

from qlora_nb.errors import KitError
from qlora_nb.model import quantized


def linear_layers(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """Name → module of every linear layer inside the blocks: not the head, no adapter's matrix.

    Only torch's own class counts, as bitsandbytes quantizes no other.
    """
    head = set(model.get_output_embeddings().modules())
    found = {}
    for name, module in model.named_modules():
        is_linear = type(module) is torch.nn.Linear or isinstance(module, bnb.nn.Linear4bit)
        if is_linear and module not in head and "lora_" not in name:
            found[name] = module
    return found


def adapted_names(model: PreTrainedModel, target_modules: Sequence[str]) -> list[str]:
    """The last part of the names of the layers to adapt: `all-linear` spelt out for this model,
    anything else as it is.

    PEFT's own `all-linear` would take the slices of a 4-bit head for layers of the blocks.

    Raises:
        KitError: a name that no linear layer of the blocks has, `all-linear` beside other names, or
            blocks without linear layers of torch's own class.
    """
    names = sorted({name.rsplit(".", 1)[-1] for name in linear_layers(model)})
    if not names:
        quantized.require_four_bit(model)
    if list(target_modules) == ["all-linear"]:
        return names
    wrong = [target for target in target_modules if target not in names]
    if wrong:
        raise KitError(
            "target_modules names layers this model does not have",
            value=", ".join(wrong),
            allowed=f"all-linear alone, or any of {', '.join(names)}",
        )
    return list(target_modules)


def dense_weight(module: torch.nn.Module) -> torch.Tensor:
    """A linear layer's weight as float32 (out, in), dequantized if it is stored in 4 bit."""
    return dequantize_module_weight(module).detach().float()
