"""The GPU benchmark on the pocket model and this CPU: the same code, so that it runs when a card is
at hand; and the process that starts it, killed and gone on with.
"""

from __future__ import annotations

import importlib
import inspect
import json
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu
import gpu_answers
import gpu_card
import gpu_training
import peers

from qlora_nb import sources
from qlora_nb.memory import ledger
from qlora_nb.memory.plan import Plan
from qlora_nb.model import configs, load
from qlora_nb.record import seal
from qlora_nb.settings import validate

PROGRAM = str(ROOT / "benchmarks" / "gpu.py")


# ---- the table -----------------------------------------------------------------------------------


def test_every_setting_of_it_is_valid():
    for values in [
        *gpu.PEAKS.values(),
        *gpu.ANSWERS.values(),
        *gpu_training.open_cells.OPTIONS.values(),
    ]:
        validate({"profile": "full", **values})
    assert validate(gpu.T4).compute_dtype == "float16"


def test_every_entry_can_be_called_by_its_name():
    table = gpu.entries(rounds=2)
    assert len({entry.title for entry in table}) == len(table)
    for entry in table:
        module, name = entry.function.split(".")
        function = getattr(importlib.import_module(module), name)
        folder = {"folder": ""} if entry.size else {}
        inspect.signature(function).bind(None, **folder, **entry.values)


def test_the_order_is_the_one_of_the_list():
    parts = list(dict.fromkeys(entry.part for entry in gpu.entries()))
    assert parts == [
        "machine",
        "pocket",
        "resume",
        "out of memory",
        "t4",
        "loading",
        "peaks",
        "answers",
        "speed",
    ]
    assert {entry.size for entry in gpu.entries()} == {None, "410m", "2.8b", "12b"}
    assert {entry.size for entry in gpu.entries("14m")} == {None, "14m"}


@pytest.mark.parametrize(
    ("words", "n"), [([], len(gpu.entries())), (["peaks"], 9), (["peaks/r 16", "speed/kit"], 3)]
)
def test_entries_are_chosen_by_their_beginning(words, n):
    assert len(gpu.chosen(gpu.entries(), words)) == n


def test_entries_come_in_the_order_of_the_words_and_once():
    words = ["speed/kit", "machine/doctor", "speed"]
    titles = [entry.title for entry in gpu.chosen(gpu.entries(), words)]
    assert titles[:3] == ["speed/kit, round 1", "speed/kit with TF32, round 1", "machine/doctor"]
    assert sorted(titles[3:]) == ["speed/common, round 1", "speed/pasted, round 1"]


def test_what_is_timed_or_weighed_runs_alone():
    groups = gpu.at_once(gpu.entries())
    together = [[entry.title for entry in group] for group in groups if len(group) > 1]
    assert together == [["pocket/bfloat16", "pocket/float16"]]
    assert sum(len(group) for group in groups) == len(gpu.entries())


def test_a_word_that_names_no_entry_is_refused():
    with pytest.raises(SystemExit, match="'peak memory'"):
        gpu.chosen(gpu.entries(), ["answers", "peak memory"])


def test_help_names_every_entry_and_the_parent_loads_no_torch():
    show = (
        "import sys; sys.argv = ['gpu.py', '--help']; sys.path.insert(0, sys.argv_0)\n"
        "import gpu\ntry:\n    gpu.main()\nfinally:\n    print('torch' in sys.modules)"
    ).replace("sys.argv_0", repr(str(ROOT / "benchmarks")))
    command = [sys.executable, "-c", show]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == "False"
    assert all(entry.title in said for entry in gpu.entries())


def test_ratios_are_of_one_round():
    speeds = {
        "kit, round 1": {"tokens_per_s": 30.0},
        "common, round 1": {"tokens_per_s": 20.0},
        "pasted, round 1": {"error": "killed"},
        "kit, round 2": {"tokens_per_s": 50.0},
        "common, round 2": {"tokens_per_s": 20.0},
        "kit with TF32, round 2": {"tokens_per_s": 60.0},
    }
    assert gpu.ratios(speeds) == {
        "kit over common": {"median": 2.0, "all": [1.5, 2.5]},
        "kit with TF32 over kit": {"median": 1.2, "all": [1.2]},
    }


# ---- the measurements ----------------------------------------------------------------------------


@pytest.fixture
def watch():
    return gpu_card.Watch()


