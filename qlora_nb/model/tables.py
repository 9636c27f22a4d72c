"""Whatever somebody names as `dataset` becomes a table of plain Python values here: a file, a
folder or a data set of the hub, all by one set of rules.

- *JSON* is parsed by Python's `json`: a date stays text, an integer an integer, and a column that
  nobody asks for can hold anything. One row a line, a list of rows, an object around such a
  list, or one of the forms that pandas writes (records, columns, index, split, table).
- *CSV* is parsed by Python's `csv`, and every field is text ("007", "NA", ""). The separator is the
  one of `,;\\t|` that makes the most of the first line.
- *Parquet, Arrow and Feather* are read by pyarrow, the asked columns alone.

JSON and CSV can be packed, as .gz, .bz2, .xz or .zip. Of a folder `datasets` says which files are
the split `train`, by its README or by their names; a folder that `save_to_disk` wrote is read as
one. A data set of the hub is its folder in the hub's cache.

The libraries' own readers guess types, shift the fields of a CSV row that has one too many and name
no line. No code of a data set is ever run: `datasets` has not done so since its version 4.
"""

import csv
import glob
import json
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
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
from qlora_nb.model import fetch


@dataclass
class Table:
    """Rows that can be read again and again, a few columns at a time."""

    columns: list[str]
    """the names, in the data's order"""
    n_rows: int
    read: Callable[[list[str]], Iterable[dict[str, object]]]
    """columns → the rows, which may have other columns besides, or lack some"""

    def rows(self, columns: list[str]) -> Iterator[dict[str, object]]:
        """Every row with these columns and no others; a value that is missing is None.

        Raises:
            KitError: a Parquet or Arrow file is damaged.
        """
        for row in self.read(columns):
            yield {column: row.get(column) for column in columns}


def read_table(name: str) -> Table:
    """The table in a file, a folder or a data set of the hub.

    Args:
        name: the path, with `~` for the home folder, or owner/name.

    Raises:
        KitError: nothing lies there, it is no table, it is damaged (the line is named), or it holds
            no row.
    """
    path = sources.local_path(name).absolute()
    if not path.exists():
        path = _snapshot(name)
    with _reading(path):
        table = _read_folder(path) if path.is_dir() else _read_files([path])
        if not table.n_rows:
            raise ValueError("it holds no row")
    return table


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
        how = {"allow_patterns": fetch.PATTERNS["dataset"], "local_files_only": True}
        return Path(snapshot_download(repo_id, repo_type="dataset", **how))


def _read_folder(folder: Path) -> Table:
    if any(folder.rglob("state.json")):  # of save_to_disk
        saved = datasets.load_from_disk(folder)
        if isinstance(saved, datasets.DatasetDict):
            saved = _train_of(saved)
        return _of_arrow(saved.data.table, folder)
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
    return _read_files(files)


def _train_of(splits: dict[str, object]) -> object:
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


def _read_files(files: list[Path]) -> Table:
    """One table of files that have the same format."""
    kind = _format_of(files[0])
    path = files[0] if len(files) == 1 else files[0].parent
    if kind == "Parquet":
        return _of_arrow([str(file) for file in files], path)
    if kind == "Arrow":
        tables = [_arrow_table(file) for file in files]
        return _of_arrow(pyarrow.concat_tables(tables, promote_options="permissive"), path)
    rows = []
    for file in files:
        with _reading(file):
            rows += _read_text(file, kind)
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(list(names), len(rows), lambda columns: rows)


def _of_arrow(source, path: Path) -> Table:
    """A table of Parquet files or of an Arrow table, whose columns are read when they are asked
    for.
    """
    fragments = pyarrow.dataset.dataset(source).get_fragments()
    schemas = [fragment.physical_schema for fragment in fragments]
    schema = pyarrow.unify_schemas(schemas, promote_options="permissive")
    found = pyarrow.dataset.dataset(source, schema=schema)
    names = found.schema.names

    def rows(columns: list[str]) -> Iterator[dict[str, object]]:
        with _reading(path):
            table = found.to_table([name for name in names if name in columns])
            table.validate(full=True)  # a damaged file can hold texts that are none
            yield from datasets.Dataset(table).to_list()

    return Table(names, found.count_rows(), rows)


def _arrow_table(path: Path) -> pyarrow.Table:
    file = pyarrow.memory_map(str(path))
    opened = pyarrow.ipc.open_stream  # as `datasets` writes it
    if file.read(6) == b"ARROW1":
        opened = pyarrow.ipc.open_file  # Feather
    file.seek(0)
    return opened(file).read_all()


def _read_text(path: Path, kind: str | None) -> list[dict[str, object]]:
    if kind is None:
        raise ValueError("its ending is that of no data")
    how = {"compression": "infer", "encoding": "utf-8-sig", "newline": ""}
    with fsspec.filesystem("file").open(str(path), "rt", **how) as file:
        if kind == "CSV":
            return _csv_rows(file)
        return _json_rows(file, is_row=kind == "JSON lines")


def _json_rows(file: TextIO, is_row: bool) -> list[dict[str, object]]:
    """The rows of a JSON file: one a line, if the first line is a value of its own.

    Args:
        is_row: an only line is a row, not an object around rows.
    """
    decode = json.JSONDecoder(object_pairs_hook=_named).decode
    found = []
    for number, line in enumerate(file, start=1):
        try:
            if line.strip():
                found.append(decode(line))
        except ValueError as error:
            if found:
                reason = str(error).replace(": line 1 column", " at character")
                raise ValueError(f"line {number}: {reason}") from None
            file.seek(0)
            found = [decode(file.read())]
            is_row = False
            break
    if len(found) == 1 and not is_row:
        found = _unwrapped(found[0])
    for i, row in enumerate(found):
        if not isinstance(row, dict):
            raise ValueError(f"row {i} has no named columns: {row!r:.60}")
    return found


def _named(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the name {name!r} occurs more than once")
    return row


def _unwrapped(value: object) -> list:
    """The rows in one JSON value: a list, an object around one or around several splits, a form
    that pandas writes, or a row.

    >>> _unwrapped({"version": 1, "data": [{"a": 1}, {"a": 2}]})
    [{'a': 1}, {'a': 2}]
    """
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        return [value]
    tables = {}
    for name, cell in value.items():
        if isinstance(cell, list) and cell and isinstance(cell[0], dict):
            tables[name] = cell
            if {"role", "content"} <= cell[0].keys():
                return [value]  # one conversation
    if len(tables) == 1:
        return next(iter(tables.values()))
    if tables:
        return _train_of(tables)
    return _rows_of_pandas(value)


def _rows_of_pandas(value: dict[str, object]) -> list:
    """The rows in what `DataFrame.to_json` writes; any other object is a row.

    >>> _rows_of_pandas({"a": {"0": 1, "1": 2}})
    [{'a': 1}, {'a': 2}]
    """
    if "columns" in value and "data" in value:
        return [_named(list(zip(value["columns"], row, strict=True))) for row in value["data"]]
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
                _named([(name, name) for name in names])
            elif fields and len(fields) == len(names):
                rows.append(dict(zip(names, fields)))
            elif names and "".join(fields).strip():
                raise csv.Error(f"{len(fields)} fields, the first line has {len(names)}")
            begins = lines.line_num + 1
    except csv.Error as error:
        raise ValueError(f"line {begins}: {error}") from None
    return rows
