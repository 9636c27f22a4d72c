"""Exercise checkers: not attempted yet, then shape, then values, always with a sentence that
teaches.

Every `check_*` prints one line and returns True only if the answer is right. `compare_guess` sets a
reader's guess beside what was measured. Topic checkers (`lora_checks`, `quant_checks`,
`paging_checks`, `training_checks`) are built from `verdict`.
"""

from functools import partial

import numpy as np


class Verdict(int):
    """True or False that a notebook does not print under the sentence already printed."""

    def __repr__(self) -> str:
        return str(bool(self))

    def _ipython_display_(self) -> None:
        return None


def verdict(
    stub: object, want: object, name: str, hint: str = "", tolerance: float = 1e-6
) -> Verdict:
    """Compare an exercise's answer with the right one and print what a teacher would say.

    Args:
        stub: the reader's answer: None while not attempted, a number, a string, or a (nested)
            sequence or tensor.
        want: the right answer, of the same kind.
        name: how the exercise calls the quantity.
        hint: one sentence that is added when the values are wrong.
        tolerance: relative tolerance for numbers (absolute below 1).

    >>> verdict(None, 4.5, "bits per weight")
    bits per weight: not attempted yet. Replace None and run the cell again.
    False
    >>> verdict(4.5, 4.5, "bits per weight")
    bits per weight: right.
    True
    """
    said = (
        "not attempted yet. Replace None and run the cell again"
        if stub is None
        else _compare(stub, want, tolerance)
    )
    wrong = stub is not None and said != "right"
    print(f"{name}: {said}.{' Hint: ' + hint if wrong and hint else ''}")
    return Verdict(said == "right")


def exercise(name: str, want: object, hint: str = "", tolerance: float = 1e-6) -> partial:
    """A checker: `exercise(…)(answer)` is `verdict` with everything but the reader's answer."""
    return partial(verdict, want=want, name=name, hint=hint, tolerance=tolerance)


def _compare(got, want, tolerance: float) -> str:
    got, want = (value.tolist() if hasattr(value, "tolist") else value for value in (got, want))
    if isinstance(want, (str, bool)):
        return "right" if got == want else f"values wrong: {got!r} is not it"
    got, want = (
        np.array(value, dtype=object) for value in (got, want)
    )  # of objects: a wrong kind can be named
    if got.shape != want.shape:
        return f"shape wrong: yours is {got.shape}, needed is {want.shape}"
    for i, (g, w) in enumerate(zip(got.flat, want.flat)):
        if not isinstance(g, (int, float)) or isinstance(g, bool):
            return f"shape wrong: a number is needed, {g!r} is not one"
        if not abs(g - w) <= tolerance * max(1.0, abs(w)):  # true of NaN too
            where = f" at position {i}" if want.shape else ""
            return f"values wrong{where}: {g:.6g} is {'too large' if g > w else 'too small' if g < w else 'not a number'}"
    return "right"


def compare_guess(
    name: str,
    guess: float | None,
    found: float,
    unit: str = "",
    digits: int = 4,
    how: str = "measured",
) -> None:
    """Print a guess beside the measured value; before a guess is made, say so and show the value
    all the same.

    `how` says where the value comes from: measured, calculated, predicted, simulated.

    >>> compare_guess("bits per weight", None, 4.127, "bits")
    bits per weight: no guess yet · measured 4.127 bits
    >>> compare_guess("bits per weight", 4.5, 4.127, "bits")
    bits per weight: your guess 4.5 bits · measured 4.127 bits · off by +9.0 %
    """
    unit = f" {unit}" if unit else ""
    shown = (
        f"{how} {found:.{digits}g}{unit}" if isinstance(found, float) else f"{how} {found:,}{unit}"
    )
    said = "no guess yet" if guess is None else f"your guess {guess:,}{unit}"
    off = (
        f" · off by {100 * (guess - found) / abs(found):+.1f} %"
        if guess is not None and found
        else ""
    )
    print(f"{name}: {said} · {shown}{off}")
