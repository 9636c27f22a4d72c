"""The batch run: the notebooks in reading order, each in its own process, with a record that can be
resumed.

A fresh process for each, so memory of one cannot hide in the next; a later notebook runs even if an
earlier one failed, so one batch tells all that is wrong. `<output_dir>/<profile>/sequence-<time>/`
holds the executed notebooks, `summary.json` and `report.html`.

What is known is written down after every notebook. A sequence that was stopped, or killed, can be
resumed: what its record calls done, of a notebook that has not changed since, is kept; the rest is
run; other parameters are refused.
"""

import json
import signal
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import yaml

from qlora_nb import sources
from qlora_nb.batch import one_notebook, report
from qlora_nb.errors import KitError
from qlora_nb.memory import preflight
from qlora_nb.progress import Bar
from qlora_nb.record import files, interrupts, runs
from qlora_nb.settings import validate

SUMMARY = "summary.json"


def run_sequence(
    parameters: dict,
    only: list[str] | None = None,
    notebooks: Path | None = None,
    resume: str = "no",
) -> dict:
    """Execute the notebooks in order.

    Args:
        parameters: as given by the user (`profile` and overrides), checked before anything starts.
        only: beginnings of notebook names, such as `["03", "04"]`; None means all.
        notebooks: the folder they lie in; None means the repository's.
        resume: "no", "latest" (this profile's newest sequence that is not done) or the folder of a
            sequence to resume.

    Returns:
        The summary, also written as `summary.json`; `summary["folder"]` holds it, the executed
        notebooks and `report.html`.

    Raises:
        KitError: a bad parameter, no such notebook, a model that cannot run here, a foreign kernel,
            or nothing to resume.
    """
    settings = validate(parameters)
    preflight.refuse_what_cannot_run(settings)
    given = _for_the_notebooks(settings)
    folder = None
    before = {}
    if resume != "no":
        if only:
            raise KitError(
                "a sequence resumes with the notebooks it began with",
                value=only,
                remedy="leave --only or --resume out",
            )
        folder, before = _unfinished(settings, resume, given)
    chosen = choose(notebooks, only or before.get("chosen"))
    n_cells = {path: len(one_notebook.read(path).cells) for path in chosen}
    one_notebook.require_own_kernel()
    if folder is None:
        folder = runs.new_folder(settings, "sequence")
    print(f"{len(chosen)} notebooks, profile {settings.profile}, into {folder}")
    record = _Record(folder, given, chosen, before)
    for name in record.outcomes:
        print(f"{name:28} is done already")
    to_run = [path for path in chosen if path.stem not in record.outcomes]
    total = sum(n_cells[path] for path in to_run)
    with (
        files.sole_writer(folder),
        interrupts.on_interrupt(end),
        Bar(total=total, unit="cell", leave=False) as bar,
    ):
        try:
            text = yaml.safe_dump(given, sort_keys=False, allow_unicode=True)
            files.write_atomically(folder / "parameters.yaml", text)
            for path in to_run:
                outcome = record.begin(path.stem)
                bar.set_description(path.stem)
                cells_after = bar.n + n_cells[path]
                one_notebook.run(path, folder, outcome, bar)
                bar.update(cells_after - bar.n)  # also the cells that a failed notebook left out
                bar.clear()
                if outcome.status == "died":
                    outcome.problems.append(_advice(settings))
                print(_line(outcome))
            outcomes = record.outcomes.items()
            failed = [name for name, outcome in outcomes if outcome.status != "done"]
            record.summary["status"] = "failed" if failed else "done"
        except BaseException:
            record.summary["status"] = "interrupted"
            print(f"to resume: qlora-nb run --resume {folder}")
            raise
        finally:
            record.save()
            files.write_atomically(folder / "report.html", report.page(record.summary, folder))
    n_done = len(outcomes) - len(failed)
    print(f"{n_done} of {len(outcomes)} done in {record.summary['wall_s']:.0f} s")
    if failed:
        print(f"failed: {', '.join(failed)}")
    print(f"report: {folder / 'report.html'}")
    return record.summary


