"""The data, looked at before any model is fetched or loaded: what is there, what is used of it, and
the first row as the model will see it.

A wrong column, a prompt that is longer than `max_length` or an answer that never ends should be
seen now, and not after a download of 24 GB. Only the tokenizer is needed for it, some megabytes.
"""

import html
from dataclasses import dataclass
from itertools import groupby

import datasets
import pandas
from transformers import PreTrainedTokenizerBase

from qlora_nb.model import characters, data
from qlora_nb.model.chunked_loss import IGNORED
from qlora_nb.settings import Settings

TRAINS = "border-bottom:2px solid #009E73;background:#009E7333"
"""CSS of what trains, in the colour that stands for training in every figure."""


@dataclass(repr=False)
class Report:
    """What a data set holds and what a run takes of it; shown as a table.

    Attributes:
        split: the rows as texts.
        settings: those of the run; `prompt_template` is "chat" where the rows are conversations.
        encoded: the training rows as `data.tokenize_rows` returns them.
        counts: what is counted → how many.
        remarks: what is worth a sentence, above all why rows are left out and which ones.
        first_row: the pieces of text of the first training row, and whether each trains.
    """

    split: data.Split
    settings: Settings
    encoded: datasets.Dataset
    counts: dict[str, int]
    remarks: list[str]
    first_row: list[tuple[str, bool]]

    def __repr__(self) -> str:
        lines = [f"{what:34} {n:>10,}" for what, n in self.counts.items()]
        lines += self.remarks
        lines.append("the first row as the model sees it; what trains stands in ⟦ ⟧:")
        row = ""
        for text, trains in self.first_row:
            row += f"⟦{text}⟧" if trains else text
        lines.append(printable(row))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        table = pandas.DataFrame({"rows or tokens": self.counts}).map("{:,}".format)
        remarks = "".join(f"<li>{html.escape(line)}</li>" for line in self.remarks)
        return f"{table.to_html()}<ul>{remarks}</ul>{shown(self.first_row)}"


def check(
    settings: Settings, tokenizer: PreTrainedTokenizerBase, every_row: bool = False
) -> Report:
    """Read, check, split and tokenize the data of these settings: the rows that their steps will
    see, or `every_row`.

    Raises:
        KitError: see `data.split`; or no row is left.
    """
    wanted = settings
    if every_row:
        wanted = settings.replace(train_rows=10**9, max_steps=10**9)
    split = data.split(wanted)
    encoded = data.encode_rows(split.train, tokenizer, settings)
    usable = data.usable(encoded, settings)
    lengths = [len(ids) for ids in usable["input_ids"]]
    n_lost = [row["n_lost"] for row in encoded if not row["left_out"]]
    trains = [[label != IGNORED for label in labels] for labels in usable["labels"]]
    n_read = len(split.train) + len(split.held_out)
    n_left_out = len(encoded) - len(usable)
    if split.source:
        n_read = split.source.n_read
        n_left_out += n_read - len(split.source.kept)
    counts = {
        "rows read": n_read,
        "rows left out": n_left_out,
        "rows held out": len(split.held_out),
        "rows to train on": len(usable),
        "rows cut to max_length": sum(n > 0 for n in n_lost),
        "tokens lost by that": sum(n_lost),
        "duplicate rows": split.n_duplicates,
        "held-out rows also trained": split.n_in_both,
        "rows with a special token in text": sum(token != "" for token in encoded["special"]),
        "tokens of the longest row": max(lengths),
        "tokens": sum(lengths),
        "tokens that train": sum(map(sum, trains)),
    }
    first_row = pieces(usable[0]["input_ids"], trains[0], tokenizer)
    remarks = split.remarks() + data.remarks(encoded)
    if not settings.packing:
        epochs = settings.max_steps * settings.rows_in_a_step / len(usable)
        steps = f"{settings.max_steps} steps of {settings.rows_in_a_step} rows"
        remarks.append(f"{steps} are {epochs:.1f} epochs: so often each of these rows is seen")
    if "messages" in split.train.column_names:
        settings = settings.replace(prompt_template="chat")
    return Report(split, settings, usable, counts, remarks, first_row)


def pieces(ids: list[int], trains: list[bool], tokenizer) -> list[tuple[str, bool]]:
    """A row's text, cut where training begins and ends, and whether each piece trains."""
    found = []
    for train, group in groupby(zip(ids, trains, strict=True), lambda pair: pair[1]):
        text = characters.joined([token for token, _ in group], tokenizer)
        found.append((text, train))
    return found


def shown(row: list[tuple[str, bool]]) -> str:
    """A row as HTML, what trains both coloured and underlined; text is escaped."""
    cells = []
    for text, trains in row:
        style = TRAINS if trains else "opacity:.65"
        escaped = html.escape(text).replace("\n", "⏎<br>")
        cells.append(f"<span style='{style};white-space:pre-wrap'>{escaped}</span>")
    return (
        f"<div style='font-family:monospace;line-height:1.7;max-width:60em'>{''.join(cells)}</div>"
    )


def printable(text: str) -> str:
    """A text for a terminal: control characters, which could move its cursor, as Python writes
    them.
    """
    shown = ""
    for character in text:
        is_plain = character.isprintable() or character == "\n"
        shown += character if is_plain else repr(character)[1:-1]
    return shown
