"""Run folders: one folder a run, written so that a killed run is seen to be one.

`runs/<profile>/<notebook>-<time>/` holds `manifest.json` (parameters, versions, hardware, commit, metrics, status),
`metrics.jsonl`, `adapter/`. Every file is written under a temporary name and renamed.
"""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Self

import psutil
from filelock import FileLock, Timeout

from qlora_nb.engine.environment import installed, machine
from qlora_nb.errors import KitError, refusing

SCHEMA_VERSION = 1
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|API_?KEY|CREDENTIAL|_KEY$|_PAT$", re.IGNORECASE)
_SECRET = re.compile(r"\b(hf_|ghp_|github_pat_|sk-)[A-Za-z0-9_-]{16,}")
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "qlora-nb")


def project_root() -> Path:
    """The folder of the repository a notebook runs in, else the current folder."""
    here = Path.cwd()
    return next((p for p in (here, *here.parents) if (p / "notebooks").is_dir() and (p / "pyproject.toml").is_file()), here)


def redact(value):
    """A copy without secrets, of a text or of whatever holds texts (keys are left alone): what looks like a token of a hub, and
    the value of every environment variable whose name says that it is a secret.

    >>> redact({"said": ["hf_" + 20 * "a"]})
    {'said': ['[hidden]']}
    """
    if isinstance(value, dict):
        return type(value)({key: redact(part) for key, part in value.items()})
    if isinstance(value, list | tuple):
        return [redact(part) for part in value]
    if isinstance(value, str):
        for name, secret in os.environ.items():
            value = value.replace(secret, "[hidden]") if len(secret) >= 8 and _SECRET_NAME.search(name) else value
        return _SECRET.sub("[hidden]", value)
    return value


GO_ON = 'make room there and run it again with resume="latest": what was written before is whole'


def writing(path: Path, remedy: str = GO_ON) -> AbstractContextManager:
    """Context in which a disk that is full or closed becomes a refusal, whatever the library that writes says."""
    return refusing(f"{path.name} cannot be written", str(path.parent), remedy)


def write_atomically(path: Path, text: str) -> None:
    """Write under a temporary name in the same folder, then rename: a reader sees the old file or the new one."""
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


def key_results(results: dict[str, object]) -> dict[str, object]:
    """Round a notebook's key results for showing and comparing, and hand them to the batch run if there is one.

    Floats are rounded to four significant digits. `qlora-nb run` sets QLORA_NB_RESULTS to the file it reads afterwards;
    a notebook that did not get this far has no such file and counts as failed.
    """
    rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in results.items()}
    if target := os.environ.get("QLORA_NB_RESULTS"):
        write_atomically(Path(target), json.dumps(rounded, indent=1))
    return rounded


def recorded(name: str) -> tuple[dict, str] | None:
    """A measurement that lies beside the notebooks (`notebooks/recorded/`) and a line that says where it comes from.

    None where the file is not: the notebook then says so. The files are written by the scripts in `benchmarks/`.
    """
    path = project_root() / "notebooks" / "recorded" / f"{name}.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    hardware, versions = record["hardware"], record["versions"] or {}
    on = ", ".join(gpu["name"] for gpu in hardware["gpus"]) or f"{hardware['n_cores']} cores of {hardware['cpu']}"
    with_ = ", ".join(f"{p} {versions.get(p, '(unknown)')}" for p in ("torch", "transformers", "bitsandbytes"))
    return record, f"recorded {record['date'][:10]} on {on}, {with_}, commit {(record['commit'] or 'unknown')[:7]}"


def runs_root(settings) -> Path:
    """The folder that this profile's runs go into; a relative `output_dir` lies in the repository."""
    return project_root() / Path(settings.output_dir).expanduser() / settings.profile


