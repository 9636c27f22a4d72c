"""Chat templates: a conversation as the text that a model reads, and which stretches of it train.

A model that was tuned to chat brings a template (Jinja, in its tokenizer): how turns follow each
other, and with which special tokens they begin and end. A base model such as Pythia brings none and
is given the kit's own, `TEMPLATE`, whose turns look like Alpaca's prompts.

Only the assistant's answers train, each with the token that ends it. They are found turn by turn:
what the template writes up to a question is the beginning of what it writes up to the answer, and
this is checked; where a template rewrites earlier turns (Qwen3 takes their thoughts out), the words
of the answer are looked for. A question may end by opening a thought (DeepSeek-R1) that the answer
is then written without. Marks of a template (`{% generation %}`) are not needed for that.
"""

from contextlib import suppress

from transformers import PreTrainedTokenizerBase

from qlora_nb.model import conversations

TEMPLATE = (
    "{% for turn in messages %}"
    "{% if turn.role == 'system' %}{{ turn.content + '\n\n' }}"
    "{% elif turn.role == 'user' %}"
    "{{ '### Instruction:\n' + turn.content + '\n\n### Response:\n' }}"
    "{% else %}{{ turn.content + eos_token }}{% if not loop.last %}{{ '\n\n' }}{% endif %}"
    "{% endif %}{% endfor %}"
)
"""For a tokenizer that brings none: one exchange reads as with `prompt_template=alpaca_short`."""

Spans = list[tuple[int, int]]
"""Beginnings and ends of stretches of a text (characters)."""


def give_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer without a chat template the kit's own, with the token that it begins texts
    with.
    """
    if tokenizer.chat_template is None:
        begins = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        tokenizer.chat_template = "{{ bos_token }}" * begins + TEMPLATE


def prompt_text(messages: list[dict], tokenizer: PreTrainedTokenizerBase) -> str:
    """What a model reads before it answers the last question of a conversation.

    Raises:
        ValueError: the template refuses this conversation; says why.
    """
    question = messages
    while question and question[-1]["role"] == "assistant":
        question = question[:-1]
    return _render(_accepted(question, tokenizer), tokenizer, asking=True)


def text_and_spans(
    messages: list[dict], tokenizer: PreTrainedTokenizerBase, train_on: str
) -> tuple[str, Spans]:
    """A conversation as text, and where in it the answers that train stand.

    Args:
        messages: as `conversations.conversation` returns them.
        tokenizer: with a chat template.
        train_on: "all" answers of the assistant, or its "last" one.

    Raises:
        ValueError: the template refuses this conversation, or an answer is not found in its text.
    """
    messages = _accepted(messages, tokenizer)
    text = _render(messages, tokenizer)
    if any(m["role"] == "user" and m["content"].strip() not in text for m in messages):
        raise ValueError("the chat template leaves out what the user says")
    answers = [message for message in messages if message["role"] == "assistant"]
    spans = [_with_end(text, span, tokenizer) for span in _found(messages, text, tokenizer)]
    end = spans[-1][1]
    if not text[:end].endswith(special_tokens(tokenizer)):
        text = text[:end] + tokenizer.eos_token  # else it would never learn to stop
        spans[-1] = spans[-1][0], len(text)
    chosen = [span for span, answer in zip(spans, answers, strict=True) if answer["trains"]]
    return text, chosen[-1:] if train_on == "last" else chosen


def encode(text: str, spans: Spans, tokenizer: PreTrainedTokenizerBase) -> tuple[list, list[bool]]:
    """Token ids of a text, and which of them lie in a stretch that trains, be it in part: as the
    tokenizer's own mask has it.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    trains = []
    for begin, end in encoded["offset_mapping"]:
        trains.append(any(start < end and begin < stop for start, stop in spans))
    return encoded["input_ids"], trains


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id of the special token that ends an assistant's turn; None if the template writes none."""
    exchange = conversations.of_instruction({"instruction": "a", "output": "b"})
    try:
        text, spans = text_and_spans(exchange["messages"], tokenizer, "all")
    except ValueError:
        return None
    start, end = spans[-1]
    for token in special_tokens(tokenizer):
        if text[start:end].endswith(token):
            return tokenizer.convert_tokens_to_ids(token)
    return None


def special_tokens(tokenizer) -> tuple[str, ...]:
    """The texts of a tokenizer's special tokens, the longest first, as one can be the end of
    another.
    """
    added = tokenizer.added_tokens_decoder.values()
    special = [str(token) for token in added if token.special]
    return tuple(sorted(special, key=len, reverse=True))


def _render(messages: list[dict], tokenizer, asking: bool = False) -> str:
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    try:
        return tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=asking)
    except Exception as error:  # a template is a program, and not ours
        raise ValueError(f"the chat template refuses it: {error}"[:120]) from None


def _accepted(messages: list[dict], tokenizer) -> list[dict]:
    """The messages as the template takes them. One that knows no system prompt, or writes the same
    without it, is given its text at the beginning of the next question.
    """
    with suppress(ValueError):
        text = _render(messages, tokenizer)
        if not any(_is_ignored(m, messages, text, tokenizer) for m in messages):
            return messages
    asked = []
    for message in messages:
        who = "user" if message["role"] == "system" else message["role"]
        asked.append({**message, "role": who})
    return conversations.taking_turns(asked)


def _is_ignored(message: dict, messages: list[dict], text: str, tokenizer) -> bool:
    """Whether a conversation's text is the same without this message of the system's."""
    if message["role"] != "system":
        return False
    others = [other for other in messages if other is not message]
    with suppress(ValueError):
        return _render(others, tokenizer) == text
    return False  # this template needs it


def _found(messages: list[dict], text: str, tokenizer) -> Spans:
    """Where the answers are, turn by turn."""
    spans = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = ""
        if place:
            before = _render(messages[:place], tokenizer, asking=True)
            asked = before.rstrip()
            if asked.endswith("<think>") and not text.startswith(before):
                before = asked.removesuffix("<think>")  # a thought, which is not written here
        words = message["content"].strip()
        start = text.find(words, len(before))
        behind_thoughts = words.rpartition("</think>")[2].strip()
        nearer = text.find(behind_thoughts, len(before))
        if behind_thoughts and nearer >= 0 and not 0 <= start <= nearer:
            words = behind_thoughts  # an earlier answer, whose thoughts are taken out
            start = nearer
        if not text.startswith(before) or start < 0:
            raise ValueError("the chat template writes an answer in other words")
        end = start + len(words)
        after = _render(messages[: place + 1], tokenizer)
        if text.startswith(after):
            end = len(after)
        opened = place and before != _render(messages[:place], tokenizer)
        if opened or not text[len(before) : start].strip():
            start = len(before)  # with all that the model has to write itself, such as <think>
        spans.append((start, end))
    return spans


def _with_end(text: str, span: tuple[int, int], tokenizer) -> tuple[int, int]:
    """A stretch with the special token that ends it, and without the blanks behind that."""
    start, end = span
    said = text[start:end].rstrip()
    if said.endswith(special_tokens(tokenizer)):
        return start, start + len(said)
    behind = text[end:].lstrip()
    for token in special_tokens(tokenizer):
        if behind.startswith(token):
            return start, len(text) - len(behind) + len(token)
    return span
