"""Many runs: every point of a grid is one run of notebook 06, shared among workers that may die.

Optuna (package optuna, extra `sweep`) keeps the list of points in a database that all workers
reach: SQLite in the sweep's folder, or PostgreSQL for several machines. It chooses nothing here:
who creates the study puts the whole grid into its queue, the workers take from it. While a worker
has a point it gives a sign of life; when none has come for `grace_s` seconds the point goes back
into the queue.

A point has a folder of its own, named after its parameters, and whoever has the point holds that
folder's lock. So who takes a dead worker's point over finds its run there and goes on from its last
checkpoint; who finds it finished trains nothing; and a worker that was only slow lets go before
another one begins. What is done is known from the runs' manifests.
"""

import hashlib
import itertools
import json
import multiprocessing
import re
import sys
import time
import tomllib
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

from filelock import FileLock

from qlora_nb import sources
from qlora_nb.batch import leaderboard, one_notebook, sequence
from qlora_nb.errors import KitError, refusing
from qlora_nb.record import files, interrupts, runs
from qlora_nb.settings import validate

TAKEN = "taken by trial"
"""A trial's attribute: its own number, once its worker gives signs of life. A trial that is tried
again has the attributes of the one before.
"""

TAKING = timedelta(minutes=1)
"""A worker that takes a trial and has given no sign of life for so long is dead."""


def run(
    grid: Path, workers: int, storage: str = "", out: str = "", name: str = "", grace_s: int = 60
) -> tuple[Path, bool]:
    """Run all points of a grid that are not done yet, and wait for them.

    Args:
        grid: the file of `read_grid`.
        workers: processes here; each trains one point at a time.
        storage: a database's URL; empty means SQLite in the sweep's folder, which must not lie on
            NFS.
        out: a folder for the sweep's own; empty means the grid's `output_dir`.
        name: of the sweep; empty means one made from its points.
        grace_s: seconds without a sign of life after which a worker counts as dead.

    Returns:
        The sweep's folder, and whether all points are done.

    Raises:
        KitError: a bad grid, no Optuna, or a database that cannot be opened.
    """
    points, wanted = read_grid(grid)
    name = name or _digest(sorted(points))
    parent = sources.local_path(out) if out else sources.project_root() / sources.local_path(wanted)
    folder = parent.absolute() / f"sweep-{name}"
    one_notebook.require_own_kernel()
    remedy = "pip install 'qlora-nb[sweep]'; docs/scale.md has URLs of databases and their drivers"
    with refusing("this sweep cannot begin", value=str(folder), remedy=remedy):
        folder.mkdir(parents=True, exist_ok=True)
        study = filled(name, folder, storage, points, grace_s)
    print(f"{len(points)} points, {workers} workers, into {folder}", flush=True)
    spawn = multiprocessing.get_context("spawn")
    processes = [
        spawn.Process(target=work, args=[study, folder], daemon=True) for _ in range(workers)
    ]
    with interrupts.on_interrupt(sequence.end):  # leaving early ends daemons too
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    done = points.keys() & _points(study, "COMPLETE")
    print(f"{len(done)} of {len(points)} points are done")
    return folder, done == points.keys()


