"""Many runs: each point of a grid is done once, whatever happens to the workers; and what the
leaderboard says of them.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy
import optuna
import psutil
import pytest
from sweep_driver import STEPS

from qlora_nb.batch import leaderboard, sweep
from qlora_nb.errors import KitError
from qlora_nb.theory import intervals

DRIVER = Path(__file__).parent / "sweep_driver.py"
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
    ],
)
def test_a_bad_grid_is_refused_before_anything_starts(grid, tmp_path, lists, fixed, says):
    with pytest.raises(KitError, match=says):
        sweep.run(grid(lists, fixed), workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["grid.toml"]
    with pytest.raises(KitError, match="this grid cannot be read"):
        sweep.run(tmp_path / "none.toml", workers=1)


def test_a_database_that_cannot_be_opened_is_refused(grid):
    for url in ("nonsense", "postgresql+nodriver://user:secret@host/db"):
        with pytest.raises(KitError, match="this sweep cannot begin") as refused:
            sweep.run(grid("r = [4]"), workers=1, storage=url)
        assert "secret" not in str(refused.value)


# ---- workers, with runs that train nothing


@pytest.fixture
def start(tmp_path):
    """`start(grid)` → (a worker, the sweep's folder); each is ended at the end."""
    processes = []

    def one(grid: Path) -> tuple[subprocess.Popen, Path]:
        points, _ = sweep.read_grid(grid)
        folder = tmp_path / "sweep"
        folder.mkdir(exist_ok=True)
        described = sweep.Sweep("s", folder, f"sqlite:///{folder}/study.db", points, grace_s=2)
        (tmp_path / "sweep.json").write_text(json.dumps(asdict(described), default=str))
        command = [sys.executable, str(DRIVER), str(tmp_path / "sweep.json")]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return processes[-1], folder

    yield one
    for process in processes:
        process.kill()
        process.wait()


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


def test_two_starts_at_once_do_each_point_once_and_a_third_nothing(grid, start):
    path = grid("r = [4, 8, 16]\nseed = [0, 1]")
    workers = [start(path)[0] for _ in range(2)]
    folder = start(path)[1]
    assert [worker.wait(60) for worker in workers] == [0, 0]
    made = steps_made(folder)
    assert len(made) == 6
    assert all(steps == ONCE for steps in made.values()), made
    assert max(map(len, workers_of(folder))) == 1
    assert len(set.union(*workers_of(folder))) > 1, "they shared the points"
    study = optuna.load_study(study_name="s", storage=f"sqlite:///{folder}/study.db")
    told = [trial.user_attrs["point"] for trial in study.trials if trial.values]
    assert sorted(told) == sorted(made)
    assert all(trial.state.is_finished() for trial in study.trials)
    again, _ = start(path)
    assert again.wait(60) == 0
    assert again.stdout.read() == ""
    assert steps_made(folder) == made
    # who has lost the database and kept the folders does nothing either
    (folder / "study.db").unlink()
    assert start(path)[0].wait(60) == 0
    assert steps_made(folder) == made


@pytest.mark.fault(24)
def test_a_killed_workers_point_is_taken_over_in_its_folder(grid, start):
    path = grid("seed = [0]")
    first, folder = start(path)
    wait_for(lambda: len(steps_made(folder).get(next(iter(steps_made(folder)), ""), [])) >= 3)
    second, _ = start(path)  # waits, for the first is alive
    time.sleep(0.3)
    first.kill()
    assert second.wait(60) == 0
    assert list(steps_made(folder).values()) == [ONCE]
    assert workers_of(folder) == [{first.pid, second.pid}]
    assert leaderboard.finished(folder)["metrics"] == {"loss_after": 1.0}


def test_a_slow_worker_lets_go_of_the_point_that_it_lost(grid, start):
    path = grid("seed = [0]")
    first, folder = start(path)
    wait_for(lambda: list(folder.glob("*/steps_made")))
    first.send_signal(signal.SIGSTOP)
    second, _ = start(path)
    study = optuna.load_study(study_name="s", storage=f"sqlite:///{folder}/study.db")
    wait_for(lambda: len(study.get_trials()) == 2)  # the point went back into the queue
    wait_for(lambda: "worker" in study.get_trials()[1].user_attrs)
    before = steps_made(folder)
    time.sleep(1.5)
    assert steps_made(folder) == before, "the first still holds the folder"
    first.send_signal(signal.SIGCONT)
    assert [first.wait(60), second.wait(60)] == [0, 0]
    assert list(steps_made(folder).values()) == [ONCE]
    assert workers_of(folder) == [{first.pid, second.pid}]
    assert "not done" in first.stdout.read()


def test_a_worker_that_died_while_it_took_a_point_leaves_it_to_the_others(grid, start, tmp_path):
    path = grid("seed = [0, 1]")
    points, _ = sweep.read_grid(path)
    folder = tmp_path / "sweep"
    folder.mkdir()
    one = sweep.Sweep("s", folder, f"sqlite:///{folder}/study.db", points, 2)
    study = sweep._filled(one)
    assert study.ask().user_attrs["point"] in points  # taken, and not a sign of life
    assert start(path)[0].wait(60) == 0
    assert [*steps_made(folder).values()] == [ONCE, ONCE]


def test_a_point_that_fails_is_told_and_tried_again_by_the_next_start(grid, start):
    path = grid("learning_rate = [0.5, 0.004]\nseed = [0]")
    worker, folder = start(path)
    assert worker.wait(60) == 0
    said = worker.stdout.read().splitlines()
    assert sorted(line.split(": ")[1].split(",")[0] for line in said) == ["done", "not done"]
    worker, _ = start(path)
    assert worker.wait(60) == 0
    [line] = worker.stdout.read().splitlines()
    assert "not done, see" in line
    assert len(leaderboard.table(folder)) == 2
