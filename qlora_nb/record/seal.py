"""A seal closes a checkpoint, an adapter or a 4-bit copy: size and SHA-256 of every file, written
last, verified first.

A run that is killed while it saves leaves a folder that looks like a checkpoint. The seal tells the
two apart: it is written when everything else is on the disk, so a folder without one is not whole,
and a file that was changed since (a full disk, a bad copy, another hand) does not agree with it.
What ships with the kit has one seal too.
"""

import json
import shutil
from contextlib import suppress
from pathlib import Path

from qlora_nb import pocket
from qlora_nb.errors import KitError
from qlora_nb.record import files

SEAL = "seal.json"

KEEP = 2
"""So many checkpoints of a run are kept: the newest, and one to fall back on."""


def write_seal(folder: Path, **about: object) -> None:
    """Close a checkpoint or an adapter that is complete, then remove all checkpoints but the newest
    two.

    Args:
        folder: its files are sealed, but for README.md, which people edit.
        about: written into the seal beside the list of files.
    """
    contents = {}
    for path in sorted(folder.iterdir()):
        if path.name not in (SEAL, "README.md"):
            contents[path.name] = size_and_hash(path)
    files.write_atomically(folder / SEAL, json.dumps({**about, "files": contents}, indent=1))
    for old in newest_first(folder.parent)[KEEP:]:
        shutil.rmtree(old, ignore_errors=True)


def damage(folder: Path) -> str:
    """Why a checkpoint cannot be used; empty if it is what was sealed."""
    sealed = {}
    with suppress(OSError, ValueError, KeyError, TypeError):
        sealed = dict(json.loads((folder / SEAL).read_text())["files"])
    if not sealed:
        return "it has no seal that can be read: the run ended while it was being written"
    for name, recorded in sealed.items():
        path = folder / name
        if not path.is_file() or size_and_hash(path) != recorded:
            return f"{name} is missing or damaged"
    return ""


def size_and_hash(path: Path) -> list:
    """What a seal says of a file."""
    return [path.stat().st_size, files.sha256(path)]


def require_whole(folder: Path, what: str = "adapter") -> None:
    """Refuse an adapter or a model that is not, byte for byte, the one that a run sealed or that
    ships with the kit; one from elsewhere has no seal.
    """
    sealed = folder
    remedy = "take another copy, or run notebook 06 again"
    if folder.parent == pocket.HERE:
        sealed = pocket.HERE
        remedy = "install the kit again"
    if not (sealed / SEAL).exists():
        return
    reason = damage(sealed)
    if reason:
        raise KitError(f"the {what} is damaged: {reason}", value=folder.name, remedy=remedy)


def newest_checkpoint(run_folder: Path) -> Path | None:
    """The newest checkpoint of a run that verifies; the reason is said for each one that does not.
    None if there is none.
    """
    for folder in newest_first(run_folder / "checkpoints"):
        reason = damage(folder)
        if not reason:
            return folder
        print(f"{folder.name} is left out: {reason}")
    return None


def step_of(folder: Path) -> int:
    """The optimizer step a checkpoint was written after."""
    return int(folder.name.rsplit("-", 1)[1])


def newest_first(folder: Path) -> list[Path]:
    """The folders `checkpoint-<step>` in a folder, the latest step first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rsplit("-", 1)[1].isdigit()]
    return sorted(found, key=step_of, reverse=True)
