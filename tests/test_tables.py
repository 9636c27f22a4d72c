"""Data that people bring, in every form that it lies in: read as it is, or refused in a sentence.

References are the texts themselves, pandas, pyarrow and `datasets`: what they wrote is read again.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import math
import os
import subprocess
import sys
import zipfile

import datasets
import pandas
import pyarrow
import pytest
from loopback_hub import Hub
from pyarrow import feather, parquet

from qlora_nb import sources
from qlora_nb.errors import KitError
from qlora_nb.model.tables import read_table

ROWS = [
    {"instruction": "Wer ist Änna?", "input": "", "output": "2024-01-01"},
    {"instruction": 'Say "a, b".', "input": "007", "output": "two\nlines"},
    {"instruction": "Line\u2028end?", "input": "NA", "output": "1e5"},
]
NAMES = list(ROWS[0])


def read(path, columns=None):
    """Names, and all rows."""
    names, none = read_table(str(path), ())
    again, rows = read_table(str(path), columns or names)
    assert none == [{}] * len(rows)
    assert again == names
    return names, rows


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


def refused(path):
    with pytest.raises(KitError) as caught:
        read(path)
    said = str(caught.value)
    assert "Traceback" not in said
    assert said.count("\n") == 0
    return said


def json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# --- JSON ---

FORMS = {
    "list.json": json.dumps(ROWS),
    "pretty.json": json.dumps(ROWS, indent=2),
    "list.jsonl": json.dumps(ROWS, indent=1),
    "lines.json": json_lines(ROWS),
    "lines.jsonl": json_lines(ROWS),
    "lines.ndjson": json_lines(ROWS).rstrip("\n"),
    "LINES.JSONL": json_lines(ROWS),
    "crlf.jsonl": json_lines(ROWS).replace("\n", "\r\n"),
    "blank.jsonl": "\n\n" + json_lines(ROWS).replace("\n", "\n  \n") + "\n",
    "two_on_one.jsonl": json_lines(ROWS[:2]).replace("\n", "") + json_lines(ROWS[2:]),
    "pretty_rows.json": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "list_on_one_line.jsonl": json.dumps(ROWS),
    "list_by_line.json": "[" + ",\n".join(json.dumps(row) for row in ROWS) + "]",
    "data.json": json.dumps({"data": ROWS}),
    "pretty_data.json": json.dumps({"version": "1.1", "data": ROWS, "tags": ["x"]}, indent=4),
    "rows.json": json.dumps({"meta": {"license": "mit", "n": 3}, "rows": ROWS}),
    "instances.json": json.dumps({"type": "text2text", "instances": ROWS}),
    "splits.json": json.dumps({"train": ROWS, "test": ROWS[:1]}),
    "by_name.json": json.dumps({f"q{i}": row for i, row in enumerate(ROWS)}, indent=1),
    "one_a_list.json": json.dumps({name: [row[name] for row in ROWS] for name in NAMES}),
}


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("name", FORMS)
def test_json_in_every_form(tmp_path, name, bom):
    assert read(write(tmp_path / name, bom + FORMS[name])) == (NAMES, ROWS)


@pytest.mark.parametrize("orient", ["records", "columns", "index", "split", "table"])
@pytest.mark.parametrize("indent", [0, 2])
def test_json_as_pandas_writes_it(tmp_path, orient, indent):
    frame = pandas.DataFrame([row | {"n": i} for i, row in enumerate(ROWS * 5)])
    frame.to_json(tmp_path / "a.json", orient=orient, indent=indent)
    columns, rows = read(tmp_path / "a.json")
    assert [name for name in columns if name != "index"] == [*NAMES, "n"]
    assert [{name: row[name] for name in [*NAMES, "n"]} for row in rows] == frame.to_dict("records")


@pytest.mark.parametrize("orient", ["columns", "index", "split", "records"])
def test_pandas_json_with_holes_and_lists(tmp_path, orient):
    turns = [{"role": "user", "content": "Hi"}]
    frame = pandas.DataFrame({"messages": [turns, turns], "note": ["x", None], "n": [1, None]})
    frame.to_json(tmp_path / "a.json", orient=orient)
    _, rows = read(tmp_path / "a.json")
    assert [row["messages"] for row in rows] == [turns, turns]
    assert rows[0]["note"] == "x"
    assert rows[1]["note"] is None or math.isnan(rows[1]["note"])


@pytest.mark.fault(48)
def test_values_keep_their_python_type(tmp_path):
    row = {"d": "2024-01-01", "i": 7, "f": 1.5, "b": True, "n": None, "l": [1, "a"], "big": 2**70}
    row |= {"iso": "2024-01-01T10:00:00Z", "digits": "007", "o": {"x": [], "y": {}}}
    _, rows = read(write(tmp_path / "a.jsonl", json_lines([row, {"d": 3}])))
    assert rows[0] == row
    assert [type(value) for value in rows[0].values()] == [type(value) for value in row.values()]
    assert rows[1] == dict.fromkeys(row) | {"d": 3}, "what a row lacks is None"


def test_nan_is_nothing(tmp_path):
    _, rows = read(write(tmp_path / "a.json", '[{"a": NaN, "b": [NaN]}, {"b": null}]'))
    assert rows == [{"a": None, "b": [None]}, {"a": None, "b": None}]


def test_one_line_that_is_a_row_is_a_row(tmp_path):
    turns = {"messages": [{"role": "user", "content": "Hi"}]}
    assert read(write(tmp_path / "a.jsonl", json_lines([turns])))[1] == [turns]
    assert read(write(tmp_path / "a.json", json_lines(ROWS[:1])))[1] == ROWS[:1]
    for more in ({}, {"model": "any"}, {"tools": [{"type": "function"}]}):
        asked = more | turns
        assert read(write(tmp_path / "asked.json", json.dumps(asked, indent=2)))[1] == [asked]
    speakers = [("from", "value"), ("speaker", "text"), ("author", "content")]
    for who, what in speakers:
        asked = {"id": 1, "conversations": [{who: "human", what: "Hi"}, {who: "gpt", what: None}]}
        assert read(write(tmp_path / "asked.json", json.dumps(asked, indent=2)))[1] == [asked]
    several = {"conversations": [{"id": 1, "conversations": []}, {"id": 2, "conversations": []}]}
    path = write(tmp_path / "several.json", json.dumps(several))
    assert read(path)[1] == several["conversations"]
    tree = {"messages": [{"message_id": "a", "parent_id": None, "role": "prompter", "text": "Q"}]}
    assert read(write(tmp_path / "tree.json", json.dumps(tree)))[1] == tree["messages"]
    context = {"instruction": "Q", "context": [{"title": "T"}]}
    assert read(write(tmp_path / "b.ndjson", json_lines([context])))[1] == [context]


@pytest.mark.fault(49)
def test_a_long_file_whose_unneeded_column_changes_its_type_late(tmp_path):
    n_rows = 150_000
    path = tmp_path / "long.jsonl"
    with path.open("w") as file:
        for i in range(n_rows):
            odd = i if i < 140_000 else {"now": [str(i)]}
            file.write(json.dumps({"instruction": f"Q{i}?", "odd": odd, "output": str(i)}) + "\n")
    _, rows = read_table(str(path), ["output", "instruction"])
    assert len(rows) == n_rows
    assert rows[-1] == {"output": "149999", "instruction": "Q149999?"}


BAD_JSON = {
    "cut.jsonl": (json_lines(ROWS * 2)[:-9], "line 6: "),
    "comma.jsonl": (json_lines(ROWS) + '{"instruction": "a",}\n' + json_lines(ROWS), "line 4: "),
    "after_blank.jsonl": ("\n\n" + json_lines(ROWS[:1]) + "\nnonsense\n", "line 5: "),
    "first.jsonl": ('{"instruction": "a", "out\n' + json_lines(ROWS), "line 1 "),
    "cut.json": ('[\n {"a": 1},\n {"a": 2', "line 3 "),
    "no_names.json": ('[{"a": 1}, ["b"]]', "row 1 has no named columns: ['b']"),
    "values.json": ("[[1, 2], [3, 4]]", "row 0 has no named columns"),
    "scalar.jsonl": ('{"a": 1}\n7\n', "row 1 has no named columns: 7"),
    "twice.jsonl": (json_lines(ROWS) + '{"a": 1, "b": 2, "a": 3}\n', "line 4: the name 'a' occurs"),
    "twice.json": ('[{"output": "x",\n "output": "y"}]', "the name 'output' occurs more than once"),
    "twice_split.json": ('{"columns": ["a", "a"], "data": [[1, 2]]}', "occurs more than once"),
    "splits.json": (json.dumps({"dev": ROWS, "test": ROWS}), "trained on? dev, test"),
    "an_object_alone.json": ("{}", "holds no row"),
    "uneven.json": ('{"a": ["x"], "b": ["y", "z"]}', "same length"),
    "empty.json": ("", "holds no row"),
    "blank.jsonl": ("\n \n", "holds no row"),
    "nothing.json": ("[]", "holds no row"),
    "nothing_in_it.json": ('{"data": []}', "holds no row"),
    "html.json": ("<!DOCTYPE html>\n<html>404</html>", "line 1"),
    "lfs.jsonl": ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "line 1"),
    "number.json": ("7", "no named columns"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_damaged_json_is_refused_by_its_line(tmp_path, name):
    text, words = BAD_JSON[name]
    said = refused(write(tmp_path / name, text))
    assert words in said
    assert str(tmp_path / name) in said


# --- CSV ---


def csv_text(separator=",", **how):
    return pandas.DataFrame(ROWS).to_csv(sep=separator, index=False, **how)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("how", [{}, {"quoting": 1}, {"lineterminator": "\r\n"}])
def test_csv_in_every_form(tmp_path, separator, bom, how):
    said = [row | {"output": row["output"].replace("\n", "\n")} for row in ROWS]
    for name in ("a.csv", "A.CSV", "a.tsv"):
        path = write(tmp_path / name, bom + csv_text(separator, **how))
        assert read(path) == (NAMES, said)


def test_every_field_of_csv_is_its_text(tmp_path):
    fields = ["NA", "", "007", "1e5", "nan", "null", "None", "True", "-0", " a ", "1,5", "2024-1-1"]
    fields += ["N/A", "'x'", "=SUM(A1)", 'a "b" c', "\\n", "#", "€", "\u2028"]
    frame = pandas.DataFrame({"n": range(len(fields)), "text": fields})
    frame.to_csv(tmp_path / "a.csv", index=False)
    _, rows = read(tmp_path / "a.csv")
    assert [row["text"] for row in rows] == fields


CSV = {
    "excel": ("sep=;\r\na;b\r\n1,5;x\r\n", [{"a": "1,5", "b": "x"}]),
    "excel with a BOM, commas": ("\ufeffsep=,\na,b\n1,x\n", [{"a": "1", "b": "x"}]),
    "a name with a comma": ('"q, or question";b\nx;y\n', [{"q, or question": "x", "b": "y"}]),
    "a name with semicolons": ('"a;b;c",d\nx,y\n', [{"a;b;c": "x", "d": "y"}]),
    "one column": ("text\nHello.\nBye.\n", [{"text": "Hello."}, {"text": "Bye."}]),
    "one column, quoted": ('text\n"Hello, you"\n', [{"text": "Hello, you"}]),
    "spaces around names": (" a , b\t\n1,2\n", [{"a": "1", "b": "2"}]),
    "empty lines": ("a,b\n\n1,2\n   \n\n\n", [{"a": "1", "b": "2"}]),
    "first line empty": ("\na,b\n1,2\n", [{"a": "1", "b": "2"}]),
    "old Mac": ("a,b\r1,2\r", [{"a": "1", "b": "2"}]),
    "no last line end": ("a,b\n1,2", [{"a": "1", "b": "2"}]),
    "a quoted line end": ('a,b\n"x\r\ny","p ""q"""\n', [{"a": "x\r\ny", "b": 'p "q"'}]),
    "pandas' index": (",a\n0,x\n", [{"column 1": "0", "a": "x"}]),
    "saved twice": (",Unnamed: 0,a\n0,0,x\n", [{"column 1": "0", "Unnamed: 0": "0", "a": "x"}]),
    "two indices": (",,a\n0,1,x\n", [{"column 1": "0", "column 2": "1", "a": "x"}]),
    "Excel's empty columns": ("a;b;;\n1;2;;\n", [{"a": "1", "b": "2", "column 3": "", "column 4": ""}]),
}  # fmt: skip


