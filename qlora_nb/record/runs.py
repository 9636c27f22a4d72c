"""Run folders: one folder a run, written so that a killed run is seen to be one.

`<output_dir>/<profile>/<notebook>-<time>/` holds `manifest.json` (parameters, versions, hardware,
commit, metrics, status), `metrics.jsonl` (a line for each logged step), `adapter/` and
`checkpoints/`. The manifest says "running" from the first moment and "done" only at the end; it
also says which process wrote it. So a manifest that says "running" while that process is gone is a
run that died, which no last word of the run itself could tell.

Which run is the newest is asked of the manifests too: each holds the instant in UTC when its run
began. A folder's name or date is no witness: folders are renamed, copied, unzipped and touched.
"""

import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path

import psutil

from qlora_nb import machine, processes, sources
from qlora_nb.errors import refusing
from qlora_nb.record import files, redaction

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "qlora-nb")

MANIFEST = "manifest.json"

FINE_TUNING = "06_finetune_pythia_12b"
"""The notebook whose runs leave an adapter; `qlora-nb train` makes such runs too."""


def key_results(results: dict) -> dict:
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
    stem = f"{name}-{datetime.now().strftime('%Y%m%d-%H%M%S')}"
    what = "output_dir cannot be written to"
    with refusing(what, value=settings.output_dir, remedy="name a folder you may write to"):
        for n in count():
            folder = sources.runs_root(settings) / (f"{stem}-{n}" if n else stem)
            with suppress(FileExistsError):
                folder.mkdir(parents=True)
                return folder


def new_record(folder: Path, parameters: dict) -> dict:
    """What the record of a run says before anything has run: the time, the process, the
    parameters, this machine, the code and the packages that numbers depend on.
    """
    return {
        "schema_version": 1,
        "status": "running",
        "started": _now(),
        "pid": os.getpid(),
        "commit": commit(),
        "parameters": parameters,
        "hardware": asdict(machine.this_machine(folder)),
        "versions": {package: machine.installed(package) for package in PACKAGES},
    }


class Run:
    """One run and its folder. Its record says "running" until `finish`.

    `folder` continues in the folder of an earlier run (`resumed` is True then); its record stays as
    it is until `save`. Of several processes that train one run the first alone writes.
    """

    def __init__(self, settings, notebook: str, folder: Path | None = None):
        self.resumed = folder is not None
        self.writes = processes.rank() == 0
        self.folder = folder or new_folder(settings, notebook)
        self.manifest = new_record(self.folder, settings.model_dump())
        self.manifest["notebook"] = notebook
        self.manifest["metrics"] = {}
        if not self.resumed:
            self.save()

    def withdraw(self) -> None:
        """Undo a run that was refused before its first step: a new one's folder goes, an earlier
        run's record is left alone.
        """
        if self.manifest["status"] != "running" or not self.writes:
            return
        self.manifest["status"] = "refused"
        written = {path.name for path in self.folder.rglob("*") if path.is_file()}
        if not self.resumed and written <= {MANIFEST, ".lock"}:
            shutil.rmtree(self.folder, ignore_errors=True)

    def log(self, record: dict) -> None:
        """Append one line to metrics.jsonl."""
        if not self.writes:
            return
        path = self.folder / "metrics.jsonl"
        with files.writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(redaction.redact(record)) + "\n")

    def truncate_log(self, step: int) -> list[dict]:
        """Remove from metrics.jsonl what was logged after a step; returns the records that stay."""
        path = self.folder / "metrics.jsonl"
        text = ""
        if path.is_file():  # not before the first logged step
            text = path.read_text(encoding="utf-8", errors="replace")
        kept = []
        for line in text.splitlines():
            # the last line of a killed run may be cut short
            with suppress(ValueError, KeyError, TypeError, AttributeError):
                record = json.loads(line)
                loss = record.get("loss", record.get("held_out_loss"))
                if record["step"] <= step and math.isfinite(loss):
                    kept.append(record)
        processes.wait()  # all have read it
        if self.writes:
            files.write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
        return kept

    def finish(self, status: str = "done", **metrics: object) -> None:
        """Write metrics and status; the last thing a run does."""
        self.manifest["metrics"].update(metrics)
        self.manifest["status"] = status
        self.manifest["ended"] = _now()
        self.save()

    def add(self, **metrics: object) -> None:
        """Add measurements to the record as it stands now; what became of the run is not
        changed.
        """
        written, _ = manifest_of(self.folder)
        if written:
            self.manifest = written
        self.manifest["metrics"].update(metrics)
        self.save()

    def save(self) -> None:
        """Write down what is known: after a start or a resume, that this run is at work."""
        if not self.writes:
            return
        text = json.dumps(redaction.redact(self.manifest), indent=1, default=str)
        files.write_atomically(self.folder / MANIFEST, text + "\n")


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _began(record: dict) -> datetime:
    """The instant at which a run began.

    Raises:
        ValueError: its record has no time, one without a zone, or one later than now; another
            machine's clock may be a minute ahead.
    """
    began = datetime.fromisoformat(str(record.get("started")))
    if began.tzinfo is None or began > datetime.now(UTC) + timedelta(minutes=1):
        raise ValueError("a time without a zone, or later than now")
    return began


