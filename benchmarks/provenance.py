"""What every measurement carries: when, on what, with which versions, from which commit."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import torch

from qlora_nb.engine import environment, runs

ROOT = Path(__file__).resolve().parent.parent


def provenance(seeds: tuple[int, ...] = ()) -> dict:
    """Date, commit (and whether the working copy was clean), hardware, versions, threads and seeds."""
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    machine = asdict(environment.machine(ROOT))
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": runs._commit(),
        "clean": not changed.strip(),  # False: the commit does not say all
        "hardware": {k: machine[k] for k in ("cpu", "n_cores", "ram_bytes", "gpus", "python", "system")},
        "versions": {v.package: v.installed for v in environment.versions() if v.installed},
        "threads": torch.get_num_threads(),
        "seeds": list(seeds),
    }


def write(path: Path, record: dict) -> None:
    """One JSON file, written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_atomically(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(f"written: {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