@pytest.mark.parametrize("name", CSV)
def test_csv_as_people_save_it(tmp_path, name):
    text, rows = CSV[name]
    assert read(write(tmp_path / "a.csv", text)) == (list(rows[0]), rows)


def test_a_long_field_is_read(tmp_path):
    path = write(tmp_path / "a.csv", "a,b\nx," + "y" * 300_000 + "\n")
    assert len(read(path)[1][0]["b"]) == 300_000


BAD_CSV = {
    "too many": ("a,b\n1,2\n3,4,5\n", "line 3: 3 fields, the first line has 2"),
    "too few": ("a,b\n1,2\n\n3\n", "line 4: 1 fields, the first line has 2"),
    "after a quoted line end": ('a,b\n"x\n\ny",2\n3\n', "line 5: 1 fields"),
    "within one": ('a,b\n1,2\n"x\n\ny"\n', "line 3: 1 fields"),
    "after sep=": ("sep=;\na;b\n1;2\n3\n", "line 4: 1 fields"),
    "a quote that stays open": ('a,b\n1,2\n"3,4\n5,6\n', "line 3: unexpected end of data"),
    "a backslash before a quote": ('a,b\n1,"he said \\"hi\\""\n', "line 2: "),
    "a name twice": ("a,b,a\n1,2,3\n", "the name 'a' occurs more than once"),
    "a name twice, by spaces": ("a, a\n1,2\n", "the name 'a' occurs more than once"),
    "nothing": ("", "holds no row"),
    "blank lines alone": ("\n\n", "holds no row"),
    "names alone": ("a,b\n", "holds no row"),
}


