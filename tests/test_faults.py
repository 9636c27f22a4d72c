"""The fault matrix: 51 kinds of fault and bad input, each with tests that inject it for real, and
what else people do.

`FAULTS` names the rows. A test that holds a row carries its number, `@pytest.mark.fault(12)`; most
stand beside what they test. Those that belong to no module in particular stand here: files and
folders of a strange kind, processes, places that cannot be written to.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import nbformat
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from nbclient import NotebookClient
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from qlora_nb import cards, cli, machine
from qlora_nb import pocket as pocket_package
from qlora_nb.answer import adapters, generate, prompt_files
from qlora_nb.batch import sequence
from qlora_nb.errors import KitError, explain_missing_names
from qlora_nb.memory import preflight
from qlora_nb.model import batching, data, device, load
from qlora_nb.pocket import ADAPTER_DIR, MODEL_DIR
from qlora_nb.record import runs, seal
from qlora_nb.settings import resolve, validate
from qlora_nb.train import checkpoints

FAULTS = {
    1: "unknown parameter",
    2: "values as text",
    3: "learning rate",
    4: "steps, batch, accumulation, length",
    5: "quant_type, compute dtype",
    6: "block size",
    7: "rank",
    8: "target modules",
    9: "alpha, dropout",
    10: "bfloat16 on a T4",
    11: "no GPU or too small a one",
    12: "out of memory in a step",
    13: "offline and not cached",
    14: "download cut, weights truncated",
    15: "401, 403",
    16: "disk full",
    17: "output folder",
    18: "SIGKILL in a step",
    19: "SIGKILL while saving",
    20: "a checkpoint's file damaged",
    21: "resume with other settings",
    22: "the stop button",
    23: "SIGTERM",
    24: "two runs into one folder",
    25: "NaN",
    26: "empty data, odd rows",
    27: "row too long",
    28: "malformed line, BOM, CRLF",
    29: "odd prompts",
    30: "hostile output",
    31: "sampling parameters",
    32: "adapter of another base, corrupt",
    33: "a token",
    34: "kernel dies under papermill",
    35: "cell timeout, papermill killed",
    36: "a cell run twice",
    37: "no front end",  # with Colab's ipywidgets 7.7.1: `make verify`, colab
    38: "versions",
    39: "one core, 2 GB",  # really so confined: `make verify`, one_core
    40: "slider dragged fast",
    41: "fork after CUDA init",
    42: "HOME read-only",
    43: "the training cell run twice",
    44: '"before" measured again after training',
    45: "a quick trial of a few rows",
    46: "cells out of order",
    47: "two answers into one file",
    48: "dates as text in JSON",
    49: "an unneeded column that changes its type late",
    50: "the newest run",
    51: "a fetch or a copy killed",
    52: "a flipped bit",
    53: "pickles, custom code",
    54: "a small address space",
    55: "a notebook as a script, own variables",
    56: "several processes started together",
}

LEAST_CASES = 280
"""How many docs/claims.md says there are."""


def test_every_row_of_the_matrix_has_tests(fault_tests):
    assert list(FAULTS) == list(range(1, len(FAULTS) + 1))
    assert set(fault_tests) == set(FAULTS), (
        "a row without a test, or a test of a row that is not there"
    )
    cases = {test for tests in fault_tests.values() for test in tests}
    assert len(cases) >= LEAST_CASES


# ---- data that somebody brings
# ---------------------------------------------------------------------------------------

ROWS = [{"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."} for i in range(8)]
LINES = "\n".join(map(json.dumps, ROWS))
CSV = "instruction,input,output\n" + "\n".join(f"Say {i}.,,It is {i}." for i in range(8))


def loaded(path, **values):
    return data.load(validate({"dataset": str(path), "eval_rows": 2, "train_rows": 10, **values}))


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
        ("bom.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("bom.csv", b"\xef\xbb\xbf" + CSV.encode()),
        ("crlf.jsonl", LINES.replace("\n", "\r\n")),
        ("crlf.csv", CSV.replace("\n", "\r\n")),
        ("blank lines.jsonl", LINES.replace("\n", "\n\n")),
        ("indented.json", json.dumps(ROWS, indent=2)),
        ("wrapped.json", json.dumps({"data": ROWS})),
        ("semicolons.csv", CSV.replace(",", ";")),
        ("tabs.csv", CSV.replace(",", "\t")),
        ("a folder 'ü\" [x]/rows [1-3]*?.json", json.dumps(ROWS)),
        (
            "more columns.jsonl",
            LINES.replace('"input": ""', '"input": "", "n": {"deep": [1, null]}'),
        ),
    ],
)
def test_data_that_is_odd_works(tmp_path, name, content):
    train, held_out = loaded(put(tmp_path / name, content))
    assert {row["output"] for row in [*train, *held_out]} == {row["output"] for row in ROWS}


@pytest.mark.fault(26, 28)
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.json", "", "it holds no row"),
        ("empty.jsonl", "\n\n", "cannot be read"),
        ("empty.csv", "", "cannot be read"),
        ("empty.parquet", "", "cannot be read"),
        ("null.json", "null", "row 0 has no named columns: None"),
        ("number.json", "3", "row 0 has no named columns: 3"),
        ("texts.json", '["a", "b"]', "row 0 has no named columns: 'a'"),
        ("dict.json", json.dumps({"data": 3}), "no column instruction and output"),
        ("deep.json", "[" * 100_000, "cannot be read"),
        ("cut.json", json.dumps(ROWS)[:100], "line 1"),
        ("line.jsonl", LINES.replace('"Say 5."', '"Say 5.'), "line 6: Expecting"),
        ("null row.jsonl", LINES + "\nnull", "row 8 has no named columns"),
        (
            "number row.jsonl",
            LINES + '\n{"instruction": 5, "output": "x"}',
            r"not text in row 8 \(got 5\)",
        ),
        (
            "latin.json",
            json.dumps([{"instruction": "Grüß", "output": "x"}], ensure_ascii=False).encode(
                "latin-1"
            ),
            "in UTF-8",
        ),
        ("latin.jsonl", '{"instruction": "Grüß", "output": "x"}'.encode("latin-1"), "in UTF-8"),
        ("latin.csv", "instruction,output\nGrüß,x".encode("latin-1"), "in UTF-8"),
        ("utf16.jsonl", LINES.encode("utf-16"), "in UTF-8"),
        ("a field too many.csv", CSV + "\na,b,c,d", "line 10: 4 fields, the first line has 3"),
        ("a field too few.csv", CSV + "\na,b", "line 10: 2 fields, the first line has 3"),
        ("no gzip.json.gz", json.dumps(ROWS), "cannot be read"),
        ("no.parquet", json.dumps(ROWS), "cannot be read"),
        ("rows.xlsx", "x", "that of no data.*bring a file that ends in"),
        ("turns.json", json.dumps([{"messages": "hi"}] * 4), "0 usable rows"),
        ("no turns.json", json.dumps([{"messages": [None]}] * 4), "0 usable rows"),
        (
            "parts.json",
            json.dumps([{"messages": [{"role": "user", "content": [{"type": "text"}]}] * 2}] * 4),
            "0 usable rows",
        ),
        (
            "tree.json",
            json.dumps([{"message_id": ["a"], "parent_id": None, "role": "x", "text": ""}] * 4),
            "cannot be used",
        ),
    ],
)
def test_data_that_cannot_be_used_is_refused(tmp_path, name, content, words):
    with pytest.raises(KitError, match=words) as refused:
        loaded(put(tmp_path / name, content))
    assert refused.value.remedy
    assert len(str(refused.value)) < 700


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("nested", "not text in row 0"),
        ("binary", "not text in row 0"),
        ("cut", "cannot be read"),
        ("renamed", "cannot be read"),
    ],
)
def test_parquet_of_other_kinds(tmp_path, kind, words):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / ("rows.json" if kind == "renamed" else "rows.parquet")
    columns = {"nested": pa.array([{"a": 1}] * 4), "binary": pa.array([b"a"] * 4)}
    pq.write_table(
        pa.table(
            {"instruction": columns.get(kind, pa.array(["a"] * 4)), "output": pa.array(["a"] * 4)}
        ),
        path,
    )
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(KitError, match=words):
        loaded(path)


@pytest.mark.parametrize(
    "name",
    [
        "loop.json",
        "nothing.json",
        "~nobody-of-that-name/a.json",
        "a" * 5000 + ".json",
        "a\0b.json",
        "\ud800.json",
    ],
)
def test_a_path_that_leads_nowhere(tmp_path, name):
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    with pytest.raises(KitError, match="dataset"):
        preflight.refuse_what_cannot_run(
            validate({"dataset": str(tmp_path / name) if "nobody" not in name else name})
        )


def test_a_folder_as_data(tmp_path):
    put(tmp_path / "full" / "train.json", json.dumps(ROWS))
    assert len(loaded(tmp_path / "full")[0]) == 6
    (tmp_path / "empty").mkdir()
    with pytest.raises(KitError, match="cannot be read"):
        loaded(tmp_path / "empty")
    with pytest.raises(KitError, match="bring a file that ends in"):
        loaded("/dev/null")


@pytest.mark.fault(26)
def test_fewer_rows_than_a_batch_work(tmp_path):
    train, _ = loaded(put(tmp_path / "rows.json", json.dumps(ROWS[:3])))
    settings = validate({"max_steps": 2, "per_device_train_batch_size": 8})
    tokenizer = load.load_tokenizer(settings)
    rows = batching.in_training_order(data.tokenize_rows(train, tokenizer, settings), settings)
    assert (len(train), len(rows)) == (1, 2 * 8 * settings.gradient_accumulation_steps)


# ---- models and adapters that somebody brings
# ------------------------------------------------------------------------


def config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def as_pickle(folder):
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def with_nan(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    name = next(n for n in weights if n.endswith("dense.weight"))
    weights[name] = torch.full_like(weights[name], float("nan"))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.fault(25)
@pytest.mark.parametrize(
    ("hurt", "words"),
    [
        (lambda f: [t.unlink() for t in f.glob("tokenizer*")], "the tokenizer cannot be loaded"),
        (
            lambda f: [t.write_bytes(t.read_bytes()[:100]) for t in f.glob("tokenizer*")],
            "the tokenizer cannot be loaded",
        ),
        (
            lambda f: [t.write_text("[]") for t in f.glob("tokenizer*")],
            "the tokenizer cannot be loaded",
        ),
        (lambda f: (f / "config.json").write_text("[]"), "cannot be loaded"),
        (lambda f: (f / "config.json").write_text(""), "cannot be loaded"),
        (lambda f: (f / "config.json").write_bytes(b"{\xff}"), "cannot be loaded"),
        (config(hidden_size="x"), "cannot be loaded"),
        (config(num_attention_heads=7), "cannot be loaded"),
        (config(hidden_act="nope"), "cannot build this model"),
        (config(num_hidden_layers=10), "of its weights are not in the files"),
        (config(model_type="gpt2"), "of its weights are not in the files"),
        (as_pickle, "safetensors"),
        (with_nan, "computes NaN or infinity"),
    ],
    ids=[
        "no tokenizer",
        "cut tokenizer",
        "odd tokenizer",
        "config list",
        "config empty",
        "config bytes",
        "hidden size",
        "heads",
        "activation",
        "more layers",
        "other architecture",
        "pickle",
        "NaN",
    ],
)
def test_a_broken_model_folder_is_refused_in_a_sentence(tmp_path, hurt, words):
    folder = shutil.copytree(MODEL_DIR, tmp_path / "a model")
    hurt(folder)
    settings = validate({"model_id": str(folder)})

    def both():
        return (load.load_tokenizer(settings), load.load_base(settings))

    with pytest.raises(KitError, match=words) as refused:
        both()
    assert refused.value.remedy
    assert refused.value.value in (str(folder), "gpt_neox")


def adapter_config(**changes):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def weights(change):
    def apply(folder):
        path = folder / "adapter_model.safetensors"
        save_file({name: change(tensor) for name, tensor in load_file(path).items()}, path)

    return apply


@pytest.fixture(scope="module")
def pocket():
    settings = validate({})
    return settings, load.load_tokenizer(settings)


@pytest.mark.fault(32)
@pytest.mark.parametrize(
    ("hurt", "words"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "not an adapter folder"),
        (
            lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
            "a pickle .*not loaded",
        ),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "does not fit"),
        (lambda f: (f / "adapter_config.json").write_text("7"), "does not fit"),
        (lambda f: (f / "adapter_config.json").write_bytes(b"\xff\xfe"), "does not fit"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b""), "does not fit"),
        (lambda f: os.truncate(f / "adapter_model.safetensors", 5000), "does not fit"),
        (adapter_config(peft_type="PROMPT_TUNING"), "does not fit"),
        (adapter_config(peft_type="IA3"), "missing adapter keys"),
        (adapter_config(r=4), "does not fit"),
        (adapter_config(r="x"), "does not fit"),
        (adapter_config(lora_alpha=None), "does not fit"),
        (adapter_config(target_modules=["dense"]), "name other layers"),
        (adapter_config(target_modules="(a+)+$["), "does not fit"),
        (adapter_config(lora_alpha=1e38), "NaN or infinity"),
        (weights(lambda w: w * float("nan")), "NaN or infinity"),
        (weights(lambda w: w * 1e38), "NaN or infinity"),
        (weights(lambda w: w.to(torch.int8)), "whole numbers"),
    ],
    ids=[
        "no config",
        "pickle",
        "list",
        "number",
        "bytes",
        "empty",
        "cut",
        "other kind",
        "other kind of layers",
        "rank",
        "rank text",
        "alpha",
        "fewer layers",
        "pattern",
        "alpha without end",
        "nan",
        "infinity",
        "whole numbers",
    ],
)
def test_a_broken_adapter_is_refused_in_a_sentence(pocket, tmp_path, hurt, words):
    folder = shutil.copytree(ADAPTER_DIR, tmp_path / "an adapter")
    hurt(folder)
    settings = validate({"adapter": str(folder)})
    with pytest.raises(KitError, match=words) as refused:
        adapters.load_adapter(load.load_base(settings), adapters.find_adapter(settings)[0])
    assert refused.value.remedy


@pytest.mark.fault(32)
def test_an_adapter_for_another_base_names_both(pocket, tmp_path, capsys):
    """Of the same shape it could be the same base under another name, so it is used and this is
    said; else it is refused.
    """
    folder = shutil.copytree(ADAPTER_DIR, tmp_path / "adapter")
    adapters.load_adapter(load.load_base(pocket[0]), folder)
    assert "made for" not in capsys.readouterr().out
    adapter_config(base_model_name_or_path="EleutherAI/pythia-70m")(folder)
    adapters.load_adapter(load.load_base(pocket[0]), folder)
    assert "made for pythia-70m, the model here is pocket" in capsys.readouterr().out
    adapter_config(base_model_name_or_path="EleutherAI/pythia-70m", r=4)(folder)
    with pytest.raises(KitError, match="made for pythia-70m, the model here is pocket"):
        adapters.load_adapter(load.load_base(pocket[0]), folder)


def test_a_sealed_adapter_with_one_other_bit_is_refused_and_a_new_card_is_not(pocket, tmp_path):
    folder = shutil.copytree(ADAPTER_DIR, tmp_path / "adapter")
    seal.write_seal(folder)
    base = load.load_base(pocket[0])
    (folder / "README.md").write_text("my own card")
    adapters.load_adapter(base, folder)
    for name in ("adapter_model.safetensors", "adapter_config.json", seal.SEAL):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:])
        with pytest.raises(KitError, match="the adapter is damaged: ") as refused:
            adapters.load_adapter(base, folder)
        assert "another copy" in refused.value.remedy
        (folder / name).write_bytes(whole)


@pytest.mark.fault(52)
@pytest.mark.parametrize("name", ["model/model.safetensors", "adapter/adapter_model.safetensors"])
def test_a_flipped_bit_in_what_ships_is_refused(tmp_path, name):
    """In a copy of the whole package, as an installation that a disk has damaged."""
    package = Path(pocket_package.__file__).parent.parent
    copy = shutil.copytree(package, tmp_path / "qlora_nb")
    whole = (copy / "pocket" / name).read_bytes()
    (copy / "pocket" / name).write_bytes(whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:])
    command = [sys.executable, "-m", "qlora_nb.cli", "generate", "-p", "adapter", "pocket"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 2
    assert f"{name} is missing or damaged" in done.stderr.splitlines()[-1]
    assert "install the kit again" in done.stderr


@pytest.mark.fault(52)
def test_the_shipped_seal_names_every_file():
    folder = Path(pocket_package.__file__).parent
    files = json.loads((folder / seal.SEAL).read_text())["files"]
    assert set(files) == {
        path.relative_to(folder).as_posix()
        for part in ("adapter", "data", "model", "rewriter")
        for path in (folder / part).iterdir()
    }
    assert not seal.damage(folder)


@pytest.mark.fault(52)
def test_the_hash_of_an_unsealed_adapter_is_shown(tmp_path):
    folder = shutil.copytree(ADAPTER_DIR, tmp_path / "theirs")
    digest = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    _, where_from = adapters.find_adapter(validate({"adapter": str(folder)}))
    assert where_from == f"the adapter in theirs, sha256 {digest[:12]}"


def test_an_adapter_that_is_a_file_or_a_loop(tmp_path):
    put(tmp_path / "file", "x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("file", "loop"):
        with pytest.raises(KitError, match="not an adapter folder"):
            adapters.find_adapter(validate({"adapter": str(tmp_path / name)}))


def test_prompts_that_are_no_text(tmp_path):
    for name, content, words in (
        ("latin.txt", "Grüß".encode("latin-1"), "in UTF-8"),
        ("none.csv", b"", "cannot be read"),
        ("blank.txt", b"\n  \n", "no row of it can be asked"),
    ):
        with pytest.raises(KitError, match=words):
            prompt_files.read_rows(str(put(tmp_path / name, content)), {})
    for name in (str(tmp_path), "~nobody-of-that-name/a.txt", "a" * 5000, "a\0b"):
        with pytest.raises(KitError, match="the file of prompts cannot be read"):
            prompt_files.read_rows(name, {})
    assert generate.row_of("half a \ud83d and a whole \ud83d\ude00") == {
        "instruction": "half a \ufffd and a whole 😀",
        "input": "",
    }


# ---- places ----------------------------------------------------------------------------------------------------------


@pytest.mark.fault(17)
@pytest.mark.parametrize(
    "name",
    ["not yet/there", "with space", "ünïcode 😀", "quote ' and \"", "a" * 200, "-p", "$HOME;ls"],
)
def test_where_runs_can_go(tmp_path, name):
    settings = validate({"output_dir": str(tmp_path / name)})
    run = runs.Run(settings, "n")
    run.log({"step": 1, "loss": 1.0})
    run.finish()
    assert runs.status_of(run.folder) == "done"
    assert run.folder.is_relative_to(tmp_path / name)


@pytest.mark.fault(17)
def test_where_runs_cannot_go(tmp_path, closed_folder):
    put(tmp_path / "file", "")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for place in (closed_folder, tmp_path / "file", tmp_path / "loop"):
        with pytest.raises(KitError, match="output_dir cannot be written to") as refused:
            runs.Run(validate({"output_dir": str(place)}), "n")
        assert refused.value.remedy
    with pytest.raises(KitError, match="output_dir"):
        validate({"output_dir": "~nobody-of-that-name/runs"})


@pytest.mark.fault(42)
def test_home_read_only(closed_folder, tmp_path, root):
    """Everything goes where one may write; what must lie in HOME says so."""
    home = {
        "HOME": str(closed_folder),
        "XDG_CACHE_HOME": "",
        "HF_HOME": "",
        "QLORA_NB_CACHE": "",
        "MPLCONFIGDIR": "",
    }
    own = {k: v for k, v in os.environ.items() if k not in home} | {"HOME": str(closed_folder)}
    own |= {"PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "qlora_nb.cli"]

    def ask(*more):
        return subprocess.run(
            [*command, *more],
            cwd=root,
            env=own,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    refused = ask("fetch", "smollm2")
    assert refused.returncode == 2, refused.stderr
    assert "the cache folder cannot be written to" in refused.stderr
    assert "set QLORA_NB_CACHE" in refused.stderr
    answered = ask(
        "generate",
        "-p",
        "adapter",
        "pocket",
        "-p",
        "max_new_tokens",
        "4",
        "-p",
        "output_dir",
        str(tmp_path),
    )
    assert answered.returncode == 0, answered.stderr
    assert "Traceback" not in answered.stderr
    refused = ask("run", "--only", "03", "--out", str(closed_folder / "runs"))
    assert refused.returncode == 2
    assert "output_dir cannot be written to" in refused.stderr


@pytest.mark.fault(13)
def test_offline_is_told_by_the_command_line(tmp_path, root):
    own = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    for parameter, name in (("model_id", "EleutherAI/pythia-70m"), ("dataset", "tatsu-lab/alpaca")):
        command = [sys.executable, "-m", "qlora_nb.cli", "run", "-p", parameter, name]
        done = subprocess.run(
            command, cwd=root, env=own, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 2
        assert (
            f"{name} is not in the local cache and http://127.0.0.1:9 cannot be reached"
            in done.stderr
        )
        assert "fetch it ahead" in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.fault(24)
def test_runs_of_the_same_second_have_own_folders(tmp_path):
    program = (
        "import sys; from qlora_nb.record import runs; from qlora_nb.settings import validate\n"
        "for _ in range(20): print(runs.new_folder(validate({'output_dir': sys.argv[1]}), 'n').name)"
    )

    def start():
        return subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )

    names = [
        name
        for process in [start(), start()]
        for name in process.communicate(timeout=60)[0].split()
    ]
    assert len(set(names)) == len(names) == 40


def test_a_number_that_another_process_has_now_is_no_running_run(tmp_path):
    """After a restart of the machine the recorded process number may belong to anybody."""
    run = runs.Run(validate({"output_dir": str(tmp_path)}), "n")
    assert runs.status_of(run.folder) == "running"
    record_as(run.folder, started="2026-01-02T03:04:05+00:00")  # a copy: its date is today's
    assert runs.status_of(run.folder) == "died"


@pytest.mark.parametrize(
    "text", ["", "[]", "7", '{"status": "running"}', '{"status": "running", "pid": "x"}', "\udcff"]
)
def test_a_manifest_that_cannot_be_read_is_no_finished_run(tmp_path, text):
    folder = tmp_path / "tiny" / "n-1"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert runs.status_of(folder) == "died"
    assert not checkpoints.start(validate({"output_dir": str(tmp_path)}), "n").resumed, (
        "a new run starts beside it"
    )


def record_as(folder, **changes):
    """Change what a run's record says."""
    written = folder / "manifest.json"
    written.write_text(json.dumps(json.loads(written.read_text()) | changes))


