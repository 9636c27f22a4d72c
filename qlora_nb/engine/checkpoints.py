"""Checkpoints that can be trusted: sealed last, verified first, continued exactly.

transformers' Trainer writes what an exact continuation needs: adapter, optimizer states, learning-rate schedule, random
states, its own counters. What can go wrong is around it: a process killed while it writes, a file cut short, a run continued
with other settings or other rows. So every checkpoint gets a *seal*, a file with the size and SHA-256 of every other file,
written when all of them are there. A checkpoint without a seal, or one that disagrees with its seal, is left out and the
reason is said. On the CPU a continued run ends with the same bits as one that was never stopped.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from qlora_nb.engine.runs import Run, manifest_of, newest_first, sha256, status_of, write_atomically
from qlora_nb.errors import KitError

SEAL, KEEP = "seal.json", 2
_WATCHING = ("sample_steps", "tensorboard", "prompts", "max_new_tokens", "temperature", "top_p", "repetition_penalty", "adapter")
MAY_DIFFER = ("output_dir", "resume", "save_steps", "prequantized", "fetch_ahead", *_WATCHING)
"""Parameters that do not change what is trained."""


def start(settings, notebook: str, say: Callable[[str], None] = print) -> Run:
    """A new run, or with `resume` the one to go on with: "latest" is this profile's newest unfinished run with checkpoints.

    A run that ■ stopped is gone on with if its cell is run again, in the same kernel and with the same settings.

    Raises:
        KitError: `resume` names a folder that is no unfinished run, or one that was started with other settings.
    """
    mine = newest_first(settings, notebook)
    if settings.resume == "no" and not (mine and _stopped_here(mine[0], settings)):
        return Run(settings, notebook)
    folders = [Path(settings.resume).expanduser()] if settings.resume not in ("no", "latest") else mine
    folder = next((f for f in folders if status_of(f) not in ("done", "running") and (f / "checkpoints").is_dir()), None)
    if folder is None and folders is mine:
        say("there is no unfinished run to go on with: a new one starts")
        return Run(settings, notebook)
    if folder is None:
        allowed = "no, latest, or a run folder with checkpoints/"
        raise KitError("this is no unfinished run", value=settings.resume, allowed=allowed)
    if checkpoint := newest(folder, say=lambda text: None):
        require_same(checkpoint, settings)
    say(f"going on with {folder.name} ({status_of(folder)})")
    return Run(settings, notebook, folder)


def _stopped_here(folder: Path, settings) -> bool:
    manifest, there = manifest_of(folder)
    mine = there and (manifest.get("status"), manifest["pid"]) == ("interrupted", os.getpid())
    return mine and not _differing(manifest.get("parameters", {}), json.loads(settings.model_dump_json()))


def _differing(before: dict, now: dict) -> list[str]:
    """What of a run's settings would train something else, with both values."""
    return [f"{k} was {before.get(k)}, is {now[k]}" for k in now if k not in MAY_DIFFER and before.get(k) != now[k]]


def fingerprint(rows) -> str:
    """A short hash of encoded training rows: their number and the tokens of some 256 of them."""
    some = range(0, len(rows), 1 + len(rows) // 256)
    return hashlib.sha256(json.dumps([len(rows), rows.select(some)["input_ids"][:]]).encode()).hexdigest()[:16]


def seal(folder: Path, **about: object) -> None:
    """Close a checkpoint or an adapter that is complete, then remove all checkpoints but the newest two."""
    files = {f.name: [f.stat().st_size, sha256(f)] for f in sorted(folder.iterdir()) if f.name not in (SEAL, "README.md")}
    write_atomically(folder / SEAL, json.dumps(about | {"files": files}, indent=1))
    for old in _newest_first(folder.parent)[KEEP:]:
        shutil.rmtree(old, ignore_errors=True)


def fault(folder: Path) -> str:
    """Why a checkpoint cannot be used; empty if it is what was sealed."""
    try:
        files = [(name, size, digest) for name, (size, digest) in json.loads((folder / SEAL).read_text())["files"].items()]
    except FileNotFoundError:
        return "it has no seal: the run ended while it was being written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "its seal cannot be read"
    for name, size, digest in files:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, {size} were sealed"
        if sha256(path) != digest:
            return f"{name} is damaged"
    return ""


def require_whole(adapter: Path) -> None:
    """Refuse an adapter that is not, byte for byte, the one that a run sealed; one from elsewhere has no seal."""
    if (adapter / SEAL).exists() and (reason := fault(adapter)):
        remedy = "take another copy, or run notebook 06 again"
        raise KitError(f"the adapter is damaged: {reason}", value=adapter.name, remedy=remedy)


def newest(run_folder: Path, say: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint of a run that verifies; the reason is said for each one that does not. None if there is none."""
    for folder in _newest_first(run_folder / "checkpoints"):
        if reason := fault(folder):
            say(f"{folder.name} is left out: {reason}")
        else:
            return folder
    return None


def require_same(folder: Path, settings, rows_hash: str | None = None) -> None:
    """Refuse to go on with other settings or other rows than the checkpoint's.

    Raises:
        KitError: names every field that differs, with both values.
    """
    record, now = json.loads((folder / SEAL).read_text()), json.loads(settings.model_dump_json())
    before = record.get("settings", {}) | {"training rows": record.get("rows")}
    now |= {"training rows": rows_hash} if rows_hash else {}
    if differ := _differing(before, now):
        remedy = 'set these back, or start a new run with resume="no"'
        raise KitError(f"this run was started with something else: {', '.join(differ)}", remedy=remedy)


def step_of(folder: Path) -> int:
    """The optimizer step a checkpoint was written after."""
    return int(folder.name.rsplit("-", 1)[1])


def _newest_first(folder: Path) -> list[Path]:
    return sorted((f for f in folder.glob("checkpoint-*") if f.name.rsplit("-", 1)[1].isdigit()), key=step_of, reverse=True)