@pytest.mark.parametrize("name", BAD_CSV)
def test_damaged_csv_is_refused_by_its_line(tmp_path, name):
    text, words = BAD_CSV[name]
    assert words in refused(write(tmp_path / "a.csv", text))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "cp1252", "utf-32", "shift_jis"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
def test_other_encodings_are_refused_with_the_remedy(tmp_path, encoding, name):
    said = "あ" if encoding == "shift_jis" else "Ä"
    row = {"instruction": said, "output": said}
    text = f"instruction,output\n{said},{said}\n" if name == "a.csv" else json_lines([row] * 2)
    assert "UTF-8" in refused(write(tmp_path / name, text, encoding))


# --- Parquet, Arrow ---

WIDE = pyarrow.table(
    {
        "instruction": pyarrow.array(["a", None, "c"]).dictionary_encode(),
        "output": pyarrow.array(["1", "2", "ü"], pyarrow.large_string()),
        "turns": [[{"role": "user", "content": "x"}], [], None],
        "n": pyarrow.array([1, None, 3]),
        "no type of datasets": pyarrow.array([[("k", "v")]] * 3, pyarrow.map_("string", "string")),
    }
)
ASKED = ["turns", "output", "instruction", "n"]


def write_arrow(table, path):
    opened = pyarrow.ipc.new_stream if "stream" in path.name else pyarrow.ipc.new_file
    with opened(str(path), table.schema) as file:
        file.write_table(table)