def finished(settings, name=None, **changes) -> Path:
    """A finished run with an adapter, its folder renamed and its record changed."""
    run = runs.Run(settings, "n")
    (run.folder / "adapter").mkdir()
    run.finish()
    folder = run.folder
    if name:
        folder = folder.rename(folder.with_name(name))
    record_as(folder, **changes)
    return folder


TIMES = {
    "another zone": ("2026-03-01T09:00:00+0900", "2026-03-01T08:00:00+0000"),
    "from summer to winter": ("2026-10-25T02:50:00+0200", "2026-10-25T02:10:00+0100"),
    "over the date line": ("2026-03-02T10:00:00+1300", "2026-03-01T22:00:00-1000"),
    "written with Z": ("2026-03-01T08:00:00Z", "2026-03-01T08:00:00.250+00:00"),
    "of one second": ("2026-03-01T08:00:00.000009Z", "2026-03-01T08:00:00.000010Z"),
}


@pytest.mark.fault(50)
@pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)
@pytest.mark.parametrize("case", ["renamed", "touched", "copied", "unzipped", "linked"])
def test_latest_is_the_newest_by_the_runs_own_time(tmp_path, times, case):
    """Whatever the folders are called and when they were last changed."""
    settings = validate({"output_dir": str(tmp_path / "runs")})
    old = finished(settings, "z-last-by-name", started=times[0])
    new = finished(settings, "a-first-by-name", started=times[1])
    if case == "touched":
        os.utime(new, (1e9, 1e9))
    elif case == "copied":
        shutil.copytree(old, tmp_path / "copy")
        shutil.rmtree(old)
        shutil.copytree(tmp_path / "copy", old, copy_function=shutil.copyfile)
    elif case == "unzipped":
        shutil.make_archive(str(tmp_path / "packed"), "zip", old)
        shutil.rmtree(old)
        shutil.unpack_archive(tmp_path / "packed.zip", old)
    elif case == "linked":
        disk = tmp_path / "another disk"
        shutil.move(new, disk)
        new.symlink_to(disk)
    os.utime(old / "manifest.json")
    os.utime(old)
    assert runs.latest_done(settings, "n") == new
    assert runs.latest_done(settings, "m") is None


