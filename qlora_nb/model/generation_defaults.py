"""A model's own generation defaults, which would decide silently, and the tokens that end an
answer.
"""

from contextlib import suppress

from transformers import GenerationConfig, PreTrainedModel

_NO_DEFAULTS = {
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "transformers_version",
    "use_cache",
}


def plain_generation(model: PreTrainedModel, path: str) -> None:
    """Set aside the model's own generation defaults, which would fill whatever a call leaves
    unsaid; keeps its special tokens.

    transformers mixes a model's `generation_config` into the one it is given
    (`generation/utils.py`, `_prepare_generation_config`), so that a call for greedy answers would
    sample, or be punished for repetitions.

    Args:
        model: a loaded model.
        path: where it comes from, as a kept 4-bit copy has lost them.
    """
    own = model.generation_config
    with suppress(OSError, ValueError, TypeError):
        own = GenerationConfig.from_pretrained(path)
    found = {
        name: value
        for name, value in own.to_diff_dict().items()
        if value is not None and not name.startswith("_")
    }
    set_aside = ", ".join(
        f"{name}={value!r:.40}" for name, value in sorted(found.items()) if name not in _NO_DEFAULTS
    )
    if set_aside:
        print(
            f"the model's own generation defaults are not used, the parameters here decide: {set_aside}"
        )
    kept = model.generation_config
    tokens = {
        "bos_token_id": kept.bos_token_id,
        "eos_token_id": kept.eos_token_id,
        "pad_token_id": kept.pad_token_id,
    }
    model.generation_config = GenerationConfig(**tokens)


def end_tokens(model: PreTrainedModel, tokenizer) -> list[int] | None:
    """Ids that end an answer: the tokenizer's end token, which the kit trains, and the model's own
    ones.

    A chat model often has several (`<|eot_id|>` beside `<|end_of_text|>`). One counts if the
    tokenizer knows it as a special
    token: a configuration's default can be any word of another vocabulary.
    """
    if tokenizer.eos_token_id is None:
        return None  # somebody took it away: what the model's own configuration says counts
    own = model.generation_config.eos_token_id
    own = [own] if isinstance(own, int) else own or []
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [tokenizer.eos_token_id, *sorted(set(own) & special - {tokenizer.eos_token_id})]
