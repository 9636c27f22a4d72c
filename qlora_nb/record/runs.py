"""Run folders: one folder a run, written so that a killed run is seen to be one.

`<output_dir>/<profile>/<notebook>-<time>/` holds `manifest.json` (parameters, versions, hardware,
commit, metrics, status), `metrics.jsonl` (a line for each logged step), `adapter/` and
`checkpoints/`. The manifest says "running" from the first moment and "done" only at the end; it
also says which process wrote it. So a manifest that says "running" while that process is gone is a
run that died, which no last word of the run itself could tell.
"""

import json
import math
import os
import shutil
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Self

import psutil

from qlora_nb import machine, sources
from qlora_nb.errors import refusing
from qlora_nb.record import files, redaction

SCHEMA_VERSION = 1

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "qlora-nb")

_TIME = "%Y-%m-%dT%H:%M:%S%z"


def key_results(results: dict[str, object]) -> dict[str, object]:
    """Round a notebook's key results for showing and comparing, and hand them to the batch run if
    there is one.

    Floats are rounded to four significant digits. `qlora-nb run` sets QLORA_NB_RESULTS to the file
    it reads afterwards; a notebook that did not get this far has no such file and counts as failed.
    """
    rounded = {}
    for name, value in results.items():
        rounded[name] = float(f"{value:.4g}") if isinstance(value, float) else value
    target = os.environ.get("QLORA_NB_RESULTS")
    if target:
        files.write_atomically(Path(target), json.dumps(redaction.redact(rounded), indent=1))
    return rounded


def new_folder(settings, name: str) -> Path:
    """Make `<output_dir>/<profile>/<name>-<time>/`, with a number behind it if another run took
    that second.

    Raises:
        KitError: the place cannot be written to, or a file is in the way.
    """
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    what = "output_dir cannot be written to"
    with refusing(what, value=settings.output_dir, remedy="name a folder you may write to"):
        for n in count():
            folder = sources.runs_root(settings) / (f"{stem}-{n}" if n else stem)
            with suppress(FileExistsError):
                folder.mkdir(parents=True)
                return folder


def new_record(
    folder: Path, parameters: dict[str, object], packages: Iterable[str]
) -> dict[str, object]:
    """What the record of a run says before anything has run: the time, the parameters, this
    machine, its packages.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "status": "running",
        "started": time.strftime(_TIME),
        "parameters": parameters,
        "hardware": asdict(machine.this_machine(folder)),
        "versions": {package: machine.installed(package) for package in packages},
    }


class Run:
    """One run and its folder. Use as a context manager; the status is `done` only if the body ended
    without an error.

    `folder` continues in the folder of an earlier run (`resumed` is True then); its record stays as
    it is until `begin`.
    """

    def __init__(self, settings, notebook: str, folder: Path | None = None):
        self.resumed = folder is not None
        self.folder = folder or new_folder(settings, notebook)
        self.manifest = new_record(self.folder, settings.model_dump(), PACKAGES)
        self.manifest["notebook"] = notebook
        self.manifest["commit"] = commit()
        self.manifest["pid"] = os.getpid()
        self.manifest["metrics"] = {}
        if not self.resumed:
            self.begin()

    def begin(self) -> None:
        """Write down that this run is at work."""
        self._save()

    def withdraw(self) -> None:
        """Undo a run that was refused before its first step: a new one's folder goes, an earlier
        run's record is left alone.
        """
        if self.manifest["status"] != "running":
            return
        self.manifest["status"] = "refused"
        written = {path.name for path in self.folder.rglob("*") if path.is_file()}
        if not self.resumed and written <= {"manifest.json", ".lock"}:
            shutil.rmtree(self.folder, ignore_errors=True)

    def log(self, record: dict[str, object]) -> None:
        """Append one line to metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        with files.writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(redaction.redact(record)) + "\n")

    def truncate_log(self, step: int) -> list[dict]:
        """Remove from metrics.jsonl what was logged after a step; returns the records that stay."""
        path = self.folder / "metrics.jsonl"
        path.touch()  # before the first logged step there is none
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            # the last line of a killed run may be cut short
            with suppress(ValueError, KeyError, TypeError, AttributeError):
                record = json.loads(line)
                loss = record.get("loss", record.get("held_out_loss"))
                if record["step"] <= step and math.isfinite(loss):
                    kept.append(record)
        files.write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
        return kept

    def finish(self, status: str = "done", **metrics: object) -> None:
        """Write metrics and status; the last thing a run does."""
        self.manifest["metrics"].update(metrics)
        self.manifest["status"] = status
        self.manifest["ended"] = time.strftime(_TIME)
        self._save()

    def add(self, **metrics: object) -> None:
        """Add measurements to the record as it stands now; what became of the run is not
        changed.
        """
        written, _ = manifest_of(self.folder)
        if written:
            self.manifest = written
        self.manifest["metrics"].update(metrics)
        self._save()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self.manifest["status"] == "refused":
            return
        if kind is not None:
            status = "interrupted" if kind is KeyboardInterrupt else "failed"
            self.finish(status, error=f"{kind.__name__}: {error}"[:500])
        elif self.manifest["status"] == "running":
            self.finish()

    def _save(self) -> None:
        text = json.dumps(redaction.redact(self.manifest), indent=1, default=str)
        files.write_atomically(self.folder / "manifest.json", text + "\n")


def manifest_of(folder: Path) -> tuple[dict, bool]:
    """A run's manifest, and whether the process that wrote it is still there; ({}, False) if it
    cannot be read.
    """
    path = folder / "manifest.json"
    manifest = {}
    there = False
    with suppress(OSError, ValueError, KeyError, TypeError, psutil.NoSuchProcess):
        manifest = dict(json.loads(path.read_text()))
        # a process that began after the last word of this one only has its number
        there = psutil.Process(manifest["pid"]).create_time() < path.stat().st_mtime + 1
    return manifest, there


def status_of(folder: Path) -> str:
    """running, done, failed, interrupted, or died (it says running but its process is gone)."""
    manifest, there = manifest_of(folder)
    status = manifest.get("status", "died")
    if status == "running" and not there:
        return "died"
    return status


def newest_first(settings, notebook: str) -> list[Path]:
    """The folders of a notebook's runs in this profile."""

    def changed(folder: Path) -> float:
        return folder.lstat().st_mtime

    folders = sources.runs_root(settings).glob(f"{notebook}-*")
    return sorted(folders, key=changed, reverse=True)


def latest_done(settings, notebook: str) -> Path | None:
    """The newest finished run of a notebook in this profile that left an adapter, or None."""
    for folder in newest_first(settings, notebook):
        if status_of(folder) == "done" and (folder / "adapter").is_dir():
            return folder
    return None


def commit() -> str | None:
    """The commit that the repository stands at; None without git or without a repository."""
    command = ["git", "-C", str(sources.project_root()), "rev-parse", "HEAD"]
    with suppress(OSError, subprocess.SubprocessError):
        said = subprocess.check_output(command, text=True, timeout=5, stderr=subprocess.DEVNULL)
        return said.strip()
