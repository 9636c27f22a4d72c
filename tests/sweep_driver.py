"""A worker of a sweep whose runs train nothing: each writes the record of a run of STEPS steps, one
every tenth of a second, and goes on after the last one that it finds.

    sweep_driver.py sweep.json

What it writes is what a real run leaves: a manifest, a line in metrics.jsonl for each step. It also
notes each step that it makes in `steps_made`, a file that nobody ever cuts short.
"""

from __future__ import annotations

import json
import os
import sys
import time
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
        time.sleep(0.1)
        with open(log, "a") as file, open(folder / "steps_made", "a") as made:
            file.write(json.dumps({"step": step}) + "\n")
            made.write(f"{step} {os.getpid()}\n")
    if parameters["learning_rate"] == 0.5:
        return  # it diverged
    record |= {"status": "done", "metrics": {"loss_after": parameters["r"] / 8}}
    (run / "manifest.json").write_text(json.dumps(record))


if __name__ == "__main__":
    sweep._run_notebook = run_nothing
    fields = json.loads(Path(sys.argv[1]).read_text())
    one = sweep.Sweep(**{**fields, "folder": Path(fields["folder"])})
    sweep._filled(one)
    sweep.work(one)
