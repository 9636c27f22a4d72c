"""What the reader answered, judged in one sentence: exercises and guesses.

A checker (what `exercise` makes) compares in the order in which a teacher would: not attempted yet,
then the shape, then the values. It prints one line. `compare_guess` sets a reader's guess beside
what was measured; it grades nothing. Functions that the reader writes are checked in `written`; the
checkers of a notebook stand with its figures, in `lessons`.
"""

import math
import re
from collections.abc import Callable

import numpy as np


def exercise(name: str, want: object, hint: str, tolerance: float = 1e-6) -> Callable:
    """A checker that compares an exercise's answer with the right one and prints what a teacher
    would say.

    Args:
        name: how the exercise calls the quantity.
        want: the right answer: a number, or a (nested) sequence of numbers.
        hint: one sentence that is added when the answer is wrong.
        tolerance: relative tolerance for numbers (absolute below 1).

    >>> check = exercise("bits per weight", want=4.5, hint="count the scales too")
    >>> check(None)
    bits per weight: not attempted yet. Replace None and run the cell again.
    >>> check(4)
    bits per weight: values wrong: 4 is too small. Hint: count the scales too.
    >>> check(4.5)
    bits per weight: right.
    """

    def check(answer: object) -> None:
        """Judge the reader's answer, which is None while not attempted."""
        said = "not attempted yet. Replace None and run the cell again"
        if answer is not None:
            fault = fault_of(answer, want, tolerance)
            said = f"{fault}. Hint: {hint}" if fault else "right"
        print(f"{name}: {said}.")

    return check


def fault_of(got: object, want: object, tolerance: float) -> str:
    """What is wrong with an answer, "" if nothing is."""
    if hasattr(got, "tolist"):
        got = got.tolist()
    got = np.array(got, dtype=object)  # of objects: each keeps its type, so that it can be named
    want = np.array(want, dtype=object)
    if got.shape != want.shape:
        return f"shape wrong: yours is {got.shape}, needed is {want.shape}"
    for i, (mine, right) in enumerate(zip(got.flat, want.flat)):
        if not isinstance(mine, (int, float)) or math.isnan(mine):
            return f"shape wrong: a number is needed, {mine!r} is not one"
        allowed = tolerance * max(1.0, abs(right)) if isinstance(right, float) else 0
        if abs(mine - right) > allowed:
            where = f" at position {i}" if want.shape else ""
            size = "large" if mine > right else "small"
            return f"values wrong{where}: {mine:.6g} is too {size}"
    return ""


def compare_guess(
    name: str,
    guess: float | str | None,
    found: float,
    unit: str = "",
    digits: int = 4,
    how: str = "measured",
) -> None:
    """Print a guess and how near it is in words; without a guess the value is shown all the same.

    Args:
        name: how the notebook calls the quantity.
        guess: the reader's: a number, a text that holds one ("about 10 GiB"), or None.
        found: the value; an integer is printed in full.
        unit: of both.
        digits: significant digits of a value that is not an integer.
        how: where the value comes from: measured, calculated, predicted, simulated.

    >>> compare_guess("bits per weight", None, 4.127, "bits")
    bits per weight: no guess yet · measured 4.127 bits
    >>> compare_guess("bits per weight", "perhaps 4.5", 4.127, "bits")
    bits per weight: your guess 4.5 bits · measured 4.127 bits · close, 9 % too high
    """
    if unit:
        unit = f" {unit}"
    value = f"{found:.{digits}g}" if isinstance(found, float) else f"{found:,}"
    said = "no guess yet"
    judged = ""
    if guess is not None:
        number = number_in(guess)
        if number is None:
            said = f"your guess {guess!r} holds no number"
        else:
            shown = f"{number:,.0f}" if number == round(number) else f"{number:.6g}"
            said = f"your guess {shown}{unit}"
            judged = f" · {_nearness(number, found, digits)}"
    if math.isnan(found):
        print(f"{name}: {said} · not {how} here")
        return
    print(f"{name}: {said} · {how} {value}{unit}{judged}")


FACTORS = {"thousand": 1e3, "million": 1e6, "billion": 1e9}


def number_in(guess: float | str) -> float | None:
    """The first number of a text, None if it holds none.

    >>> number_in("about 10 GiB"), number_in("4,5"), number_in("1,024"), number_in("2 million")
    (10.0, 4.5, 1024.0, 2000000.0)
    """
    in_thousands = r"(?<=\d)(?<!\b0)[,_ ](?=\d{3}\b)"  # the comma of 1,024, not that of 0,125
    text = re.sub(in_thousands, "", str(guess))
    found = re.search(r"[-+]?\d*[.,]?\d+(?:e[-+]?\d+)?", text.lower())
    if found is None:
        return None
    number = float(found[0].replace(",", "."))
    for word, factor in FACTORS.items():
        if word in text.lower():
            number *= factor
    return number


def _nearness(guess: float, found: float, digits: int) -> str:
    """In words how near a guess is."""
    if f"{guess:.{digits}g}" == f"{found:.{digits}g}":
        return "right"
    if found == 0 or guess * found <= 0:
        return "too high" if guess > found else "too low"
    direction = "too high" if guess > found else "too low"
    ratio = max(guess / found, found / guess)
    percent = 100 * abs(guess / found - 1)
    if ratio >= 2:
        times = f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"
        return f"{times} times {direction}"
    if percent < 2:
        return f"very close, a little {direction}"
    near = "close, " if percent < 15 else ""
    return f"{near}{percent:.0f} % {direction}"
