"""Conversations: from the shapes in which chats are published or exported to one, a list of
messages with `role` (system, user, assistant) and `content` (text).

- *turns*: a list of them, each with who speaks (`role`, `from`, …) and what is said (`content`,
  `value`, …), under `messages`, `conversations` or a name like these (OpenAI, ShareGPT); also as
  text in a table's column, JSON or Python's, or cut into `prompt` and `completion` (TRL);
- *instruction rows* with a `system` prompt or with a `history` of question and answer;
- *Guanaco*: one text with `### Human:` and `### Assistant:` before the turns
  (`timdettmers/openassistant-guanaco`, the data of the QLoRA paper's best model), `### System:`
  first if there is one;
- *OASST*: a tree with one message a row, tied by `parent_id`; its best-ranked replies (rank 0
  first) make the conversation.

The whole conversation is kept, up to the assistant's last answer. Two turns of one speaker become
one, with a blank line between them, as most chat templates want speakers to take turns. A
conversation that cannot be used says why.
"""

import ast
import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import suppress

ROLES = {
    "system": "system developer systemprompt 系统",
    "user": "user human prompter customer client question questioner 用户",
    "assistant": "assistant gpt chatgpt bot chatbot ai aiassistant model llm agent answer response "
    "claude gemini bard 助手",
}
"""Who speaks → the words for it in data, in letters alone: "GPT-4:" counts as "gpt"."""

COLUMNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns")
"""Columns that hold a list of turns; the first that is there is taken."""

SYSTEM = ("system", "system_prompt")
"""Columns for a system prompt beside the turns."""

_WHO = ("role", "from", "speaker", "author", "sender")

_WHAT = ("content", "value", "text", "message")

_THOUGHTS = ("reasoning_content", "thinking", "reasoning")

_TREE = ("message_id", "parent_id", "role", "text")

READ = {*COLUMNS, *SYSTEM, *_TREE, "rank", "deleted", "prompt", "completion", "history"}
READ |= {"instruction", "input", "output"}
"""Columns that rows are read from."""

_MARK = re.compile(r"### (Human|User|Assistant|System):", re.IGNORECASE)


def of_table(columns: list[str], rows: list[dict], asking: bool) -> Iterator[dict] | None:
    """The conversations of a table; None if it holds none of the known shapes.

    Args:
        columns: their names.
        rows: with those of them that `READ` names.
        asking: the conversations are to be asked, so they end with the user's turn.

    Returns:
        What `conversation` returns for each, and `number`, its place in the table.
    """
    if set(columns).issuperset(_TREE):
        return _of_trees(rows, asking)
    turns_of = _turns_of(columns, rows)
    return _of_rows(rows, turns_of, asking) if turns_of else None


def _of_rows(rows: list[dict], turns_of: Callable, asking: bool) -> Iterator[dict]:
    for number, row in enumerate(rows):
        problem = ""
        try:
            turns = turns_of(row)
        except Unreadable as error:
            turns = []
            problem = str(error)
        turns = [turn if isinstance(turn, dict) else {} for turn in turns]
        for name in SYSTEM:
            system = row.get(name)
            if isinstance(system, str) and not any(_who(turn) == "system" for turn in turns):
                turns = [{"role": "system", "content": system}, *turns]
        talk = conversation(turns, asking)
        if problem:
            talk["left_out"] = problem
        yield {**talk, "number": number}


class Unreadable(ValueError):
    """Why nobody can say what the turns of a row are."""


def _turns_of(columns: list[str], rows: list[dict]) -> Callable[[dict], list] | None:
    """The function that takes a row of this table to its turns; None if no row has any."""
    is_instruction = "instruction" in columns
    for name in COLUMNS:
        if name in columns and (not is_instruction or _hold_turns(rows, name)):
            return lambda row: _listed(row[name])
    if is_instruction:
        if any(_is_more_than_an_exchange(row) for row in rows):
            return instruction_turns
        return None
    if "prompt" in columns:
        return lambda row: _listed(row["prompt"]) + _answer(row.get("completion"))
    if "text" in columns and _are_guanaco(rows):
        return lambda row: _turns_of_text(row["text"])
    return None


def _hold_turns(rows: list[dict], name: str) -> bool:
    """Whether lists of turns stand in this column, and no number of turns or the like."""
    for row in rows:
        with suppress(Unreadable):
            turns = _list_in(row[name])
            if isinstance(turns, list) and turns:
                return isinstance(turns[0], dict)
    return False


