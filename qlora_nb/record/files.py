"""Files that are whole or not there: written under another name and renamed, hashed, locked.

A process can be killed between any two instructions, and a disk can be full at any byte. So a text
file is written under a temporary name in the same folder, flushed to the disk and then renamed:
POSIX and Windows rename within a file system in one step, and a reader sees the old file or the new
one, never half of one. Two processes that write into one folder are kept apart by an operating
system's lock (package filelock), which goes with its process however that ends. So a folder of
something half made is known to be left over by its lock, which nobody holds any more.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock, Timeout

from qlora_nb.errors import KitError, refusing

GO_ON = 'make room there and run it again with resume="latest": what was written before is whole'


def writing(path: Path, remedy: str = GO_ON) -> AbstractContextManager:
    """Context in which a disk that is full or closed becomes a refusal, whatever the library that
    writes says.
    """
    return refusing(f"{path.name} cannot be written", value=str(path.parent), remedy=remedy)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file in UTF-8, so that a reader sees the old one or the new one.

    Raises:
        KitError: there is no room, or one may not write there; the old file is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """A file's SHA-256 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sole_writer(path: Path) -> AbstractContextManager:
    """Hold a run folder, or a single file, for this process until the returned context ends.

    The lock lies in the folder, or beside the file that all its names lead to.

    Raises:
        KitError: another process holds it.
    """
    file = path.resolve()
    lock = file.with_name(f".{file.name}.lock")
    if path.is_dir():
        lock = path / ".lock"
    try:
        return FileLock(lock).acquire(blocking=False)
    except Timeout:
        what = "another process writes here"
        raise KitError(what, value=path.name, remedy="wait for it, or stop it") from None


@contextmanager
def temporary_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder for what is not whole yet; it goes at the end. If the process is killed, it
    stays until `clear_leftovers`.
    """
    temporary = TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True)
    with temporary as name, sole_writer(Path(name)):
        yield Path(name)


def clear_leftovers(parent: Path, prefix: str) -> None:
    """Remove the folders that killed processes left behind, those whose lock nobody holds."""
    for folder in parent.glob(f"{prefix}*/"):
        with suppress(KitError, OSError), sole_writer(folder):
            shutil.rmtree(folder, ignore_errors=True)
