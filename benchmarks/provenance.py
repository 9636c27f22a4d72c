"""What every measurement carries: when, on what, with which versions, from which commit."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType

import torch

from qlora_nb import machine
from qlora_nb.record import files, runs

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tools"))


def __getattr__(name: str) -> ModuleType:
    """`from provenance import open_cells`, the notebook's own cells, or `micro_world`: what lies in
    `tools`. The cells bring transformers and PEFT with them, so they are loaded where they are
    asked for (PEP 562).
    """
    if name not in ("open_cells", "micro_world"):
        raise AttributeError(name)
    return importlib.import_module(name)


def provenance(seeds: tuple[int, ...] = ()) -> dict:
    """Date, commit (and whether the working copy was clean), hardware, versions, threads and seeds;
    None: not known.
    """
    status = _git("status", "--porcelain")
    # where the kit is not installed, only on the path: those that numbers depend on
    versions = {package: machine.installed(package) for package in runs.PACKAGES}
    with suppress(PackageNotFoundError):
        versions = {
            version.package: version.installed
            for version in machine.versions()
            if version.installed
        }
    hardware = asdict(machine.this_machine(ROOT))
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": _git("rev-parse", "HEAD"),
        "clean": None if status is None else not status,  # False: the commit does not say all
        "hardware": {
            k: hardware[k] for k in ("cpu", "n_cores", "ram_bytes", "gpus", "python", "system")
        },
        "versions": versions,
        "threads": torch.get_num_threads(),
        "seeds": list(seeds),
    }


def _git(*arguments: str) -> str | None:
    """What git says of the repository that this file lies in; None without git or repository."""
    with suppress(OSError):
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            return done.stdout.strip()
    return None


def write(path: Path, record: dict) -> None:
    """One JSON file, written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(f"written: {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