@pytest.mark.slow
@pytest.mark.parametrize(
    "values", [{}, {"r": 16, **gpu.LOW}, gpu.T4], ids=["as profile full", "every option", "t4"]
)
def test_a_peak(watch, values):
    few = {"max_length": 64, "max_steps": 2, "gradient_accumulation_steps": 1}
    found = gpu_training.peak(watch, "pocket", {**values, **few})
    assert found["predicted"] == sum(found["predicted_lines"].values()) > 2_000_000
    assert len(found["losses"]) == 2
    assert found["allocated"] is found["process"] is None or torch.cuda.is_available()


@pytest.mark.slow
@pytest.mark.parametrize("who", ["kit", "common", "pasted"])
def test_a_speed(watch, monkeypatch, who):
    monkeypatch.setattr(gpu_training, "WARM_UP", 1)
    monkeypatch.setattr(gpu_training, "MEASURED", 2)
    found = gpu_training.speed(watch, "pocket", who)
    assert found["tokens_per_s"] > 0
    assert found["steps"] == [1, 2]


@pytest.mark.slow
def test_tf32_is_asked_of_torch(watch, monkeypatch):
    precisions = []

    def precision(*arguments):
        precisions.append(torch.get_float32_matmul_precision())
        return 1.0, None

    monkeypatch.setattr(peers, "kit", precision)
    try:
        gpu_training.speed(watch, "pocket", "kit", tf32=True)
        gpu_training.speed(watch, "pocket", "kit")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert precisions == ["high", "highest"]


@pytest.mark.slow
def test_an_answer_and_a_load(watch, monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "CACHE", tmp_path)
    found = gpu_answers.answer(watch, "pocket", {})
    assert found["first_token_s"] > 0
    assert found["predicted"] > 2_000_000
    assert {"tokens_per_s", "allocated", "reserved", "process", "context"} < set(found)
    config = configs.config_of("pocket")
    held = ledger.predict(Plan(config, rest_dtype=torch.float32))
    cache = 992 * 2 * config.num_hidden_layers * config.hidden_size * 4
    assert (
        found["bytes_read_per_token"]
        == held.total_bytes - held["buffers"] - 4 * config.vocab_size * config.hidden_size + cache
    )
    assert found["share_of_limit"] > 0


@pytest.mark.slow
def test_loading_says_from_what(watch, monkeypatch, tmp_path, capsys):
    """Plain weights are read though a copy lies there, a copy is made anew, a copy that is not
    there is no measurement.
    """
    monkeypatch.setattr(sources, "CACHE", tmp_path)
    folder = load.sources.model_path("pocket")
    with pytest.raises(FileNotFoundError, match="no copy is kept"):
        gpu_answers.load_seconds(watch, folder, "copy")
    held = []
    for way in ("keep", "plain", "copy", "keep"):
        capsys.readouterr()
        held.append(gpu_answers.load_seconds(watch, folder, way)["held"])
        assert ("loading the 4-bit copy" in capsys.readouterr().out) == (way == "copy")
    assert held[0] > 1_000_000
    assert len(set(held)) == 1


def test_one_option_of_the_pocket_model_that_fails_hides_no_other(watch, monkeypatch):
    def fail(watch, values):
        if values.get("packing"):
            raise RuntimeError("packing fails")
        return {"losses": [1.0, 2.0]}

    monkeypatch.setattr(gpu_training, "one_pocket", fail)
    found = gpu_training.pocket(watch, "bfloat16")
    assert found.keys() == gpu_training.open_cells.OPTIONS.keys()
    assert {name for name, one in found.items() if "error" in one} == {
        "packed",
        "every option, packed",
    }
    assert found["plain"]["off float32 (nats)"] == 0


@pytest.mark.slow
def test_a_resumed_run_of_the_benchmark_has_the_losses_of_one_at_once(watch):
    found = gpu_training.resume(watch, "pocket")
    assert found["equal"]
    assert len(found["losses"]) == 4
    assert found["steps resumed"] == 2


# ---- the clock -----------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for what a test adds."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(peers, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


@pytest.mark.slow
@pytest.mark.parametrize("who", ["kit", "common"])
def test_the_clock_counts_the_steps_after_the_warm_up_and_nothing_else(clock, monkeypatch, who):
    """A step takes a second, one of the warm-up a hundred, what is saved and sealed a thousand."""

    class OneSecond(gpu_training.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            clock.now += 1.0 if state.global_step >= 2 else 100.0

        def on_train_begin(self, args, state, control, **kwargs):
            clock.now += 1000.0

        def on_train_end(self, args, state, control, **kwargs):
            clock.now += 1000.0

    write_seal = seal.write_seal

    def slow_seal(*arguments, **options):
        clock.now += 1000.0
        write_seal(*arguments, **options)

    monkeypatch.setattr(seal, "write_seal", slow_seal)
    rows = [{"input_ids": [3 + i for i in range(24)], "labels": [3] * 24} for _ in range(20)]
    settings = validate({"max_steps": 5, "per_device_train_batch_size": 4, "save_steps": 0})
    tokenizer = load.load_tokenizer(settings)
    run = getattr(peers, who)
    found, _ = run(settings, peers.datasets.Dataset.from_list(rows), tokenizer, 2, [OneSecond()])
    assert found == 4 * 24


# ---- one child -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "values", "error"),
    [
        ("gpu_card.nothing", {}, "AttributeError"),
        ("gpu_training.peak", {"folder": "/nowhere/at/all", "values": {}}, "KitError"),
    ],
)
def test_a_failure_is_told_and_not_measured(function, values, error):
    assert gpu.apart([None, function, values], {}, 100)["error"].startswith(error)


