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

import math
import re
from collections import defaultdict
from typing import NamedTuple

import datasets

ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "bot", "model", "ai", "chatbot", "chatgpt"),
}
"""Who speaks → the words for it in published data, in capitals or not."""

_TEXT = datasets.Value("string")

_FLAG = datasets.Value("bool")

_NUMBER = datasets.Value("int64")

_FEATURES = datasets.Features(
    instruction=_TEXT,
    input=_TEXT,
    output=_TEXT,
    left_out=_TEXT,
    system=_FLAG,
    earlier=_FLAG,
    n_unused=_NUMBER,
    row=_NUMBER,
)

_MARK = re.compile(r"### (Human|User|Assistant|System):", re.IGNORECASE)


class _Turn(NamedTuple):
    who: str
    """system, user, assistant, or nothing if the role is unknown."""
    text: str
    problem: str
    """Why this turn cannot be used; nothing if it can."""
    trains: bool = True
    """Whether its weight is not 0."""

    def is_blank(self) -> bool:
        """Whether it says nothing and could be left out."""
        return not self.text.strip() and not self.problem


def exchanges(rows: datasets.Dataset, asking: bool = False) -> datasets.Dataset | None:
    """One row for each conversation; None if this is none of the known shapes.

    Args:
        asking: the rows are to be asked and need no answer; a column `prompt`, of text or of turns,
            is then enough.

    Returns:
        instruction, input and output (text, perhaps empty); `left_out`, why there is no exchange,
        or nothing; `system`, whether there is a system prompt; `earlier`, whether the input is what
        was said before; `n_unused`, how many turns are neither in them nor the answer; `row`, its
        number in `rows`.

    >>> row = _exchange(_turns_of_text("### Human: Hi.### Assistant: Hello!### Human: Bye."))
    >>> row["instruction"], row["output"], row["n_unused"]
    ('Hi.', 'Hello!', 1)
    """
    names = set(rows.column_names)
    if {"message_id", "parent_id", "role", "text"} <= names:
        return _exchanges_of_trees(rows, asking)
    if "messages" in names:
        column = "messages"
        turns_of = _listed
    elif "conversations" in names:
        column = "conversations"
        turns_of = _listed
    elif "text" in names and _are_guanaco(rows["text"][:100]):
        column = "text"
        turns_of = _turns_of_text
    elif asking and "prompt" in names:
        column = "prompt"
        turns_of = _prompted
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


def say_what_is_taken(talks: datasets.Dataset, asking: bool) -> None:
    """Print how many conversations are longer than what is taken of them, and how many have a
    system prompt.

    Args:
        talks: what `exchanges` returned, without the rows that are left out.
    """
    conversations = f"of {len(talks)} conversations"
    n_unused = [n for n in talks["n_unused"] if n]
    if n_unused:
        what = "not shown to the model" if asking else "not trained"
        print(
            f"{len(n_unused)} {conversations} are longer than their first exchange; "
            f"turns {what}: {sum(n_unused)}"
        )
    n_system = sum(talks["system"])
    if n_system:
        print(
            f"{n_system} {conversations} have a system prompt: "
            "it stands at the beginning of the instruction"
        )
    n_earlier = sum(talks["earlier"])
    if n_earlier:
        print(
            f"{n_earlier} {conversations} are asked their last question: "
            "what was said before is its input"
        )


def _listed(turns: object) -> list:
    if turns is None:
        return []
    return turns if isinstance(turns, list) else [turns]


def _prompted(prompt: object) -> list:
    return prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]


def _exchange(turns: list, asking: bool = False) -> dict[str, object]:
    """The columns of `exchanges` but `row`, for the turns of one conversation."""
    said = [_turn(turn) for turn in turns]
    earlier = []
    answer = None
    if asking:
        earlier, before = _last_question(said)
    else:
        n_before = _first_answer(said)
        before = said[:n_before]
        if n_before < len(said):
            answer = said[n_before]
    prompt = [turn for turn in before if turn.who != "assistant" and turn.text.strip()]
    n_used = len(prompt) + len(earlier) + 1  # and the answer, if there is one
    n_said = sum(not turn.is_blank() for turn in said)
    return {
        "instruction": "\n\n".join(turn.text for turn in prompt),
        "input": "\n\n".join(f"{turn.who.capitalize()}: {turn.text.strip()}" for turn in earlier),
        "output": answer.text if answer else "",
        "left_out": _why_left_out(earlier + before, prompt, answer, asking),
        "system": any(turn.who == "system" for turn in prompt),
        "earlier": bool(earlier),
        "n_unused": max(0, n_said - n_used),
    }