def new_folder(settings, name: str) -> Path:
    """Make `<output_dir>/<profile>/<name>-<time>/`, with a number behind it if another run took that second.

    Raises:
        KitError: the place cannot be written to, or a file is in the way.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    with refusing("output_dir cannot be written to", settings.output_dir, "name a folder you may write to"):
        for n in count():
            folder = runs_root(settings) / f"{name}-{stamp}{f'-{n}' if n else ''}"
            with suppress(FileExistsError):
                folder.mkdir(parents=True)
                return folder


def beginning(folder: Path, parameters: dict[str, object], packages: Iterable[str]) -> dict[str, object]:
    """What the record of a run says before anything has run: the time, the parameters, this machine, its packages."""
    when = {"schema_version": SCHEMA_VERSION, "status": "running", "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    here = {"hardware": asdict(machine(folder)), "versions": {package: installed(package) for package in packages}}
    return {**when, "parameters": parameters, **here}


class Run:
    """One run and its folder. Use as a context manager; the status is `done` only if the body ended without an error.

    `folder` continues in the folder of an earlier run (`resumed` is True then); its record stays as it is until `begin`.
    """

    def __init__(self, settings, notebook: str, folder: Path | None = None):
        self.settings, self.notebook, self.resumed = settings, notebook, folder is not None
        self.folder = folder or new_folder(settings, notebook)
        about = {"notebook": notebook, "commit": _commit(), "pid": os.getpid(), "metrics": {}}
        self.manifest = beginning(self.folder, settings.model_dump(), PACKAGES) | about
        if not self.resumed:
            self.begin()

    def begin(self) -> None:
        """Write down that this run is at work."""
        self._save()

    def withdraw(self) -> None:
        """Undo a run that was refused before its first step: a new one's folder goes, an earlier run's record is left alone."""
        if self.manifest["status"] != "running":
            return
        self.manifest["status"] = "refused"
        files = {path.name for path in self.folder.rglob("*") if path.is_file()}
        if not self.resumed and files <= {"manifest.json", ".lock"}:
            shutil.rmtree(self.folder, ignore_errors=True)

    def log(self, record: dict[str, object]) -> None:
        """Append one line to metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        with writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(redact(record)) + "\n")

    def cut(self, step: int) -> list[dict]:
        """Forget what was logged after a step; returns the records that stay."""
        path = self.folder / "metrics.jsonl"
        path.touch()  # before the first logged step there is none
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, KeyError, TypeError):  # the last line of a killed run may be cut short
                record = json.loads(line)
                loss = record.get("loss", record.get("held_out_loss"))
                kept += [record] if record["step"] <= step and math.isfinite(loss) else []
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
        return kept

    def finish(self, status: str = "done", **metrics: object) -> None:
        """Write metrics and status; the last thing a run does."""
        self.manifest["metrics"] |= metrics
        self.manifest |= {"status": status, "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        self._save()

    def add(self, **metrics: object) -> None:
        """Add measurements to the record as it stands now; what became of the run is not changed."""
        self.manifest = manifest_of(self.folder)[0] or self.manifest
        self.manifest["metrics"] |= metrics
        self._save()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self.manifest["status"] == "refused":
            return
        if kind is not None:
            self.finish("interrupted" if kind is KeyboardInterrupt else "failed", error=f"{kind.__name__}: {error}"[:500])
        elif self.manifest["status"] == "running":
            self.finish()

    def _save(self) -> None:
        write_atomically(self.folder / "manifest.json", json.dumps(redact(self.manifest), indent=1, default=str) + "\n")


@contextmanager
def on_interrupt(handle: Callable[[int], None]) -> Iterator[None]:
    """Inside, SIGINT (■, Ctrl-C) and SIGTERM (a cluster's pre-emption) are given to `handle` as their numbers.

    Only the main thread receives signals: in any other one nothing changes.
    """
    mine = threading.current_thread() is threading.main_thread()
    catch = lambda number, frame: handle(number)
    before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM) if mine}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def sole_writer(path: Path) -> AbstractContextManager:
    """Hold a run folder, or a single file, for this process until the returned context ends.

    The lock goes with the process, however it ends. It lies in the folder, or beside the file that all its names lead to.

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


def manifest_of(folder: Path) -> tuple[dict, bool]:
    """A run's manifest, and whether the process that wrote it is still there; ({}, False) if it cannot be read."""
    manifest, there = {}, False
    with suppress(OSError, ValueError, KeyError, TypeError, psutil.NoSuchProcess):
        manifest = dict(json.loads((path := folder / "manifest.json").read_text()))
        # a process that began after the last word of this one only has its number
        there = psutil.Process(manifest["pid"]).create_time() < path.stat().st_mtime + 1
    return manifest, there


def status_of(folder: Path) -> str:
    """running, done, failed, interrupted, or died (it says running but its process is gone)."""
    manifest, there = manifest_of(folder)
    status = manifest.get("status", "died")
    return status if there or status != "running" else "died"


def newest_first(settings, notebook: str) -> list[Path]:
    """The folders of a notebook's runs in this profile."""
    return sorted(runs_root(settings).glob(f"{notebook}-*"), key=lambda f: f.lstat().st_mtime, reverse=True)


def latest_done(settings, notebook: str) -> Path | None:
    """The newest finished run of a notebook in this profile that left an adapter, or None."""
    folders = newest_first(settings, notebook)
    return next((f for f in folders if status_of(f) == "done" and (f / "adapter").is_dir()), None)


def _commit() -> str | None:
    command = ["git", "-C", str(project_root()), "rev-parse", "HEAD"]
    with suppress(OSError, subprocess.SubprocessError):  # no git, or no repository
        return subprocess.check_output(command, text=True, timeout=5, stderr=subprocess.DEVNULL).strip()
