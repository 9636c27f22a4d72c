"""What a model brings along and would decide silently: its own quantization, unquantized layers, generation defaults."""

from collections import Counter
from contextlib import suppress

from torch import nn
from transformers import BitsAndBytesConfig, GenerationConfig, PreTrainedModel

from qlora_nb.errors import KitError

_NO_DEFAULTS = {"bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version", "use_cache"}
_NO_DEFAULTS |= {"output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"}


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
        raise KitError(what, value=str(method), allowed=allowed, remedy="choose the model it was made from")
    return BitsAndBytesConfig.from_dict(own)


def described(quant_type: str, double_quant: bool) -> str:
    """A 4-bit storage in words.

    >>> described("nf4", False)
    'nf4 without double quantization'
    """
    return f"{quant_type} {'with' if double_quant else 'without'} double quantization"


def require_four_bit(model: PreTrainedModel) -> None:
    """Count what is packed; print in one line what of the blocks is not, and why.

    Matrices outside the embeddings and the head are counted, whatever module holds them. bitsandbytes packs the weights of linear
    layers: neither a family's own class of them nor experts kept together in one three-dimensional parameter.

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
    shown = ", ".join(f"{n:,} in {whose}" for whose, n in left.most_common(3)) + (", …" if len(left) > 3 else "")
    if not packed:
        remedy = "choose a model whose blocks are made of torch's linear layers"
        raise KitError(f"no weight of this model can be stored in 4 bit ({shown})", value=model.config.model_type, remedy=remedy)
    if left:
        dtype = str(model.dtype).removeprefix("torch.")
        print(f"in 4 bit: {packed:,} weights of the blocks; {left.total():,} are not and stay in {dtype}: {shown}")


def _whose(path: str, name: str, module: nn.Module) -> str:
    own = type(module).__name__
    layer = path.rsplit(".", 1)[-1]
    if type(module) is nn.Linear:
        return f"{layer} (left out by the model's own settings)"
    if isinstance(module, nn.Linear):
        return f"{layer} ({own}, a class of its own)"
    return f"{layer}.{name} ({own}, no linear layer)"


def plain_generation(model: PreTrainedModel, path: str) -> None:
    """Set aside the model's own generation defaults, which would fill whatever a call leaves unsaid; keeps its special tokens.

    transformers mixes a model's `generation_config` into the one it is given (`generation/utils.py`,
    `_prepare_generation_config`), so that a call for greedy answers would sample, or be punished for repetitions.

    Args:
        model: a loaded model.
        path: where it comes from, as a kept 4-bit copy has lost them.
    """
    own = model.generation_config
    with suppress(OSError, ValueError, TypeError):
        own = GenerationConfig.from_pretrained(path)
    found = {name: value for name, value in own.to_diff_dict().items() if value is not None and not name.startswith("_")}
    set_aside = ", ".join(f"{name}={value!r:.40}" for name, value in sorted(found.items()) if name not in _NO_DEFAULTS)
    if set_aside:
        print(f"the model's own generation defaults are not used, the parameters here decide: {set_aside}")
    kept = model.generation_config
    tokens = {"bos_token_id": kept.bos_token_id, "eos_token_id": kept.eos_token_id, "pad_token_id": kept.pad_token_id}
    model.generation_config = GenerationConfig(**tokens)


def end_tokens(model: PreTrainedModel, tokenizer) -> list[int] | None:
    """Ids that end an answer: the tokenizer's end token, which the kit trains, and the model's own ones.

    A chat model often has several (`<|eot_id|>` beside `<|end_of_text|>`). One counts if the tokenizer knows it as a special
    token: a configuration's default can be any word of another vocabulary.
    """
    if tokenizer.eos_token_id is None:
        return None  # somebody took it away: what the model's own configuration says counts
    own = model.generation_config.eos_token_id
    own = [own] if isinstance(own, int) else own or []
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [tokenizer.eos_token_id, *sorted(set(own) & special - {tokenizer.eos_token_id})]