@pytest.mark.parametrize(
    "started",
    [
        (datetime.now(UTC) + timedelta(days=2)).isoformat(),
        (datetime.now(UTC) + timedelta(hours=1)).isoformat(),
        "9999-12-31T23:59:59+0000",
        "2026-03-01T08:00:00",
        "2026-03-01",
        "yesterday",
        None,
        1772352000,
    ],
    ids=["two days", "five minutes", "9999", "no zone", "a day", "a word", "none", "a number"],
)
@pytest.mark.parametrize("asked", ["adapter", "resume", "sequence"])
def test_a_run_whose_time_cannot_be_right_is_left_out_and_said(tmp_path, capsys, asked, started):
    settings = validate({"output_dir": str(tmp_path), "resume": "latest"})
    right = finished(settings, "right", started="2026-03-01T07:00:00+0000")
    wrong = finished(settings, "wrong", started=started)
    if asked == "adapter":
        assert runs.latest_done(settings, "n") == right
    elif asked == "resume":
        for folder in (right, wrong):
            (folder / "checkpoints").mkdir()
            record_as(folder, status="failed")
        assert checkpoints.start(settings, "n").folder == right
    else:
        given = {"profile": "tiny"}
        for folder in (right, wrong):
            (folder / "manifest.json").rename(folder / "summary.json")
            record = json.loads((folder / "summary.json").read_text())
            record |= {"status": "interrupted", "parameters": given}
            (folder / "summary.json").write_text(json.dumps(record))
        assert sequence._unfinished(settings, "latest", given)[0] == right
    said = capsys.readouterr().out
    assert re.search(
        rf"wrong is left out: its \w+\.json says that it began at {started!r:.10}", said
    )