@pytest.mark.parametrize("name", ["a.parquet", "a.feather", "stream.arrow", "file.arrow"])
def test_arrow_and_parquet_give_the_asked_columns(tmp_path, name):
    writers = {".parquet": parquet.write_table, ".feather": feather.write_feather}
    path = tmp_path / name
    writers.get(path.suffix, write_arrow)(WIDE, str(path) if path.suffix != ".arrow" else path)
    columns, rows = read(path, ASKED)
    assert columns == WIDE.column_names
    assert rows == WIDE.select(ASKED).to_pylist()


def test_parquet_as_pandas_writes_it(tmp_path):
    frame = pandas.DataFrame(ROWS, index=["x", "y", "z"])
    frame.to_parquet(tmp_path / "a.parquet")
    columns, rows = read(tmp_path / "a.parquet", NAMES)
    assert columns[:3] == NAMES
    assert rows == ROWS


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="datasets of before 4.7")
def test_values_of_several_types_are_what_datasets_gives(tmp_path):
    rows = [{"a": [{"content": "x"}, {"content": ["y", 1]}]}, {"a": [{"content": {"z": None}}]}]
    found = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    found.to_parquet(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[1] == rows
    found.save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved")[1] == rows


def test_an_unneeded_column_of_parquet_is_not_read(tmp_path):
    table = pyarrow.table({"a": ["x"] * 1000, "b": [os.urandom(50) for _ in range(1000)]})
    path = tmp_path / "a.parquet"
    parquet.write_table(table, path)
    where = parquet.ParquetFile(path).metadata.row_group(0).column(1)
    content = bytearray(path.read_bytes())
    start = where.dictionary_page_offset or where.data_page_offset
    content[start : start + where.total_compressed_size] = bytes(where.total_compressed_size)
    path.write_bytes(content)
    assert read(path, ["a"])[1] == [{"a": "x"}] * 1000
    assert "cannot be read" in refused(path)


@pytest.mark.parametrize("name", ["a.parquet", "a.feather", "stream.arrow"])
@pytest.mark.parametrize("part", [0, 0.5])
def test_a_file_that_was_cut_short_is_refused(tmp_path, name, part):
    path = tmp_path / name
    table = WIDE.select(["instruction", "output"])
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        write_arrow(table, path)
    write(path, path.read_bytes()[: int(part * path.stat().st_size)])
    assert str(path) in refused(path)


def test_texts_that_are_none_are_refused(tmp_path):
    texts = pyarrow.array([b"\xff\xfe", b"a"]).view("string")
    parquet.write_table(pyarrow.table({"a": texts}), tmp_path / "a.parquet")
    assert "Invalid UTF8" in refused(tmp_path / "a.parquet")


def test_a_name_twice_in_parquet_is_refused(tmp_path):
    table = pyarrow.Table.from_arrays([["x"], ["y"]], names=["a", "a"])
    parquet.write_table(table, tmp_path / "a.parquet")
    assert "duplicate field names" in refused(tmp_path / "a.parquet")


# --- packed ---

PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("packing", [*PACK, ".GZ", ".zip"])
@pytest.mark.parametrize("name", ["pretty.json", "lines.jsonl", "a.csv", "a.tsv"])
def test_packed_files_are_read_like_plain_ones(tmp_path, name, packing):
    text = (FORMS.get(name) or csv_text("\t")).encode()
    path = tmp_path / f"{name}{packing}"
    if packing == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"a folder/{name}", text)
    else:
        write(path, PACK[packing.lower()](text))
    assert read(path) == (NAMES, ROWS)


