"""What `mutate.py` runs in forks: pytest with a mutant in place of its module, or with a survey.

The process that forks has loaded every library (`warm`) and nothing of the package, which each fork
loads for itself. The changed module is compiled from memory: no file of the package is touched.
"""

from __future__ import annotations

import ast
import gc
import importlib.abc
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.machinery import SourceFileLoader
from pathlib import Path

import coverage
import pytest
from mutants import Mutant, zero

PROGRAMS = ("git", "mount", "umount")
"""What a test may start: none of them runs the package's code."""


# In a fork


class Planted(SourceFileLoader, importlib.abc.MetaPathFinder):
    """Imports a mutant in place of its module."""

    def __init__(self, mutant: Mutant):
        super().__init__(mutant.module, str(Path(mutant.file).resolve()))
        self.mutant = mutant
        self.used = False

    def find_spec(self, name, path=None, target=None):
        if name == self.mutant.module:
            return importlib.util.spec_from_file_location(name, self.path, loader=self)
        return None

    def get_code(self, fullname):
        self.mutant.change()
        tree = ast.fix_missing_locations(self.mutant.tree)
        return compile(tree, self.path, "exec", dont_inherit=True)

    def exec_module(self, module) -> None:
        self.used = True
        module.__zero__ = zero
        super().exec_module(module)


def starts_program(event: str, values: tuple) -> bool:
    """Whether Python's audit event is the start of a program that is none of PROGRAMS."""
    return event == "subprocess.Popen" and Path(os.fsdecode(values[0])).name not in PROGRAMS


class Chosen:
    """A pytest plugin: runs these tests alone, in this order, and notes the first failure."""

    def __init__(self, tests: list[str]):
        self.order = {test: i for i, test in enumerate(tests)}
        self.failed: dict | None = None
        sys.addaudithook(self.on_event)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items) -> None:
        chosen = [item for item in items if item.nodeid in self.order]
        items[:] = sorted(chosen, key=lambda item: self.order[item.nodeid])

    def on_event(self, event: str, values: tuple) -> None:
        """These tests start no program; a mutant that would (a download, a server) finds none."""
        if starts_program(event, values):
            raise FileNotFoundError(f"there is no {values[0]} for a mutant")

    def pytest_exception_interact(self, node, call) -> None:
        if self.failed is None:
            in_test = Path("tests").resolve() in Path(call.excinfo.traceback[-1].path).parents
            kind = call.excinfo.typename
            crashed = not in_test and kind not in ("AssertionError", "Failed")
            self.failed = {"test": node.nodeid, "exception": kind, "crashed": crashed}