def test_a_clock_that_is_a_little_ahead_is_borne(tmp_path):
    settings = validate({"output_dir": str(tmp_path)})
    soon = (datetime.now(UTC) + timedelta(seconds=20)).isoformat()
    ahead = finished(settings, started=soon)
    assert runs.latest_done(settings, "n") == ahead


def test_times_are_written_in_utc(tmp_path, monkeypatch):
    """Four runs while the zone changes under them; the instants go up."""
    settings, found = validate({"output_dir": str(tmp_path)}), []
    for zone in ("Asia/Tokyo", "UTC", "America/New_York", "Pacific/Kiritimati"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        manifest = json.loads((finished(settings) / "manifest.json").read_text())
        found.append(datetime.fromisoformat(manifest["started"]))
        assert manifest["started"].endswith("+00:00")
        assert abs(datetime.fromisoformat(manifest["ended"]) - datetime.now(UTC)).seconds < 60
    monkeypatch.undo()
    time.tzset()
    assert found == sorted(set(found))


def test_a_dangling_link_among_the_runs_hides_none(tmp_path):
    settings = validate({"output_dir": str(tmp_path)})
    run = runs.Run(settings, "n")
    (run.folder / "adapter").mkdir()
    run.finish()
    (tmp_path / "tiny" / "n-link").symlink_to(tmp_path / "nowhere")
    assert runs.latest_done(settings, "n") == run.folder


# ---- the notebook and the machine
# ------------------------------------------------------------------------------------


@pytest.mark.fault(36)
def test_a_cell_run_twice_holds_one_model():
    """The cells of notebook 07 that load, run twice in one kernel: the first model is gone."""
    program = """
import gc, nbformat, torch, transformers
from pathlib import Path
from IPython.core.interactiveshell import InteractiveShell
cells = nbformat.read("notebooks/07_inference.ipynb", 4).cells
first = next(i for i, c in enumerate(cells) if "parameters" in c.metadata.get("tags", []))
last = next(i for i, c in enumerate(cells) if "adapters.checked(" in c.source)
shell = InteractiveShell.instance()
for _ in range(2):
    for cell in cells[first:last + 1]:
        if cell.cell_type == "code":
            assert shell.run_cell(cell.source, store_history=True).success
gc.collect()
print("models", sum(isinstance(o, transformers.GPTNeoXForCausalLM) for o in gc.get_objects()))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.stdout.strip().endswith("models 1"), done.stdout[-500:] + done.stderr[-1000:]


@pytest.mark.fault(43, 44, 45, 46)
def test_cells_run_twice_late_or_too_early_make_no_record_lie(tmp_path):
    """The cells of notebook 06 as somebody clicks them, in a trial of four steps: too early, twice,
    "before" after training.
    """
    program = r"""
import json, sys, nbformat
from pathlib import Path
from IPython.core.interactiveshell import InteractiveShell
cells = [c for c in nbformat.read("notebooks/06_finetune_pythia_12b.ipynb", 4).cells if c.cell_type == "code"]
number = lambda text: next(i for i, c in enumerate(cells) if text in c.source)
start, load, attach, train = map(number, ("from typing", "load.prepared(", "get_peft_model(model", "trainer.train("))
measure, finish, last = map(number, ("before = evaluate", "script.write(", "runs.key_results("))
shell, runs = InteractiveShell.instance(), Path(sys.argv[1]) / "tiny"
cells[start].source += f"\nmax_steps, per_device_train_batch_size, eval_rows, output_dir = 4, 2, 20, {sys.argv[1]!r}"
def run(*wanted):
    for i in wanted:
        done = shell.run_cell(cells[i].source, store_history=True)
        if not done.success:
            return "".join(getattr(done.error_in_exec, "_render_traceback_", lambda: [repr(done.error_in_exec)])())
    return ""
def folders():
    return len(list(runs.iterdir())) if runs.is_dir() else 0
told = {}
run(start, start + 1)
told["train first"] = run(train), folders()
told["measure first"] = run(measure), folders()
drawn = number("qlora_layer(")  # draws a layer with its adapter
used = number("qlora_forward(x, layer) - ")  # computes with it
run(*(i for i in range(start + 2, train) if i not in (attach, drawn, used)))
told["not attached"] = run(train), folders()
told["measure the base"] = run(measure - 1, measure)
told["trained"] = run(attach, train), folders()
told["again"] = run(train), folders()
told["measured"] = run(measure - 1, measure), shell.user_ns["before"]["loss"] > shell.user_ns["after"]["loss"]
loss = shell.user_ns["before"]["loss"]
told["before"] = run(measure), shell.user_ns["before"]["loss"] == loss
told["rest"] = run(*range(measure + 1, last))
told["after done"] = run(train), run(finish), folders()
told["loaded again"] = run(load, measure), folders()
told["record"] = [json.loads((folder / "manifest.json").read_text()) for folder in runs.iterdir()]
print(json.dumps(told))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-1500:]
    told = json.loads(done.stdout.splitlines()[-1])
    [record] = told.pop("record")
    assert record["status"] == "done"
    assert record["metrics"]["loss_before"] > record["metrics"]["loss_after"] > 0
    remedy = "run the cell above that sets it first ({0} = …), or all cells above this one."
    early = "NameError: {0} is not there yet. Do this: " + remedy
    assert told["train first"] == [early.format("tokenizer"), 0]
    assert told["measure first"] == [early.format("model"), 0]
    assert "run the cell with get_peft_model first" in told["not attached"][0]
    assert told["not attached"][1] == 0
    assert "no adapter" in told["measure the base"]
    assert told["trained"] == ["", 1]
    assert "trained before" in told["again"][0]
    assert told["again"][1] == 1
    assert told["measured"] == ["", True]
    assert told["before"] == ["", True]
    assert told["rest"] == ""
    assert "trained before" in told["after done"][0]
    assert told["after done"][1:] == ["", 1]
    assert "no adapter" in told["loaded again"][0]


