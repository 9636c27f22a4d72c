"""Checkers of exercises: what the reader answered, beside the right answer, in one sentence.

A checker (`verdict`, and what `exercise` makes of it) compares in the order in which a teacher
would: not attempted yet, then the shape, then the values. It prints one line and returns True only
if the answer is right. `compare_guess` sets a reader's guess beside what was measured; it grades
nothing. The checkers of an exercise stand with the figures of their notebook, in `lessons`.
"""

import math
from collections.abc import Callable

import numpy as np


class Verdict(int):
    """True or False that a notebook does not show under the sentence already printed."""

    def __repr__(self) -> str:
        return str(bool(self))

    def _ipython_display_(self) -> None:
        """Show nothing."""


def verdict(stub: object, want: object, name: str, hint: str, tolerance: float = 1e-6) -> Verdict:
    """Compare an exercise's answer with the right one and print what a teacher would say.

    Args:
        stub: the reader's answer: None while not attempted, a number, or a (nested) sequence or
            tensor of numbers.
        want: the right answer, of the same kind.
        name: how the exercise calls the quantity.
        hint: one sentence that is added when the answer is wrong.
        tolerance: relative tolerance for numbers (absolute below 1).

    >>> verdict(None, 4.5, "bits per weight", "count the scales too")
    bits per weight: not attempted yet. Replace None and run the cell again.
    False
    >>> verdict(4, 4.5, "bits per weight", "count the scales too")
    bits per weight: values wrong: 4 is too small. Hint: count the scales too.
    False
    >>> verdict(4.5, 4.5, "bits per weight", "count the scales too")
    bits per weight: right.
    True
    """
    said = "not attempted yet. Replace None and run the cell again"
    right = False
    if stub is not None:
        fault = _fault(stub, want, tolerance)
        right = not fault
        said = "right" if right else f"{fault}. Hint: {hint}"
    print(f"{name}: {said}.")
    return Verdict(right)


def exercise(name: str, want: object, hint: str, tolerance: float = 1e-6) -> Callable:
    """A checker that needs the reader's answer only; see `verdict`."""

    def check(stub: object) -> Verdict:
        return verdict(stub, want, name, hint, tolerance)

    return check


def _fault(got: object, want: object, tolerance: float) -> str:
    """What is wrong with an answer, "" if nothing is."""
    if hasattr(got, "tolist"):
        got = got.tolist()
    if hasattr(want, "tolist"):
        want = want.tolist()
    got = np.array(got, dtype=object)  # of objects: each keeps its type, so that it can be named
    want = np.array(want, dtype=object)
    if got.shape != want.shape:
        return f"shape wrong: yours is {got.shape}, needed is {want.shape}"
    for i, (mine, right) in enumerate(zip(got.flat, want.flat)):
        if not isinstance(mine, (int, float)) or math.isnan(mine):
            return f"shape wrong: a number is needed, {mine!r} is not one"
        if abs(mine - right) > tolerance * max(1.0, abs(right)):
            where = f" at position {i}" if want.shape else ""
            size = "large" if mine > right else "small"
            return f"values wrong{where}: {mine:.6g} is too {size}"
    return ""


def compare_guess(
    name: str,
    guess: float | None,
    found: float,
    unit: str = "",
    digits: int = 4,
    how: str = "measured",
) -> None:
    """Print a guess and by how much it is off; without a guess the value is shown all the same.

    Args:
        name: how the notebook calls the quantity.
        guess: the reader's, or None.
        found: the value; an integer is printed in full.
        unit: of both.
        digits: significant digits of a value that is not an integer.
        how: where the value comes from: measured, calculated, predicted, simulated.

    >>> compare_guess("bits per weight", None, 4.127, "bits")
    bits per weight: no guess yet · measured 4.127 bits
    >>> compare_guess("bits per weight", 4.5, 4.127, "bits")
    bits per weight: your guess 4.5 bits · measured 4.127 bits · off by +9.0 %
    """
    if unit:
        unit = f" {unit}"
    value = f"{found:.{digits}g}" if isinstance(found, float) else f"{found:,}"
    said = "no guess yet"
    off = ""
    if guess is not None:
        said = f"your guess {guess:,}{unit}"
        if found:
            off = f" · off by {100 * (guess - found) / abs(found):+.1f} %"
    print(f"{name}: {said} · {how} {value}{unit}{off}")
