"""Which run to resume, and whether it may be resumed.

transformers' Trainer writes what an exact continuation needs: adapter, optimizer states,
learning-rate schedule, random states, its own counters. What can go wrong is around it: a process
killed while it writes, a file cut short, a run resumed with other settings or other rows. So every
checkpoint gets a *seal* (`record/seal.py`), a file with the size and SHA-256 of every other file,
written when all of them are there. A checkpoint without a seal, or one that disagrees with its
seal, is left out and the reason is said. The seal also holds the settings and a hash of the rows,
which are compared here. On the CPU a resumed run ends with the same bits as one that was never
stopped.
"""

import hashlib
import json
import os
from pathlib import Path

from qlora_nb import sources
from qlora_nb.errors import KitError
from qlora_nb.record import runs, seal

MAY_DIFFER = {
    "output_dir",
    "resume",
    "save_steps",
    "prequantized",
    "allow_slow",
    "fetch_ahead",
    "pythia",
    "gpu_gib",
    "blocksize",
    "sample_steps",
    "tensorboard",
    "prompts",
    "max_new_tokens",
    "temperature",
    "top_p",
    "repetition_penalty",
    "adapter",
}
"""Parameters that do not change what is trained."""


def start(settings, notebook: str) -> runs.Run:
    """A new run, or with `resume` an unfinished one: "latest" is this profile's newest unfinished
    run with checkpoints, anything else a run's folder.

    A run that ■ stopped is resumed when its cell is run again in the same kernel with the same
    settings, also without `resume`.

    Raises:
        KitError: `resume` names a folder that is no unfinished run, or one that was started with
            other settings.
    """

    def is_meant(folder: Path, record: dict) -> bool:
        if record.get("notebook") != notebook:
            return False
        if settings.resume == "no":
            return _stopped_here(folder, settings)
        return _is_unfinished(folder)

    if settings.resume not in ("no", "latest"):
        folder = sources.local_path(settings.resume)
        if not _is_unfinished(folder):
            raise KitError(
                "this is no unfinished run",
                value=str(folder.absolute()),
                allowed="no, latest, or a run folder with checkpoints/",
            )
    else:
        folder = runs.newest(sources.runs_root(settings), is_meant)
    if folder is None:
        if settings.resume == "latest":
            print("there is no unfinished run to resume: a new one starts")
        return runs.Run(settings, notebook)
    checkpoint = seal.newest_checkpoint(folder)
    if checkpoint:
        require_same(checkpoint, settings)
    print(f"resuming {folder.name} ({runs.status_of(folder)})")
    return runs.Run(settings, notebook, folder)


def _is_unfinished(folder: Path) -> bool:
    has_checkpoints = (folder / "checkpoints").is_dir()
    return has_checkpoints and runs.status_of(folder) not in ("done", "running")


def _stopped_here(folder: Path, settings) -> bool:
    """Whether ■ stopped this run, in this very process and with these settings."""
    manifest, there = runs.manifest_of(folder)
    if not there or manifest.get("status") != "interrupted" or manifest["pid"] != os.getpid():
        return False
    return not _differing(manifest.get("parameters", {}), settings.model_dump(mode="json"))


def _differing(before: dict, now: dict) -> list[str]:
    """What of a run's settings would train something else, with both values. A parameter that the
    version of the run did not have has decided nothing.
    """
    found = []
    for name, value in now.items():
        if name not in MAY_DIFFER and before.get(name, value) != value:
            found.append(f"{name} was {before[name]}, is {value}")
    return found


def fingerprint(rows) -> str:
    """A short hash of tokenized training rows: their number and the tokens of some 256 of them."""
    some = range(0, len(rows), 1 + len(rows) // 256)
    content = json.dumps([len(rows), rows.select(some)["input_ids"][:]])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def require_same(checkpoint: Path, settings, rows_hash: str | None = None) -> None:
    """Refuse to resume with other settings or other rows than the checkpoint's.

    Raises:
        KitError: names every field that differs, with both values.
    """
    record = json.loads((checkpoint / seal.SEAL).read_text())
    now = settings.model_dump(mode="json")
    recorded = record.get("settings") or dict.fromkeys(now)
    before = {**recorded, "training rows": record.get("rows")}
    if rows_hash:
        now["training rows"] = rows_hash
    differing = _differing(before, now)
    if differing:
        raise KitError(
            f"this run was started with something else: {', '.join(differing)}",
            remedy='set these back, or start a new run with resume="no"',
        )
