"""The batch run: every notebook in its own process, in reading order, judged by what it left
behind.

Papermill's word is not enough. A kernel that was killed leaves a notebook marked "completed", and
an exception inside a widget leaves exit code 0. So a notebook counts as done only if three
witnesses agree: papermill ended with 0, the notebook reached its key-results cell (which writes a
    small file), and no stored output, also inside a widget, holds an error.

Each notebook gets a fresh process, so memory of one cannot hide in the next, and the memory of its
kernel and the kernel's children is sampled while it runs. A later notebook runs even if an earlier
one failed: one batch tells all that is wrong.

What is known is written down after every notebook. A sequence that was stopped, or killed, can be
gone on with: what its record calls done is kept, the rest is run, and other parameters are refused.
"""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import nbformat
import psutil
import yaml

from qlora_nb import machine, sources
from qlora_nb.batch import report
from qlora_nb.errors import KitError, refusing
from qlora_nb.memory import preflight
from qlora_nb.progress import Bar
from qlora_nb.record import files, interrupts, redaction, runs
from qlora_nb.settings import validate

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
    results: dict[str, object] = field(default_factory=dict)


def run_sequence(
    parameters: dict[str, object], only: list[str] | None = None, notebooks: Path | None = None,
    say: Callable[[str], None] = print, extra_env: dict[str, str] | None = None, resume: str = "no",
) -> dict[str, object]:  # fmt: skip
    """Execute the notebooks in order with papermill and write
    `<output_dir>/<profile>/sequence-<time>/`.

    Args:
        parameters: as given by the user (`profile` and overrides), checked before anything starts.
        only: beginnings of notebook names, such as `["03", "04"]`; None means all.
        notebooks: the folder they lie in; None means the repository's.
        say: called with each line for the reader.
        extra_env: environment variables for the notebooks' processes besides the inherited ones.
        resume: "no", "latest" (this profile's newest sequence that is not done) or the folder of a
            sequence to go on with.

    Returns:
        The summary, also written as `summary.json`; `summary["folder"]` holds it, the executed
        notebooks and `report.html`.

    Raises:
        KitError: a bad parameter, no such notebook, a model that cannot run here, a foreign kernel,
            or nothing to go on with.
    """
    settings = validate(parameters)
    preflight.refuse_what_cannot_run(settings)
    given = _for_the_notebooks(settings, parameters)
    if only and resume != "no":
        raise KitError(
            "a sequence goes on with the notebooks it began with",
            value=only,
            remedy="leave --only or --resume out",
        )
    folder, before = _unfinished(settings, resume, given) if resume != "no" else (None, {})
    chosen = choose(notebooks or sources.project_root() / "notebooks", only or before.get("chosen"))
    cells = {source: len(read_notebook(source).cells) for source in chosen}
    require_own_kernel()
    folder = folder or runs.new_folder(settings, "sequence")
    hashes = {source.stem: files.sha256(source) for source in chosen}
    earlier = [Outcome(**o) for o in before.get("notebooks", [])]
    done = {
        o.notebook: o for o in earlier if o.status == "done" and o.source == hashes.get(o.notebook)
    }
    say(f"{len(chosen)} notebooks, profile {settings.profile}, into {folder}")
    for name in done:
        say(f"{name:28} is done already")
    chosen = [source for source in chosen if source.stem not in done]
    summary = runs.beginning(folder, given, [version.package for version in machine.versions()])
    summary |= {"folder": str(folder), "profile": settings.profile, "chosen": list(hashes)}
    summary["started"] = before.get("started", summary["started"])
    outcomes, started, n_cells = [*done.values()], time.time(), [cells[source] for source in chosen]

    def record() -> None:
        seconds = before.get("wall_s", 0) + time.time() - started
        summary.update(
            wall_s=round(seconds, 1),
            notebooks=[asdict(o) for o in sorted(outcomes, key=lambda o: o.notebook)],
        )
        files.write_atomically(
            folder / "summary.json", json.dumps(summary, indent=1, default=str) + "\n"
        )

    with (
        files.sole_writer(folder),
        interrupts.on_interrupt(_end),
        Bar(total=sum(n_cells), unit="cell", leave=False) as bar,
    ):
        try:
            files.write_atomically(
                folder / "parameters.yaml",
                yaml.safe_dump(given, sort_keys=False, allow_unicode=True),
            )
            for n, source in enumerate(chosen, start=1):
                record()
                outcomes.append(Outcome(source.stem, hashes[source.stem]))
                bar.set_description(source.stem)
                _run_one(source, folder, outcomes[-1], bar, extra_env or {})
                bar.update(
                    sum(n_cells[:n]) - bar.n
                )  # also the cells that a failed notebook left out
                bar.clear()
                if outcomes[-1].status == "died":
                    from qlora_nb.memory import budget

                    outcomes[-1].problems.append(
                        f"{budget.advice(settings, None)} Next option: {budget.options(settings)[:1]}"
                    )
                say(_line(outcomes[-1]))
            summary["status"] = "done" if all(o.status == "done" for o in outcomes) else "failed"
        except BaseException:
            summary["status"] = "interrupted"
            say(f"go on with: qlora-nb run --resume {folder}")
            raise
        finally:
            record()
            report.write(summary, folder)
    bad = [o.notebook for o in outcomes if o.status != "done"]
    told = f"{len(outcomes) - len(bad)} of {len(outcomes)} done in {summary['wall_s']:.0f} s"
    say(
        told
        + (f"; failed: {', '.join(bad)}" if bad else "")
        + f"\nreport: {folder / 'report.html'}"
    )
    return summary


