"""Conversations as rows: the first question and its answer, from the three shapes in which such
data is published.

- *messages*: a list of turns, each with a role and a content (chat data, `messages` or
  `conversations`);
- *Guanaco*: one text with `### Human:` and `### Assistant:` before the turns
  (`timdettmers/openassistant-guanaco`, the data of the QLoRA paper's best model), `### System:`
  first if there is one;
- *OASST*: a tree with one message a row, tied by `parent_id`; its best-ranked replies (rank 0
  first) make the conversation.

All that the system and the user say before the first answer of the assistant is the instruction, a
blank line between two turns; that answer is the output. A conversation that gives no row says why,
and what stands outside the first exchange is counted. To be asked, a conversation needs no answer:
one that ends with the user's turn is asked that turn, with what was said before it as the input.
"""

import re
from typing import NamedTuple

import datasets

ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "bot", "model", "ai", "chatbot", "chatgpt"),
}
"""Who speaks → the words for it in published data, in capitals or not."""

COUNTS = {
    "n_unused": "are longer than what is taken of them",
    "n_system": "have a system prompt, at the beginning of the instruction",
    "n_earlier": "are asked their last question, with what was said before as its input",
}
"""What is counted in turns → what it means for a conversation."""

_TEXT = datasets.Value("string")

_NUMBER = datasets.Value("int64")

ROW = datasets.Features(instruction=_TEXT, input=_TEXT, output=_TEXT, left_out=_TEXT, row=_NUMBER)
"""A row: its texts, why it cannot be used (or nothing), its number in the data."""

_FEATURES = datasets.Features(ROW | dict.fromkeys(COUNTS, _NUMBER))

_MARK = re.compile(r"### (Human|User|Assistant|System):", re.IGNORECASE)


class _Turn(NamedTuple):
    who: str
    """system, user, assistant, or nothing if the role is unknown."""
    text: str
    problem: str = ""
    """Why this turn cannot be used; nothing if it can."""
    trains: bool = True
    """Whether its weight is not 0."""


def exchanges(rows: datasets.Dataset, asking: bool) -> datasets.Dataset | None:
    """One row for each conversation; None if this is none of the known shapes.

    Args:
        asking: the rows are to be asked and need no answer; a column `prompt`, of text or of turns,
            is then enough.

    Returns:
        instruction, input and output (text, perhaps empty); `left_out`, why there is no exchange,
        or nothing; `row`, its number in `rows`; how many turns are a system prompt in the
        instruction (`n_system`), were said before and are the input (`n_earlier`), and are neither
        in them nor the answer (`n_unused`).

    >>> row = _exchange(_turns_of_text("### Human: Hi.### Assistant: Hello!### Human: Bye."), False)
    >>> row["instruction"], row["output"], row["n_unused"]
    ('Hi.', 'Hello!', 1)
    """
    names = set(rows.column_names)
    if {"message_id", "parent_id", "role", "text"} <= names:
        return _exchanges_of_trees(rows, asking)
    turns_of = _listed
    if "messages" in names:
        column = "messages"
    elif "conversations" in names:
        column = "conversations"
    elif "text" in names and _are_guanaco(rows["text"][:100]):
        column = "text"
        turns_of = _turns_of_text
    elif asking and "prompt" in names:
        column = "prompt"
    else:
        return None

    def convert(row: dict[str, object], number: int) -> dict[str, object]:
        turns = turns_of(row[column])
        system = row.get("system") or row.get("system_prompt")
        if isinstance(system, str) and not any(_turn(turn).who == "system" for turn in turns):
            turns = [{"role": "system", "content": system}, *turns]
        found = _exchange(turns, asking)
        if column == "prompt" and not found["input"] and isinstance(row.get("input"), str):
            found["input"] = row["input"]
        return {**found, "row": number}

    return rows.map(
        convert, with_indices=True, remove_columns=rows.column_names, features=_FEATURES
    )


def say_what_is_taken(talks: datasets.Dataset) -> None:
    """Print how many conversations are longer than what is taken of them, have a system prompt, or
    are asked their last question.

    Args:
        talks: what `exchanges` returned, without the rows that are left out.
    """
    for column, meaning in COUNTS.items():
        turns = [n for n in talks[column] if n]
        if turns:
            print(f"{len(turns)} of {len(talks)} conversations {meaning}; turns: {sum(turns)}")


def _listed(turns: object) -> list:
    """A list of turns as it is; what stands alone is said by the user."""
    return turns if isinstance(turns, list) else [{"role": "user", "content": turns}]


def _turns_of_text(text: str | None) -> list[dict[str, str]]:
    start, *parts = _MARK.split(text or "")
    turns = [{"role": "system", "content": start.strip()}]
    for role, said in zip(parts[::2], parts[1::2], strict=True):
        turns.append({"role": role, "content": said.strip()})
    return turns