class Mapper:
    """A pytest plugin: each test's seconds, the lines it runs, and why it is left out, if it is."""

    def __init__(self, package: Path, longest: float):
        options = {"data_file": None, "config_file": False, "messages": False}
        self.coverage = coverage.Coverage(source=[str(package)], **options)
        self.longest = longest
        self.item = ""
        self.seconds: Counter[str] = Counter()
        self.left_out: dict[str, str] = {}
        sys.addaudithook(self.on_event)
        for sign in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(sign, lambda *_: self.leave_out("takes too long"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.item = item.nodeid
        self.coverage.switch_context(item.nodeid)
        self.limit(self.longest)
        result = yield
        self.limit(0)
        self.coverage.switch_context("")
        self.item = ""
        return result

    def pytest_runtest_logreport(self, report) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.outcome != "passed":
            self.left_out.setdefault(report.nodeid, report.outcome)

    def limit(self, seconds: float) -> None:
        """So long the processor may work from now on (0: as long as it takes); a clock allows
        more.
        """
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, 5 * seconds)

    def on_event(self, event: str, values: tuple) -> None:
        if self.item and starts_program(event, values):
            self.leave_out("starts a program")

    def leave_out(self, why: str) -> None:
        self.left_out[self.item] = why
        if threading.current_thread() is threading.main_thread():
            pytest.skip(why)


def run_pytest(files: list[str], plugin: object, place: Path, *more: str) -> int:
    """pytest in this process, whatever the project's own options; its folders lie in `place`."""
    options = ["-p", "no:cacheprovider", "-o", "addopts=", "-W", "ignore", *more]
    folders = [f"--basetemp={place / 'tmp'}", f"--rootdir={Path.cwd()}"]
    return int(pytest.main([*files, *options, *folders], plugins=[plugin]))


def survey(file: str, package: Path, wanted: dict, longest: float, place: Path) -> dict:
    """One test file: test → seconds, test left out → why, and "source:line" → tests.

    Args:
        wanted: source → numbers of the lines that are asked for.
        longest: seconds that a test may take.
    """
    mapper = Mapper(package, longest)
    mapper.coverage.start()
    code = run_pytest([file], mapper, place)
    mapper.coverage.stop()
    data, lines = mapper.coverage.get_data(), {}
    for source, numbers in wanted.items():
        for line, tests in data.contexts_by_lineno(str(Path(source).resolve())).items():
            if line in numbers:
                lines[f"{source}:{line}"] = [test for test in tests if test]
    seconds = {test: s for test, s in mapper.seconds.items() if test not in mapper.left_out}
    return {"exit": code, "seconds": seconds, "left_out": mapper.left_out, "lines": lines}


def meet(mutant: Mutant | None, tests: list[str], place: Path) -> dict:
    """What comes of these tests, up to the first failure, with a mutant or without one."""
    planted = None
    if mutant is not None:
        planted = Planted(mutant)
        sys.meta_path.insert(0, planted)
    chosen = Chosen(tests)
    files = list(dict.fromkeys(test.split("::")[0] for test in tests))
    code = run_pytest(files, chosen, place, "-x")
    return {"exit": code, "failed": chosen.failed, "planted": planted is None or planted.used}


# In the process that forks


def warm(package: Path) -> None:
    """Import all libraries of the package, its tests and pytest's plugins, once for all forks."""
    tests = list(Path("tests").glob("*.py"))
    ours = {package.name, *(path.stem for path in (*tests, *Path("tools").glob("*.py")))}
    lines = set()
    for path in [*package.rglob("*.py"), *tests]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                lines |= {f"import {alias.name}" for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                lines |= {f"from {node.module} import {alias.name}" for alias in node.names}
    for line in sorted(lines):
        if line.split()[1].split(".")[0] not in ours:
            with suppress(Exception):
                exec(line, {})
    for plugin in importlib.metadata.entry_points(group="pytest11"):
        plugin.load()
    with suppress(ImportError):  # to shrink an example of a failure helps nobody here
        from hypothesis import Phase, settings

        phases = (Phase.explicit, Phase.generate)
        settings.register_profile("mutation", database=None, derandomize=True, phases=phases)
        settings.load_profile("mutation")
    gc.collect()
    gc.freeze()


def fork(job: Callable[[Path], dict], place: Path) -> int:
    """Run a job in a fork, a process group of its own; `place` gets its result.json and log."""
    place.mkdir()
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        log = os.open(place / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        (place / "result.json").write_text(json.dumps(job(place)))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def run_all(jobs: deque, workers: int, until: float) -> Iterator[tuple[object, dict]]:
    """Run jobs (key, function of a folder, seconds it may take) side by side; gives (key, result).

    A job that came to no result has the `exit` "timeout" or "died". None begins after `until`.
    """
    folder = Path(tempfile.mkdtemp())
    running: dict[int, tuple] = {}
    started = 0
    while running or (jobs and time.monotonic() < until):
        while jobs and len(running) < workers and time.monotonic() < until:
            key, job, limit = jobs.popleft()
            started += 1
            place = folder / str(started)
            running[fork(job, place)] = (key, place, time.monotonic() + limit)
        time.sleep(0.01)
        for pid, (key, place, deadline) in list(running.items()):
            ended = os.waitpid(pid, os.WNOHANG)[0] == pid
            if not ended and time.monotonic() < deadline:
                continue
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # it, or what it left running
            if not ended:
                os.waitpid(pid, 0)
            result = {"exit": "died" if ended else "timeout", "log": log_of(place)}
            if (place / "result.json").is_file():
                result |= json.loads((place / "result.json").read_text())
            shutil.rmtree(place, ignore_errors=True)
            del running[pid]
            yield key, result
    shutil.rmtree(folder, ignore_errors=True)


def log_of(place: Path) -> str:
    log = place / "log"
    return log.read_text(errors="replace")[-1500:] if log.is_file() else ""
