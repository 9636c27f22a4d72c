"""Checkpoints that can be trusted: sealed last, verified first, continued exactly.

transformers' Trainer writes what an exact continuation needs: adapter, optimizer states,
learning-rate schedule, random states, its own counters. What can go wrong is around it: a process
killed while it writes, a file cut short, a run continued with other settings or other rows. So
every checkpoint gets a *seal*, a file with the size and SHA-256 of every other file, written when
all of them are there. A checkpoint without a seal, or one that disagrees with its seal, is left out
and the reason is said. On the CPU a continued run ends with the same bits as one that was never
stopped.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from qlora_nb import sources
from qlora_nb.errors import KitError
from qlora_nb.record import runs, seal

_WATCHING = (
    "sample_steps",
    "tensorboard",
    "prompts",
    "max_new_tokens",
    "temperature",
    "top_p",
    "repetition_penalty",
    "adapter",
)

MAY_DIFFER = ("output_dir", "resume", "save_steps", "prequantized", "fetch_ahead", *_WATCHING)
"""Parameters that do not change what is trained."""


def start(settings, notebook: str, say: Callable[[str], None] = print) -> runs.Run:
    """A new run, or with `resume` the one to go on with: "latest" is this profile's newest
    unfinished run with checkpoints.

    A run that ■ stopped is gone on with if its cell is run again, in the same kernel and with the
    same settings.

    Raises:
        KitError: `resume` names a folder that is no unfinished run, or one that was started with
            other settings.
    """
    mine = runs.newest_first(settings, notebook)
    if settings.resume == "no" and not (mine and _stopped_here(mine[0], settings)):
        return runs.Run(settings, notebook)
    folders = (
        [sources.local_path(settings.resume)] if settings.resume not in ("no", "latest") else mine
    )
    folder = next(
        (
            f
            for f in folders
            if runs.status_of(f) not in ("done", "running") and (f / "checkpoints").is_dir()
        ),
        None,
    )
    if folder is None and folders is mine:
        say("there is no unfinished run to go on with: a new one starts")
        return runs.Run(settings, notebook)
    if folder is None:
        allowed = "no, latest, or a run folder with checkpoints/"
        raise KitError("this is no unfinished run", value=settings.resume, allowed=allowed)
    if checkpoint := seal.newest_checkpoint(folder, say=lambda text: None):
        require_same(checkpoint, settings)
    say(f"going on with {folder.name} ({runs.status_of(folder)})")
    return runs.Run(settings, notebook, folder)


def _stopped_here(folder: Path, settings) -> bool:
    manifest, there = runs.manifest_of(folder)
    mine = there and (manifest.get("status"), manifest["pid"]) == ("interrupted", os.getpid())
    return mine and not _differing(
        manifest.get("parameters", {}), json.loads(settings.model_dump_json())
    )


def _differing(before: dict, now: dict) -> list[str]:
    """What of a run's settings would train something else, with both values."""
    return [
        f"{k} was {before.get(k)}, is {now[k]}"
        for k in now
        if k not in MAY_DIFFER and before.get(k) != now[k]
    ]


def fingerprint(rows) -> str:
    """A short hash of encoded training rows: their number and the tokens of some 256 of them."""
    some = range(0, len(rows), 1 + len(rows) // 256)
    return hashlib.sha256(
        json.dumps([len(rows), rows.select(some)["input_ids"][:]]).encode()
    ).hexdigest()[:16]


def require_same(folder: Path, settings, rows_hash: str | None = None) -> None:
    """Refuse to go on with other settings or other rows than the checkpoint's.

    Raises:
        KitError: names every field that differs, with both values.
    """
    record, now = (
        json.loads((folder / seal.SEAL).read_text()),
        json.loads(settings.model_dump_json()),
    )
    before = record.get("settings", {}) | {"training rows": record.get("rows")}
    now |= {"training rows": rows_hash} if rows_hash else {}
    if differ := _differing(before, now):
        remedy = 'set these back, or start a new run with resume="no"'
        raise KitError(
            f"this run was started with something else: {', '.join(differ)}", remedy=remedy
        )
