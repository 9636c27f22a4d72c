"""Checks of `make verify` for many runs: workers that are killed at random, and workers that share
a PostgreSQL server.

Both run notebook 06 for real, as short as it can be.
"""

from __future__ import annotations

import json
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from hosts import must

from qlora_nb import sources
from qlora_nb.batch import leaderboard

STEPS = 20
KILLS = 6
SHORT = f"""
[fixed]
max_steps = {STEPS}
save_steps = 4
eval_rows = 6
sample_steps = 0
"""
GRACE_S = 5


def killed_at_random() -> dict:
    """Twelve points of twenty steps, two commands, six kills at random: each point is done once and
    in no run a step is missing or repeated.
    """
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as out:
        grid = Path(out) / "grid.toml"
        grid.write_text(
            f"{SHORT}\n[grid]\nr = [4, 8]\nlearning_rate = [2e-3, 4e-3]\nseed = [0, 1, 2]\n"
        )
        commands = [_start(grid), _start(grid)]
        killed = []
        while len(killed) < KILLS:
            time.sleep(chance.uniform(8, 30))
            place = chance.randrange(2)
            commands[place] = _restarted(commands[place], grid)
            what = chance.choice(["the worker", "the worker and all that it started", "all"])
            if _kill(commands[place], what):
                killed.append(what)
        codes = []
        while 0 not in codes and len(codes) < 4:
            commands = [_restarted(command, grid) for command in commands]
            codes += [command.wait(3600) for command in commands]
        found = judged(Path(out) / "sweep-s", STEPS)
        board = leaderboard.as_text(Path(out) / "sweep-s").splitlines()
    passed = found["points done"] == 12 and not found["wrong"] and 0 in codes
    return {"passed": passed, "killed": killed, "exit codes": codes, **found, "board": board}


def judged(folder: Path, n_steps: int) -> dict:
    """What became of the points of a sweep: how many are done, and in which something is wrong:
    done twice, or its steps are not 1, 2, … n_steps.
    """
    wrong = []
    n_done = 0
    n_sequences = 0
    points = [path for path in folder.iterdir() if path.is_dir()]
    for point in points:
        runs = [path.parent for path in point.glob("*/06_*/manifest.json")]
        done = [run for run in runs if leaderboard.finished(run)]
        n_sequences += len(list(point.glob("*/sequence-*")))
        n_done += len(done) > 0
        if len(done) > 1:
            wrong.append(f"{point.name} was done {len(done)} times")
        for run in done:
            lines = (run / "metrics.jsonl").read_text().splitlines()
            steps = [json.loads(line)["step"] for line in lines]
            if steps != list(range(1, n_steps + 1)):
                wrong.append(f"{point.name} has the steps {steps}")
    return {"points": len(points), "points done": n_done, "starts": n_sequences, "wrong": wrong}


def _start(grid: Path, *options: str, **more) -> subprocess.Popen:
    command = [sys.executable, "-m", "qlora_nb.cli", "sweep", str(grid), "--name", "s"]
    command += ["--out", str(grid.parent), "--grace", str(GRACE_S), *options]
    return subprocess.Popen(command, cwd=sources.project_root(), stdout=subprocess.DEVNULL, **more)


def _restarted(command: subprocess.Popen, grid: Path) -> subprocess.Popen:
    return command if command.poll() is None else _start(grid)


def _kill(command: subprocess.Popen, what: str) -> bool:
    """SIGKILL for a command's worker, alone or with all below it, or for everything; whether there
    was a worker at work.
    """
    with suppress(psutil.NoSuchProcess):
        top = psutil.Process(command.pid)
        workers = [child for child in top.children() if child.children()]
        if workers:
            doomed = [workers[0]]
            if what != "the worker":
                doomed += workers[0].children(recursive=True)
            if what == "all":
                doomed.append(top)
            for process in doomed:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            return True
    return False


def postgresql() -> dict:
    """Two commands with two workers each share the points of one grid through PostgreSQL."""
    programs = _postgresql()
    if programs is None:
        return {"passed": None, "skipped": "there is no PostgreSQL here (Debian: postgresql)"}
    with tempfile.TemporaryDirectory() as out, _server(programs) as port:
        driver = Path(out) / "driver"
        pip = [sys.executable, "-m", "pip", "install", "-q", "--target", driver, "--no-deps"]
        must([*pip, "psycopg", "psycopg-binary"])
        environment = {**os.environ}
        environment["PYTHONPATH"] = f"{os.environ.get('PYTHONPATH', '')}:{driver}".lstrip(":")
        grid = Path(out) / "grid.toml"
        short = SHORT.replace(f"max_steps = {STEPS}", "max_steps = 4")
        grid.write_text(f"{short}\n[grid]\nr = [4, 8]\nseed = [0, 1]\n")
        url = f"postgresql+psycopg://kit@127.0.0.1:{port}/postgres"
        options = ("--workers", "2", "--storage", url)
        commands = [_start(grid, *options, env=environment) for _ in range(2)]
        codes = [command.wait(1800) for command in commands]
        found = judged(Path(out) / "sweep-s", 4)
        made = list(Path(out).glob("sweep-s/*.db"))
    passed = codes == [0, 0] and found["points done"] == 4 and not found["wrong"] and not made
    return {"passed": passed and found["starts"] == 4, "exit codes": codes, **found}


def _postgresql() -> Path | None:
    """The folder of initdb and pg_ctl; on Debian the package is installed if this user may."""
    is_there = any(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not is_there and shutil.which("apt-get") and os.geteuid() == 0:
        command = ["apt-get", "install", "-y", "-q", "postgresql"]
        subprocess.run(command, check=False, capture_output=True)
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


@contextmanager
def _server(programs: Path) -> Iterator[int]:
    """A PostgreSQL server of our own on a free port of this machine, with a user `kit`. It refuses
    to run as root: then it belongs to the user postgres.
    """
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        own = {"cwd": folder, "stdout": subprocess.DEVNULL}
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(folder, user.pw_uid, user.pw_gid)
            own |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        data = f"{folder}/data"
        make = [programs / "initdb", "-D", data, "-A", "trust", "-U", "kit"]
        subprocess.run(make, check=True, **own)
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1"
        log = f"{folder}/log"
        start = [programs / "pg_ctl", "-D", data, "-o", options, "-l", log, "-w", "start"]
        subprocess.run(start, check=True, **own)
        try:
            yield port
        finally:
            stop = [programs / "pg_ctl", "-D", data, "-m", "fast", "stop"]
            subprocess.run(stop, check=True, **own)