def read_record(path: Path) -> dict:
    """What a manifest.json or summary.json holds; empty if it cannot be read."""
    with suppress(OSError, ValueError, TypeError):
        return dict(json.loads(path.read_text(encoding="utf-8")))
    return {}


def manifest_of(folder: Path) -> tuple[dict, bool]:
    """A run's manifest, and whether the process that wrote it is still there; ({}, False) if it
    cannot be read.
    """
    manifest = read_record(folder / MANIFEST)
    there = False
    with suppress(ValueError, KeyError, TypeError, psutil.Error):
        # a process that began after this run did only has its number
        created = psutil.Process(manifest["pid"]).create_time()
        there = created < _began(manifest).timestamp() + 1
    return manifest, there


def status_of(folder: Path) -> str:
    """running, done, failed, interrupted, or died (it says running but its process is gone)."""
    manifest, there = manifest_of(folder)
    status = manifest.get("status", "died")
    if status == "running" and not there:
        return "died"
    return status


def newest(root: Path, is_meant: Callable[[Path, dict], bool], name: str = MANIFEST) -> Path | None:
    """The folder of the run that began last, as its own record says. None if there is none.

    A run whose record cannot be right about its time (`_began`) is left out and said.

    Args:
        root: a profile's folder; the names of the folders in it do not matter.
        is_meant: asked for each run, with its folder and its record.
        name: the record's file.
    """
    dated = []
    for path in root.glob(f"*/{name}"):
        folder = path.parent
        record = read_record(path)
        if not is_meant(folder, record):
            continue
        try:
            dated.append((_began(record), folder))
        except ValueError:
            print(
                f"{folder.name} is left out: its {name} says that it began at "
                f"{record.get('started')!r}, which is later than now or no time with a zone"
            )
    return max(dated)[-1] if dated else None


def latest_done(settings, notebook: str) -> Path | None:
    """The newest finished run of a notebook in this profile that left an adapter, or None."""

    def is_finished(folder: Path, record: dict) -> bool:
        is_done = record.get("notebook") == notebook and record.get("status") == "done"
        return is_done and (folder / "adapter").is_dir()

    return newest(sources.runs_root(settings), is_finished)


def commit() -> str | None:
    """The commit that the repository stands at; None without git or without a repository."""
    command = ["git", "-C", str(sources.project_root()), "rev-parse", "HEAD"]
    with suppress(OSError, subprocess.SubprocessError):
        said = subprocess.check_output(command, text=True, timeout=5, stderr=subprocess.DEVNULL)
        return said.strip()
