"""Conversations as rows: the first question and its answer, from the three shapes in which such data is published.

- *messages*: a list of turns, each with a role and a content (chat data, `messages` or `conversations`);
- *Guanaco*: one text with `### Human:` and `### Assistant:` before the turns (`timdettmers/openassistant-guanaco`, the data of
  the QLoRA paper's best model);
- *OASST*: a tree with one message a row, tied by `parent_id`; the answer is the assistant's best-ranked one (rank 0).

Later turns are left out: a row of this kit is one question and one answer.
"""

import re

import datasets

_TURN = re.compile(r"### (Human|Assistant):")


def first_exchanges(rows: datasets.Dataset) -> datasets.Dataset | None:
    """Rows with instruction and output; None if this is none of the known shapes. A row without an answer becomes an empty one.

    >>> _of_text("### Human: Hi.### Assistant: Hello!### Human: Bye.")
    {'instruction': 'Hi.', 'output': 'Hello!'}
    """
    names = set(rows.column_names)
    if {"message_id", "parent_id", "role", "text"} <= names:
        return datasets.Dataset.from_list(_of_tree(rows))
    if turns := names & {"messages", "conversations"}:
        return rows.map(lambda row: _of_turns(row[min(turns, key=len)] or []), remove_columns=rows.column_names)
    if "text" in names and all(_TURN.match((text or "").strip()) for text in rows["text"][:100]):
        return rows.map(lambda row: _of_text(row["text"]), remove_columns=rows.column_names)
    return None


def _of_turns(turns: list[dict[str, str]]) -> dict[str, str]:
    said = [(turn.get("role") or turn.get("from"), turn.get("content") or turn.get("value") or "") for turn in turns]
    asked = next((i for i, (role, _) in enumerate(said) if role in {"user", "human", "prompter"}), len(said))
    question, answer = ([text for _, text in said[i : i + 1]] for i in (asked, asked + 1))
    return {"instruction": "".join(question), "output": "".join(answer)}


def _of_text(text: str) -> dict[str, str]:
    _, *parts = _TURN.split(text or "")
    return _of_turns([{"role": role.lower(), "content": said.strip()} for role, said in zip(parts[::2], parts[1::2])])


def _of_tree(rows: datasets.Dataset) -> list[dict[str, str]]:
    asked = {row["message_id"]: row["text"] for row in rows if not row["parent_id"]}
    by_rank = sorted((row for row in rows if row["parent_id"] in asked), key=lambda row: row.get("rank") or 0)
    best = {row["parent_id"]: row["text"] for row in reversed(by_rank)}  # the best one is written last
    return [{"instruction": text, "output": best.get(name, "")} for name, text in asked.items()]
