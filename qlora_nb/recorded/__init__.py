"""Measurements that a laptop cannot repeat, as package data.

What needs a GPU or hours is measured once, by the scripts in `benchmarks/`, and stored here as JSON
with hardware, versions, commit and date. A notebook shows such a number only with the line that
says where it comes from. Tables of what was measured, here and by others, beside what is predicted
are written by `tools/recorded_tables.py` and `tools/published_table.py`.
"""

import json
from pathlib import Path

FOLDER = Path(__file__).parent


def read(name: str) -> tuple[dict, str] | None:
    """A recorded measurement and a line that says where it comes from; None where it was not made
    yet.
    """
    path = FOLDER / f"{name}.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    hardware = record["hardware"]
    versions = record["versions"] or {}
    device = ", ".join(gpu["name"] for gpu in hardware["gpus"])
    if not device:
        device = f"{hardware['n_cores']} cores of {hardware['cpu']}"
    source = f"recorded {record['date'][:10]} on {device}"
    for package in ("torch", "transformers", "bitsandbytes"):
        source += f", {package} {versions.get(package, '(unknown)')}"
    commit = record["commit"] or "unknown"
    return record, f"{source}, commit {commit[:7]}"
