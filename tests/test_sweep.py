"""Many runs: each point of a grid is done once, whatever happens to the workers; and what the
leaderboard says of them.
"""

from __future__ import annotations

import inspect
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import numpy
import optuna
import psutil
import pytest
from sweep_driver import STEPS, drive

from qlora_nb.batch import leaderboard, sweep
from qlora_nb.errors import KitError
from qlora_nb.theory import intervals

COMMAND = [sys.executable, "-m", "qlora_nb.cli"]


@pytest.fixture
def grid(tmp_path):
    """Write a grid; the fixed parameters are those of a short run."""

    def write(lists: str, fixed: str = "") -> Path:
        path = tmp_path / "grid.toml"
        path.write_text(f'[fixed]\noutput_dir = "{tmp_path}"\n{fixed}\n[grid]\n{lists}\n')
        return path

    return write


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


# ---- the grid


def test_the_points_are_all_combinations(grid, tmp_path):
    path = grid("r = [4, 8]\nlearning_rate = [1e-3, 4e-3]\nseed = [0, 1, 2]", "max_steps = 4")
    points, wanted = sweep.read_grid(path)
    assert wanted == str(tmp_path)
    found = {(p["r"], p["learning_rate"], p["seed"], p["max_steps"]) for p in points.values()}
    assert found == set(itertools.product([4, 8], [1e-3, 4e-3], [0, 1, 2], [4]))
    assert len(points) == 12
    assert sweep.read_grid(path)[0] == points, "the same names each time"
    more, _ = sweep.read_grid(grid("seed = [3, 2]\nr = [4, 16]\nlearning_rate = [1e-3]"))
    assert not more.keys() & points.keys(), "other steps: other points"


def test_a_point_that_is_written_twice_is_one(grid):
    points, _ = sweep.read_grid(grid('r = [4, "4", 4.0]\ndouble_quant = [true, "true"]'))
    assert len(points) == 1
    assert len(sweep.read_grid(grid("r = [8]\noutput_dir = ['a', 'b']"))[0]) == 1


def test_a_points_folder_is_one_folder_whatever_its_parameters_say(grid):
    hostile = '["../../etc", "<b>/\\u001b[31m\\\\", "a\\nb", "%s"]' % ("x" * 300)
    points, _ = sweep.read_grid(grid(f"prompts = {hostile}\nseed = [1]"))
    assert len(points) == 4
    for name in points:
        assert name == Path(name).name
        assert len(name) < 100
        assert name.isascii()
        assert not name.startswith(".")


