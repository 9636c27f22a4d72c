"""Measurements made by the scripts in `benchmarks/`, with hardware, versions, commit and date, as
package data.
"""

import json
from pathlib import Path

FOLDER = Path(__file__).parent


def read(name: str) -> tuple[dict, str] | None:
    """A recorded measurement and a line that says where it comes from.

    None where the file is not: the notebook then says so. The files are written by the scripts in
        `benchmarks/`.
    """
    path = FOLDER / f"{name}.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    hardware, versions = record["hardware"], record["versions"] or {}
    on = (
        ", ".join(gpu["name"] for gpu in hardware["gpus"])
        or f"{hardware['n_cores']} cores of {hardware['cpu']}"
    )
    with_ = ", ".join(
        f"{p} {versions.get(p, '(unknown)')}" for p in ("torch", "transformers", "bitsandbytes")
    )
    return (
        record,
        f"recorded {record['date'][:10]} on {on}, {with_}, commit {(record['commit'] or 'unknown')[:7]}",
    )
