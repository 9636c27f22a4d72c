"""One run in several processes: its bits, its bytes, and how it ends when one process is hurt.

Each start of two processes costs some 20 seconds of two cores, so that a few runs serve all checks.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import open_cells
import pytest
import torch
from conftest import ROOT
from peft import PeftModel
from safetensors.torch import load_file

from qlora_nb import processes
from qlora_nb.batch import leaderboard
from qlora_nb.errors import KitError
from qlora_nb.memory import budget, ledger, shares
from qlora_nb.memory.plan import plan_of
from qlora_nb.model import data, device, load
from qlora_nb.record import runs, seal
from qlora_nb.settings import validate
from qlora_nb.train import checkpoints, script, sharded
from qlora_nb.train import run as training

GIVEN = {
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "save_steps": 2,
    "sample_steps": 0,
    "optim": "adamw_torch",
    "eval_rows": 32,
}
"""Two passes in a step, so that two processes have one each."""


def parameters(folder: Path, **more) -> list[str]:
    words = []
    for name, value in {**GIVEN, "output_dir": str(folder), **more}.items():
        words += ["-p", name, str(value)]
    return words


def start(folder: Path, *options: str, hurt: str = "", **more) -> subprocess.CompletedProcess:
    """Train in two processes, through the command line, or with one of them hurt."""
    words = parameters(folder, **more)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    if hurt:
        environment["HURT"] = hurt
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [*launcher, str(ROOT / "tests" / "processes_driver.py"), *options]
    else:
        command = ["qlora_nb.cli", "train", "--processes", "2", *options]
    return module([*command, *words], ROOT, environment)


def module(words: list[str], cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess:
    """`python -m …` to its end, whatever that is."""
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def alone(folder: Path, **more):
    """Train in this process."""
    training.in_this_process(validate({**GIVEN, "output_dir": str(folder), **more}))


def only_run(folder: Path) -> Path:
    [found] = [path for path in (folder / "tiny").iterdir() if path.is_dir()]
    return found


def adapter_hash(folder: Path) -> str:
    return hashlib.sha256(adapter_file(folder).read_bytes()).hexdigest()


def adapter_file(folder: Path) -> Path:
    return only_run(folder) / "adapter" / "adapter_model.safetensors"


def steps(folder: Path) -> list[dict]:
    lines = (only_run(folder) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the processes that are started: other threads, another order of sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    alone(folder)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, start(folder)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Rank 1 is killed when step 5 is logged."""
    folder = tmp_path_factory.mktemp("killed")
    return folder, start(folder, hurt="1:kill@5")


@pytest.fixture(scope="module")
def two_shards(tmp_path_factory):
    """With an answer and no further change: between two steps the model is asked something."""
    folder = tmp_path_factory.mktemp("shards")
    return folder, start(folder, "--shard", "fsdp", sample_steps=3)


# the same run


def test_two_processes_end_with_the_bits_of_one(one, two):
    folder, done = two
    assert done.returncode == 0, done.stderr[-2000:]
    assert [step["loss"] for step in steps(folder)] == [step["loss"] for step in steps(one)]
    assert adapter_hash(folder) == adapter_hash(one)


def test_one_folder_and_one_voice(two):
    folder, done = two
    assert len(list((folder / "tiny").iterdir())) == 1
    assert runs.status_of(only_run(folder)) == "done"
    assert [step["step"] for step in steps(folder)] == [1, 2, 3, 4, 5, 6]
    said = done.stdout.splitlines()
    assert sum(line.startswith("step 6 of 6: loss") for line in said) == 1
    assert sum(line.startswith("done: ") for line in said) == 1


def test_what_lies_in_the_folder_is_what_notebook_06_leaves(two):
    folder = only_run(two[0])
    for name in ("manifest.json", "train.py", "ask.py", "rows.jsonl", "adapter/README.md"):
        assert (folder / name).is_file()
    assert not seal.damage(folder / "adapter")
    newest = seal.newest_checkpoint(folder)
    assert seal.step_of(newest) == 6
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in newest.iterdir()}
    manifest = runs.read_record(folder / runs.MANIFEST)
    assert manifest["notebook"] == "06_finetune_pythia_12b", "notebook 07 finds it"


def test_both_count_their_tokens(one, two):
    """Tokens a second times seconds: those of all processes."""

    def tokens(folder):
        metrics = runs.read_record(only_run(folder) / runs.MANIFEST)["metrics"]
        return metrics["tokens_per_s"] * metrics["train_seconds"]

    assert tokens(two[0]) == pytest.approx(tokens(one))