@pytest.mark.parametrize(
    ("lists", "fixed", "says"),
    [
        ("rr = [4]", "", "unknown parameter 'rr'"),
        ("r = [4, 8, 0]", "", "r .*got 0"),
        ("r = [4]", "learning_rate = 7", "learning_rate .*got 7"),
        ('optim = ["adamw_torch", "sophia"]', "", "optim .*got 'sophia'"),
        ("r = 4", "", "no lists of values"),
        ("r = []", "", "no lists of values"),
        ("", "r = 4", "no lists of values"),
        ("r = [4]\n[fixd]\nmax_steps = 4", "", "unknown parameter 'fixd'"),
        ("r = [4", "", "this grid cannot be read"),
        ("r = [4]\n[[grid.x]]\ny = 1", "", "unknown parameter 'x'"),
    ],
)
def test_a_bad_grid_is_refused_before_anything_starts(grid, tmp_path, lists, fixed, says):
    with pytest.raises(KitError, match=says):
        sweep.run(grid(lists, fixed), workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["grid.toml"]
    (tmp_path / "odd.toml").write_text("grid = 3")
    for name in ("odd.toml", "none.toml"):
        with pytest.raises(KitError, match="this grid cannot be read"):
            sweep.run(tmp_path / name, workers=1)


def test_a_database_that_cannot_be_opened_is_refused(grid):
    for url in ("nonsense", "postgresql+nodriver://user:secret@host/db"):
        with pytest.raises(KitError, match="this sweep cannot begin") as refused:
            sweep.run(grid("r = [4]"), workers=1, storage=url)
        assert "secret" not in str(refused.value)


def test_the_list_of_points_lies_in_the_sweeps_folder_whatever_that_is_called(grid, tmp_path):
    folder, _ = sweep.run(grid("r = [4]"), workers=0, out=str(tmp_path / "a? b%20#c"))
    assert (folder / "study.db").is_file()
    assert folder.parent == tmp_path / "a? b%20#c"
    assert not list(tmp_path.glob("*/*/study.db?*"))


def test_without_optuna_it_says_what_to_install(grid, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(KitError, match=r"pip install 'qlora-nb\[sweep\]'"):
        sweep.run(grid("r = [4]"), workers=1)


def test_the_grid_of_the_documentation(root, tmp_path):
    page = (root / "docs" / "scale.md").read_text(encoding="utf-8")
    [text] = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    path = tmp_path / "grid.toml"
    path.write_text(text)
    points, wanted = sweep.read_grid(path)
    assert f"= {len(points)}\n" in text
    assert wanted == "runs"
    grace = inspect.signature(sweep.run).parameters["grace_s"].default
    assert (grace, grace // 6) == (60, 10), "a minute, and a sign of life every ten seconds"


# ---- workers, with runs that train nothing


class Worker:
    """A process that does what a command with one worker does; it begins as a copy of this one,
    which has read all libraries.
    """

    def __init__(self, said: Path, *of_the_sweep):
        self._said = said
        fork = multiprocessing.get_context("fork")
        self.process = fork.Process(target=drive, args=(said, *of_the_sweep))
        self.process.start()
        self.pid = self.process.pid

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int | None:
        self.process.join(60)
        return self.process.exitcode

    def said(self) -> list[str]:
        assert self.wait() == 0
        return self._said.read_text().splitlines()


@pytest.fixture
def start(tmp_path):
    """`start(grid)` → (a worker, the sweep's folder); each is ended at the end."""
    workers = []

    def one(grid: Path, place: str = "sweep") -> tuple[Worker, Path]:
        points, _ = sweep.read_grid(grid)
        folder = tmp_path / place
        folder.mkdir(exist_ok=True)
        url = f"sqlite:///{tmp_path}/study.db?timeout=60"
        said = tmp_path / f"said{len(workers)}"
        workers.append(Worker(said, "s", folder, url, points, 2))
        return workers[-1], folder

    yield one
    for worker in workers:
        worker.process.kill()


def steps_made(folder: Path) -> dict[str, list[int]]:
    """Point → the numbers of the steps that were made there, in their order."""
    found = {}
    for path in sorted(folder.glob("*/steps_made")):
        found[path.parent.name] = [int(line.split()[0]) for line in path.read_text().splitlines()]
    return found


def workers_of(folder: Path) -> list[set[int]]:
    """Of each point the processes that made steps of it."""
    found = []
    for path in sorted(folder.glob("*/steps_made")):
        found.append({int(line.split()[1]) for line in path.read_text().splitlines()})
    return found


ONCE = list(range(1, STEPS + 1))


def test_two_starts_at_once_do_each_point_once_and_a_third_nothing(grid, start, tmp_path):
    path = grid("r = [4, 8, 16]\nseed = [0, 1]")
    workers = []
    for _ in range(2):
        worker, folder = start(path)
        workers.append(worker)
    assert [worker.wait() for worker in workers] == [0, 0]
    made = steps_made(folder)
    assert len(made) == 6
    assert all(steps == ONCE for steps in made.values()), made
    assert max(map(len, workers_of(folder))) == 1
    assert len(set.union(*workers_of(folder))) > 1, "they shared the points"
    study = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path}/study.db")
    told = [trial.user_attrs["point"] for trial in study.trials if trial.values]
    assert sorted(told) == sorted(made)
    assert all(trial.state.is_finished() for trial in study.trials)
    again, _ = start(path)
    assert again.said() == []
    assert steps_made(folder) == made
    # who has lost the database and kept the folders does nothing either
    (tmp_path / "study.db").unlink()
    assert sorted(start(path)[0].said()) == sorted(f"{name}: done" for name in made)
    assert steps_made(folder) == made


def test_machines_without_a_common_folder_share_the_points_too(grid, start, tmp_path):
    path = grid("r = [4, 8]\nseed = [0, 1]")
    optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/study.db")  # the tables are there
    workers = []
    made = []
    for place in ("here", "there"):
        worker, folder = start(path, place)
        workers.append((worker, folder))
    for worker, folder in workers:
        assert worker.wait() == 0
        made += steps_made(folder).items()
    assert len({name for name, _ in made}) == len(made) == 4, "each on one machine alone"
    assert all(steps == ONCE for _, steps in made)


@pytest.mark.fault(24)
def test_a_killed_workers_point_is_taken_over_in_its_folder(grid, start, tmp_path):
    path = grid("seed = [0]")
    hold = tmp_path / "sweep" / "hold"
    hold.parent.mkdir()
    hold.touch()
    first, folder = start(path)
    wait_for(lambda: len(steps_made(folder).get(next(iter(steps_made(folder)), ""), [])) >= 3)
    second, _ = start(path)  # waits, for the first is alive
    time.sleep(0.3)
    first.send(signal.SIGKILL)
    hold.unlink()
    assert second.wait() == 0
    assert list(steps_made(folder).values()) == [ONCE]
    assert workers_of(folder) == [{first.pid, second.pid}]
    assert leaderboard.finished(folder)["metrics"] == {"loss_after": 1.0}


def test_a_slow_worker_lets_go_of_the_point_that_it_lost(grid, start, tmp_path):
    path = grid("seed = [0]")
    first, folder = start(path)
    wait_for(lambda: list(folder.glob("*/steps_made")))
    first.send(signal.SIGSTOP)
    second, _ = start(path)
    study = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path}/study.db")
    wait_for(lambda: len(study.get_trials()) == 2)  # the point went back into the queue
    wait_for(lambda: study.get_trials()[1].user_attrs.get(sweep.TAKEN) == 1)
    before = steps_made(folder)
    time.sleep(1.5)
    assert steps_made(folder) == before, "the first still holds the folder"
    first.send(signal.SIGCONT)
    assert [first.wait(), second.wait()] == [0, 0]
    assert list(steps_made(folder).values()) == [ONCE]
    assert workers_of(folder) == [{first.pid, second.pid}]
    assert ["not done" in line for line in first.said()] == [True]


def test_a_worker_that_died_while_it_took_a_point_leaves_it_to_the_next_start(
    grid, start, tmp_path, monkeypatch
):
    path = grid("seed = [0, 1]")
    points, _ = sweep.read_grid(path)
    folder = tmp_path / "sweep"
    folder.mkdir()
    study = sweep.filled("s", folder, f"sqlite:///{tmp_path}/study.db", points, 2)
    assert study.ask().user_attrs["point"] in points  # taken, and not a sign of life
    assert len(sweep._points(study, "WAITING", "RUNNING")) == 2, "it may be at it just now"
    monkeypatch.setattr(sweep, "TAKING", timedelta(0))
    assert start(path)[0].wait() == 0
    assert [*steps_made(folder).values()] == [ONCE, ONCE]


def test_a_point_that_fails_is_told_and_tried_again_by_the_next_start(grid, start):
    path = grid("learning_rate = [0.5, 0.004]\nseed = [0]")
    worker, folder = start(path)
    said = [line.split(": ")[1].split(",")[0] for line in worker.said()]
    assert sorted(said) == ["done", "not done"]
    worker, _ = start(path)
    [line] = worker.said()
    assert "not done, see" in line
    assert len(leaderboard.table(folder)) == 2


# ---- real runs


def tree_of(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def worker_processes(command: subprocess.Popen) -> list[psutil.Process]:
    """The command's workers: those of its children that have children."""
    children = psutil.Process(command.pid).children()
    return [child for child in children if child.children()]


@pytest.mark.fault(23, 24)
@pytest.mark.slow
def test_real_runs_stopped_killed_and_gone_on_with(grid, tmp_path):
    """Ctrl-C, then a machine that dies in the middle of a run, then the same command once more."""
    short = "max_steps = 4\neval_rows = 6\nsample_steps = 0\nsave_steps = 1"
    grid("seed = [0, 1]", short)
    command = [*COMMAND, "sweep", str(tmp_path / "grid.toml"), "--grace", "3", "--name", "s"]

    def start() -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, **pipes)

    folder = tmp_path / "sweep-s"
    first = start()
    wait_for(lambda: list(folder.glob("*/tiny/sequence-*/parameters.yaml")))
    processes = tree_of(psutil.Process(first.pid))
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 130
    assert "stopped by you" in errors
    assert "Traceback" not in errors
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive

    def second_checkpoints() -> set[Path]:
        return set(folder.glob("*/tiny/06_*/checkpoints/checkpoint-2/seal.json"))

    before = second_checkpoints()  # of a run that was quicker than Ctrl-C
    second = start()
    wait_for(lambda: second_checkpoints() - before)
    [worker] = worker_processes(second)
    for process in tree_of(worker):  # at once, as when a machine loses its power
        with suppress(psutil.NoSuchProcess):
            process.kill()
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 1
    assert "0 of 2 points are done" in said
    [new] = second_checkpoints() - before
    cut = new.parents[2]
    n_starts = len(list(cut.parent.glob("sequence-*")))

    third = start()
    said, errors = third.communicate(timeout=300)
    assert third.returncode == 0, errors[-2000:]
    assert "2 of 2 points are done" in said
    found = []
    for run in folder.glob("*/tiny/06_*"):  # Ctrl-C may have left one that had no step yet
        if leaderboard.finished(run):
            found.append(run)
        else:
            assert not (run / "checkpoints").exists()
    assert len(found) == 2, "the killed run was resumed in its folder"
    assert cut in found
    assert len(list(cut.parent.glob("sequence-*"))) == n_starts + 1
    losses = []
    peaks = []
    for run in found:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
        manifest = json.loads((run / "manifest.json").read_text())
        assert manifest["status"] == "done"
        losses.append(manifest["metrics"]["loss_after"])
        peaks.append(max(json.loads(line)["memory_bytes"] for line in lines))
        assert manifest["metrics"]["peak_bytes"] == peaks[-1]
        seconds = [json.loads(line)["seconds"] for line in lines]
        assert seconds == sorted(seconds), "those before it was killed count too"
        assert manifest["metrics"]["train_seconds"] >= seconds[-1]
    board = leaderboard.table(folder)
    assert board["memory (MiB)"].tolist() == pytest.approx([numpy.mean(peaks) / 2**20])
    assert board["seeds"].tolist() == [2]
    assert board["loss (nats)"].tolist() == pytest.approx([numpy.mean(losses)])
    assert f"{numpy.mean(losses):.4g}" in said.splitlines()[-1], "the command ends with the board"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    fourth = start()
    said, _ = fourth.communicate(timeout=60)
    assert fourth.returncode == 0
    assert "2 of 2 points are done" in said
    written = {path.name for path, t in before.items() if path.stat().st_mtime_ns != t}
    assert written <= {"study.db", ".lock"}
    assert {path for path in folder.rglob("*") if path.is_file()} == before.keys()


# ---- the leaderboard


@pytest.fixture
def record(tmp_path):
    """Write a manifest: `record("06_a", loss=2.0, r=8, seed=0)`."""
    count = itertools.count()

    def write(loss=None, status="done", notebook="06_finetune", metrics=None, **parameters):
        number = next(count)
        folder = tmp_path / "runs" / f"{notebook}-{number}"
        folder.mkdir(parents=True)
        measured = {} if loss is None else {"loss_after": loss}
        manifest = {
            "status": status,
            "notebook": notebook,
            "started": f"2026-01-01T00:00:{number:02}+00:00",
            "parameters": {"model_id": "pocket", "output_dir": f"runs{number}", **parameters},
            "metrics": {**measured, **(metrics or {})},
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return tmp_path / "runs"

    return write


T_975 = {1: 12.706205, 2: 4.302653, 3: 3.182446, 4: 2.776445, 9: 2.262157, 29: 2.045230}
"""Published values of Student's t."""


def test_the_interval_is_students():
    assert math.isnan(intervals.half_width([2.0]))
    assert math.isnan(intervals.half_width([]))
    for degrees, t in T_975.items():
        values = numpy.random.default_rng(degrees).normal(size=degrees + 1)
        expected = t * values.std(ddof=1) / math.sqrt(degrees + 1)
        found = intervals.half_width(list(values))
        if degrees <= 9:
            assert found == pytest.approx(expected, rel=1e-3)
        else:
            assert expected < found < 1.16 * expected, "too wide, never too narrow"


def test_the_leaderboards_numbers_are_numpys(record):
    losses = {4: [2.1, 2.3, 2.25], 8: [1.9, 2.4, 1.7], 16: [2.05]}
    for r, of_seeds in losses.items():
        for seed, loss in enumerate(of_seeds):
            metrics = {
                "exact_match_after": {"all": loss / 10, "who": 1.0},
                "peak_bytes": (r + seed) * 2**20,
                "train_seconds": r + 10.0 * seed,
            }
            folder = record(loss, metrics=metrics, r=r, seed=seed, resume=f"from {seed}")
    record(None, status="running", r=16, seed=1)  # its process is gone
    record(None, status="interrupted", r=32, seed=0)
    board = leaderboard.table(folder)
    assert board.columns.tolist() == [
        *("r", "seeds", "loss (nats)", "±", "exact match", "memory (MiB)", "training (s)"),
        "unfinished",
    ]
    assert board["r"].tolist() == [8, 16, 4, 32]
    by_r = board.set_index("r")
    for r, of_seeds in losses.items():
        row = by_r.loc[r]
        n = len(of_seeds)
        assert row["seeds"] == n
        assert row["loss (nats)"] == pytest.approx(numpy.mean(of_seeds))
        assert row["exact match"] == pytest.approx(numpy.mean(of_seeds) / 10)
        assert row["memory (MiB)"] == pytest.approx(r + numpy.mean(range(n)))
        assert row["training (s)"] == pytest.approx(r + 10 * numpy.mean(range(n)))
    half = T_975[2] * numpy.std(losses[4], ddof=1) / math.sqrt(3)
    assert by_r.loc[4, "±"] == pytest.approx(half, rel=1e-4)
    assert by_r["±"].isna().tolist() == [False, True, False, True]
    assert by_r.loc[32, "seeds"] == 0
    assert by_r["unfinished"].tolist() == ["", "seed 1 died", "", "seed 0 interrupted"]
    record(r=4, seed=7)
    [said] = leaderboard.table(folder).query("r == 4")["unfinished"].unique()[-1:]
    assert "seed 7 done, not measured" in said
    said = leaderboard.as_text(folder).splitlines()
    assert len(said) == 5
    assert said[1].split()[:3] == ["8", "3", "2"]
    assert "nan" not in "".join(said).lower()


def test_a_point_counts_once_and_its_finished_run_wins(record):
    record(3.0, r=8, seed=0)
    record(None, status="died", r=8, seed=0)
    record(2.0, r=8, seed=0)
    record(None, status="failed", r=8, seed=0)
    record(9.0, r=8, seed=1, notebook="07_inference")
    folder = record(9.0, status="interrupted", r=8, seed=1)  # stopped before it was measured again
    (folder / "06_cut").mkdir()
    (folder / "06_cut" / "manifest.json").write_text('{"status": "do')
    board = leaderboard.table(folder)
    assert board["seeds"].tolist() == [1]
    assert board["loss (nats)"].tolist() == [2.0]
    assert board["unfinished"].tolist() == ["seed 1 interrupted"]
    with pytest.raises(KitError, match="no runs of notebook 06"):
        leaderboard.table(folder / "06_cut")


def test_what_varies_makes_a_line_whatever_its_type(record):
    for targets, packing in (["q"], True), (["q", "k"], True), (["q"], False), (["q"], None):
        folder = record(1.0, target_modules=targets, packing=packing, seed=0)
    board = leaderboard.table(folder)
    assert len(board) == 4
    assert board.columns[:2].tolist() == ["target_modules", "packing"]
    assert set(board["target_modules"]) == {"['q']", "['q', 'k']"}


def test_hostile_names_stay_text(record):
    script = "<script>alert(1)</script>"
    terminal = "\x1b[2J\x1b]0;title\x07\n| r | best |\u202e"
    for n, name in enumerate((script, terminal, "模型")):
        folder = record(1.0 + n, model_id=name, prompts=[script], seed=0)
    record(None, status=f"{terminal}{script}", model_id=script, prompts=[script], seed=script)
    board = leaderboard.table(folder)
    for page in (board.to_html(), board._repr_html_()):
        assert "<script" not in page
        assert "&lt;script&gt;" in page
    said = leaderboard.as_text(folder)
    assert len(said.splitlines()) == 4
    assert "模型" in said
    assert all(letter.isprintable() for line in said.split("\n") for letter in line)
    printed = subprocess.run(
        [*COMMAND, "leaderboard", str(folder)], capture_output=True, text=True, check=True
    )
    assert printed.stdout == f"{said}\n"


def test_a_folder_that_a_run_removes_meanwhile_is_passed_over(record, monkeypatch):
    folder = record(1.0, seed=0)
    going = folder / "06_finetune-0" / "checkpoints"
    going.mkdir()
    scandir, seen = os.scandir, []

    def gone(path):
        if str(path) == str(going):
            seen.append(path)
            raise FileNotFoundError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", gone)
    assert list(leaderboard.table(folder)["loss (nats)"]) == [1.0]
    assert seen


def test_a_leaderboard_of_nothing_is_refused(tmp_path):
    done = subprocess.run(
        [*COMMAND, "leaderboard", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "no runs of notebook 06" in done.stderr
