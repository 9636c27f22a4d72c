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
from collections import defaultdict
from pathlib import Path
from typing import TextIO

import datasets
from tqdm import tqdm

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
        KitError: the data cannot be read, lacks a column, holds something other than text, or no
            conversation in it has an answer.
    """
    needed = ["instruction"] if asking else ["instruction", "output"]
    rows = _renamed(_read_table(name), columns)
    talks = None
    if "instruction" not in rows.column_names:
        with _reading(name):  # the turns can be of any type
            talks = conversations.exchanges(rows, asking)
    if talks:
        texts = talks.select_columns(list(COLUMNS))
        reasons = talks["left_out"][:]
        numbers = talks["row"][:]
    else:
        texts = _as_texts(rows, name, needed)
        reasons = [""] * len(texts)
        numbers = range(len(texts))
    kept = []
    left_out = defaultdict(list)
    for i, row in enumerate(tqdm(texts, desc="checking", unit="row")):
        is_whole = all(row[column].strip() for column in needed)
        if is_whole and not reasons[i]:
            kept.append(i)
        else:
            left_out[reasons[i]].append(numbers[i])
    _say_left_out(left_out, len(texts), needed)
    if talks:
        if not kept and not asking:
            raise _no_exchange(name, next(iter(left_out)))
        conversations.say_what_is_taken(talks.select(kept), asking)
    else:
        unused = sorted(set(rows.column_names) - set(COLUMNS))
        if unused:
            print(f"columns that are not used: {_first([repr(column) for column in unused])}")
    return texts.select(kept)


def _no_exchange(name: str, reason: str) -> KitError:
    roles = ", ".join("/".join(words) for words in conversations.ROLES.values())
    return KitError(
        f"the conversations cannot be read as questions and answers: {reason}",
        value=Path(name).name,
        allowed=f"turns with a role ({roles}) and a text",
        remedy="look at its first row",
    )


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
        raise KitError(
            "unknown kind of data file",
            value=path.name,
            allowed=f"a file that ends in {', '.join(_READERS)}",
            remedy="convert it to one of these",
        )
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
    if is_list:
        rows = _parsed(file.read())
    else:
        rows = (_parsed(line, n) for n, line in enumerate(file) if line.strip())
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"row {i} has no named columns: {row!r:.60}")


def _parsed(text: str, lines_before: int = 0) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = lines_before + error.lineno
        raise ValueError(f"line {line}: {error.msg} at character {error.colno}") from None


def _renamed(rows: datasets.Dataset, columns: dict[str, str]) -> datasets.Dataset:
    """Call the data's own columns what the kit calls them; a column that had such a name before
    goes.
    """
    theirs = set(columns.values())
    unknown = sorted(theirs - set(rows.column_names))
    if unknown:
        raise KitError(
            "columns names what the data does not have",
            value=", ".join(unknown),
            allowed=", ".join(rows.column_names),
        )
    if len(theirs) < len(columns):
        raise KitError(
            "columns names one column of the data twice",
            value=columns,
            allowed="another one for each",
        )
    replaced = [name for name in columns if name in rows.column_names and name not in theirs]
    new_names = {own: column for column, own in columns.items() if own != column}
    return rows.remove_columns(replaced).rename_columns(new_names)


def _as_texts(rows: datasets.Dataset, name: str, needed: list[str]) -> datasets.Dataset:
    """The three columns of every row; whatever is not there is empty text, and so is an answer that
    is not needed.

    Raises:
        KitError: a needed column is missing, or a value is something other than text.
    """
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
    with _reading(name):
        return rows.select_columns(used).map(
            _texts_of,
            batched=True,
            with_indices=True,
            fn_kwargs={"name": Path(name).name},
            features=datasets.Features(dict.fromkeys(COLUMNS, datasets.Value("string"))),
        )


def _texts_of(columns: dict[str, list], numbers: list[int], name: str) -> dict[str, list[str]]:
    """Some rows' columns as text: a column, a null or the NaN that pandas writes becomes empty."""
    texts = {}
    for column in COLUMNS:
        texts[column] = [""] * len(numbers)
        for i, value in enumerate(columns.get(column, [])):
            if isinstance(value, str):
                texts[column][i] = value
            elif value is not None and not (isinstance(value, float) and math.isnan(value)):
                raise KitError(
                    f"column {column} is not text in row {numbers[i]}",
                    value=value,
                    allowed="text",
                    remedy=f"look at {name}",
                )
    return texts


def _say_left_out(left_out: dict[str, list[int]], n_rows: int, needed: list[str]) -> None:
    """One line for each reason: how many rows, which ones."""
    lacking = " or no ".join(needed).replace("output", "answer")
    reasons = list(left_out)
    for reason in reasons[:MOST_REASONS]:
        numbers = left_out[reason]
        why = f" ({reason})" if reason else ""
        rows = _first(numbers)
        print(
            f"{len(numbers)} of {n_rows} rows have no {lacking}{why} and are left out: rows {rows}"
        )
    others = reasons[MOST_REASONS:]
    if others:
        n_others = sum(len(left_out[reason]) for reason in others)
        print(f"{n_others} more rows are left out for {len(others)} other reasons")


def _first(items: list) -> str:
    """The first five, and a sign if there are more."""
    more = " …" if len(items) > 5 else ""
    return ", ".join(str(item) for item in items[:5]) + more
