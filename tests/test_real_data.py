"""The pythia path on real Alpaca rows and the real tokenizer, on random weights of pythia-70m's
shape.

The data is not part of the repository: it is looked for in QLORA_NB_DATA, and the tests say so when
    it is not there.
"""

import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from qlora_nb.batch import one_notebook
from qlora_nb.model import chunked_loss, configs, data, load
from qlora_nb.settings import validate

DATA = Path(os.environ.get("QLORA_NB_DATA", "not given"))
pytestmark = pytest.mark.skipif(
    not (DATA / "gpt_neox_20b_tokenizer.json").is_file(),
    reason="no real data: set QLORA_NB_DATA to a folder that has it",
)


@pytest.fixture(scope="module")
def pythia_70m(tmp_path_factory):
    """A folder with pythia-70m's shape, random weights, and the tokenizer that every Pythia
    uses.
    """
    folder = tmp_path_factory.mktemp("models") / "pythia-70m-random"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(
        configs.pythia_config("70m"), dtype=torch.float16
    ).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_file=str(DATA / "gpt_neox_20b_tokenizer.json"),
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alpaca(tmp_path_factory):
    """The first 3,000 rows of Alpaca as a plain JSON file."""
    with lzma.open(DATA / "alpaca" / "alpaca_data.json.xz") as file:
        rows = json.load(file)
    path = tmp_path_factory.mktemp("data") / "alpaca.json"
    path.write_text(json.dumps(rows[:3000]))
    return path


def test_compressed_alpaca_is_read_whole():
    settings = validate(
        {
            "dataset": str(DATA / "alpaca" / "alpaca_data.json.xz"),
            "train_rows": 99_999,
            "max_steps": 99_999,
        }
    )
    train, test = data.load(settings)
    assert 51_900 < len(train) + len(test) <= 52_002


def test_pythia_tokenizer_pads_with_its_own_padding_token(pythia_70m, alpaca):
    settings = validate({"model_id": str(pythia_70m), "dataset": str(alpaca), "max_length": 256})
    tokenizer = load.load_tokenizer(settings)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    encoded = data.tokenize_rows(data.load(settings)[1], tokenizer, settings)
    assert all(row["labels"][-1] == 0 for row in encoded)
    assert all(row["labels"][0] == chunked_loss.IGNORED for row in encoded)


def test_other_scripts_survive(pythia_70m):
    settings = validate(
        {
            "model_id": str(pythia_70m),
            "dataset": str(DATA / "alpaca_zh_demo.json"),
            "eval_rows": 50,
            "train_rows": 50,
            "max_length": 4096,
        }
    )
    tokenizer, (train, _) = load.load_tokenizer(settings), data.load(settings)
    for row, encoded in zip(train, data.tokenize_rows(train, tokenizer, settings), strict=True):
        assert row["output"] in tokenizer.decode(encoded["input_ids"])


def test_notebooks_06_and_07_run_the_pythia_path(pythia_70m, alpaca, tmp_path, root):
    given = [
        "-p",
        "profile",
        "full",
        "-p",
        "model_id",
        str(pythia_70m),
        "-p",
        "dataset",
        str(alpaca),
    ]
    given += ["-p", "eval_rows", "16", "-p", "output_dir", str(tmp_path / "runs")]
    for name, more in (
        ("06_finetune_pythia_12b", ["-p", "max_steps", "3"]),
        ("07_inference", ["-p", "max_new_tokens", "8"]),
    ):
        out = tmp_path / f"{name}.ipynb"
        line = [
            sys.executable,
            "-m",
            "papermill",
            "--no-progress-bar",
            str(root / "notebooks" / f"{name}.ipynb"),
            str(out),
        ]
        done = subprocess.run(
            [*line, *given, *more], capture_output=True, text=True, timeout=900, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert not one_notebook.stored_errors(nbformat.read(out, as_version=4))
    run = next((tmp_path / "runs" / "full").glob("06_*"))
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["status"] == "done"
    assert manifest["parameters"]["r"] == 64
    assert manifest["metrics"]["adapter_difference"] == 0
    assert manifest["metrics"]["loss_after"] < manifest["metrics"]["loss_before"]