def _is_more_than_an_exchange(row: dict) -> bool:
    history = row.get("history")
    with suppress(Unreadable):
        history = _list_in(history)
    return bool(history) or any(row.get(name) for name in SYSTEM)


def is_turn(fields: dict) -> bool:
    """Whether it says who speaks and what, and is not a message of a tree."""
    says_who = not fields.keys().isdisjoint(_WHO)
    says_what = not fields.keys().isdisjoint(_WHAT)
    return says_who and says_what and not fields.keys() >= set(_TREE)


def are_prompts(columns: list[str], rows: list[dict]) -> bool:
    """Whether a column `prompt` holds instructions as text; it may hold turns, and be an extract of
    a conversation that stands beside it.
    """
    if "prompt" not in columns or set(COLUMNS) & set(columns):
        return False
    there = (row["prompt"] for row in rows if row["prompt"] is not None)
    return isinstance(next(there, ""), str)


def _listed(turns: object) -> list:
    """A list of turns as it is, or written as text; anything else is said by the user."""
    turns = _list_in(turns)
    if turns is None:
        return []
    return turns if isinstance(turns, list) else [{"role": "user", "content": turns}]


def _list_in(cell: object) -> object:
    """The list that a text is, written as JSON or, as pandas does it, as Python writes it; anything
    else as it is.

    Raises:
        Unreadable: the text begins like a list of turns and cannot be read.
    """
    if not isinstance(cell, str) or not cell.lstrip().startswith("["):
        return cell
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            found = read(cell.strip())
            if isinstance(found, list):
                return found
    if re.match(r"\s*\[\s*\{", cell):
        raise Unreadable("a list that cannot be read stands in place of its turns")
    return cell


def _answer(completion: object) -> list:
    if isinstance(completion, str):
        return [{"role": "assistant", "content": completion}]
    return completion or []


def instruction_turns(row: dict) -> list[dict]:
    """The turns of an instruction row: pairs of question and answer that were said before it, and
    its own exchange, in which instruction and input are one question.

    >>> instruction_turns({"instruction": "Add.", "input": "2 3", "output": "5"})[0]["content"]
    'Add.\\n\\n2 3'
    """
    question = row.get("instruction")
    if row.get("input"):
        question = f"{question}\n\n{row['input']}"
    turns = []
    for asked, answer in [*_pairs(row.get("history")), (question, row.get("output"))]:
        turns.append({"role": "user", "content": asked})
        turns.append({"role": "assistant", "content": answer})
    return turns


def _pairs(history: object) -> list:
    pairs = _list_in(history) or []
    if not isinstance(pairs, list) or not all(_is_pair(pair) for pair in pairs):
        raise Unreadable("its history is no list of pairs of question and answer")
    return pairs