def test_the_held_out_loss_is_that_of_the_base_and_of_the_saved_adapter(one, two, two_shards):
    """Measured anew by plain transformers, a row at a time; two processes and shards agree."""
    metrics = runs.read_record(only_run(one) / runs.MANIFEST)["metrics"]
    settings = validate({**GIVEN, "output_dir": str(one)})
    tokenizer = load.load_tokenizer(settings)
    rows = data.tokenize_rows(data.load(settings)[1], tokenizer, settings)
    model = load.load_base(settings)
    assert metrics["loss_before"] == pytest.approx(plain_loss(model, rows), rel=1e-5)
    tuned = PeftModel.from_pretrained(model, str(only_run(one) / "adapter"))
    assert metrics["loss_after"] == pytest.approx(plain_loss(tuned, rows), rel=1e-5)
    assert metrics["loss_after"] < metrics["loss_before"]
    for folder, done in (two, two_shards):
        others = runs.read_record(only_run(folder) / runs.MANIFEST)["metrics"]
        assert others["loss_before"] == pytest.approx(metrics["loss_before"], rel=1e-6)
        assert others["loss_after"] == pytest.approx(metrics["loss_after"], rel=1e-5)
        said = f"{metrics['loss_before']:.3f} before, {metrics['loss_after']:.3f} after"
        assert done.stdout.count(said) == 1
    assert leaderboard.table(one)["loss (nats)"].tolist() == [metrics["loss_after"]]
    card = (only_run(one) / "adapter" / "README.md").read_text()
    assert f"| loss_after | {metrics['loss_after']:.4g} |" in card


@torch.no_grad()
def plain_loss(model, rows) -> float:
    """Mean over all labelled tokens, from the model's own loss of each row."""
    total = 0.0
    n_tokens = 0
    for row in rows:
        n = sum(label != -100 for label in row["labels"][1:])
        batch = {name: torch.tensor([row[name]]) for name in ("input_ids", "labels")}
        total += n * model(**batch).loss.item()
        n_tokens += n
    return total / n_tokens


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_alone_it_is_the_training_of_notebook_06(dropout, tmp_path):
    settings = validate({**GIVEN, "output_dir": str(tmp_path / "cells"), "lora_dropout": dropout})
    tokenizer = load.load_tokenizer(settings)
    model = open_cells.attach_adapter(load.load_base(settings), settings)
    rows = data.tokenize_rows(data.load(settings)[0], tokenizer, settings)
    run = checkpoints.start(settings, runs.FINE_TUNING)
    found = open_cells.finetune(model, tokenizer, rows, settings, run, report=lambda step: None)
    alone(tmp_path / "alone", lora_dropout=dropout)
    assert [step["loss"] for step in steps(tmp_path / "alone")] == found["losses"]
    assert adapter_hash(tmp_path / "alone") == adapter_hash(tmp_path / "cells")


def test_a_run_of_one_step(tmp_path):
    """Nothing is measured in its first step."""
    alone(tmp_path, max_steps=1)
    assert runs.status_of(only_run(tmp_path)) == "done"


def test_held_out_rows_that_are_all_too_long_leave_no_run(tmp_path):
    rows = [{"instruction": f"Say {i}.", "output": f"It is {i}."} for i in range(8)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    given = {**GIVEN, "dataset": str(path), "eval_rows": 1, "output_dir": str(tmp_path / "runs")}
    [held_out] = data.split(validate(given)).held_out
    long = {"instruction": "so " * 300, "output": "It is."}
    path.write_text(
        json.dumps([long if row["output"] == held_out["output"] else row for row in rows])
    )
    with pytest.raises(KitError, match="no row is left"):
        training.in_this_process(validate(given))
    assert not (tmp_path / "runs").exists()


def test_what_all_refuse_is_said_once(tmp_path):
    ended = start(tmp_path, "--shard", "fsdp", optim="paged_adamw_32bit")
    assert ended.returncode == 2
    assert ended.stderr.count("optim: not supported where every process holds a share") == 1
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "tiny").exists()


# one of them is hurt


def test_a_killed_process_ends_both_and_leaves_a_sealed_checkpoint(killed):
    folder, ended = killed
    assert ended.returncode != 0
    assert runs.status_of(only_run(folder)) != "done"
    assert seal.step_of(seal.newest_checkpoint(only_run(folder))) == 4
    assert not (only_run(folder) / "adapter").exists()


def test_a_killed_run_is_resumed_by_one_process(one, killed, tmp_path):
    shutil.copytree(killed[0], tmp_path / "copy")
    alone(tmp_path / "copy", resume="latest")
    assert adapter_hash(tmp_path / "copy") == adapter_hash(one)
    assert [step["loss"] for step in steps(tmp_path / "copy")] == [s["loss"] for s in steps(one)]


def test_a_killed_run_is_resumed_by_two(one, killed, tmp_path):
    shutil.copytree(killed[0], tmp_path / "copy")
    done = start(tmp_path / "copy", resume="latest")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resuming after step 4" in done.stdout
    assert adapter_hash(tmp_path / "copy") == adapter_hash(one)
    assert [step["step"] for step in steps(tmp_path / "copy")] == [1, 2, 3, 4, 5, 6]