def test_an_entry_that_takes_too_long_is_ended_and_told():
    assert gpu.apart([None, "gpu_card.header", {}], {}, 0.2) == {"error": "not finished after 0 s"}


def test_a_child_that_is_killed_is_told(monkeypatch):
    monkeypatch.setattr(gpu.sys, "executable", "false")
    assert gpu.apart([None, "gpu_card.header", {}], {}, 10) == {"error": "exit 1: "}


def test_a_child_ends_when_the_process_that_asks_is_gone():
    """Its parent is not the process that asked."""
    call = json.dumps([None, "gpu_training.peak", {"folder": "pocket", "values": {}}])
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_child.py"), "1", call]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_a_copy_without_git_and_not_installed_measures_itself(tmp_path, monkeypatch):
    """From another folder: the copy's own code is measured, its commit is what the caller says."""
    copy = tmp_path / "copy"
    for folder in ("qlora_nb", "benchmarks", "tools"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    with open(copy / "qlora_nb" / "machine.py", "a") as file:
        file.write("\n\ndef describe(here):\n    return {'this': 'is the copy'}\n")
    out = tmp_path / "out" / "gpu.json"
    command = [sys.executable, str(copy / "benchmarks" / "gpu.py"), "--shape", "14m"]
    command += ["--out", str(out), "--commit", "abc", "--only", "machine/doctor"]
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    record = json.loads(out.read_text())
    assert record["machine"]["doctor"]["described"] == {"this": "is the copy"}
    assert record["commit"] == "abc"
    assert record["clean"] is None
    assert record["versions"]["torch"]


# ---- the whole, killed and gone on with ----------------------------------------------------------


def in_time(condition, seconds: float = 120.0) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.1)


def written(out, part: str) -> dict:
    return json.loads(out.read_text())[part] if out.is_file() else {}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_killed_in_the_middle_it_goes_on(tmp_path):
    """SIGKILL: the child goes too; finished entries stay byte for byte, the rest is measured, and
    what needs a card is said to.
    """
    out = tmp_path / "gpu.json"
    command = [sys.executable, PROGRAM, "--shape", "14m", "--out", str(out), "--commit", "abc"]
    command += ["--folder", str(tmp_path), "--only", "machine/doctor", "loading/plain"]
    command += ["peaks/r 16", "out of memory"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=tmp_path)
    in_time(lambda: written(out, "machine"))
    in_time(lambda: psutil.Process(first.pid).children())
    children = psutil.Process(first.pid).children()
    first.send_signal(signal.SIGKILL)
    first.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    before = json.loads(out.read_text())
    assert before["commit"] == "abc"
    kept = json.dumps(before["machine"]["doctor"], indent=1).splitlines()[1:-1]
    assert before["loading"] == before["peaks"] == {}

    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    after = json.loads(out.read_text())
    assert "machine/doctor:" not in done.stdout
    assert after["machine"] == before["machine"]
    assert "\n".join("  " + line for line in kept) in out.read_text()
    assert after["date"] == before["date"]
    assert after["loading"]["plain"]["held"] > 40_000_000
    assert len(after["peaks"]["r 16, 512 tokens, every option"]["losses"]) == 3
    skipped = {"skipped": "needs a CUDA device"}
    assert after["out of memory"] == {"batch 4 and 1": skipped, gpu.AVOIDED: skipped}
    assert {"answers", "speed"} < set(after), "notebook 07 reads them also where they are empty"
    assert not list(tmp_path.glob("avoided_oom.json"))


