"""What a model brings along and would decide silently: its own quantization, unquantized layers,
generation defaults.
"""

from collections import Counter

from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from qlora_nb.errors import KitError
from qlora_nb.model import generation_defaults

generation_defaults._NO_DEFAULTS |= {
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
    "return_dict_in_generate",
}


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
    is_four_bit = own.get("load_in_4bit") or own.get("_load_in_4bit")
    if not is_four_bit:
        method = own.get("quant_method") or "an unknown method"
        if own.get("load_in_8bit") or own.get("_load_in_8bit"):
            method = "bitsandbytes in 8 bit"
        what = "the model is quantized already, in a way that is not trained here"
        allowed = "a model in 16 or 32 bit, or in 4 bit by bitsandbytes"
        raise KitError(
            what, value=str(method), allowed=allowed, remedy="choose the model it was made from"
        )
    return BitsAndBytesConfig.from_dict(own)


def described(quant_type: str, double_quant: bool) -> str:
    """A 4-bit storage in words.

    >>> described("nf4", False)
    'nf4 without double quantization'
    """
    return f"{quant_type} {'with' if double_quant else 'without'} double quantization"


def require_four_bit(model: PreTrainedModel) -> None:
    """Count what is packed; print in one line what of the blocks is not, and why.

    Matrices outside the embeddings and the head are counted, whatever module holds them.
    bitsandbytes packs the weights of linear
    layers: neither a family's own class of them nor experts kept together in one three-dimensional
        parameter.

    Raises:
        KitError: nothing is packed.
    """
    head = model.get_output_embeddings()
    apart = set() if head is None else set(head.modules())
    packed = 0
    left: Counter[str] = Counter()
    for path, module in model.named_modules():
        if module in apart or isinstance(module, nn.Embedding):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if hasattr(parameter, "quant_state"):
                packed += parameter.quant_state.shape.numel()
            elif sum(side > 1 for side in parameter.shape) >= 2:
                left[_whose(path, name, module)] += parameter.numel()
    shown = ", ".join(f"{n:,} in {whose}" for whose, n in left.most_common(3)) + (
        ", …" if len(left) > 3 else ""
    )
    if not packed:
        remedy = "choose a model whose blocks are made of torch's linear layers"
        raise KitError(
            f"no weight of this model can be stored in 4 bit ({shown})",
            value=model.config.model_type,
            remedy=remedy,
        )
    if left:
        dtype = str(model.dtype).removeprefix("torch.")
        print(
            f"in 4 bit: {packed:,} weights of the blocks; {left.total():,} are not and stay in {dtype}: {shown}"
        )


def _whose(path: str, name: str, module: nn.Module) -> str:
    own = type(module).__name__
    layer = path.rsplit(".", 1)[-1]
    if type(module) is nn.Linear:
        return f"{layer} (left out by the model's own settings)"
    if isinstance(module, nn.Linear):
        return f"{layer} ({own}, a class of its own)"
    return f"{layer}.{name} ({own}, no linear layer)"
