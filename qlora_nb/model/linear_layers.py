"""The linear layers of a model's blocks, the ones that QLoRA quantizes and adapts, and what of a
model is in 4 bit.

The QLoRA paper (section 4, figure 2) finds that LoRA has to sit on every linear layer of the
transformer's blocks to match full fine-tuning. Embedding and head are not among them: they stay in
16 bit and get no adapter.

A model can be published in 4 bit by bitsandbytes (it is trained as it is) or in other ways (it is
refused). And bitsandbytes quantizes nothing but torch's own linear layers: neither a family's own
class of them nor experts kept together in one three-dimensional parameter. Such weights stay in 16
bit, which the user is told, as the memory is then not what the paper promises.
"""

from collections import Counter
from collections.abc import Sequence

import bitsandbytes as bnb
import torch
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from qlora_nb.errors import KitError

OWN = "bitsandbytes quantizes torch's own linear layers alone"


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Name → module of every linear layer inside the blocks: not the head, no adapter's matrix.

    Only torch's own class counts, as bitsandbytes quantizes no other.
    """
    head = set(model.get_output_embeddings().modules())
    found = {}
    for name, module in model.named_modules():
        is_linear = type(module) is nn.Linear or isinstance(module, bnb.nn.Linear4bit)
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
        require_four_bit(model)
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


def dense_weight(module: nn.Module) -> torch.Tensor:
    """A linear layer's weight as float32 (out, in), dequantized if it is stored in 4 bit."""
    return dequantize_module_weight(module).detach().float()


def own_quantization(config) -> BitsAndBytesConfig | None:
    """How a saved model is quantized, from its config.json; None for a model in 16 or 32 bit.

    Raises:
        KitError: in another way than 4 bit by bitsandbytes (8 bit, GPTQ, AWQ, FP8, …).
    """
    own = getattr(config, "quantization_config", None)
    if not own:
        return None
    if not isinstance(own, dict):
        own = own.to_dict()
    if own.get("load_in_4bit"):
        return BitsAndBytesConfig.from_dict(own)
    raise KitError(
        "the model is quantized already, in a way that is not trained here",
        value=own.get("quant_method"),
        allowed="a model in 16 or 32 bit, or in 4 bit by bitsandbytes",
        remedy="choose the model it was made from",
    )


def described(quant_type: str, double_quant: bool) -> str:
    """A 4-bit storage in words.

    >>> described("nf4", False)
    'nf4 without double quantization'
    """
    return f"{quant_type} {'with' if double_quant else 'without'} double quantization"


def require_four_bit(model: PreTrainedModel) -> None:
    """Count what is in 4 bit; print in one line what of the blocks is not, and why.

    Matrices outside the embeddings and the head are counted, whatever module holds them. Of a model
    without memory (`configs.meta_model`) it is told what would be.

    Raises:
        KitError: nothing is in 4 bit.
    """
    head = model.get_output_embeddings()
    apart = set() if head is None else set(head.modules())
    n_packed = 0
    left: Counter[str] = Counter()
    for path, module in model.named_modules():
        if module in apart or isinstance(module, nn.Embedding):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if hasattr(parameter, "quant_state"):
                n_packed += parameter.quant_state.shape.numel()
            elif parameter.is_meta and type(module) is nn.Linear and name == "weight":
                n_packed += parameter.numel()
            elif sum(side > 1 for side in parameter.shape) >= 2:
                left[_whose(path, name, module)] += parameter.numel()
    shown = ", ".join(f"{n:,} in {whose}" for whose, n in left.most_common(3))
    if not n_packed:
        raise KitError(
            f"no weight of this model can be stored in 4 bit: {OWN} ({shown})",
            value=model.config.model_type,
            remedy="choose a model whose blocks are made of torch's linear layers",
        )
    if left:
        dtype = str(model.dtype).removeprefix("torch.")
        print(
            f"in 4 bit: {n_packed:,} weights of the blocks; "
            f"{left.total():,} are not and stay in {dtype}: {shown}; {OWN}"
        )


def _whose(path: str, name: str, module: nn.Module) -> str:
    own = type(module).__name__
    layer = path.rsplit(".", 1)[-1]
    if type(module) is nn.Linear:
        return f"{layer} (left out by the model's own settings)"
    return f"{layer}.{name} ({own})"