class _Record:
    """`summary.json`: what is known of a sequence, written down before every notebook and at the
    end. `before` is the record of a sequence that is resumed; what it calls done is kept.
    """

    def __init__(self, folder: Path, given: dict, chosen: list[Path], before: dict):
        self.folder = folder
        self.hashes = {path.stem: files.sha256(path) for path in chosen}
        self.started = time.time() - before.get("wall_s", 0)
        self.summary = runs.new_record(folder, given)
        self.summary.update(folder=str(folder), chosen=list(self.hashes))
        self.summary["started"] = before.get("started", self.summary["started"])
        self.outcomes = {}
        for earlier in before.get("notebooks", []):
            outcome = one_notebook.Outcome(**earlier)
            unchanged = outcome.source == self.hashes.get(outcome.notebook)
            if unchanged and outcome.status == "done":
                self.outcomes[outcome.notebook] = outcome

    def begin(self, name: str) -> one_notebook.Outcome:
        """Write down what is known, then note that a notebook begins."""
        self.save()
        self.outcomes[name] = one_notebook.Outcome(name, source=self.hashes[name])
        return self.outcomes[name]

    def save(self) -> None:
        self.summary["wall_s"] = round(time.time() - self.started, 1)
        in_order = sorted(self.outcomes.items())
        self.summary["notebooks"] = [asdict(outcome) for _, outcome in in_order]
        text = json.dumps(self.summary, indent=1, default=str) + "\n"
        files.write_atomically(self.folder / SUMMARY, text)


def choose(folder: Path | None, only: list[str] | None = None) -> list[Path]:
    """The notebooks of a folder (None: the repository's) in reading order, or those whose names
    begin with one of `only`.

    Raises:
        KitError: there are none, or none that begins so.
    """
    if folder is None:
        folder = sources.project_root() / "notebooks"
    there = sorted(folder.glob("[0-9]*.ipynb"))
    if not there:
        raise KitError(
            "no notebooks found",
            value=str(folder),
            remedy="run this in the kit's repository (a clone)",
        )
    if only is None:
        return there
    for start in only:
        if not start or not any(path.stem.startswith(start) for path in there):
            allowed = ", ".join(path.stem for path in there)
            raise KitError("no such notebook", value=start, allowed=allowed)
    return [path for path in there if path.stem.startswith(tuple(only))]


def _for_the_notebooks(settings) -> dict:
    """The profile and what differs from it; a path of the user's folder is made absolute, for the
    notebooks run in the repository's.
    """
    given = {"profile": settings.profile, **settings.changed()}
    for name in ("model_id", "dataset", "adapter", "resume"):
        if name in given:
            given[name] = sources.seen_from_anywhere(given[name])
    return given


def _unfinished(settings, which: str, given: dict) -> tuple[Path, dict]:
    """Folder and record of the sequence to resume: the newest that is not done, or the one that
    `which` names.

    Raises:
        KitError: there is none, or it was started with other parameters.
    """
    folder = sources.local_path(which)
    if which == "latest":
        folder = runs.newest(sources.runs_root(settings), _is_unfinished, SUMMARY)
    record = runs.read_record(folder / SUMMARY) if folder else {}
    if not _is_unfinished(folder, record):
        raise KitError(
            "there is no unfinished sequence to resume",
            value=which if which == "latest" else str(folder.absolute()),
            allowed="latest, or a folder sequence-… whose summary.json does not say done",
            remedy="leave --resume out",
        )
    then = record["parameters"]
    differences = []
    for name in sorted({*then, *given} - {"resume"}):
        if then.get(name) != given.get(name):
            differences.append(f"{name} was {then.get(name)}, is {given.get(name)}")
    if differences:
        raise KitError(
            f"this sequence was started with something else: {', '.join(differences)}",
            value=folder.name,
            remedy="give the same parameters, or leave --resume out",
        )
    return folder, record


def _is_unfinished(folder: Path | None, record: dict) -> bool:
    is_record = isinstance(record.get("parameters"), dict) and "status" in record
    return is_record and record["status"] != "done"


def _advice(settings) -> str:
    """What a run whose kernel died was predicted to need, and what would lower it."""
    from qlora_nb.memory import budget

    said = ""
    with suppress(KitError):  # a family that cannot be planned
        said = budget.advice(settings, None)
        for option in budget.options(settings)[:1]:
            said += f" Next option: {option}"
    return said


def end(number: int) -> None:
    """Leave the run, which ends the kernel too (SIGTERM: exit 143); a second signal does not
    disturb that.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def _line(outcome: one_notebook.Outcome) -> str:
    peak = f"{outcome.peak_bytes / 2**20:6.0f} MiB"
    lines = [f"{outcome.notebook:28} {outcome.status:8} {outcome.wall_s:6.1f} s  {peak}"]
    lines += [f"    {problem}" for problem in outcome.problems]
    return "\n".join(lines)