class Child:
    """What `apart` answers without a process: a header, then the function's name."""

    def __init__(self, monkeypatch):
        self.calls: list[str] = []
        self.seconds = 0.0
        self.failing: set[str] = set()
        self.gpus: list[dict] = []
        monkeypatch.setattr(gpu, "apart", self)

    def __call__(self, call, environment, limit_s):
        _, function, values = call
        self.calls.append(function)
        time.sleep(min(limit_s, self.seconds))
        if function == "gpu_card.header":
            here = {"hardware": {"gpus": self.gpus}, "versions": None, "commit": None}
            return {**here, "date": "2026-01-01", "uuid": "1234"}
        if function in self.failing:
            return {"error": "it failed"}
        if function == "gpu_card.weights":
            return {"folder": "somewhere", "seconds": 1.0}
        return {"of": function, "values": values, "limit": limit_s}


@pytest.fixture
def child(monkeypatch):
    return Child(monkeypatch)


def run(monkeypatch, tmp_path, *arguments: str) -> dict:
    out = tmp_path / "gpu.json"
    command = ["gpu.py", "--out", str(out), "--folder", str(tmp_path), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    gpu.main()
    return json.loads(out.read_text())


def test_what_failed_is_tried_again_and_what_was_measured_is_not(monkeypatch, tmp_path, child):
    child.failing = {"gpu_answers.answer", "gpu_training.pocket"}
    small = ("--shape", "14m", "--only", "pocket", "answers", "loading")
    found = run(monkeypatch, tmp_path, *small)
    assert set(found["pocket"]) == {"bfloat16", "float16"}, "one that fails stops no other"
    assert all(one == {"error": "it failed"} for one in found["answers"].values())
    child.failing = set()
    child.calls.clear()
    again = run(monkeypatch, tmp_path, *small)
    assert again["loading"] == found["loading"]
    assert "gpu_answers.load_seconds" not in child.calls
    assert child.calls.count("gpu_training.pocket") == 2
    assert not any("error" in one for one in again["answers"].values())


@pytest.mark.parametrize("what", ["commit", "shape", "code", "card"])
def test_a_record_of_something_else_is_set_aside(monkeypatch, tmp_path, child, what):
    small = ["--only", "pocket/b", "--shape", "14m", "--commit", "a"]
    run(monkeypatch, tmp_path, *small)
    child.calls.clear()
    run(monkeypatch, tmp_path, *small)
    assert child.calls == ["gpu_card.header"]
    if what == "commit":
        small[-1] = "b"
    elif what == "shape":
        small[3] = "70m"
    elif what == "code":
        monkeypatch.setattr(gpu, "code_hash", lambda: "another")
    else:
        child.gpus = [{"name": "H100"}]
    run(monkeypatch, tmp_path, *small)
    assert child.calls[-1] == "gpu_training.pocket"
    assert (tmp_path / "gpu.before").is_file()


def test_the_code_has_another_hash_when_it_changes(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "qlora_nb").mkdir()
    file = tmp_path / "qlora_nb" / "a.py"
    file.write_text("1")
    before = gpu.code_hash()
    file.write_text("2")
    assert gpu.code_hash() != before


def test_when_the_time_is_up_it_ends_and_keeps_what_is_whole(monkeypatch, tmp_path, child):
    child.seconds = 0.5
    with pytest.raises(SystemExit, match="the time is up"):
        run(monkeypatch, tmp_path, "--shape", "14m", "--minutes", str(1.2 / 60))
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found["machine"]) == ["doctor", "NVML beside CUDA", "CUDA_VISIBLE_DEVICES"]
    assert found["pocket"] == {}, "what was broken off is no failure"


def test_patience_stretches_the_limits(monkeypatch, tmp_path, child):
    small = ("--shape", "14m", "--only", "pocket/b", "--patience", "2.5")
    found = run(monkeypatch, tmp_path, *small)
    assert found["pocket"]["bfloat16"]["limit"] == 2.5 * gpu.LIMIT_S


def test_weights_that_cannot_be_made_cost_their_entries_only(monkeypatch, tmp_path, child):
    child.failing = {"gpu_card.weights"}
    found = run(monkeypatch, tmp_path, "--shape", "14m", "--only", "resume", "pocket")
    assert found["resume"] == {"14m": {"error": "no weights of a 14m"}}
    assert not any("error" in one for one in found["pocket"].values())


def test_with_a_card_notebook_05_gets_its_file(monkeypatch, tmp_path, child):
    child.gpus = [{"name": "H100"}]
    run(monkeypatch, tmp_path, "--only", "out of memory/avoided", "pocket/b")
    record = json.loads((tmp_path / "avoided_oom.json").read_text())
    assert record["of"] == "gpu_card.avoided"
    assert record["hardware"]["gpus"] == child.gpus
    assert not {"pocket", "peaks", "made"} & set(record)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_nothing_is_written(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, PROGRAM, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no CUDA device here" in done.stderr
    assert not out.exists()