class Kernel:
    """A real kernel that runs cells one by one; what a cell's error shows, or ""."""

    def __init__(self, folder):
        self.client = NotebookClient(
            nbformat.v4.new_notebook(),
            kernel_name="python3",
            timeout=120,
            allow_errors=True,
            resources={"metadata": {"path": str(folder)}},
        )

    def __enter__(self):
        self.session = self.client.setup_kernel()
        self.session.__enter__()
        return self

    def __exit__(self, *error):
        self.session.__exit__(*error)

    def run(self, source: str) -> str:
        cell = nbformat.v4.new_code_cell(source)
        self.client.nb.cells.append(cell)
        self.client.execute_cell(cell, len(self.client.nb.cells) - 1)
        errors = [o for o in cell.outputs if o.output_type == "error"]
        return re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(errors[0].traceback)) if errors else ""


def code_of(name: str, **parameters) -> list[str]:
    """The cells from the parameters on, these parameters set."""
    (path,) = (Path(__file__).parent.parent / "notebooks").glob(f"{name}_*.ipynb")
    cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    first = next(i for i, c in enumerate(cells) if "parameters" in c.metadata.get("tags", []))
    code = [cell.source for cell in cells[first:]]
    for parameter, value in parameters.items():
        code[0] = re.sub(rf"(?m)^({parameter}: .*=).*$", rf"\1 {value!r}", code[0])
    return code


