"""How a model is quantized: by its makers already, or by this kit, and what of it is not.

A model can be published in 4 bit by bitsandbytes (it is trained as it is) or in other ways (it is
refused). And bitsandbytes quantizes nothing but torch's own linear layers: neither a family's own
class of them nor experts kept together in one three-dimensional parameter. Such weights stay in 16
bit, which the user is told, as the memory is then not what the paper promises.
"""

from collections import Counter

from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from qlora_nb.errors import KitError

OWN = "bitsandbytes quantizes torch's own linear layers alone"


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
