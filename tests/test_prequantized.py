"""The 4-bit copy: the same bits, used only while it is whole and of the same model."""

import hashlib
import json
import subprocess
import sys

import open_cells
import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_nb import sources
from qlora_nb.memory import ledger
from qlora_nb.model import configs, fetch, load
from qlora_nb.record import seal
from qlora_nb.settings import validate

IDS = torch.arange(5, 45).reshape(2, 20)


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A small Pythia-like folder, and a cache of its own."""
    monkeypatch.setattr(sources, "CACHE", tmp_path / "cache")
    save_random(tmp_path / "small", seed=0)
    return tmp_path / "small"


def save_random(folder, seed):
    config = configs.pythia_config("14m")
    config.num_hidden_layers = 2
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder)


def settings_for(source, **values):
    return validate({"model_id": str(source), "prequantized": True, **values})


def copies(tmp_path):
    return sorted((tmp_path / "cache" / "quantized").glob("*"))


@pytest.mark.parametrize(
    "values", [{}, {"double_quant": False, "quant_type": "fp4"}, {"head_4bit": True}], ids=str
)
def test_the_copy_holds_the_same_bits_and_is_smaller(source, tmp_path, capsys, values):
    settings = settings_for(source, **values)
    first = load.load_base(settings)
    assert "loading the 4-bit copy" not in capsys.readouterr().out
    [copy] = copies(tmp_path)
    second = load.load_base(settings)
    assert "loading the 4-bit copy" in capsys.readouterr().out
    before, after = first.state_dict(), second.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(first(IDS).logits, second(IDS).logits)
    assert ledger.measure(first).total_bytes == ledger.measure(second).total_bytes
    assert not list(copy.glob("*.bin")) + list(copy.glob("*.pt"))


def test_an_adapter_trained_on_the_copy_names_the_original(source):
    settings = settings_for(source)
    for _ in range(2):
        model = open_cells.attach_adapter(load.load_base(settings), settings)
        assert model.peft_config["default"].base_model_name_or_path == str(source)


def test_other_datatypes_have_their_own_copy(source, tmp_path):
    for values in (
        {},
        {"double_quant": False},
        {"quant_type": "fp4"},
        {"compute_dtype": "bfloat16"},
    ):
        load.load_base(settings_for(source, **values))
    assert len(copies(tmp_path)) == 4


@pytest.mark.parametrize("hurt", ["cut", "note", "a byte", "another model"])
def test_a_copy_that_does_not_hold_is_made_anew(source, tmp_path, capsys, hurt):
    settings = settings_for(source)
    first = load.load_base(settings)(IDS).logits
    [copy] = copies(tmp_path)
    weights = copy / "model.safetensors"
    if hurt == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif hurt == "note":
        (copy / seal.SEAL).write_text("{")
    elif hurt == "a byte":
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    else:
        save_random(source, seed=1)
    capsys.readouterr()
    again = load.load_base(settings)
    assert "loading the 4-bit copy" not in capsys.readouterr().out
    assert torch.equal(again(IDS).logits, first) == (hurt != "another model")
    load.load_base(settings)
    assert "loading the 4-bit copy" in capsys.readouterr().out


def test_no_room_costs_the_copy_and_not_the_run(source, tmp_path, capsys, monkeypatch):
    def full(*args):
        raise fetch.KitError("the 4-bit copy needs 1.0 GB of disk, 0.0 GB are free")

    monkeypatch.setattr(fetch, "require_room", full)
    model = load.load_base(settings_for(source))
    assert model(IDS).logits.isfinite().all()
    assert "no 4-bit copy was kept: the 4-bit copy needs" in capsys.readouterr().out
    assert not copies(tmp_path)


def test_a_write_that_fails_leaves_nothing_behind(source, tmp_path, capsys, monkeypatch):
    def broken(folder, **kwargs):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    settings = settings_for(source)
    monkeypatch.setattr(
        "transformers.PreTrainedModel.save_pretrained",
        lambda self, folder, **kw: broken(folder, **kw),
    )
    load.load_base(settings)
    assert "No space left" in capsys.readouterr().out
    assert not copies(tmp_path)


def test_the_seal_is_the_last_thing_written(source, tmp_path):
    load.load_base(settings_for(source))
    [copy] = copies(tmp_path)
    sealed = json.loads((copy / seal.SEAL).read_text())
    assert sealed["files"] == {
        f.name: [f.stat().st_size, hashlib.sha256(f.read_bytes()).hexdigest()]
        for f in copy.iterdir()
        if f.name != seal.SEAL
    }


KILLED = """
import os, signal, sys, pathlib
from qlora_nb.record import files
with files.temporary_folder(pathlib.Path(sys.argv[1]), sys.argv[2]) as folder:
    (folder / "half").write_bytes(b"x" * 1000)
    print(folder.name, flush=True)
    if sys.argv[3] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()
"""


@pytest.mark.fault(51)
def test_what_a_killed_copy_left_is_cleared_and_a_live_one_is_not(source, tmp_path, capsys):
    folder = tmp_path / "cache" / "quantized"
    (folder / ".small-0123456789ab.4711").mkdir(parents=True)  # as the first version named them

    def writer(how):
        command = [sys.executable, "-c", KILLED, str(folder), ".", how]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    with writer("killed") as dead, writer("alive") as alive:
        left, held = dead.stdout.readline().strip(), alive.stdout.readline().strip()
        dead.wait()
        assert (folder / left / "half").exists()
        load.load_base(settings_for(source))
        [copy] = [path for path in copies(tmp_path) if not path.name.startswith(".")]
        hidden = {path.name for path in folder.glob(".*")}
        assert hidden == {held}
        assert (folder / held / "half").exists()
        alive.stdin.close()
        alive.wait()
    assert list(folder.iterdir()) == [copy]
