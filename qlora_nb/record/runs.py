"""Run folders: one folder a run, written so that a killed run is seen to be one.

`runs/<profile>/<notebook>-<time>/` holds `manifest.json` (parameters, versions, hardware, commit,
metrics, status), `metrics.jsonl`, `adapter/`. Every file is written under a temporary name and
renamed.
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


def key_results(results: dict[str, object]) -> dict[str, object]:
    """Round a notebook's key results for showing and comparing, and hand them to the batch run if
    there is one.

    Floats are rounded to four significant digits. `qlora-nb run` sets QLORA_NB_RESULTS to the file
    it reads afterwards; a notebook that did not get this far has no such file and counts as failed.
    """
    rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in results.items()}
    if target := os.environ.get("QLORA_NB_RESULTS"):
        files.write_atomically(Path(target), json.dumps(rounded, indent=1))
    return rounded


def new_folder(settings, name: str) -> Path:
    """Make `<output_dir>/<profile>/<name>-<time>/`, with a number behind it if another run took
    that second.

    Raises:
        KitError: the place cannot be written to, or a file is in the way.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    with refusing(
        "output_dir cannot be written to", settings.output_dir, "name a folder you may write to"
    ):
        for n in count():
            folder = sources.runs_root(settings) / f"{name}-{stamp}{f'-{n}' if n else ''}"
            with suppress(FileExistsError):
                folder.mkdir(parents=True)
                return folder


def beginning(
    folder: Path, parameters: dict[str, object], packages: Iterable[str]
) -> dict[str, object]:
    """What the record of a run says before anything has run: the time, the parameters, this
    machine, its packages.
    """
    when = {
        "schema_version": SCHEMA_VERSION,
        "status": "running",
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    here = {
        "hardware": asdict(machine.this_machine(folder)),
        "versions": {package: machine.installed(package) for package in packages},
    }
    return {**when, "parameters": parameters, **here}


class Run:
    """One run and its folder. Use as a context manager; the status is `done` only if the body ended
    without an error.

    `folder` continues in the folder of an earlier run (`resumed` is True then); its record stays as
    it is until `begin`.
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
        """Undo a run that was refused before its first step: a new one's folder goes, an earlier
        run's record is left alone.
        """
        if self.manifest["status"] != "running":
            return
        self.manifest["status"] = "refused"
        files = {path.name for path in self.folder.rglob("*") if path.is_file()}
        if not self.resumed and files <= {"manifest.json", ".lock"}:
            shutil.rmtree(self.folder, ignore_errors=True)

    def log(self, record: dict[str, object]) -> None:
        """Append one line to metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        with files.writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(redaction.redact(record)) + "\n")

    def cut(self, step: int) -> list[dict]:
        """Forget what was logged after a step; returns the records that stay."""
        path = self.folder / "metrics.jsonl"
        path.touch()  # before the first logged step there is none
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(
                ValueError, KeyError, TypeError
            ):  # the last line of a killed run may be cut short
                record = json.loads(line)
                loss = record.get("loss", record.get("held_out_loss"))
                kept += [record] if record["step"] <= step and math.isfinite(loss) else []
        files.write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
        return kept

    def finish(self, status: str = "done", **metrics: object) -> None:
        """Write metrics and status; the last thing a run does."""
        self.manifest["metrics"] |= metrics
        self.manifest |= {"status": status, "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        self._save()

    def add(self, **metrics: object) -> None:
        """Add measurements to the record as it stands now; what became of the run is not
        changed.
        """
        self.manifest = manifest_of(self.folder)[0] or self.manifest
        self.manifest["metrics"] |= metrics
        self._save()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self.manifest["status"] == "refused":
            return
        if kind is not None:
            self.finish(
                "interrupted" if kind is KeyboardInterrupt else "failed",
                error=f"{kind.__name__}: {error}"[:500],
            )
        elif self.manifest["status"] == "running":
            self.finish()

    def _save(self) -> None:
        files.write_atomically(
            self.folder / "manifest.json",
            json.dumps(redaction.redact(self.manifest), indent=1, default=str) + "\n",
        )


def manifest_of(folder: Path) -> tuple[dict, bool]:
    """A run's manifest, and whether the process that wrote it is still there; ({}, False) if it
    cannot be read.
    """
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
    return sorted(
        sources.runs_root(settings).glob(f"{notebook}-*"),
        key=lambda f: f.lstat().st_mtime,
        reverse=True,
    )


def latest_done(settings, notebook: str) -> Path | None:
    """The newest finished run of a notebook in this profile that left an adapter, or None."""
    folders = newest_first(settings, notebook)
    return next((f for f in folders if status_of(f) == "done" and (f / "adapter").is_dir()), None)


def _commit() -> str | None:
    command = ["git", "-C", str(sources.project_root()), "rev-parse", "HEAD"]
    with suppress(OSError, subprocess.SubprocessError):  # no git, or no repository
        return subprocess.check_output(
            command, text=True, timeout=5, stderr=subprocess.DEVNULL
        ).strip()