def test_a_stop_asked_of_one_stops_both_after_their_step(tmp_path):
    ended = start(tmp_path, hurt="1:int@3")
    assert "interrupted: " in ended.stdout
    assert runs.status_of(only_run(tmp_path)) == "interrupted"
    assert "held-out loss" not in ended.stdout
    assert [step["step"] for step in steps(tmp_path)] == [1, 2, 3]
    assert seal.step_of(seal.newest_checkpoint(only_run(tmp_path))) == 3


def test_nan_in_one_ends_both_with_the_last_good_checkpoint(tmp_path):
    ended = start(tmp_path, hurt="1:nan@4")
    assert ended.returncode != 0
    assert "became nan at step 4" in ended.stderr
    assert runs.status_of(only_run(tmp_path)) == "failed"
    assert seal.step_of(seal.newest_checkpoint(only_run(tmp_path))) == 2


def test_memory_that_runs_out_in_one_ends_both_with_a_remedy(tmp_path):
    ended = start(tmp_path, hurt="1:oom@3")
    assert ended.returncode != 0
    assert re.search(r"qlora-nb: .*memory.*Do this", ended.stderr)
    assert runs.status_of(only_run(tmp_path)) != "done"
    assert seal.step_of(seal.newest_checkpoint(only_run(tmp_path))) == 2


def test_a_first_process_that_is_slow_to_write_ends_well_too(tmp_path):
    ended = start(tmp_path, hurt="0:slow@2", max_steps=1)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "done: " in ended.stdout
    assert runs.status_of(only_run(tmp_path)) == "done"


def test_a_refusal_is_said_also_if_the_first_process_is_too_slow(tmp_path):
    """Both refuse the data, the first one eight seconds later."""
    ended = start(tmp_path, hurt="0:shy@8", eval_rows=10**9, dataset=str(ROOT / "README.md"))
    assert ended.returncode != 0
    assert re.search("qlora-nb: .*Do this", ended.stderr)


# taken home


def test_the_script_for_several_processes_ends_with_the_same_bits(one, tmp_path):
    """Plain torchrun, and nothing of this kit on the path."""
    given = validate({**GIVEN, "output_dir": str(tmp_path)})
    program, *_ = script.write_untrained(given, str(tmp_path / "home"), torchrun=True)[1:]
    assert len(program.read_text().splitlines()) <= 160
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    (tmp_path / "qlora_nb.py").write_text("raise ImportError('not needed')")
    done = module(command, tmp_path, environment)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = tmp_path / "home" / "adapter" / "adapter_model.safetensors"
    assert hashlib.sha256(theirs.read_bytes()).hexdigest() == adapter_hash(one)


# shares of every tensor


def test_a_sharded_run_is_the_same_run_but_for_the_order_of_sums(one, two_shards):
    """The gradients' norm is summed over shares. Over six seeds of six steps no loss differed by
    more than 1.5e-7 of itself and no number of the adapter by more than 4e-6, of 0.08 at most.
    """
    folder, done = two_shards
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [step["loss"] for step in steps(folder)]
    assert losses == pytest.approx([step["loss"] for step in steps(one)], rel=1e-6)
    ours = load_file(adapter_file(folder))
    theirs = load_file(adapter_file(one))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape
        assert (tensor - theirs[name]).abs().max() < 2e-5


def test_a_sharded_model_answers_between_two_steps(two_shards):
    said = [line for line in two_shards[1].stdout.splitlines() if ", asked " in line]
    assert [line.split(",")[0] for line in said] == ["step 3", "step 6"]


def test_every_rank_holds_the_bytes_that_were_predicted(two_shards):
    held = runs.read_record(only_run(two_shards[0]) / runs.MANIFEST)["metrics"]
    by_rank = held["bytes held by each process"]
    plan = plan_of(validate(GIVEN))
    predicted = shares.of_each(ledger.predict(plan), plan, 2, "fsdp")
    wanted = {line.name: line.bytes for line in predicted.lines if line.name != shares.GATHERED}
    assert by_rank == [wanted, wanted]
    whole = ledger.predict(plan)
    assert 2 * wanted["4-bit codes"] == whole["4-bit codes"]
    assert wanted["scales (absmax)"] == whole["scales (absmax)"], "no parameter: not cut"


def test_every_rank_of_ddp_holds_everything(two):
    held = runs.read_record(only_run(two[0]) / runs.MANIFEST)["metrics"]
    wanted = {line.name: line.bytes for line in ledger.predict(plan_of(validate(GIVEN))).lines}
    assert held["bytes held by each process"] == [wanted, wanted]