def _why_left_out(
    before: list[_Turn], prompt: list[_Turn], answer: _Turn | None, asking: bool
) -> str:
    """The first reason why this is no exchange; nothing if it is one."""
    used = [*before, answer] if answer else before
    problems = [turn.problem for turn in used if turn.problem]
    if not any(turn.who == "user" for turn in prompt):
        problems.append("no turn by a user")
    elif not asking and not answer:
        problems.append("no turn by an assistant after the user's")
    elif answer and not answer.text.strip():
        problems.append("the assistant's turn is empty")
    elif answer and not answer.trains:
        problems.append("the assistant's turn has weight 0: it is not to be trained")
    return problems[0] if problems else ""


def _last_question(said: list[_Turn]) -> tuple[list[_Turn], list[_Turn]]:
    """What was said earlier and the turns to be asked: the last ones of the user, or the first if
    an answer comes last.
    """
    while said and said[-1].is_blank():
        said = said[:-1]  # the place for the answer
    if not said or said[-1].who != "user":
        return [], said[: _first_answer(said)]
    start = len(said)
    while start and said[start - 1].who != "assistant":
        start -= 1
    system = [turn for turn in said[:start] if turn.who == "system"]
    earlier = [turn for turn in said[:start] if turn.who != "system" and not turn.is_blank()]
    return earlier, system + said[start:]


def _first_answer(said: list[_Turn]) -> int:
    """Index of the first assistant's turn after something a user says; the number of turns if there
    is none.
    """
    asked = False
    for i, turn in enumerate(said):
        if turn.who == "user" and turn.text.strip():
            asked = True
        if turn.who == "assistant" and asked:
            return i
    return len(said)


def _turn(turn: object) -> _Turn:
    if not isinstance(turn, dict):
        return _Turn("", "", "a turn is no record of role and content")
    role = turn.get("role") or turn.get("from")
    word = str(role).strip().lower()
    who = ""
    for speaker, words in ROLES.items():
        if word in words:
            who = speaker
    text, problem = _text(turn)
    if not role:
        problem = "a turn has no role"
    elif not who:
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


def _are_guanaco(texts: list[str | None]) -> bool:
    there = [text for text in texts if text and text.strip()]
    return bool(there) and all(_MARK.match(text.strip()) for text in there)


def _turns_of_text(text: str | None) -> list[dict[str, str]]:
    start, *parts = _MARK.split(text or "")
    turns = []
    if start.strip():
        turns.append({"role": "system", "content": start.strip()})
    for role, said in zip(parts[::2], parts[1::2], strict=True):
        turns.append({"role": role, "content": said.strip()})
    return turns


def _exchanges_of_trees(rows: datasets.Dataset, asking: bool) -> datasets.Dataset:
    """One row for each tree: its first message, and after it the best replies."""
    names = {None, "", *rows["message_id"]}
    roots = []
    replies = defaultdict(list)
    for number, message in enumerate(rows):
        parent = message["parent_id"]
        if isinstance(parent, float) and math.isnan(parent):
            parent = None  # as pandas writes it
        if parent and parent in names:
            replies[parent].append(message)
        else:
            roots.append((number, message, parent in names))
    found = []
    for number, root, is_whole in roots:
        turns = [root] if asking else _best_turns(root, replies)
        row = _exchange(turns, asking)
        row["row"] = number
        if not is_whole:
            row["left_out"] = "the message it replies to is not in the data"
        found.append(row)
    return datasets.Dataset.from_list(found, features=_FEATURES)


def _best_turns(root: dict[str, object], replies: dict[str, list[dict]]) -> list[dict[str, object]]:
    """The messages from the root along the best-ranked reply of another speaker to each."""

    def rank(reply: dict[str, object]) -> float:
        known = reply.get("rank")
        return math.inf if known is None or math.isnan(known) else known

    turns = []
    message = root
    while message is not None:
        turns.append(message)
        speaker = _turn(message).who
        ranked = sorted(replies.pop(message["message_id"], []), key=rank)
        message = None
        for reply in ranked:
            if not reply.get("deleted") and _turn(reply).who != speaker:
                message = reply
                break
    return turns
