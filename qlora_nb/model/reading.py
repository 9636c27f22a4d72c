"""From somebody's file or data set to rows of three texts: *instruction, input, output*.

`datasets` reads JSON (a list of rows, or one row a line), CSV and Parquet, a folder, or a data set
of the hub. Around its readers stand three steps of ours:

1. *Check.* The readers name no line of a damaged file, guess types ("007" becomes 7) and shift the
   fields of a CSV row that has one too many. So JSON and CSV are parsed once before, and the first
   line that is no row is named.
2. *Name.* `columns` says what the data calls the three columns; data without an instruction may be
   conversations, which `conversations` turns into questions and answers.
3. *Keep.* A row without an instruction or an answer cannot train and is left out; how many, which
   ones and why is printed.
"""

import csv
import glob
import gzip
import json
import lzma
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import datasets
import pandas

from qlora_nb import sources
from qlora_nb.errors import KitError, refusing
from qlora_nb.model import conversations

COLUMNS = ("instruction", "input", "output")
"""The columns of a row, those of Alpaca's data."""

MOST_REASONS = 8
"""For no more reasons than this are the rows that are left out named."""

_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}

_OPENERS = {".gz": gzip.open, ".xz": lzma.open}


def read(name: str, columns: dict[str, str], asking: bool = False) -> datasets.Dataset:
    """The rows of a file, a folder or a hub data set, each column as text.

    Args:
        name: the path or the hub name.
        columns: the kit's column → the data's own name for it, where they differ.
        asking: the rows are to be asked, so they need no answer; `output` is empty.

    Raises:
        KitError: the data cannot be read, lacks a column, or holds something other than text.
    """
    rows = _renamed(_read_table(name), columns)
    talks = None
    if "instruction" not in rows.column_names:
        with _reading(name):  # the turns can be of any type
            talks = conversations.exchanges(rows, asking)
    found = talks if talks else _as_texts(rows, name, asking)
    reasons = found.select_columns(["left_out", "row"]).to_pandas()
    _say_left_out(reasons[reasons["left_out"] != ""], len(found))
    kept = found.filter(lambda row: not row["left_out"], desc="checking")
    unused = sorted(set(rows.column_names) - set(COLUMNS))
    if talks:
        conversations.say_what_is_taken(kept)
    elif unused:
        print(f"columns that are not used: {_first([repr(column) for column in unused])}")
    return kept.select_columns(list(COLUMNS))


def _read_table(name: str) -> datasets.Dataset:
    path = sources.local_path(name)
    with _reading(path.name):
        if path.is_dir():
            return datasets.load_dataset(str(path), split="train")
        if not path.exists():
            return datasets.load_dataset(name, split="train")
        return _read_file(path)


def _reading(name: str):
    """Context in which whatever damaged data makes a library say becomes a refusal."""
    remedy = "check that it is whole and in UTF-8; JSON is a list of rows or one row a line"
    return refusing("the data cannot be read", name, remedy)


def _read_file(path: Path) -> datasets.Dataset:
    is_compressed = path.suffix in {".gz", ".xz", ".zst"}
    uncompressed = path.with_suffix("") if is_compressed else path
    suffix = uncompressed.suffix.lower()
    if suffix not in _READERS or not path.is_file():
        raise ValueError(f"it is no file that ends in {', '.join(_READERS)}")
    options = {}
    if suffix != ".parquet" and path.suffix != ".zst":
        opener = _OPENERS.get(path.suffix, open)
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            if suffix == ".csv":
                options = _check_csv(file)
            else:
                _check_json(file)
    files = glob.escape(str(path))
    rows = datasets.load_dataset(_READERS[suffix], data_files=files, split="train", **options)
    rows.data.validate(full=True)  # a damaged Parquet file can hold texts that are none
    return rows


