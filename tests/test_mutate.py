"""The mutation check on a toy package: killed is what its tests see, found what they do not."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mutants import zero

TOOL = Path(__file__).resolve().parent.parent / "tools" / "mutate.py"

STYLE = """
from functools import wraps
from matplotlib.figure import Figure


def draws(plot):
    @wraps(plot)
    def drawn(*data):
        figure = Figure()
        ax = figure.subplots()
        ax.set_title(plot(ax, *data))
        return figure

    return drawn
"""

FIGURES = """
from .style import draws


def labelled(ax, heights):
    bars = ax.bar(range(len(heights)), heights)
    ax.bar_label(bars)


@draws
def seen(ax, heights):
    labelled(ax, heights)
    return f"highest {max(heights)}"


@draws
def blind(ax, x, unit):
    ax.plot(x, [value / unit for value in x])
    ax.axhline(0)
    return "two lines"


@draws
def never_drawn(ax):
    ax.text(1, 2, "3")
"""

REFUSALS = """
class KitError(ValueError):
    pass


def _made(x) -> KitError:
    return KitError(f"made of {x}")


def seen(x):
    if x < 0:
        raise KitError("negative")
    elif (size := x) > 100:
        raise _made(size)
    return x


def blind(x):
    if isinstance(x, bool):
        raise KitError("a truth value")
    try:
        return int(x)
    except TypeError:
        raise KitError("no number") from None


def uncovered(x):
    if x is None:
        raise KitError("nothing")
    else:
        raise KitError("something")
"""

TESTS = """
import subprocess
import sys
from contextlib import suppress

import pytest
from toy import figures, refusals


def test_figure():
    ax = figures.seen([1, 5]).axes[0]
    assert [bar.get_height() for bar in ax.patches] == [1, 5]
    assert [text.get_text() for text in ax.texts] == ["1", "5"]
    assert ax.get_title() == "highest 5"


def test_figure_without_looking():
    assert len(figures.blind([1, 2], 2).axes[0].lines) == 2


def test_refusal():
    with pytest.raises(refusals.KitError, match="negative"):
        refusals.seen(-1)
    with pytest.raises(refusals.KitError, match="made of 101"):
        refusals.seen(101)
    assert refusals.seen(7) == 7


def test_refusal_without_looking():
    with suppress(refusals.KitError):
        refusals.blind(True)
    with suppress(Exception):
        refusals.blind([])


def test_in_another_process():
    command = [sys.executable, "-c", "from toy import refusals; refusals.uncovered(None)"]
    assert subprocess.run(command).returncode == 1
    with pytest.raises(refusals.KitError):
        refusals.uncovered(None)


def test_that_fails_anyway():
    figures.blind([1, 2], 2)
    assert False


BEGUN = []


def test_that_begins():
    BEGUN.append(True)


def test_that_fails_alone():
    with suppress(refusals.KitError):
        refusals.blind(True)
    assert BEGUN
"""

ACCEPTED = """
[[survivor]]
function = "blind"
text = "isinstance(x, bool)"
reason = "the toy's test is blind"

[[survivor]]
function = "gone"
text = "x"
reason = "it is not there any more"
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    """What the check says of the toy package."""
    root = tmp_path_factory.mktemp("toy")
    files = {"style": STYLE, "rooms/figures": FIGURES, "refusals": REFUSALS}
    files["__init__"] = "from .rooms import figures"
    files["rooms/__init__"] = "from ..style import draws"
    files["rooms/style"] = "from ..style import draws"
    for name, text in files.items():
        path = root / "toy" / f"{name}.py"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
    for path, text in {"tests/test_toy.py": TESTS, "tools/mutate_survivors.toml": ACCEPTED}.items():
        (root / path).parent.mkdir()
        (root / path).write_text(text)
    command = [sys.executable, str(TOOL), "--root", str(root), "--package", "toy", "--workers", "1"]
    command += ["--out", str(root / "result.json"), "--map", str(root / "map.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    return json.loads((root / "result.json").read_text())


def texts(entries: list[dict]) -> set[tuple[str, str]]:
    return {(entry["function"], entry["text"]) for entry in entries}


def test_what_no_test_looks_at_survives(result):
    assert not result["passed"]
    assert texts(result["survived"]) == {
        ("blind", "ax.plot(x, [value / unit for value in x])"),
        ("blind", "ax.axhline(0)"),
        ("blind", 'return "two lines"'),
        ("blind", 'raise KitError("no number") from None'),
    }
    (line,) = [entry["line"] for entry in result["survived"] if entry["text"] == "ax.axhline(0)"]
    assert FIGURES.splitlines()[line - 1] == "    ax.axhline(0)"


def test_what_no_test_runs_is_uncovered(result):
    assert texts(result["uncovered"]) == {
        ("never_drawn", 'ax.text(1, 2, "3")'),
        ("uncovered", "x is None"),
        ("uncovered", 'raise KitError("something")'),
    }


def test_what_a_test_looks_at_is_killed(result):
    """Two calls of labelled, seen's call and title; seen's two refusals, and what _made returns."""
    assert result["counts"] == {
        "figure": {"killed": 4, "survived": 3, "uncovered": 1},
        "refusal": {"killed": 3, "survived": 2, "uncovered": 2},
    }
    assert result["crashed"] == result["other"] == []


def test_an_accepted_survivor_has_its_reason_and_one_that_is_gone_is_named(result):
    (entry,) = result["accepted"]
    assert entry["reason"] == "the toy's test is blind"
    assert result["stale"] == ["gone x"]


def test_only_tests_that_can_be_trusted_count(result):
    assert result["tests"] == 6
    assert result["left_out"] == {"starts a program": 1, "failed": 1}
    assert result["failed"] == ["tests/test_toy.py::test_that_fails_anyway"]
    assert result["unreliable"] == ["tests/test_toy.py::test_that_fails_alone"]


def test_zero_changes_every_number_and_keeps_the_shape():
    assert zero([1, 0, 2.5, True, None]) == [0, 1, 0.0, True, None]
    texts = ("r = 8", "#009E73", "{:.2f}")
    assert zero({"a 1": (3, *texts)}) == {"a 1": (0, "r = ", *texts[1:])}
    assert zero(range(3)) == [1, 0, 0]
    assert zero({"a": 4}.values()) == [0]
    assert (zero(7), zero(7, scalar=False)) == (0, 7)
    array = zero(np.array([[2.0, 0.0]]))
    assert array.tolist() == [[0.0, 1.0]]
    assert zero(print) is print
