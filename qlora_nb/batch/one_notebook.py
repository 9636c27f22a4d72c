"""One notebook in its own process, watched while it runs and judged by what it left behind.

papermill executes it: parameters go in, every cell runs in a fresh kernel, an executed copy comes
out. Its word is not enough, though. A kernel that was killed can leave a notebook marked
"completed", and an exception inside a widget leaves exit code 0. So a notebook counts as done only
if three witnesses agree: papermill ended with 0, the notebook reached its key-results cell (which
writes a small file), and no stored output, also inside a widget, holds an error.

papermill runs as a process, not as a function: in this process its client (nbclient) would take
SIGINT and SIGTERM for itself, environment variables could not be given to one kernel alone, and
what a dying kernel writes to stderr would not land in this notebook's log.
"""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import psutil

from qlora_nb import sources
from qlora_nb.errors import KitError, refusing
from qlora_nb.progress import Bar
from qlora_nb.record import files, redaction

SAMPLE_S = 0.25

_PROGRESS = re.compile(r"(\d+)/\d+ \[")  # papermill's own bar, read from its stderr


@dataclass
class Outcome:
    """What happened to one notebook. `problems` is empty if it is done."""

    notebook: str
    source: str = ""  # SHA-256 of the notebook that was run
    status: str = "running"
    wall_s: float = 0.0
    peak_bytes: int = 0
    exit_code: int | None = None
    problems: list[str] = field(default_factory=list)
    results: dict = field(default_factory=dict)


def read(path: Path) -> nbformat.NotebookNode:
    """A notebook from its file, or a refusal."""
    with refusing("this is no notebook", value=path.name, remedy="take another copy of it"):
        return nbformat.read(path, 4)


def require_own_kernel() -> None:
    """The kernel `python3` must be this Python: another one would run other package versions,
    silently.
    """
    from jupyter_client.kernelspec import get_kernel_spec

    program = Path(get_kernel_spec("python3").argv[0])
    this = Path(sys.executable)
    # jupyter_client starts a bare "python" with its own Python
    if program.is_absolute() and program.parent.resolve() != this.parent.resolve():
        raise KitError(
            "the Jupyter kernel python3 belongs to another Python",
            value=str(program),
            remedy=f"{this.name} -m ipykernel install --sys-prefix",
        )


def run(source: Path, folder: Path, outcome: Outcome, bar: Bar) -> None:
    """Run one notebook and write into `outcome` what the witnesses say.

    Args:
        source: the notebook.
        folder: where `parameters.yaml` lies and the executed notebook goes.
        outcome: filled in, also if this is interrupted.
        bar: moved on by the cells that have run.
    """
    executed = folder / source.name
    results = folder / f"{source.stem}.results.json"
    log = folder / f".{source.stem}.log"
    started = time.time()
    cells_before = bar.n
    process = _start_papermill(source, folder, log, results)
    try:
        while process.poll() is None:
            outcome.peak_bytes = max(outcome.peak_bytes, _resident_bytes(process.pid))
            cells = _PROGRESS.findall(log.read_text(encoding="utf-8", errors="replace"))
            if cells:
                bar.update(cells_before + int(cells[-1]) - bar.n)
            time.sleep(SAMPLE_S)
    except BaseException:
        outcome.status = "interrupted"
        outcome.problems = ["stopped by you"]
        raise
    finally:
        stop_tree(process.pid)
        outcome.exit_code = process.poll()
        outcome.wall_s = round(time.time() - started, 1)
        take_out_secrets(executed)
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        log.unlink()
    said = [line for line in lines if line.strip() and not _PROGRESS.search(line)]
    judge(outcome, executed, results, said)


def _start_papermill(source: Path, folder: Path, log: Path, results: Path) -> subprocess.Popen:
    root = sources.project_root()
    command = [sys.executable, "-m", "papermill", str(source), str(folder / source.name)]
    command += ["--kernel", "python3", "--cwd", str(root), "-f", str(folder / "parameters.yaml")]
    command += ["--progress-bar", "--log-level", "ERROR"]

    environment = {**os.environ, "QLORA_NB_RESULTS": str(results), "PYTHONUNBUFFERED": "1"}
    with open(log, "wb") as stderr:
        streams = {"stdout": subprocess.DEVNULL, "stderr": stderr}
        return start(command, "SIGKILL", env=environment, cwd=root, **streams)


