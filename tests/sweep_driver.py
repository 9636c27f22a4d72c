"""A worker of a sweep whose runs train nothing: each leaves what a real run leaves, a manifest and
a line in metrics.jsonl for each of its STEPS steps, and goes on after the last one that it finds.

It also notes each step that it makes in `steps_made`, a file that nobody ever cuts short. A run
with a learning rate of 0.5 fails. After half of its steps it waits for as long as there is a file
`hold` beside the points' folders.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import redirect_stdout
from datetime import UTC, datetime
from pathlib import Path

from qlora_nb.batch import sweep
from qlora_nb.settings import validate

STEPS = 12


def run_nothing(given, folder, is_lost):
    run = folder / "tiny" / "06_nothing"
    run.mkdir(parents=True, exist_ok=True)
    parameters = validate({**given, "output_dir": str(folder)}).model_dump()
    record = {"notebook": "06", "status": "running", "pid": os.getpid(), "parameters": parameters}
    record |= {"started": datetime.now(UTC).isoformat(), "metrics": {}}
    (run / "manifest.json").write_text(json.dumps(record))
    log = run / "metrics.jsonl"
    n_done = len(log.read_text().splitlines()) if log.exists() else 0
    for step in range(n_done + 1, STEPS + 1):
        if is_lost():
            return
        time.sleep(0.05)
        while step > STEPS // 2 and (folder.parent / "hold").exists():
            time.sleep(0.05)
        with open(log, "a") as file, open(folder / "steps_made", "a") as made:
            file.write(json.dumps({"step": step}) + "\n")
            made.write(f"{step} {os.getpid()}\n")
    if parameters["learning_rate"] != 0.5:
        record |= {"status": "done", "metrics": {"loss_after": parameters["r"] / 8}}
        (run / "manifest.json").write_text(json.dumps(record))


def drive(said: Path, name: str, folder: Path, *more) -> None:
    """What a command with one worker does, in this very process; `said` takes what it prints, the
    rest is for `sweep.filled`.
    """
    sweep._run_notebook = run_nothing
    with open(said, "w") as file, redirect_stdout(file):
        sweep.work(sweep.filled(name, folder, *more), folder)