def test_a_sharded_run_that_was_killed_is_resumed_to_the_same_bits(two_shards, tmp_path):
    ended = start(tmp_path, "--shard", "fsdp", hurt="0:kill@5")
    assert ended.returncode != 0
    assert seal.step_of(seal.newest_checkpoint(only_run(tmp_path))) == 4
    done = start(tmp_path, "--shard", "fsdp", resume="latest")
    assert done.returncode == 0, done.stderr[-2000:]
    assert adapter_hash(tmp_path) == adapter_hash(two_shards[0])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"optim": "paged_adamw_32bit"}, "optim"),
        ({"head_4bit": True}, "head_4bit"),
        ({"embedding_on_cpu": True}, "embedding_on_cpu"),
    ],
)
def test_what_is_not_supported_under_shards_is_refused_by_name(given, said):
    with pytest.raises(KitError, match=f"^{said}: not supported"):
        sharded.require_able(validate({**GIVEN, **given}))


def test_an_old_torch_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.8.0")
    with pytest.raises(KitError, match="cannot shard 4-bit weights"):
        sharded.require_able(validate(GIVEN))


def test_one_process_has_nobody_to_share_with():
    with pytest.raises(KitError, match="nobody to share with"):
        training.in_this_process(validate(GIVEN), shard="fsdp")


# a step's rows, and what is sent


@pytest.mark.parametrize(
    ("rows", "passes", "n", "own"),
    [
        (4, 2, 2, (4, 1)),
        (4, 3, 2, (2, 3)),
        (8, 4, 4, (8, 1)),
        (16, 1, 8, (2, 1)),
        (5, 6, 1, (5, 6)),
    ],
)
def test_a_step_holds_the_same_rows_for_any_number_of_processes(rows, passes, n, own):
    given = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": passes}
    assert shares.of_a_step(validate(given), n) == own
    assert own[0] * own[1] * n == rows * passes


def test_a_step_that_cannot_be_shared_is_refused():
    given = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    with pytest.raises(KitError, match="3 processes cannot share a step of 2 passes of 4 rows"):
        shares.of_a_step(validate(given), 3)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_what_n_processes_hold_of_pythia_12b(n):
    """By hand, from facts of its shape: 11,324,620,800 weights in 4 bit, r 64."""
    settings = validate({"profile": "full", "optim": "adamw_torch"})
    plan = plan_of(settings, config=configs_12b(), on_gpu=True)
    whole = budget.peak(plan)
    ddp = shares.of_each(whole, plan, n, "none")
    assert ddp.total_bytes == whole.total_bytes + whole["gradients"]
    cut = shares.of_each(whole, plan, n, "fsdp")
    assert cut["4-bit codes"] == 11_324_620_800 // 2 // n
    assert cut["LoRA weights"] == 4 * 188_743_680 // n
    assert cut["optimizer states"] == 8 * 188_743_680 // n + 4 * 2 * 4 * 36
    assert cut["scales (absmax)"] == 11_324_620_800 // 64
    a_block = (11_324_620_800 // 2 + 4 * 188_743_680 + whole["biases and norms"]) // 36
    gathered = whole["embedding and head"] + 2 * a_block
    assert cut[shares.GATHERED] == pytest.approx(gathered, rel=1e-6)


def configs_12b():
    from qlora_nb.model import configs

    return configs.pythia_config("12b")


def test_what_is_sent_by_the_ring():
    """A ring of n: all-reduce moves 2 (n − 1)/n of a buffer, a gather or scatter (n − 1)/n."""
    settings = validate({"profile": "full", "optim": "adamw_torch"})
    whole = budget.peak(plan_of(settings, config=configs_12b(), on_gpu=True))
    gradients = 4 * 188_743_680
    assert shares.sent(whole, 2, "none") == gradients
    assert shares.sent(whole, 8, "none") == 2 * 7 * gradients // 8
    every = whole.sum(shares.CUT)
    assert shares.sent(whole, 8, "fsdp", passes=3) == 3 * 7 * (2 * every + gradients) // 8
    assert shares.sent(whole, 1, "none") == 0


# on cards: rehearsed, no card was there


def test_each_process_has_the_card_of_its_number(monkeypatch):
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device.compute_device() == torch.device("cuda", 0), "alone: as before"
    monkeypatch.setattr(processes, "count", lambda: 2)
    assert device.compute_device() == torch.device("cuda", 1)
    assert training.backend() == "nccl"


def test_float16_is_refused_under_shards(monkeypatch):
    with pytest.raises(KitError, match="gradient scaler"):
        sharded.require_able(validate({**GIVEN, "compute_dtype": "float16"}))


# alone


def test_alone_every_answer_is_its_own():
    assert (processes.count(), processes.rank(), processes.gathered("x")) == (1, 0, ["x"])
    processes.wait()


def test_the_ground_loads_no_torch():
    code = "import sys, qlora_nb.processes as p; p.wait(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