def test_a_zip_is_named_by_what_is_in_it_and_several_files_are_refused(tmp_path):
    path = tmp_path / "archive.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train.jsonl", json_lines(ROWS))
    assert read(path) == (NAMES, ROWS)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("test.jsonl", json_lines(ROWS))
    assert "archive.zip packs several files: unpack it" in refused(path)


@pytest.mark.parametrize("packing", [*PACK, ".zip"])
def test_a_packed_file_that_was_cut_short_is_refused(tmp_path, packing):
    content = json_lines(ROWS * 400).encode()
    if packing == ".zip":
        with zipfile.ZipFile(tmp_path / "whole.zip", "w") as archive:
            archive.writestr("a.jsonl", content)
        content = (tmp_path / "whole.zip").read_bytes()
    else:
        content = PACK[packing](content)
    refused(write(tmp_path / f"a.jsonl{packing}", content[: len(content) // 2]))


# --- folders ---


@pytest.mark.parametrize(
    "files",
    [
        ["a.csv"],
        ["train.csv"],
        ["train.csv", "test.csv"],
        ["train.csv", "validation.csv"],
        ["data/train.csv", "data/test.csv"],
        ["train/a.csv", "test/a.csv"],
        ["data/train-00000-of-00001.csv", "data/test-00000-of-00001.csv"],
        ["data/train_sft-00000-of-00001.csv", "data/test_sft-00000-of-00001.csv"],
        ["a.csv", "README.md", ".a.csv", ".DS_Store"],
        ["a.csv", "dataset_infos.json"],
        ["a.csv", "LICENSE", "notes.txt"],
    ],
)
def test_a_folder_gives_its_split_train(tmp_path, files):
    folder = tmp_path / "dätä (1)"
    for name in files:
        text = csv_text() if "test" not in name and "valid" not in name else "other\nx\n"
        write(folder / name, "{}" if name == "dataset_infos.json" else text)
    assert read(folder) == (NAMES, ROWS)


@pytest.mark.parametrize("name", ["json", "csv", "text", "pandas", "parquet"])
def test_a_folder_with_the_name_of_a_reader(tmp_path, monkeypatch, name):
    write(tmp_path / name / "a.csv", csv_text())
    monkeypatch.chdir(tmp_path)
    assert read(name) == (NAMES, ROWS)


def test_a_folder_is_read_by_the_rules_for_a_file(tmp_path):
    text = "a;b\n007;NA\n;x, y\n"
    write(tmp_path / "folder" / "train.csv", text)
    write(tmp_path / "file.csv", text)
    assert read(tmp_path / "folder") == read(tmp_path / "file.csv")
    assert "line 2: 1 fields" in refused(write(tmp_path / "other" / "b.csv", "a;b\n1\n").parent)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv.gz", ".parquet", ".arrow"])
def test_shards_are_read_in_order(tmp_path, suffix):
    for i, row in enumerate(ROWS):
        path = tmp_path / f"train-{i:05}-of-00003{suffix}"
        if suffix == ".jsonl":
            write(path, json_lines([row]))
        elif suffix == ".csv.gz":
            pandas.DataFrame([row]).to_csv(path, index=False)
        elif suffix == ".parquet":
            pandas.DataFrame([row]).to_parquet(path)
        else:
            write_arrow(pyarrow.Table.from_pylist([row]), path)
    assert read(tmp_path, NAMES)[1] == ROWS


def test_shards_that_lack_a_column_or_have_only_nulls_in_it(tmp_path):
    rows = [{"a": "x", "b": None}, {"a": "y", "b": "z"}]
    for i, row in enumerate(rows):
        datasets.Dataset.from_list([row]).to_parquet(tmp_path / "parquet" / f"{i}.parquet")
        write(tmp_path / "json" / f"{i}.jsonl", json_lines([{k: v for k, v in row.items() if v}]))
    assert read(tmp_path / "parquet")[1] == rows
    assert read(tmp_path / "json")[1] == rows


def test_shards_of_parquet_where_only_a_later_one_has_a_column(tmp_path):
    parquet.write_table(pyarrow.table({"a": ["x"]}), tmp_path / "0.parquet")
    parquet.write_table(pyarrow.table({"a": ["y"], "b": ["z"]}), tmp_path / "1.parquet")
    assert read(tmp_path)[1] == [{"a": "x", "b": None}, {"a": "y", "b": "z"}]


def test_a_readme_says_which_files_train(tmp_path):
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: good.csv\n---\n"
    write(tmp_path / "README.md", card)
    write(tmp_path / "good.csv", csv_text())
    write(tmp_path / "bad.csv", "other\nx\n")
    assert read(tmp_path) == (NAMES, ROWS)


def test_a_readme_with_several_sets_is_refused(tmp_path):
    sets = "".join(
        f"- config_name: {name}\n  data_files: {name}.csv\n" for name in ("main", "other")
    )
    write(tmp_path / "README.md", f"---\nconfigs:\n{sets}---\n")
    for name in ("main", "other"):
        write(tmp_path / f"{name}.csv", csv_text())
    said = refused(tmp_path)
    assert "Config name is missing" in said
    assert "name one file" in said
    assert read(tmp_path / "other.csv") == (NAMES, ROWS)


def test_a_damaged_shard_is_not_put_down_to_another_one(tmp_path):
    for i in range(2):
        parquet.write_table(pyarrow.table({"a": [os.urandom(9)] * 9}), tmp_path / f"{i}.parquet")
    path = tmp_path / "1.parquet"
    where = parquet.ParquetFile(path).metadata.row_group(0).column(0)
    start = where.dictionary_page_offset
    write(path, path.read_bytes()[:start] + bytes(40) + path.read_bytes()[start + 40 :])
    assert "0.parquet" not in refused(tmp_path)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_shards_by_several_writers(tmp_path, suffix):
    writer = parquet.write_table if suffix == ".parquet" else write_arrow
    for i, kind in enumerate(("string", "large_string", "null")):
        column = pyarrow.array([None if kind == "null" else "x"], kind)
        writer(pyarrow.table({"a": column}), tmp_path / f"{i}{suffix}")
    assert read(tmp_path)[1] == [{"a": "x"}, {"a": "x"}, {"a": None}]
    writer(pyarrow.table({"a": [{"b": 1}]}), tmp_path / f"3{suffix}")
    assert read(tmp_path)[1][3] == {"a": {"b": 1}}, "whoever needs a text refuses this one"


def test_a_folder_that_cannot_be_searched_says_so_and_its_file_is_read(tmp_path):
    path = write(tmp_path / "data [v2]" / "a.csv", csv_text())
    assert "name the file" in refused(path.parent)
    assert read(path) == (NAMES, ROWS)


def test_saved_by_datasets(tmp_path):
    found = datasets.Dataset.from_list(ROWS * 3)
    found.with_format("numpy", columns=["input"]).save_to_disk(tmp_path / "one", num_shards=2)
    assert read(tmp_path / "one") == (NAMES, ROWS * 3)
    chosen = found.shuffle(seed=1).select(range(2))
    chosen.save_to_disk(tmp_path / "chosen")
    assert read(tmp_path / "chosen")[1] == list(chosen)
    for train in ("train", "train_sft"):
        splits = datasets.DatasetDict({"test": found.select([0]), train: found})
        splits.save_to_disk(tmp_path / train)
        assert read(tmp_path / train) == (NAMES, ROWS * 3)
    write_arrow(pyarrow.table({"a": ["stale"]}), tmp_path / "one" / "cache-stream-1.arrow")
    assert read(tmp_path / "one") == (NAMES, ROWS * 3)
    splits = datasets.DatasetDict({"train_a": found, "train_b": found})
    splits.save_to_disk(tmp_path / "two")
    assert "train_a, train_b" in refused(tmp_path / "two")
    (shard, *_) = (tmp_path / "chosen").glob("*.arrow")
    assert read(shard)[1] == list(chosen), "one of its files, too"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], "contain any data files"),
        (["notes.txt"], "end"),
        (["picture.png"], "end"),
        (["a.csv", "b.json"], "data of another format"),
        (["train.csv", "train.parquet"], "format"),
        (["train.csv", "test.jsonl"], "format"),
        (["test.csv"], "which of its splits is to be trained on? test"),
        (["train_a-00000-of-00001.csv"], None),
        (
            ["data/train_a-00000-of-00001.csv", "data/train_b-00000-of-00001.csv"],
            "train_a, train_b",
        ),
        ([".a.csv"], "data"),
    ],
)
def test_folders_that_are_not_clear_are_refused(tmp_path, files, words):
    for name in files:
        write(tmp_path / name, csv_text())
    if words is None:
        assert read(tmp_path) == (NAMES, ROWS)
        return
    said = refused(tmp_path)
    assert words in said
    assert str(tmp_path) in said
    assert ".jsonl" in said