@pytest.mark.fault(46)
@pytest.mark.slow
@pytest.mark.parametrize("name", ["02", "06"])
def test_a_cell_that_was_run_too_early_says_in_one_line_what_is_missing(name, tmp_path):
    """Each cell alone, right after the parameters: it runs, or it names what another cell sets."""
    parameters, resolves, *others = code_of(name, output_dir=str(tmp_path / "runs"))
    said = []
    with Kernel(tmp_path) as kernel:
        assert kernel.run(resolves).startswith(("KitError: profile is not there yet", "NameError"))
        assert kernel.run(parameters) == kernel.run(resolves) == ""
        kernel.run("import builtins; builtins.kept = dict(globals())")
        for cell in others:
            said.append(kernel.run(cell))
            kernel.run("for _ in {*globals()} - {*kept}: del globals()[_]\nglobals().update(kept)")
    said = [text for text in said if text]
    assert len(said) > 5
    for text in said:
        assert "\n" not in text
        assert re.match(
            r"NameError: (\w+) is not there yet( \(line \d+ of \w+\))?\. Do this: ", text
        )
    assert not (tmp_path / "runs").exists()


@pytest.mark.fault(36, 46)
@pytest.mark.slow
def test_after_a_cell_that_failed_the_others_say_what_is_missing(tmp_path):
    """Names that are there but None; the adapter attached twice, trained twice."""
    runs_root = tmp_path / "runs" / "tiny"
    given = {"output_dir": str(tmp_path / "runs"), "max_steps": 2, "eval_rows": 20}
    parameters, resolves, *others = code_of("06", **given, per_device_train_batch_size=2)

    def at(text):
        return next(i for i, cell in enumerate(others) if text in cell)

    load, attach, train = at("load.prepared("), at("get_peft_model(model"), at("trainer.train(")
    with Kernel(tmp_path) as kernel:
        kernel.run(parameters)
        kernel.run(resolves)
        failing = others[load].replace("load.weights_of(settings)", "'/nowhere'")
        assert kernel.run(failing).startswith("KitError: the model cannot be loaded")
        for i, name in (
            (load + 1, "tokenizer"),
            (attach, "model"),
            (at("hasattr(layer, "), "model"),
            (at("guess_off = "), "trained"),
        ):
            assert re.match(rf"\w+Error: {name} is not there yet", kernel.run(others[i])), name
        assert "run the cell" in kernel.run(others[train])
        assert not runs_root.exists()
        for i in (*range(load - 1, train), attach):
            assert kernel.run(others[i]) == ""
        for name in ("in_order", "tokenizer", "model", "args"):
            kernel.run(f"kept, {name} = {name}, None")
            said = kernel.run(others[train])
            assert "\n" not in said
            assert "run the cell" in said, name
            kernel.run(f"{name} = kept")
            assert not runs_root.exists() or not list(runs_root.iterdir())
        assert kernel.run(others[train]) == ""
        assert "trained before" in kernel.run(others[train])
        assert len(list(runs_root.iterdir())) == 1
        assert kernel.run(others[attach]) == kernel.run(others[train]) == ""
        assert len(list(runs_root.iterdir())) == 2