def start(command: list[str], name: str, **options: object) -> subprocess.Popen:
    """Start a program that hears of Ctrl-C through this process alone. If this process is killed,
    Linux sends it the signal of this name. The options are those of `Popen`.
    """

    def end_with_parent() -> None:
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.Signals[name])

    return subprocess.Popen(
        command,
        start_new_session=True,
        preexec_fn=end_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509
        **options,
    )


def _resident_bytes(pid: int) -> int:
    """Resident memory of the kernel and its children. Linux tells how many share a page (PSS);
    elsewhere what they share is counted for each.
    """
    n_bytes = 0
    with suppress(psutil.Error):  # here and below: it has ended by itself
        for child in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.Error):
                if sys.platform == "linux":
                    n_bytes += child.memory_full_info().pss
                else:
                    n_bytes += child.memory_info().rss
    return n_bytes


def stop_tree(pid: int) -> None:
    """End a process and all its descendants. The kernel has a session of its own, so a signal to
    the group would miss it.
    """
    with suppress(psutil.Error):  # here and below: it has ended by itself
        parent = psutil.Process(pid)
        tree = [*parent.children(recursive=True), parent]
        for process in tree:
            with suppress(psutil.Error):
                process.terminate()
        _, alive = psutil.wait_procs(tree, timeout=5)
        for process in alive:
            with suppress(psutil.Error):
                process.kill()


def take_out_secrets(executed: Path) -> None:
    """Redact what a notebook has left; one that was cut off is no JSON any more and redacted as it
    stands.
    """
    if not executed.is_file():
        return
    text = executed.read_text(encoding="utf-8", errors="replace")
    try:
        # nbformat joins texts that are cut into lines
        text = nbformat.writes(redaction.redact(nbformat.reads(text, 4)))
    except ValueError:
        text = redaction.redact(text)
    files.write_atomically(executed, text)


def judge(outcome: Outcome, executed: Path, results: Path, said: list[str]) -> None:
    """Hear the witnesses: fills in the results, the problems and the status.

    Args:
        outcome: its `exit_code` is papermill's.
        executed: the executed notebook; not there if papermill refused it at once.
        results: what the key-results cell wrote.
        said: the lines that papermill wrote on stderr besides its bar.
    """
    problems = []
    try:
        if executed.exists():
            problems = [error[:600] for error in stored_errors(nbformat.read(executed, 4))]
    except ValueError:
        problems = [f"{executed.name} is cut off: papermill was ended while it wrote"]
    died = outcome.exit_code in (-9, 138)  # papermill was killed, or says that its kernel died
    if died:
        problems.append(
            f"the kernel died (exit {outcome.exit_code}), most often because memory ran out"
        )
    elif outcome.exit_code and not problems:
        last = redaction.redact(said[-1])[:300] if said else ""
        problems.append(f"papermill ended with {outcome.exit_code}: {last}")
    try:
        outcome.results = json.loads(results.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        problems.append("the notebook did not reach its key results")
    outcome.problems = problems
    outcome.status = "done"
    if problems:
        outcome.status = "died" if died else "failed"


def stored_errors(notebook: nbformat.NotebookNode) -> list[str]:
    """Every error in a notebook's stored outputs, also inside widgets, where papermill does not
    look.

    A cell tagged `raises-exception` may fail.
    """
    found = []
    for number, cell in enumerate(notebook.cells):
        if "raises-exception" not in cell.metadata.get("tags", []):
            for error in _errors(cell.get("outputs", [])):
                found.append(f"cell {number}: {error}")
    widgets = notebook.metadata.get("widgets", {})
    models = widgets.get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
    for model in models.values():
        for error in _errors(model.get("state", {}).get("outputs", [])):
            found.append(f"inside a widget: {error}")
    return found


def _errors(outputs: Iterable[dict]) -> list[str]:
    found = []
    for output in outputs:
        if output.get("output_type") == "error":
            name = output.get("ename", "error")
            text = output.get("evalue", "")
            found.append(text if name == "KitError" else f"{name}: {text}")
        elif output.get("name") == "stderr":
            text = "".join(output.get("text", ""))
            if "Traceback (most recent call last)" in text:
                found.append(f"a traceback was printed: {text.strip().splitlines()[-1]}")
    return found
