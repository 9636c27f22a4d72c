"""The mutation check: does a test see it when a figure draws other data, or a refusal is gone?

    python tools/mutate.py                                   the whole package, within an hour
    python tools/mutate.py --only figures --file lora_plots  a part of it, for quick use

Every change of `mutants.py` is tried alone, against the tests that run the changed lines:

1. All tests run once, each file in a process of its own; noted are each test's time and the lines
   it runs. A test is left out that fails, lasts too long, or starts a program (a notebook, a
   browser): a mutant lives in one process.
2. Every mutant meets its quickest tests, up to the first that fails.
3. What survived meets more of its tests.
4. The tests up to a failure run once more without a mutant: a test that fails then too saw nothing.

A mutant that survives, or whose lines no test runs, stands in mutate_survivors.toml with a reason,
or the check fails; for one of a figure there is no excuse.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import tomllib
from collections import Counter, deque
from functools import partial
from pathlib import Path

# Before torch loads: a fork has one thread, and a GPU that was touched is lost to it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import forks
from mutants import Mutant, find

ROOT = Path(__file__).resolve().parent.parent
FIRST_TESTS = 20
"""So many tests a mutant meets in its first turn."""
TURN_S = (30, 120)
"""So long the tests of the first and the second turn may take when they pass; one is always met."""
SURVEY_LIMIT_S = 1200
NO_SURVEY = "a whole file that came to no end"


class Map:
    """Which tests run which lines, and how long each test takes."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.lines: dict[str, list[str]] = {}
        self.left_out: dict[str, str] = {}
        self.reliable: dict[str, bool] = {}

    def add(self, file: str, found: dict) -> None:
        """What `forks.survey` found in a test file."""
        if "seconds" not in found:
            self.left_out[file] = NO_SURVEY
            return
        self.seconds |= found["seconds"]
        self.left_out |= found["left_out"]
        for line, tests in found["lines"].items():
            self.lines.setdefault(line, []).extend(tests)

    def tests_of(self, mutant: Mutant) -> list[str]:
        """The tests that may see a mutant, the quickest first."""
        found = set()
        for line in mutant.lines:
            found |= set(self.lines.get(f"{mutant.file}:{line}", ()))
        usable = [test for test in found if test in self.seconds and self.reliable.get(test, True)]
        return sorted(usable, key=lambda test: (self.seconds[test], test))

    def turn(self, mutant: Mutant, turn: int) -> list[str]:
        """The tests of a mutant's first (0) or second (1) turn, those of one file together."""
        tests = self.tests_of(mutant)
        first = self.as_time_allows(tests[:FIRST_TESTS], TURN_S[0])
        chosen = self.as_time_allows(tests[len(first) :], TURN_S[1]) if turn else first
        files = list(dict.fromkeys(file_of(test) for test in chosen))
        return sorted(chosen, key=lambda test: files.index(file_of(test)))

    def as_time_allows(self, tests: list[str], seconds: float) -> list[str]:
        for n, test in enumerate(tests):
            seconds -= self.seconds[test]
            if seconds < 0:
                return tests[: max(n, 1)]
        return tests


def file_of(test: str) -> str:
    return test.split("::", maxsplit=1)[0]


def survey(options: argparse.Namespace, mutants: list[Mutant]) -> Map:
    """All tests once."""
    wanted: dict[str, set[int]] = {}
    for mutant in mutants:
        wanted.setdefault(mutant.file, set()).update(mutant.lines)
    jobs = deque()
    for file in options.tests or sorted(map(str, Path("tests").glob("test_*.py"))):
        job = partial(forks.survey, file, Path(options.package).resolve(), wanted, options.longest)
        jobs.append((file, job, SURVEY_LIMIT_S))
    known = Map()
    for file, found in forks.run_all(jobs, options.workers, math.inf):
        known.add(file, found)
        print(f"{file}: {len(found.get('seconds', ()))} tests", flush=True)
    return known


def hunt(mutants: list[Mutant], known: Map, workers: int, until: float) -> dict[Mutant, dict]:
    """What became of each mutant: its `status`, and which tests it met."""
    became = {mutant: {"status": "not run", "met": []} for mutant in mutants}
    for mutant in mutants:
        if not known.tests_of(mutant):
            became[mutant]["status"] = "uncovered"
    for turn, waiting in enumerate(("not run", "survived")):
        jobs = deque()
        for mutant in mutants:
            tests = known.turn(mutant, turn)
            if became[mutant]["status"] == waiting and tests:
                limit = 60 + 5 * sum(known.seconds[test] for test in tests)
                jobs.append((mutant, partial(forks.meet, mutant, tests), limit))
        for mutant, result in forks.run_all(jobs, workers, until):
            met = became[mutant]["met"] + known.turn(mutant, turn)
            became[mutant] = {"status": status_of(result), "met": met, **result}
            where = f"{mutant.file}:{mutant.line}"
            print(f"{status_of(result):9} {where} {mutant.text[:70]}", flush=True)
    return became