SET = "from qlora_nb.settings import validate\nsettings = validate({})\n"


@pytest.mark.fault(46)
@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("nowhere", "NameError: nowhere is not there yet. Do this: run the cell above that sets"),
        ("[nowhere for i in [1]]", "NameError: nowhere is not there yet. Do"),
        (
            "def f():\n    return nowhere\n\nf()",
            "NameError: nowhere is not there yet (line 2 of f)",
        ),
        ("a = None\na.shape", "AttributeError: a is not there yet. Do"),
        ("a = None\nlen(a)", "TypeError: a is not there yet. Do"),
        ("a = None\nfor x in a: pass", "TypeError: a is not there yet. Do"),
        ("shape = None\na = None\nclass B: shape = 1\nB.shape + a.shape", "a is not there yet"),
        (
            f"{SET}r = None\n1 + r",
            "TypeError: r is None, which means the profile's value: settings.r has it.",
        ),
        (
            f"{SET}r = None\ndef f():\n    return 1 + r\n\nf()",
            "r is None, which means the profile's value (line 5 of f): settings.r has it.",
        ),
        (f"{SET}prompts = None\nprompts[0]", "value: settings.prompts has it."),
        (f"{SET}model = None\nmodel.eval()", "AttributeError: model is not there yet. Do"),
        (f"{SET}r", "NameError: r is not there yet. Do"),
        ("settings = None\nsettings.r", "AttributeError: settings is not there yet. Do"),
        ("r = None\n1 + r", "TypeError: r is not there yet. Do"),
        ("a = 1\na.shape", "'int' object has no attribute 'shape'"),
        ("import json\njson.loads(None)", "the JSON object must be str"),
        ("import json\njson.loads('x', cls=lambda **k: nowhere)", "nowhere is not there yet. Do"),
    ],
)
def test_which_name_a_cell_lacks(cell, said, capsys):
    shell = InteractiveShell()
    explain_missing_names(shell)
    error = shell.run_cell(cell).error_in_exec
    shown = getattr(error, "_render_traceback_", lambda: [str(error)])()
    assert said in "\n".join(shown)


