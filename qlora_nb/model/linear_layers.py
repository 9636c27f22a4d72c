"""The linear layers of a model's blocks: the ones that QLoRA quantizes and adapts."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from qlora_nb.errors import KitError


def linear_layers(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """Name → module of every linear layer inside the blocks: the ones QLoRA quantizes and adapts
    (the head is not one).
    """
    head = set(model.get_output_embeddings().modules())
    linear = {
        n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m not in head
    }
    return {n: m for n, m in linear.items() if "lora_" not in n}


def adapted_names(model: PreTrainedModel, target_modules: Sequence[str]) -> list[str]:
    """The last part of the names of the layers to adapt: `all-linear` spelt out for this model,
    anything else as it is.

    PEFT's own `all-linear` would take the slices of a 4-bit head for layers of the blocks.

    Raises:
        KitError: a name that no linear layer of the blocks has, or `all-linear` beside other names.
    """
    names = sorted({name.rsplit(".", 1)[-1] for name in linear_layers(model)})
    if list(target_modules) == ["all-linear"]:
        return names
    if wrong := [target for target in target_modules if target not in names]:
        allowed = f"all-linear alone, or any of {', '.join(names)}"
        raise KitError(
            "target_modules names layers this model does not have",
            value=", ".join(wrong),
            allowed=allowed,
        )
    return list(target_modules)


def dense_weight(module: torch.nn.Module) -> torch.Tensor:
    """A linear layer's weight as float32 (out, in), dequantized if it is stored in 4 bit."""
    weight = module.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).float()
    return weight.detach().float()