def test_a_script_beside_the_data_is_never_run(tmp_path):
    folder = tmp_path / "mine"
    write(folder / "a.csv", csv_text())
    ran = tmp_path / "ran"
    write(folder / "other.py", f"open({str(ran)!r}, 'w')")
    assert read(folder) == (NAMES, ROWS)
    write(folder / "mine.py", f"open({str(ran)!r}, 'w')")
    assert "scripts" in refused(folder)
    assert not ran.exists()


# --- names ---


@pytest.mark.parametrize(
    "name",
    ["a.xlsx", "a.txt", "a.pdf", "a.pkl", "a.csv.tar.gz", "a.json.bak", "csv", "a.csv.zst", "a.7z"],
)
def test_other_files_are_refused_and_the_endings_named(tmp_path, name):
    said = refused(write(tmp_path / name, csv_text()))
    for ending in (".json", ".jsonl", ".csv", ".parquet"):
        assert f"{ending}," in said
    assert str(tmp_path / name) in said


@pytest.mark.parametrize(
    "name", ["a b.csv", "ä[1].csv", "日本.csv", "a*?.csv", "a::b.csv", "#%20.csv"]
)
def test_names_of_all_kinds(tmp_path, monkeypatch, name):
    write(tmp_path / name, csv_text())
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / name, name, f"./{name}", f"~/{name}"):
        assert read(path) == (NAMES, ROWS)