def read_grid(path: Path) -> tuple[dict[str, dict], str]:
    """The points of a grid, by name, and the folder that it wants everything written to.

    Args:
        path: TOML with a table `grid` of lists, whose combinations are the points, and a table
            `fixed` of parameters that all of them share.

    Raises:
        KitError: no such file, no such table, or a value that is refused in any of the points.
    """
    remedy = "write a table [grid] of lists and a table [fixed], as in docs/scale.md"
    with refusing("this grid cannot be read", value=str(path), remedy=remedy):
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        fixed = dict(tables.pop("fixed", {}))
        lists = dict(tables.pop("grid", {}))
    if not lists or not all(isinstance(values, list) and values for values in lists.values()):
        raise KitError("[grid] has no lists of values", value=lists, remedy=remedy)
    points = {}
    for values in itertools.product(*lists.values()):
        given = {**tables, **fixed, **dict(zip(lists, values, strict=True))}
        settings = validate(given)
        point = settings.replace(output_dir="", resume="")  # these are set for each
        shown = "-".join(str(getattr(point, name)) for name in lists)
        slug = re.sub("[^A-Za-z0-9.]+", "_", shown)[:60].lstrip(".")
        points[f"{slug}-{_digest([point.profile, point.changed()])}"] = given
    return points, settings.output_dir


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def filled(name: str, folder: Path, storage: str, points: dict[str, dict], grace_s: int):
    """Optuna's study, with every point in its queue that is not done, waiting or running.

    Of several machines that start at once one makes the study; the others wait until it is filled.
    """
    optuna = _optuna()
    if not storage:
        import sqlalchemy  # of the same extra

        wait = {"timeout": "60"}  # seconds, while another worker writes
        storage = sqlalchemy.URL.create("sqlite", database=f"{folder}/study.db", query=wait)
        storage = storage.render_as_string()
    with FileLock(folder / ".lock"):
        database = optuna.storages.RDBStorage(
            storage,
            heartbeat_interval=max(1, grace_s // 6),
            grace_period=grace_s,
            heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
        )
        try:
            study = optuna.create_study(storage=database, study_name=name)
        except optuna.exceptions.DuplicatedStudyError:
            study = optuna.load_study(storage=database, study_name=name)
            until = time.monotonic() + grace_s  # who made it may have died
            while "enqueued" not in study.user_attrs and time.monotonic() < until:
                time.sleep(0.2)
        known = _points(study, "COMPLETE", "WAITING", "RUNNING")
        for point, given in points.items():
            if point not in known:
                study.enqueue_trial({}, user_attrs={"point": point, "given": given})
        study.set_user_attr("enqueued", True)
    return study


def _optuna():
    """The package, which is an extra, without its log and its warnings of what is new in it."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    return optuna


def _points(study, *states: str) -> set[str]:
    """The points of which there is a trial in one of these states. A worker that dies as it takes a
    trial, before its first sign of life, leaves one that seems to run for ever; it does not count.
    """
    found = set()
    for trial in study.get_trials(deepcopy=False):
        is_taken = trial.user_attrs.get(TAKEN) == trial.number
        is_new = trial.datetime_start is None or datetime.now() - trial.datetime_start < TAKING
        if trial.state.name in states and (trial.state.is_finished() or is_taken or is_new):
            found.add(trial.user_attrs.get("point"))
    return found


def work(study, folder: Path) -> None:
    """Take points of a study and train them, until all are over. While others run theirs this
    worker waits, for one of them may die.
    """
    optuna = _optuna()

    def train(trial) -> float:
        if "point" not in trial.user_attrs:
            raise optuna.TrialPruned  # another worker was quicker, and the queue is empty
        trial.set_user_attr(TAKEN, trial.number)
        return _train(study, trial, folder / trial.user_attrs["point"])

    command = multiprocessing.parent_process()
    with suppress(KeyboardInterrupt), interrupts.on_interrupt(sequence.end):
        while command.is_alive() and _points(study, "WAITING", "RUNNING"):
            if _points(study, "WAITING"):
                with suppress(ValueError, AssertionError):  # the trial was lost meanwhile
                    study.optimize(train, n_trials=1, catch=KitError)
            else:
                time.sleep(1)
                optuna.storages.fail_stale_trials(study)


def _train(study, trial, folder: Path) -> float:
    """Train a point, if that is not done, while nobody else holds its folder.

    Returns:
        Its held-out loss, in nats.

    Raises:
        KitError: its run did not come to its end.
    """

    def is_lost() -> bool:
        """Too long without a sign of life: the point is in the queue again."""
        return study.get_trials(deepcopy=False)[trial.number].state.is_finished()

    folder.mkdir(exist_ok=True)
    with FileLock(folder / ".lock"):
        if not leaderboard.finished(folder):
            _mark_dead(folder)
            _run_notebook(trial.user_attrs["given"], folder, is_lost)
        done = leaderboard.finished(folder)
    if not done:
        print(f"{folder.name}: not done, see {folder / 'run.log'}", flush=True)
        raise KitError("this point is not done", value=folder.name)
    print(f"{folder.name}: done", flush=True)
    return done["metrics"]["loss_after"]


def _mark_dead(folder: Path) -> None:
    """Wait for a run that outlives its worker, and mark what did not come to its end, so that it is
    resumed. Of a process on another machine its record alone could not tell.
    """
    for path in folder.glob(f"*/*/{runs.MANIFEST}"):
        with FileLock(path.with_name(".lock")):
            record = runs.read_record(path)
            if record.get("status") in ("running", "done"):
                record["status"] = "died"
                files.write_atomically(path, json.dumps(record, indent=1) + "\n")


def _run_notebook(given: dict, folder: Path, is_lost: Callable[[], bool]) -> None:
    """`qlora-nb run --only 06` with a point's parameters, from its last checkpoint if there is
    one; stopped in good order when the point is lost.
    """
    command = [sys.executable, "-m", "qlora_nb.cli", "run", "--only", "06"]
    for name, value in {**given, "output_dir": str(folder), "resume": "latest"}.items():
        command += ["-p", name, value if isinstance(value, str) else json.dumps(value)]
    with open(folder / "run.log", "ab") as log:
        process = one_notebook.start(command, "SIGTERM", stdout=log, stderr=log)
    try:
        while process.poll() is None and not is_lost():
            time.sleep(1)
    finally:
        process.terminate()  # its kernel finishes the step and saves
        process.wait()
