"""From somebody's table to rows that can train or be asked.

A row is an instruction, perhaps an input to it, and an output, or a conversation (`conversations`).
`columns` says what the data calls these three. A row that lacks a needed text is left out; how
many, which ones and why is kept, as `data_report` shows it and refusals name it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import datasets

from qlora_nb.errors import KitError, refusing
from qlora_nb.model import conversations, tables

COLUMNS = ("instruction", "input", "output")
"""The columns of a row, those of Alpaca's data."""

MOST_REASONS = 8
"""For no more reasons than this are the rows that are left out named."""

_HALF = re.compile("[\ud800-\udfff]")
"""What JSON can write ("\\ud83d" without its other half) and no file in UTF-8 can hold."""


@dataclass
class Rows:
    """The rows of a table that can be used, and what became of the others.

    Attributes:
        kept: instruction, input, output and `number`, the row's in the data, from 0; of
            conversations also `messages`.
        n_read: rows in the data (of a tree of messages: conversations).
        left_out: reason → numbers of the rows that are left out for it, from 0.
        unused: columns of the data that nothing is taken from.
        n_unused_turns: turns of conversations behind their last answer.
    """

    kept: datasets.Dataset
    n_read: int
    left_out: dict[str, list[int]]
    unused: list[str]
    n_unused_turns: int

    def remarks(self) -> list[str]:
        """A sentence for each reason for which rows are left out, and for what is not used."""
        lines = why_left_out(self.left_out, self.n_read)
        if self.n_unused_turns:
            lines.append(f"{self.n_unused_turns} turns behind a last answer are not used")
        if self.unused:
            names = [repr(column) for column in self.unused]
            lines.append(f"columns that are not used: {_first_few(names)}")
        return lines


def why_left_out(left_out: dict[str, list[int]], n_rows: int) -> list[str]:
    """A sentence for each reason: how many rows of all, and which ones.

    >>> why_left_out({"no output": [3, 7]}, 50)
    ['2 of 50 rows are left out (no output): rows 3, 7']
    """
    lines = []
    for reason, numbers in list(left_out.items())[:MOST_REASONS]:
        n_left_out = f"{len(numbers)} of {n_rows} rows are left out"
        lines.append(f"{n_left_out} ({reason}): rows {_first_few(numbers)}")
    others = list(left_out.values())[MOST_REASONS:]
    if others:
        n_others = sum(map(len, others))
        lines.append(f"{n_others} more rows are left out for {len(others)} other reasons")
    return lines


def _first_few(items: list) -> str:
    """The first five, and a sign if there are more."""
    more = " …" if len(items) > 5 else ""
    return ", ".join(str(item) for item in items[:5]) + more


def read(name: str, columns: dict[str, str], asking: bool = False, as_chat: bool = False) -> Rows:
    """The rows of a file, a folder or a hub data set, each column as text.

    Args:
        name: the path or the hub name.
        columns: the kit's column → the data's own name for it, where they differ.
        asking: the rows are to be asked, so they need no answer; `output` is empty.
        as_chat: an instruction row becomes a conversation of one exchange.

    Raises:
        KitError: the data cannot be read, lacks a column, or holds something other than text.
    """
    wanted = {*conversations.READ, *columns.values()}
    names, rows = _own_names(*tables.read_table(name, wanted), columns)
    with refusing(f"the rows of {name} cannot be used", None, "docs/own_data.md shows what can"):
        of_talks = names
        if "instruction" in columns:  # somebody says what is asked, whatever stands beside it
            of_talks = [column for column in names if column not in conversations.COLUMNS]
        talks = conversations.of_table(of_talks, rows, asking)
        if talks is not None:
            return _sorted_out(list(talks), unused=[])
        rows = list(_as_texts(names, rows, asking))
        if as_chat:
            rows = [{**row, **conversations.of_instruction(row, asking)} for row in rows]
        return _sorted_out(rows, sorted(set(names) - set(COLUMNS)))


def _sorted_out(found: list[dict], unused: list[str]) -> Rows:
    """Rows with `left_out` (why they cannot be used, or nothing) and `number`."""
    left_out: dict[str, list[int]] = {}
    kept = []
    for row in found:
        texts = [row[column] for column in COLUMNS]
        texts += [message["content"] for message in row.get("messages", [])]
        reason = row["left_out"]
        if not reason and _HALF.search("".join(texts)):
            reason = "half a character, a surrogate alone"
        if reason:
            left_out.setdefault(reason, []).append(row["number"])
        else:
            kept.append(row)
    names = [*COLUMNS, "number"]
    if found and "messages" in found[0]:
        names.append("messages")
    dataset = datasets.Dataset.from_dict({name: [row[name] for row in kept] for name in names})
    n_unused_turns = sum(row.get("n_unused", 0) for row in kept)
    return Rows(dataset, len(found), left_out, unused, n_unused_turns)


def _own_names(found: list[str], rows: list[dict], columns: dict[str, str]) -> tables.Table:
    """Call the data's own columns what the kit calls them; a column that had such a name before
    goes. A question in a column `prompt` and an answer in `completion` need no renaming.
    """
    theirs = set(columns.values())
    if len(theirs & set(found)) < len(columns):
        raise KitError(
            "columns names what the data does not have, or one column of the data twice",
            value=columns,
            allowed=f"{', '.join(found)}, each once",
        )
    names = {name: name for name in found if name not in theirs}
    names.update(columns)
    if conversations.are_prompts(found, rows) and "instruction" not in names:
        names["instruction"] = names.pop("prompt")
        if "completion" in names:
            names["output"] = names.pop("completion")
    return list(names), [{name: row.get(names[name]) for name in names} for row in rows]


def _as_texts(names: list[str], rows: list[dict], asking: bool) -> Iterator[dict]:
    """The three columns of every row, `left_out` (why it cannot be used, or nothing) and `number`.
    Whatever is not there is empty text, and so is an answer that is not needed.

    Raises:
        KitError: a needed column is missing, or a value is something other than text.
    """
    needed = ["instruction"] if asking else ["instruction", "output"]
    missing = [column for column in needed if column not in names]
    if missing:
        raise KitError(
            f"the data has no column {' and '.join(missing)}",
            value=", ".join(names),
            allowed="instruction, output, input if there is one; prompt and completion; "
            "or a conversation (messages, conversations, OASST, Guanaco)",
            remedy="name them, as columns=instruction=question,output=answer",
        )
    for number, row in enumerate(rows):
        found = {"left_out": "", "number": number}
        for column in COLUMNS:
            text = row.get(column)
            if text is None or column not in (*needed, "input"):
                text = ""
            if not isinstance(text, str):
                raise KitError(
                    f"column {column} is not text in row {number}",
                    value=text,
                    remedy="write it as text",
                )
            if column in needed and not text.strip():
                found["left_out"] = f"no {column}"
            found[column] = text
        yield found
