"""A seal closes a checkpoint or an adapter: size and SHA-256 of every file, written last, verified
first.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from qlora_nb.errors import KitError
from qlora_nb.record import files

SEAL, KEEP = "seal.json", 2


def write_seal(folder: Path, **about: object) -> None:
    """Close a checkpoint or an adapter that is complete, then remove all checkpoints but the newest
    two.
    """
    contents = {
        f.name: [f.stat().st_size, files.sha256(f)]
        for f in sorted(folder.iterdir())
        if f.name not in (SEAL, "README.md")
    }
    files.write_atomically(folder / SEAL, json.dumps(about | {"files": contents}, indent=1))
    for old in newest_first(folder.parent)[KEEP:]:
        shutil.rmtree(old, ignore_errors=True)


def damage(folder: Path) -> str:
    """Why a checkpoint cannot be used; empty if it is what was sealed."""
    try:
        sealed = [
            (name, size, digest)
            for name, (size, digest) in json.loads((folder / SEAL).read_text())["files"].items()
        ]
    except FileNotFoundError:
        return "it has no seal: the run ended while it was being written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "its seal cannot be read"
    for name, size, digest in sealed:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, {size} were sealed"
        if files.sha256(path) != digest:
            return f"{name} is damaged"
    return ""


def require_whole(adapter: Path) -> None:
    """Refuse an adapter that is not, byte for byte, the one that a run sealed; one from elsewhere
    has no seal.
    """
    if (adapter / SEAL).exists() and (reason := damage(adapter)):
        remedy = "take another copy, or run notebook 06 again"
        raise KitError(f"the adapter is damaged: {reason}", value=adapter.name, remedy=remedy)


def newest_checkpoint(run_folder: Path, say: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint of a run that verifies; the reason is said for each one that does not.
    None if there is none.
    """
    for folder in newest_first(run_folder / "checkpoints"):
        if reason := damage(folder):
            say(f"{folder.name} is left out: {reason}")
        else:
            return folder
    return None


def step_of(folder: Path) -> int:
    """The optimizer step a checkpoint was written after."""
    return int(folder.name.rsplit("-", 1)[1])


def newest_first(folder: Path) -> list[Path]:
    return sorted(
        (f for f in folder.glob("checkpoint-*") if f.name.rsplit("-", 1)[1].isdigit()),
        key=step_of,
        reverse=True,
    )