def _is_pair(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2


def of_instruction(row: dict, asking: bool = False) -> dict:
    """An instruction row as a conversation of one exchange."""
    return conversation(instruction_turns(row), asking)


def _are_guanaco(rows: list[dict]) -> bool:
    texts = [str(row["text"] or "").strip() for row in rows[:100]]
    return any(texts) and all(_MARK.match(text) for text in texts if text)


def _turns_of_text(text: str | None) -> list[dict[str, str]]:
    """What stands before the first mark is the system's."""
    _, *parts = _MARK.split(f"### System:{text or ''}")
    turns = []
    for role, said in zip(parts[::2], parts[1::2], strict=True):
        turns.append({"role": role, "content": said.strip()})
    return turns


def conversation(turns: list[dict], asking: bool) -> dict:
    """Turns as they are written → one conversation.

    Returns:
        `messages`, each with role, content and `trains` (whether it is an answer that may train);
        instruction and output, the last question and answer, and `input`, empty, so that a
        conversation can be shown and compared like any other row; `left_out`, why it cannot be
        used, or nothing; `n_unused`, turns behind the last one that is used.

    >>> found = conversation([{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello!"},
    ...                       {"from": "human", "value": "Bye."}], asking=False)
    >>> [message["role"] for message in found["messages"]], found["n_unused"]
    (['user', 'assistant'], 1)
    """
    last = "user" if asking else "assistant"
    places = [place for place, turn in enumerate(turns, start=1) if _who(turn) == last]
    n_used = max(places, default=len(turns))
    messages = []
    problem = ""
    for turn in turns[:n_used]:
        message, reason = _message(turn)
        problem = problem or reason
        if message["content"].strip():
            messages.append(message)
        elif message["role"] == "assistant":
            problem = problem or "an assistant's turn is empty"
    messages = taking_turns(messages)
    questions = [m["content"] for m in messages if m["role"] == "user"]
    answers = [m["content"] for m in messages if m["trains"]]
    if not questions:
        problem = problem or "no turn by a user"
    elif not asking and not answers:
        problem = problem or "no turn by an assistant after it, or of weight 0 alone"
    return {
        "messages": messages,
        "instruction": questions[-1] if questions else "",
        "input": "",
        "output": answers[-1] if answers and not asking else "",
        "left_out": problem,
        "n_unused": len(turns) - n_used,
    }


def taking_turns(messages: list[dict]) -> list[dict]:
    """Messages in which nobody speaks twice in a row: what was said together is joined by a blank
    line, and trains if all of it may. An answer that follows no question does not train.
    """
    joined = []
    asked = False
    for message in messages:
        asked = asked or message["role"] == "user"
        trains = message["trains"] and asked
        content = message["content"]
        if joined and joined[-1]["role"] == message["role"]:
            before = joined.pop()
            trains = trains and before["trains"]
            content = f"{before['content']}\n\n{content}"
        joined.append({"role": message["role"], "content": content, "trains": trains})
    return joined


def _message(turn: dict) -> tuple[dict, str]:
    """A turn as a message, and why it cannot be used, or nothing."""
    who = _who(turn)
    text, problem = _text(turn)
    if who == "assistant":
        text = _with_thoughts(text, turn)
    if not who:
        word = str(_first_of(turn, _WHO)).strip().lower()
        problem = f"the role {word[:40]!r} is neither system, user nor assistant"
    elif turn.get("deleted"):
        problem = "a turn is deleted"
    elif turn.get("tool_calls") or turn.get("function_call"):
        problem = "an assistant's turn calls a tool"
    trains = who == "assistant" and turn.get("weight") != 0 and turn.get("train") is not False
    return {"role": who, "content": text, "trains": trains}, problem


def _who(turn: dict) -> str:
    """system, user or assistant; nothing if the role is another one."""
    word = _first_of(turn, _WHO)
    if isinstance(word, dict):
        word = word.get("role")
    letters = re.sub(r"[\W\d_]", "", str(word).lower())
    for speaker, words in ROLES.items():
        if letters in words.split():
            return speaker
    return ""


def _first_of(fields: dict, names: tuple[str, ...]) -> object:
    there = (fields[name] for name in names if fields.get(name) is not None)
    return next(there, None)


def _text(turn: dict) -> tuple[str, str]:
    """What a turn says, its parts joined as chat templates join them; and a problem if a part is
    not text.
    """
    content = _first_of(turn, _WHAT)
    text = ""
    for part in content if isinstance(content, list) else [content or ""]:
        words = part.get("text") if isinstance(part, dict) else part
        if not isinstance(words, str):
            return "", "a turn holds something other than text"
        text += words
    return text, ""


def _with_thoughts(answer: str, turn: dict) -> str:
    """An answer behind the thoughts that are kept beside it, as the templates of models that think
    write them.
    """
    if not answer.strip() or "</think>" in answer:
        return answer
    for name in _THOUGHTS:
        thoughts = turn.get(name)
        if isinstance(thoughts, str) and thoughts.strip():
            thoughts = thoughts.strip("\n")
            answer = answer.lstrip("\n")
            return f"<think>\n{thoughts}\n</think>\n\n{answer}"
    return answer


def _of_trees(messages: list[dict], asking: bool) -> Iterator[dict]:
    """One conversation for each tree: its first message, and after it the best replies."""
    known = {message["message_id"] for message in messages}
    replies = {}
    for message in messages:
        replies.setdefault(message["parent_id"], []).append(message)
    for number, root in enumerate(messages):
        if root["parent_id"] in known:
            continue
        row = conversation([root] if asking else _best_turns(root, replies), asking)
        if root["parent_id"]:
            row["left_out"] = "the message it replies to is not in the data"
        yield {**row, "number": number}


def _best_turns(root: dict, replies: dict[str, list[dict]]) -> list[dict]:
    """The messages from the root along the best-ranked reply of another speaker to each."""

    def rank(message: dict) -> float:
        return math.inf if message.get("rank") is None else message["rank"]

    turns = []
    message = root
    while message:
        turns.append(message)
        spoke = _who(message)
        others = replies.pop(message["message_id"], [])
        others = [reply for reply in others if not reply.get("deleted") and _who(reply) != spoke]
        message = min(others, key=rank, default=None)
    return turns