def _for_the_notebooks(settings, parameters: dict[str, object]) -> dict[str, object]:
    """What was given, resolved; a path of the user's folder is made absolute, for the notebooks run
    in the repository's.
    """
    given = {k: getattr(settings, k) for k, v in parameters.items() if v is not None} | {
        "profile": settings.profile
    }
    for name in {"model_id", "dataset", "adapter"} & given.keys():
        path = sources.local_path(given[name])
        if path.exists() and given[name] not in ("pocket", "smollm2", "latest"):
            given[name] = str(path.absolute())
    return given


def _unfinished(settings, which: str, given: dict[str, object]) -> tuple[Path, dict]:
    """Folder and record of the sequence to go on with: the newest that is not done, or the one that
    `which` names.

    Raises:
        KitError: there is none, or it was started with other parameters.
    """
    folders = (
        sorted(sources.runs_root(settings).glob("sequence-*"), reverse=True)
        if which == "latest"
        else [Path(which)]
    )
    for folder in folders:
        record = {}
        with suppress(OSError, ValueError):
            record = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        then = record.get("parameters") if isinstance(record, dict) else None
        if not isinstance(then, dict) or record.get("status") == "done":
            continue
        if names := [
            n for n in sorted({*then, *given} - {"resume"}) if then.get(n) != given.get(n)
        ]:
            differ = ", ".join(f"{n} was {then.get(n)}, is {given.get(n)}" for n in names)
            remedy = "give the same parameters, or leave --resume out"
            raise KitError(
                f"this sequence was started with something else: {differ}",
                value=folder.name,
                remedy=remedy,
            )
        return folder, record
    allowed = "latest, or a folder sequence-… whose summary.json does not say done"
    raise KitError(
        "there is no unfinished sequence to go on with",
        value=which,
        allowed=allowed,
        remedy="leave --resume out",
    )


def choose(folder: Path, only: list[str] | None = None) -> list[Path]:
    """The notebooks of a folder in reading order, or those whose names begin with one of `only`."""
    there = sorted(folder.glob("[0-9]*.ipynb"))
    if not there:
        raise KitError(
            "no notebooks found",
            value=str(folder),
            remedy="run this in the kit's repository (a clone)",
        )
    for start in only or []:
        if not start or not any(p.stem.startswith(start) for p in there):
            raise KitError(
                "no such notebook", value=start, allowed=", ".join(p.stem for p in there)
            )
    return [p for p in there if p.stem.startswith(tuple(only or [""]))]


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """A notebook from its file, or a refusal."""
    with refusing("this is no notebook", path.name, "take another copy of it"):
        return nbformat.read(path, 4)


def require_own_kernel() -> None:
    """The kernel `python3` must be this Python: another one would run other package versions,
    silently.
    """
    from jupyter_client.kernelspec import get_kernel_spec

    program, this = Path(get_kernel_spec("python3").argv[0]), Path(sys.executable)
    # jupyter_client starts a bare "python" with its own Python
    if program.is_absolute() and program.parent.resolve() != this.parent.resolve():
        remedy = f"{this.name} -m ipykernel install --sys-prefix"
        raise KitError(
            "the Jupyter kernel python3 belongs to another Python",
            value=str(program),
            remedy=remedy,
        )


def stored_errors(notebook: nbformat.NotebookNode) -> list[str]:
    """Every error in a notebook's stored outputs, also inside widgets, where papermill does not
    look.

    A cell tagged `raises-exception` may fail.
    """
    may_fail = lambda cell: "raises-exception" in cell.metadata.get("tags", [])
    state = (
        notebook.metadata.get("widgets", {})
        .get("application/vnd.jupyter.widget-state+json", {})
        .get("state", {})
    )
    places = [(f"cell {i}", cell) for i, cell in enumerate(notebook.cells) if not may_fail(cell)]
    places += [("inside a widget", model.get("state", {})) for model in state.values()]
    return [
        f"{where}: {text}" for where, place in places for text in _errors(place.get("outputs", []))
    ]


