"""Files that are whole or not there: written under another name and renamed, hashed, locked."""

import hashlib
import os
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from filelock import FileLock, Timeout

from qlora_nb.errors import KitError, refusing

GO_ON = 'make room there and run it again with resume="latest": what was written before is whole'


def writing(path: Path, remedy: str = GO_ON) -> AbstractContextManager:
    """Context in which a disk that is full or closed becomes a refusal, whatever the library that
    writes says.
    """
    return refusing(f"{path.name} cannot be written", str(path.parent), remedy)


def write_atomically(path: Path, text: str) -> None:
    """Write under a temporary name in the same folder, then rename: a reader sees the old file or
    the new one.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path), ExitStack() as stack:
        stack.callback(temporary.unlink, missing_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def sha256(path: Path) -> str:
    """A file's SHA-256 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sole_writer(path: Path) -> AbstractContextManager:
    """Hold a run folder, or a single file, for this process until the returned context ends.

    The lock goes with the process, however it ends. It lies in the folder, or beside the file that
    all its names lead to.

    Raises:
        KitError: another process holds it.
    """
    lock, what = path / ".lock", "run folder"
    if not path.is_dir():
        lock, what = path.resolve().with_name(f".{path.resolve().name}.lock"), "file"
    try:
        return FileLock(lock).acquire(blocking=False)
    except Timeout:
        what = f"another process writes into this {what}"
        raise KitError(what, value=path.name, remedy="wait for it, or stop it") from None
