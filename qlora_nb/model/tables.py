"""Whatever somebody names as `dataset` becomes rows of plain Python values here: a file, a folder
or a data set of the hub, all by one set of rules.

- *JSON* is parsed by Python's `json`: a date stays text, an integer an integer, and a column that
  nobody asks for can hold anything. One row after another, a list of rows, an object around
  such a list, or one of the forms that pandas writes (records, columns, index, split, table).
- *CSV* is parsed by Python's `csv`, and every field is text ("007", "NA", ""). The separator is the
  one of `,;\\t|` that makes the most of the first line.
- *Parquet, Arrow and Feather* are read by pyarrow, the wanted columns alone.

JSON and CSV can be packed, as .gz, .bz2, .xz or .zip. Of a folder `datasets` says which files are
the split `train`, by its README or by their names; a folder that `save_to_disk` wrote is read as
one. A data set of the hub is its folder in the hub's cache.

The libraries' own readers guess types, shift the fields of a CSV row that has one too many and name
no line. No code of a data set is ever run: `datasets` has not done so since its version 4.
"""

import csv
import glob
import json
import re
import zipfile
from collections.abc import Container, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import datasets
import fsspec
import pandas
import pyarrow
import pyarrow.dataset
from datasets import data_files
from fsspec.utils import infer_compression
from huggingface_hub import snapshot_download

from qlora_nb import sources
from qlora_nb.errors import refusing
from qlora_nb.model import conversations, fetch

Table = tuple[list[str], list[dict]]
"""The names of all columns, in the data's order, and the rows."""


def read_table(name: str, wanted: Container[str]) -> Table:
    """The table in a file, a folder or a data set of the hub.

    Args:
        name: the path, with `~` for the home folder, or owner/name.
        wanted: the columns that every row gets; a value that is missing is None.

    Raises:
        KitError: nothing lies there, it is no table, it is damaged (the line is named), or it holds
            no row.
    """
    path = sources.local_path(name).absolute()
    if not path.exists():
        path = _snapshot(name)
    with _reading(path):
        if path.is_dir():
            columns, rows = _read_folder(path, wanted)
        else:
            columns, rows = _read_files([path], wanted)
        if not rows:
            raise ValueError("it holds no row")
    found = [column for column in columns if column in wanted]
    return columns, [{column: row.get(column) for column in found} for row in rows]


def _reading(path: Path | str):
    """Context in which whatever a library says of damaged data becomes a refusal."""
    remedy = (
        f"bring a file that ends in {', '.join(sources.DATA_FORMATS)}, whole and saved in UTF-8; "
        "JSON is a list of rows or one row a line, the first line of CSV names the columns; "
        "of a folder that is not clear, name one file"
    )
    return refusing(f"the data at {path} cannot be read", None, remedy)


def _snapshot(repo_id: str) -> Path:
    """The folder of a hub data set in the local cache, made whole if the hub can be reached."""
    sources.require_reachable("dataset", repo_id, sources.DATASETS)
    if sources.hub_is_reachable():
        fetch.fetch_repo(repo_id, "dataset")
    with _reading(repo_id):
        folder = snapshot_download(
            repo_id,
            repo_type="dataset",
            allow_patterns=fetch.PATTERNS["dataset"],
            local_files_only=True,
        )
    return Path(folder)


def _read_folder(folder: Path, wanted: Container[str]) -> Table:
    if any(folder.rglob("state.json")):  # of save_to_disk
        saved = datasets.load_from_disk(folder)
        if isinstance(saved, datasets.DatasetDict):
            saved = _train_of(saved)
        return _of_arrow([saved.data.table], wanted)
    if glob.has_magic(str(folder)):
        raise ValueError("a folder with [, * or ? in its path cannot be searched: name the file")
    splits = datasets.load_dataset_builder(str(folder)).config.data_files
    files = [Path(file) for file in _train_of(splits)]
    formats = set()
    for file in files[0].parent.iterdir():
        if file.name not in data_files.FILES_TO_IGNORE:
            formats.add(_format_of(file))
    if len(formats - {None}) > 1:
        raise ValueError(f"{files[0].name} lies beside data of another format: name the file")
    return _read_files(files, wanted)


def _train_of(splits: dict) -> object:
    """The split `train`, or the only one that begins with it."""
    names = [name for name in splits if str(name).startswith("train")]
    if "train" in names:
        names = ["train"]
    if len(names) != 1:
        raise ValueError(f"which of its splits is to be trained on? {', '.join(map(str, splits))}")
    return splits[names[0]]


def _format_of(path: Path) -> str | None:
    """The format that the ending tells, of the file or of the one that is packed in it."""
    name = path.name
    if path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path) as archive:
            name, *others = archive.namelist()
        if others:
            raise ValueError(f"{path.name} packs several files: unpack it")
    elif infer_compression(name):
        name = path.stem
    return sources.DATA_FORMATS.get(Path(name).suffix.lower())


def _read_files(files: list[Path], wanted: Container[str]) -> Table:
    """One table of files that have the same format."""
    kind = _format_of(files[0])
    if kind == "Parquet":
        return _of_arrow(files, wanted)
    if kind == "Arrow":
        return _of_arrow([_arrow_table(file) for file in files], wanted)
    rows = []
    for file in files:
        with _reading(file):
            rows += _read_text(file, kind)
    return list(dict.fromkeys(name for row in rows for name in row)), rows