@pytest.mark.parametrize(
    "name",
    ["rows.csv", "data/rows.csv", "data/rows.csv.gz", "no/such/folder", "~/rows.jsonl", "imdb"],
)
def test_what_is_not_there_is_named_by_the_absolute_path(tmp_path, monkeypatch, name):
    folder = tmp_path / ("long" * 20)
    folder.mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(folder)
    said = refused(name)
    where = tmp_path / "rows.jsonl" if name.startswith("~") else folder / name
    assert f"nothing lies at {where}" in said
    assert "a file or a folder" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    path = write(tmp_path / "a.csv", csv_text())
    path.chmod(0)
    assert "Permission denied" in refused(path)


# --- the hub ---


@pytest.fixture
def hub():
    hub = Hub({"README.md": b"---\nlicense: mit\n---\n"}, weights="")
    yield hub
    hub.close()


PROGRAM = """
import sys
from qlora_nb.errors import KitError
from qlora_nb.model.tables import read_table
try:
    print("\\nfound", *read_table("a/b", ["instruction", "input", "output"]))
except KitError as error:
    print("\\nrefused", error)
"""


def read_from(hub, home, **more):
    """What a fresh process finds in the data set a/b."""
    ways = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | ways | {"HF_HUB_OFFLINE": "0"} | more,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    "files",
    [
        {"rows.jsonl": json_lines(ROWS)},
        {"train.csv": csv_text(";"), "test.csv": "x\n1\n"},
        {
            "data/train_sft-00000-of-00001.jsonl": json_lines(ROWS),
            "data/test_sft-00000-of-00001.jsonl": '{"x": 1}\n',
        },
    ],
)
def test_a_hub_data_set_is_read_like_a_folder_and_again_without_the_hub(hub, tmp_path, files):
    hub.files |= {name: text.encode() for name, text in files.items()}
    hub.files["evil.py"] = b"1 / 0"
    expected = f"found {NAMES} {ROWS}"
    assert read_from(hub, tmp_path) == expected
    assert read_from(hub, tmp_path, HF_HUB_OFFLINE="1") == expected
    assert read_from(hub, tmp_path, HF_ENDPOINT="http://127.0.0.1:9") == expected
    assert not list(tmp_path.rglob("*.py"))


def test_a_hub_data_set_without_one_split_to_train_on_is_refused(hub, tmp_path):
    for name in ("train_sft", "train_gen", "test_sft"):
        hub.files[f"data/{name}-00000-of-00001.jsonl"] = json_lines(ROWS).encode()
    said = read_from(hub, tmp_path)
    assert said.startswith("refused")
    assert "test_sft, train_gen, train_sft" in said


def test_a_hub_that_is_away_and_one_that_says_no(hub, tmp_path):
    said = read_from(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert "not in the local cache" in said
    assert f"{os.getcwd()}/a/b" in said
    hub.mode = "404"
    assert "knows no such repository" in read_from(hub, tmp_path)


def test_every_ending_is_fetched():
    from qlora_nb.model import fetch

    for ending in sources.DATA_FORMATS:
        assert f"*{ending}*" in fetch.PATTERNS["dataset"]