def _check_csv(file: TextIO) -> dict[str, object]:
    """Name the first line that has not as many fields as the header.

    Returns:
        Options for the reader: the separator, and that every field is text ("NA", "" and "007").
    """
    separator = max(",;\t", key=file.readline().count)
    file.seek(0)
    csv.field_size_limit(2**31 - 1)
    lines = csv.reader(file, delimiter=separator)
    rows = filter(None, lines)  # blank lines are no rows
    names = next(rows, [])
    for row in rows:
        if len(row) != len(names):
            n_fields = f"{len(row)} fields, the first line {len(names)}"
            raise ValueError(f"line {lines.line_num} has {n_fields}")
    named = [name or f"Unnamed: {i}" for i, name in enumerate(names)]  # as pandas calls them
    texts = datasets.Features(dict.fromkeys(named, datasets.Value("string")))
    return {"sep": separator, "keep_default_na": False, "features": texts}


def _check_json(file: TextIO) -> None:
    """Name the first line that is not JSON, or the first row that has no named columns."""
    is_list = file.read(4096).lstrip().startswith("[")
    file.seek(0)
    rows = json.load(file) if is_list else _json_lines(file)
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"row {i} has no named columns: {row!r:.60}")


def _json_lines(file: TextIO) -> Iterator[object]:
    for n, line in enumerate(file, start=1):
        try:
            if line.strip():
                yield json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {n}: {error.msg} at character {error.colno}") from None


def _renamed(rows: datasets.Dataset, columns: dict[str, str]) -> datasets.Dataset:
    """Call the data's own columns what the kit calls them; a column that had such a name before
    goes.
    """
    there = rows.column_names
    theirs = set(columns.values())
    if len(theirs & set(there)) < len(columns):
        raise KitError(
            "columns names what the data does not have, or one column of the data twice",
            value=columns,
            allowed=f"{', '.join(there)}, each once",
        )
    replaced = [name for name in columns if name in there and name not in theirs]
    new_names = {own: column for column, own in columns.items() if own != column}
    return rows.remove_columns(replaced).rename_columns(new_names)


def _as_texts(rows: datasets.Dataset, name: str, asking: bool) -> datasets.Dataset:
    """The three columns of every row, `left_out` (why it cannot be used, or nothing) and `row`, its
    number. Whatever is not there is empty text, and so is an answer that is not needed.

    Raises:
        KitError: a needed column is missing, or a value is something other than text.
    """
    needed = ["instruction"] if asking else ["instruction", "output"]
    there = rows.column_names
    used = [column for column in there if column == "input" or column in needed]
    missing = [column for column in needed if column not in there]
    if missing:
        raise KitError(
            f"the data has no column {' and '.join(missing)}",
            value=", ".join(there),
            allowed="instruction, output, input if there is one; "
            "or a conversation (messages, OASST, Guanaco)",
            remedy="name them, as columns=instruction=question,output=answer",
        )

    how = {"name": Path(name).name, "needed": needed}
    with _reading(name):
        return rows.select_columns(used).map(
            _as_text, with_indices=True, fn_kwargs=how, features=conversations.ROW
        )


def _as_text(row: dict, number: int, name: str, needed: list[str]) -> dict[str, object]:
    """A row as text: a column, a null or the NaN that pandas writes becomes empty."""
    found = {"left_out": "", "row": number}
    for column in COLUMNS:
        value = row.get(column)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            value = ""
        if not isinstance(value, str):
            raise KitError(
                f"column {column} is not text in row {number}",
                value=value,
                allowed="text",
                remedy=f"look at {name}",
            )
        if column in needed and not value.strip():
            found["left_out"] = f"no {column}"
        found[column] = value
    return found


def _say_left_out(left_out: pandas.DataFrame, n_rows: int) -> None:
    """One line for each reason: how many rows, which ones."""
    by_reason = left_out.groupby("left_out", sort=False)["row"].apply(list)
    for reason, numbers in by_reason.head(MOST_REASONS).items():
        rows = _first(numbers)
        print(f"{len(numbers)} of {n_rows} rows are left out ({reason}): rows {rows}")
    others = by_reason.iloc[MOST_REASONS:]
    if len(others):
        n_others = others.map(len).sum()
        print(f"{n_others} more rows are left out for {len(others)} other reasons")


def _first(items: list) -> str:
    """The first five, and a sign if there are more."""
    more = " …" if len(items) > 5 else ""
    return ", ".join(str(item) for item in items[:5]) + more
