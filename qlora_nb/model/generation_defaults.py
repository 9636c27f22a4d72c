"""A model's own generation defaults, which would decide silently, and the tokens that end an
answer.

transformers mixes a model's `generation_config` into the one that a call gives
(`generation/utils.py`, `_prepare_generation_config`): whatever the call leaves unsaid comes from
the model's makers, so that a call for greedy answers would sample, or be punished for repetitions.
"""

from contextlib import suppress

from transformers import GenerationConfig, PreTrainedModel

from qlora_nb.model import chat_templates

_DECIDE_NOTHING = {
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "transformers_version",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
    "return_dict_in_generate",
}


def set_aside(model: PreTrainedModel) -> None:
    """Replace a loaded model's generation defaults by plain ones and print what is no longer used;
    its special tokens are kept. They are read where its name points, as a kept 4-bit copy has lost
    them.
    """
    kept = model.generation_config
    own = kept
    with suppress(OSError, ValueError, TypeError):
        own = GenerationConfig.from_pretrained(model.name_or_path)
    found = []
    for name, value in sorted(own.to_diff_dict().items()):
        if value is not None and not name.startswith("_") and name not in _DECIDE_NOTHING:
            found.append(f"{name}={value!r:.40}")
    if found:
        print(
            "the model's own generation defaults are not used, the parameters here decide: "
            + ", ".join(found)
        )
    model.generation_config = GenerationConfig(
        bos_token_id=kept.bos_token_id,
        eos_token_id=kept.eos_token_id,
        pad_token_id=kept.pad_token_id,
    )


def end_tokens(model: PreTrainedModel, tokenizer) -> list[int] | None:
    """Ids that end an answer: the tokenizer's end token, which the kit trains, the model's own ones
    and the one that ends a turn in the chat template.

    A chat model often has several (`<|eot_id|>` beside `<|end_of_text|>`). One of its own counts if
    the tokenizer knows it as a special token: a configuration's default can be any word of another
    vocabulary.
    """
    if tokenizer.eos_token_id is None:
        return None  # somebody took it away: what the model's own configuration says counts
    own = model.generation_config.eos_token_id
    if not isinstance(own, list):
        own = [own]  # one id or None
    ids = [tokenizer.eos_token_id]
    for number, token in tokenizer.added_tokens_decoder.items():
        if token.special and number in own and number not in ids:
            ids.append(number)
    turn_end = chat_templates.turn_end(tokenizer)
    if turn_end is not None and turn_end not in ids:
        ids.append(turn_end)
    return ids
