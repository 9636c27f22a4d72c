"""A mirror of the hub and folders placed by hand: what is asked of whom, and what is said."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pandas
import pytest
from loopback_hub import Hub

from qlora_nb import sources
from qlora_nb.errors import KitError
from qlora_nb.memory import preflight
from qlora_nb.model import data, load
from qlora_nb.pocket import MODEL_DIR
from qlora_nb.settings import validate

MODEL = "EleutherAI/pythia-12b"
ALPACA = "tatsu-lab/alpaca"
CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
---
"""
"""The part of a data set's README that says which file is which split."""

ROWS = pandas.DataFrame(
    {
        "instruction": [f"第{n}个问题?" for n in range(6)],
        "input": [""] * 6,
        "output": [f"第{n}个回答。" for n in range(6)],
        "text": ["both together"] * 6,
    }
)
PARQUET = "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet"


@pytest.fixture
def mirror():
    files = {path.name: path.read_bytes() for path in MODEL_DIR.iterdir() if path.is_file()}
    rows = {"README.md": CARD.encode(), PARQUET: ROWS.to_parquet(), ".gitattributes": b""}
    hub = Hub(files, data=rows)
    yield hub
    hub.close()


PROGRAM = f"""
from transformers import AutoModelForCausalLM
from qlora_nb import sources
from qlora_nb.memory import preflight
from qlora_nb.model import data, fetch, load
from qlora_nb.settings import validate

settings = validate({{"model_id": "EleutherAI/pythia-70m", "dataset": "{ALPACA}", "eval_rows": 2}})
preflight.require_model_and_data(settings)
tokenizer = load.load_tokenizer(settings)
print("read", len(data.split(settings).train))
fetch.fetch_ahead(settings)
model = AutoModelForCausalLM.from_pretrained(sources.model_path(settings.model_id))
print("loaded", model.num_parameters())
"""


def run(command: list[str], **ways: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, *command],
        env=os.environ | ways,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize("slash", ["", "/"])
def test_everything_is_asked_of_the_mirror_and_nothing_of_anybody_else(
    mirror, listener, tmp_path, slash
):
    """Whoever asks another host asks the proxy, as the environment says, which takes it down."""
    ways = listener.environment() | {"HF_ENDPOINT": mirror.url + slash, "HF_HOME": str(tmp_path)}
    ways |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = run(["-c", PROGRAM], **ways)
    assert "read 4" in done.stdout, done.stdout + done.stderr
    assert "loaded 2" in done.stdout
    assert listener.calls == []
    assert "/" in mirror.asked, "whether it can be reached"
    for kind in ("models/EleutherAI/pythia-70m", f"datasets/{ALPACA}"):
        assert any(path.startswith(f"/api/{kind}") for path in mirror.asked)
    for name in ("tokenizer.json", "config.json", "model.safetensors"):
        asked = [path for path in mirror.asked if path.endswith(name)]
        assert asked
        assert all(path.startswith("/EleutherAI/pythia-70m/resolve/") for path in asked)
    assert any(path.endswith(PARQUET) for path in mirror.asked)


@pytest.mark.parametrize("address", ["hub.example", "127.0.0.1:80", ""])
def test_an_address_without_its_scheme_is_refused(monkeypatch, address):
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(KitError, match="HF_ENDPOINT is no address") as refused:
        sources.require_reachable("model", "owner/model", "a model")
    assert refused.value.allowed == f"https://{address}"


def test_an_address_that_comes_too_late_is_refused(monkeypatch):
    """The hub's library reads it when it is imported, and would ask another host."""
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(sources, "_reachable", lambda endpoint: True)
    with pytest.raises(KitError, match="after the hub's library had read it") as refused:
        sources.require_reachable("model", "owner/model", "a model")
    assert "restart the kernel" in refused.value.remedy
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://mirror.example")
    sources.require_reachable("model", "owner/model", "a model")


def test_a_mirror_that_is_down_is_named_with_its_variable(tmp_path):
    ways = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    commands = (["fetch", "EleutherAI/pythia-70m"], ["data", ALPACA, "-p", "eval_rows", "2"])
    for command in commands:
        done = run(["-m", "qlora_nb.cli", *command], **ways)
        assert done.returncode == 2
        said = done.stderr.strip().splitlines()[-1]
        assert "http://127.0.0.1:9 cannot be reached" in said
        assert "HF_ENDPOINT" in said


# ---- folders placed by hand ------------------------------------------------------------------------


@pytest.fixture
def by_hand(tmp_path, monkeypatch):
    """The folders of docs/own_data.md beside a notebook; any call of the hub fails."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(MODEL_DIR, tmp_path / MODEL)
    folder = tmp_path / ALPACA
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / ".gitattributes").write_text("*.parquet filter=lfs\n")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("[core]\n")
    ROWS.to_parquet(folder / PARQUET)
    monkeypatch.setattr(sources, "hub_is_reachable", lambda: pytest.fail("the hub was asked"))
    return tmp_path


@pytest.mark.parametrize("end", ["", "/"])
def test_a_folder_of_that_name_wins_and_is_said(by_hand, capsys, end):
    settings = validate({"model_id": MODEL + end, "dataset": ALPACA + end, "eval_rows": 2})
    preflight.require_model_and_data(settings)
    said = capsys.readouterr().out.splitlines()
    if not end:
        assert said == [
            f"model {MODEL}: taken from the folder {by_hand / MODEL}, not from the hub",
            f"dataset {ALPACA}: taken from the folder {by_hand / ALPACA}, not from the hub",
        ]
    split = data.split(settings)
    assert len(split.train) + len(split.held_out) == 6
    assert set(split.train["output"]) < set(ROWS["output"])
    assert load.load_base(settings).num_parameters() < 10_000_000
    assert len(load.load_tokenizer(settings)) < 2000


def test_what_is_no_hub_name_needs_no_words(by_hand, capsys):
    for name in ("pocket", f"./{MODEL}", str(by_hand / MODEL)):
        sources.require_reachable("model", name, "a model")
    assert capsys.readouterr().out == ""


def test_a_clone_without_its_large_files_is_refused(by_hand):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 24246638\n"
    (by_hand / ALPACA / PARQUET).write_text(pointer)
    with pytest.raises(KitError, match="cannot be read"):
        data.split(validate({"dataset": ALPACA}))
    (by_hand / MODEL / "model.safetensors").write_text(pointer)
    with pytest.raises(KitError, match="cannot be loaded"):
        load.load_base(validate({"model_id": MODEL}))


@pytest.mark.parametrize("name", ["own_data.md", "own_data.zh-CN.md"])
def test_the_pages_show_these_folders_and_this_sentence(root, by_hand, capsys, name):
    page = (root / "docs" / name).read_text(encoding="utf-8")
    sources.require_reachable("dataset", ALPACA, "data")
    said = capsys.readouterr().out.replace(str(by_hand), "/…")
    assert f"```text\n{said}```" in page
    assert "EleutherAI/" in page
    assert "config.json" in page
    assert Path(PARQUET).name.split("-")[0] in page