def _are_guanaco(texts: list[str | None]) -> bool:
    there = [text for text in texts if text and text.strip()]
    return bool(there) and all(_MARK.match(text.strip()) for text in there)


def _exchange(turns: list, asking: bool) -> dict[str, object]:
    """The columns of `exchanges` but `row`, for the turns of one conversation."""
    said = []
    for turn in map(_turn, turns):
        is_place_for_answer = turn.who == "assistant" and not asking
        if turn.text.strip() or turn.problem or is_place_for_answer:
            said.append(turn)
    n_before = _first_answer(said)
    earlier = []
    before = said[:n_before]
    answer = said[n_before : n_before + 1]
    if asking:
        answer = []
        if said and said[-1].who == "user":
            earlier, before = _last_question(said)
    prompt = [turn for turn in before if turn.who != "assistant"]
    output = "".join(turn.text for turn in answer if turn.trains)
    problems = [turn.problem for turn in earlier + before + answer if turn.problem]
    if not any(turn.who == "user" for turn in prompt):
        problems.append("no turn by a user")
    elif not asking and not output.strip():
        problems.append("no turn by an assistant after it, or one that is empty or has weight 0")
    return {
        "instruction": "\n\n".join(turn.text for turn in prompt),
        "input": "\n\n".join(f"{turn.who.capitalize()}: {turn.text.strip()}" for turn in earlier),
        "output": output,
        "left_out": problems[0] if problems else "",
        "n_system": sum(turn.who == "system" for turn in prompt),
        "n_earlier": len(earlier),
        # one more is the answer, if there is one
        "n_unused": max(0, len(said) - len(prompt) - len(earlier) - 1),
    }


def _first_answer(said: list[_Turn]) -> int:
    """Index of the first assistant's turn after one of a user; the number of turns if there is
    none.
    """
    asked = False
    for i, turn in enumerate(said):
        if turn.who == "user":
            asked = True
        if turn.who == "assistant" and asked:
            return i
    return len(said)


def _last_question(said: list[_Turn]) -> tuple[list[_Turn], list[_Turn]]:
    """What was said earlier, and the turns to be asked: system prompts and the user's last ones."""
    start = len(said)
    while start and said[start - 1].who != "assistant":
        start -= 1
    system = [turn for turn in said[:start] if turn.who == "system"]
    earlier = [turn for turn in said[:start] if turn.who != "system"]
    return earlier, system + said[start:]


def _turn(turn: object) -> _Turn:
    if not isinstance(turn, dict):
        turn = {}
    word = str(turn.get("role") or turn.get("from")).strip().lower()
    who = ""
    for speaker, words in ROLES.items():
        if word in words:
            who = speaker
    text, problem = _text(turn)
    if not who:
        problem = f"the role {word[:40]!r} is neither system, user nor assistant"
    elif turn.get("deleted"):
        problem = "a turn is deleted"
    elif turn.get("tool_calls") or turn.get("function_call"):
        problem = "an assistant's turn calls a tool"
    return _Turn(who, text, problem, turn.get("weight") != 0)


def _text(turn: dict[str, object]) -> tuple[str, str]:
    """What a turn says, its parts joined as chat templates join them; and a problem if a part is
    not text.
    """
    content = ""
    for key in ("text", "value", "content"):
        if turn.get(key) is not None:
            content = turn[key]
    text = ""
    for part in content if isinstance(content, list) else [content]:
        words = part.get("text") if isinstance(part, dict) else part
        if not isinstance(words, str):
            return "", "a turn holds something other than text"
        text += words
    return text, ""


def _exchanges_of_trees(rows: datasets.Dataset, asking: bool) -> datasets.Dataset:
    """One row for each tree: its first message, and after it the best replies."""
    messages = rows.to_pandas().astype(object)
    messages = messages.where(messages.notna(), None)
    has_parent = messages["parent_id"].map(bool)
    is_reply = has_parent & messages["parent_id"].isin(messages["message_id"])
    ranked = messages[is_reply]
    if "rank" in messages:
        ranked = ranked.sort_values("rank", kind="stable")
    replies = {name: group.to_dict("records") for name, group in ranked.groupby("parent_id")}
    found = []
    for number, root in messages[~is_reply].to_dict("index").items():
        turns = [root] if asking else _best_turns(root, replies)
        row = _exchange(turns, asking)
        row["row"] = number
        if has_parent[number]:
            row["left_out"] = "the message it replies to is not in the data"
        found.append(row)
    return datasets.Dataset.from_list(found, features=_FEATURES)


def _best_turns(root: dict[str, object], replies: dict[str, list[dict]]) -> list[dict[str, object]]:
    """The messages from the root along the best-ranked reply of another speaker to each."""
    turns = []
    message = root
    while message is not None:
        turns.append(message)
        speaker = _turn(message).who
        ranked = replies.pop(message["message_id"], [])
        message = None
        for reply in ranked:
            if not reply.get("deleted") and _turn(reply).who != speaker:
                message = reply
                break
    return turns