TOGETHER = [
    {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
    {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
    {"PMI_SIZE": "4", "PMI_RANK": "0"},
    {"MV2_COMM_WORLD_SIZE": "2"},
    {"PMIX_RANK": "1"},
    {"LOCAL_RANK": "1"},
    {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"},
    {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"},
    {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"},
]
ALONE = [
    {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"},
    {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},
    {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
    {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"},
    {"WORLD_SIZE": "", "RANK": "x", "LOCAL_RANK": "-1"},
]


@pytest.fixture
def no_launcher(monkeypatch):
    for name in {name for given in [*TOGETHER, *ALONE] for name in given}:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.fault(56)
@pytest.mark.parametrize("given", TOGETHER, ids=str)
def test_one_of_several_processes_is_refused_before_anything_is_written(
    no_launcher, tmp_path, given
):
    for name, value in given.items():
        no_launcher.setenv(name, value)
    values, said = (
        {"output_dir": str(tmp_path / "runs")},
        "one of several processes .*start it once",
    )
    with pytest.raises(KitError, match=said):
        preflight.refuse_what_cannot_run(resolve(values))
    with pytest.raises(KitError, match=said):
        sequence.run_sequence(values)
    assert (
        CliRunner()
        .invoke(cli.app, ["generate", "--out", str(tmp_path / "answers.jsonl")])
        .exit_code
        == 2
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(56)
@pytest.mark.parametrize("given", ALONE, ids=str)
def test_a_process_that_was_started_alone_runs(no_launcher, given):
    for name, value in given.items():
        no_launcher.setenv(name, value)
    preflight.refuse_what_cannot_run(resolve({"seed": 3}))


def test_a_process_in_a_group_of_others_is_refused(no_launcher):
    no_launcher.setattr(torch.distributed, "is_initialized", lambda: True)
    no_launcher.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(KitError, match="a process group of 2"):
        preflight.refuse_what_cannot_run(resolve({}))
    no_launcher.setattr(torch.distributed, "get_world_size", lambda: 1)
    preflight.refuse_what_cannot_run(resolve({}))


@pytest.mark.fault(56)
@pytest.mark.slow
def test_torchrun_is_refused_in_a_sentence(no_launcher, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--no-python",
        sys.executable,
    ]
    command += ["-m", "qlora_nb.cli", "run", "--only", "06", "--out", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("qlora-nb: ")]
    assert said
    assert all("one of several processes started together" in line for line in said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(40)
def test_a_slider_dragged_fast_ends_with_the_last_value():
    from qlora_nb.ui.style import ShownFigure
    from qlora_nb.ui.widgets import explore, float_slider

    drawn = []

    def plot(x):
        drawn.append(x)
        figure = ShownFigure()
        figure.suptitle(f"{x:.2f}")
        return figure

    panel = explore(plot, x=float_slider("x", 0.0, 0, 1, 0.01))
    for i in range(20):
        panel.children[0].value = i / 20
    assert drawn[-1] == 0.95
    assert panel.result.get_suptitle() == "0.95"
    assert panel.children[-1].value.count("<img ") == 1, "one picture stands there"
    assert not panel.children[0].continuous_update, "the browser sends where the slider was let go"

    def refuses(x):
        if x > 0.5:
            raise KitError("<b>x</b> is too large", value=x)
        return plot(x)

    panel = explore(refuses, x=float_slider("x", 0.0, 0, 1, 0.01))
    with pytest.raises(KitError):
        panel.children[0].value = 0.9
    assert panel.children[-1].value == "<pre>&lt;b&gt;x&lt;/b&gt; is too large (got 0.9).</pre>"
    panel.children[0].value = 0.1
    assert panel.children[-1].value.startswith("<img ")


@pytest.mark.fault(10)
def test_bfloat16_on_a_card_without_it_becomes_float16_with_a_notice(monkeypatch, capsys):
    t4 = cards.Gpu("Tesla T4", 15 * 2**30, 15 * 2**30, (7, 5))
    monkeypatch.setattr(machine, "gpus", lambda: (t4,))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.compute_dtype("bfloat16") is torch.float16
    assert "Tesla T4 has no bfloat16: computing in float16 instead" in capsys.readouterr().out


@pytest.mark.fault(41)
def test_a_forked_process_is_told_to_use_torchrun(monkeypatch):
    """What torch says of itself in a process that was forked after CUDA was used."""
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(KitError, match="forked") as refused:
        load.load_base(validate({}))
    assert "torchrun" in refused.value.remedy
    gc.collect()


# ---- memory that runs out in other words than torch's
# ----------------------------------------------------------


START = """
from qlora_nb.memory import preflight
from qlora_nb.settings import resolve
preflight.refuse_what_cannot_run(resolve({"profile": "tiny"}))
import torch
"""


@pytest.mark.fault(54)
@pytest.mark.skipif(sys.platform == "win32", reason="there is no such limit")
@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-m", "qlora_nb.cli", "generate", "-p", "adapter", "pocket"],
        [sys.executable, "-m", "qlora_nb.cli", "script", "--out", "out"],
        [sys.executable, "-m", "qlora_nb.cli", "run", "--only", "07", "--out", "out"],
        [sys.executable, "-c", START],
    ],
    ids=["generate", "script", "run", "a notebook's start"],
)
def test_a_small_address_space_is_said_in_a_sentence(tmp_path, command):
    limited = ["bash", "-c", 'ulimit -v 900000; exec "$@"', "bash", *command]
    done = subprocess.run(limited, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode
    assert "GiB of memory (address space)" in done.stderr.strip().splitlines()[-1]
    assert "ulimit -v" in done.stderr
    assert not os.listdir(tmp_path)


@pytest.mark.fault(54)
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("std::bad_alloc"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"
        ),
        RuntimeError("unable to mmap 4400952 bytes from file: Cannot allocate memory (12)"),
        OSError(12, "Cannot allocate memory"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        RuntimeError("can't start new thread"),
    ],
    ids=str,
)
def test_memory_that_runs_out_under_any_name(monkeypatch, capsys, error):
    def runs_out(*given):
        raise error

    out_of_memory = pytest.raises(KitError, match=r"the model cannot be loaded: memory ran out \(")
    with out_of_memory, load.loading("model", "pocket"):
        runs_out()
    monkeypatch.setattr("qlora_nb.model.fetch.fetch_repo", runs_out)
    done = CliRunner().invoke(cli.app, ["fetch", "someone/model"])
    assert done.exit_code == 2
    assert "qlora-nb: memory ran out (" in done.output
    assert "Do this: close other programs" in done.output


def test_other_errors_are_not_taken_for_memory(monkeypatch):
    def fails(*given):
        raise RuntimeError("something else")

    monkeypatch.setattr("qlora_nb.model.fetch.fetch_repo", fails)
    done = CliRunner().invoke(cli.app, ["fetch", "someone/model"])
    assert isinstance(done.exception, RuntimeError)


def test_a_long_value_is_seen_to_be_cut():
    assert str(KitError("name", value="a" * 78)) == f"name (got '{'a' * 78}')."
    assert str(KitError("name", value="a" * 79)) == f"name (got '{'a' * 78}…)."