def status_of(result: dict) -> str:
    """Killed: a test failed. To last too long (timeout) or to end the process (died) is as good."""
    if isinstance(result["exit"], str):
        return result["exit"]
    if result["failed"]:
        return "killed"
    return "survived" if result["exit"] == 0 and result["planted"] else "error"


def control(became: dict[Mutant, dict], known: Map, workers: int) -> list[Mutant]:
    """The mutants killed by a test that fails without them too, and so is no longer reliable."""
    jobs: dict[str, tuple] = {}
    for result in became.values():
        if result["status"] == "killed" and result["failed"]["test"] not in known.reliable:
            test, met = result["failed"]["test"], result["met"]
            before = met[: met.index(test) + 1] if test in met else met
            limit = 60 + 5 * sum(known.seconds[one] for one in before)
            jobs.setdefault(test, (test, partial(forks.meet, None, before), limit))
    for test, result in forks.run_all(deque(jobs.values()), workers, math.inf):
        known.reliable[test] = result["exit"] == 0
    again = []
    for mutant, result in became.items():
        if result["status"] == "killed" and not known.reliable[result["failed"]["test"]]:
            again.append(mutant)
    return again


def report(became: dict[Mutant, dict], known: Map, accepted: list[dict], whole: bool) -> dict:
    """The result of the check, to be written as JSON."""
    reasons = {(entry["function"], entry["text"]): entry["reason"] for entry in accepted}
    counts = {"figure": Counter(), "refusal": Counter()}
    names = ("survived", "uncovered", "accepted", "crashed", "other")
    lists: dict[str, list] = {name: [] for name in names}
    used = set()
    for mutant, result in became.items():
        status, entry, key = result["status"], mutant.described(), (mutant.function, mutant.text)
        counts[mutant.kind][status] += 1
        if status == "killed":
            if mutant.kind == "figure" and result["failed"]["crashed"]:
                lists["crashed"].append(entry | result["failed"])
        elif status in ("survived", "uncovered"):
            used.add(key)
            entry |= {"tests": len(result["met"]), "of": len(known.tests_of(mutant))}
            if mutant.kind == "refusal" and key in reasons:
                lists["accepted"].append(entry | {"reason": reasons[key]})
            else:
                lists[status].append(entry)
        else:
            lists["other"].append(entry | {"status": status, "log": result.get("log", "")})
    failed = [test for test, why in known.left_out.items() if why in ("failed", NO_SURVEY)]
    lost = [entry for entry in lists["other"] if entry["status"] in ("error", "not run")]
    return {
        "passed": bool(became) and not lists["survived"] and not lists["uncovered"] and not lost,
        "counts": counts,
        **lists,
        "stale": [" ".join(key) for key in reasons if whole and key not in used],
        "tests": len(known.seconds),
        "left_out": Counter(known.left_out.values()),
        "failed": failed,
        "unreliable": [test for test, reliable in known.reliable.items() if not reliable],
    }


def arguments(words: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--only", choices=("figures", "refusals"))
    parser.add_argument("--file", action="append", help="part of a module's path; may be repeated")
    parser.add_argument("--budget-minutes", type=float, default=60)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tests", nargs="*", help="these test files alone")
    parser.add_argument(
        "--longest", type=float, default=20, help="processor seconds a test may take"
    )
    parser.add_argument("--map", type=Path, help="keep the first run here, or take it from here")
    parser.add_argument("--out", type=Path, help="write the result to this file")
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--package", default="qlora_nb")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    options, started = arguments(words), time.monotonic()
    until = started + 60 * options.budget_minutes
    for name in ("map", "out"):
        if getattr(options, name):
            setattr(options, name, getattr(options, name).absolute())
    os.chdir(options.root)
    sys.path.insert(0, str(Path.cwd()))
    every = find(Path(options.package).resolve())
    forks.warm(Path(options.package).resolve())
    if options.map and options.map.is_file():
        known = Map()
        vars(known).update(json.loads(options.map.read_text()))
    else:
        known = survey(options, every)
        if options.map:
            options.map.write_text(json.dumps(vars(known)))
    surveyed = time.monotonic()
    chosen = []
    for mutant in every:
        of_kind = options.only in (None, f"{mutant.kind}s")
        if of_kind and any(part in mutant.file for part in options.file or [""]):
            chosen.append(mutant)
    became = hunt(chosen, known, options.workers, until)
    while again := control(became, known, options.workers):
        became |= hunt(again, known, options.workers, until)
    survivors = Path("tools/mutate_survivors.toml")
    listed = tomllib.loads(survivors.read_text()) if survivors.is_file() else {}
    accepted = listed.get("survivor", [])
    result = report(became, known, accepted, whole=len(chosen) == len(every))
    result["survey_s"] = round(surveyed - started, 1)
    result["mutants_s"] = round(time.monotonic() - surveyed, 1)
    text = json.dumps(result, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