def _errors(outputs: list) -> Iterator[str]:
    for output in outputs:
        if output.get("output_type") == "error":
            name, text = output.get("ename", "error"), output.get("evalue", "")
            yield text if name == "KitError" else f"{name}: {text}"
        elif output.get("name") == "stderr" and "Traceback (most recent call last)" in "".join(
            output.get("text", "")
        ):
            yield "a traceback was printed: " + "".join(output["text"]).strip().splitlines()[-1]


def _run_one(
    source: Path, folder: Path, outcome: Outcome, bar: Bar, extra_env: dict[str, str]
) -> None:
    """Run one notebook in its own process and write into `outcome` what the witnesses say."""
    executed, results = folder / source.name, folder / f"{source.stem}.results.json"
    root = sources.project_root()
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(source),
        str(executed),
        "--kernel",
        "python3",
        "--cwd",
        str(root),
    ]
    command += ["-f", str(folder / "parameters.yaml"), "--progress-bar", "--log-level", "ERROR"]
    env = os.environ | extra_env | {"QLORA_NB_RESULTS": str(results), "PYTHONUNBUFFERED": "1"}
    started, log, cells_before = time.time(), folder / f".{source.stem}.log", bar.n
    how = {"start_new_session": True}  # Ctrl-C reaches us alone, and we end the kernel too
    if (
        sys.platform == "linux"
    ):  # PR_SET_PDEATHSIG: if we are killed, Linux ends papermill, and then its kernel ends
        how["preexec_fn"] = lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    with open(log, "wb") as stderr:
        process = subprocess.Popen(
            command, env=env, cwd=root, stdout=subprocess.DEVNULL, stderr=stderr, **how
        )
    try:
        while process.poll() is None:
            outcome.peak_bytes = max(outcome.peak_bytes, _resident(process.pid))
            if steps := _PROGRESS.findall(log.read_text(encoding="utf-8", errors="replace")):
                bar.update(cells_before + int(steps[-1]) - bar.n)
            time.sleep(SAMPLE_S)
    except BaseException:
        outcome.status, outcome.problems = "interrupted", ["stopped by you"]
        raise
    finally:
        stop_tree(process.pid)
        outcome.exit_code, outcome.wall_s = process.poll(), round(time.time() - started, 1)
        _take_out_secrets(executed, results)
        said = [
            line
            for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
            if not _PROGRESS.search(line)
        ]
        log.unlink()
    outcome.problems = _judge(outcome, executed, results, "\n".join(said).strip())
    died = any(problem.startswith("the kernel died") for problem in outcome.problems)
    outcome.status = "died" if died else "failed" if outcome.problems else "done"


def _take_out_secrets(executed: Path, results: Path) -> None:
    """Redact what a notebook has left; a notebook that was cut off is no JSON any more and redacted
    as it stands.
    """
    for path in filter(Path.is_file, (executed, results)):
        text = path.read_text(encoding="utf-8", errors="replace")
        try:
            if path is executed:
                text = nbformat.writes(
                    redaction.redact(nbformat.reads(text, 4))
                )  # which joins texts that are cut into lines
            else:
                text = json.dumps(redaction.redact(json.loads(text)), indent=1)
        except ValueError:
            text = redaction.redact(text)
        files.write_atomically(path, text)


def _judge(outcome: Outcome, executed: Path, results: Path, log: str) -> list[str]:
    """What the witnesses object to; `log` is what papermill wrote on stderr besides its bar."""
    try:  # there is no such file if papermill refused it at once
        problems = (
            [problem[:600] for problem in stored_errors(nbformat.read(executed, 4))]
            if executed.exists()
            else []
        )
    except ValueError:
        problems = [f"{executed.name} is cut off: papermill was ended while it wrote"]
    if outcome.exit_code in (-9, 137, 138) or "Kernel died" in log or "DeadKernelError" in log:
        problems.append(
            f"the kernel died (exit {outcome.exit_code}), most often because memory ran out"
        )
    elif outcome.exit_code and not problems:
        problems.append(
            f"papermill ended with {outcome.exit_code}: {redaction.redact(''.join(log.splitlines()[-1:]))[:300]}"
        )
    try:
        outcome.results = json.loads(results.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        problems.append("the notebook did not reach its key results")
    return problems


def _resident(pid: int) -> int:
    """Resident memory (bytes) of the kernel and its children. Pages they share are counted for
    each.
    """
    n_bytes = 0
    with suppress(psutil.Error):  # it has ended by itself
        for child in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.Error):
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
        for process in psutil.wait_procs(tree, timeout=5)[1]:
            with suppress(psutil.Error):
                process.kill()


def _end(number: int) -> None:
    """Leave the run, which ends the kernel too (SIGTERM: exit 143); a second signal does not
    disturb that.
    """
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def _line(outcome: Outcome) -> str:
    line = f"{outcome.notebook:28} {outcome.status:8} {outcome.wall_s:6.1f} s  {outcome.peak_bytes / 2**20:6.0f} MiB"
    return "\n".join([line, *(f"    {problem}" for problem in outcome.problems)])