def _of_arrow(parts: list, wanted: Container[str]) -> Table:
    """A table of Parquet files or of Arrow tables. A part may lack columns that others have, or
    have them of another type.
    """
    names = {}
    rows = []
    for part in parts:
        found = pyarrow.dataset.dataset(part)
        names.update(dict.fromkeys(found.schema.names))
        table = found.to_table([name for name in found.schema.names if name in wanted])
        table.validate(full=True)  # a damaged file can hold texts that are none
        rows += datasets.Dataset(table).to_list() or [{}] * found.count_rows()
    return list(names), rows


def _arrow_table(path: Path) -> pyarrow.Table:
    file = pyarrow.memory_map(str(path))
    with suppress(pyarrow.ArrowInvalid):
        return pyarrow.ipc.open_file(file).read_all()  # Feather
    return pyarrow.ipc.open_stream(file).read_all()  # as `datasets` writes it


def _read_text(path: Path, kind: str | None) -> list[dict]:
    if kind is None:
        raise ValueError("its ending is that of no data")
    with fsspec.filesystem("file").open(
        str(path), "rt", compression="infer", encoding="utf-8-sig", newline=""
    ) as file:
        if kind == "CSV":
            return _csv_rows(file)
        rows = _json_values(file.read())
    if len(rows) == 1 and isinstance(rows[0], list):
        rows = rows[0]
    elif len(rows) == 1 and isinstance(rows[0], dict) and kind == "JSON":
        rows = _unwrapped(rows[0])
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"row {i} has no named columns: {row!r:.60}")
    return rows


def _json_values(text: str) -> list:
    """The JSON values that follow each other in a text, be it one a line or one alone. NaN, which
    pandas has for what is missing, is read as null.

    >>> _json_values('{"a": 1}\\n{"a": 2}')
    [{'a': 1}, {'a': 2}]
    """
    decoder = json.JSONDecoder(object_pairs_hook=_named, parse_constant=lambda name: None)
    blanks = re.compile(r"\s*")
    values = []
    start = blanks.match(text).end()
    while start < len(text):
        try:
            value, end = decoder.raw_decode(text, start)
        except ValueError as error:
            n_lines = text.count("\n", 0, start)
            raise ValueError(f"line {n_lines + 1}: {error}") from None
        values.append(value)
        start = blanks.match(text, end).end()
    return values


def _named(pairs: Iterable[tuple[str, object]]) -> dict:
    row = {}
    for name, value in pairs:
        if name in row:
            raise ValueError(f"the name {name!r} occurs more than once")
        row[name] = value
    return row


def _unwrapped(value: dict) -> list:
    """The rows in an object around a list or around several splits, or in a form that pandas
    writes; any other object is a row.

    >>> _unwrapped({"version": 1, "data": [{"a": 1}, {"a": 2}]})
    [{'a': 1}, {'a': 2}]
    """
    tables = {}
    for name, cell in value.items():
        if isinstance(cell, list) and cell and isinstance(cell[0], dict):
            tables[name] = cell
            is_talk = name in conversations.COLUMNS and conversations.is_turn(cell[0])
            if is_talk or {"role", "content"} <= cell[0].keys():
                return [value]  # one conversation
    if len(tables) == 1:
        return next(iter(tables.values()))
    return _train_of(tables) if tables else _rows_of_pandas(value)


def _rows_of_pandas(value: dict) -> list:
    """The rows in what `DataFrame.to_json` writes; any other object is a row.

    >>> _rows_of_pandas({"a": {"0": 1, "1": 2}})
    [{'a': 1}, {'a': 2}]
    """
    if "columns" in value and "data" in value:
        return [_named(zip(value["columns"], row, strict=True)) for row in value["data"]]
    cells = list(value.values())
    if all(isinstance(cell, dict) for cell in cells):
        if not all(label.isdigit() for cell in cells for label in cell):
            return cells  # one row for each name
    elif not all(isinstance(cell, list) for cell in cells):
        return [value]
    return pandas.DataFrame(value, dtype=object).to_dict("records")


def _csv_rows(file: TextIO) -> list[dict[str, str]]:
    """The rows of a CSV file; a line in which nothing stands is no row. A first line "sep=;", which
    Excel writes, is skipped.
    """
    csv.field_size_limit(2**31 - 1)
    first = file.readline()

    def n_names(separator: str) -> int:
        return len(next(csv.reader([first], delimiter=separator)))

    separator = max(",;\t|", key=n_names)
    file.seek(0)
    lines = csv.reader(file, delimiter=separator, strict=True)
    names = []
    rows = []
    begins = 1
    try:
        for fields in lines:
            if not names and fields and not fields[0].startswith("sep="):
                names = [name.strip() or f"column {i}" for i, name in enumerate(fields, start=1)]
                _named(zip(names, names))
            elif fields and len(fields) == len(names):
                rows.append(dict(zip(names, fields)))
            elif names and "".join(fields).strip():
                raise csv.Error(f"{len(fields)} fields, the first line has {len(names)}")
            begins = lines.line_num + 1
    except csv.Error as error:
        raise ValueError(f"line {begins}: {error}") from None
    return rows
