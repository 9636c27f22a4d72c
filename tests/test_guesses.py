"""A reader's guess: any text that holds a number is understood, and judged in words."""

import pytest

from qlora_nb.ui.checks import compare_guess, number_in
from qlora_nb.ui.style import draws
from qlora_nb.ui.widgets import explore, float_slider

TEXTS = {
    "10 GiB": 10.0,
    "about 10.5 GiB, I think": 10.5,
    "ca. 10,5": 10.5,
    "0,125": 0.125,
    "10,250": 10250.0,
    "1,024 bytes": 1024.0,
    "11,846,072,320": 11846072320.0,
    "1_000": 1000.0,
    "-3 %": -3.0,
    "1e-4": 1e-4,
    "47 million": 47e6,
    "2 billion weights": 2e9,
    ".5": 0.5,
    "~7": 7.0,
    "none at all": None,
    "": None,
}


@pytest.mark.parametrize("text", TEXTS)
def test_the_number_of_a_text(text):
    assert number_in(text) == TEXTS[text]


@pytest.mark.parametrize("number", [3, 4.5, 1e-7, -2])
def test_a_number_is_itself(number):
    assert number_in(number) == number


WORDS = [
    (4.127, 4.1270, "right"),
    ("4.13", 4.127, "very close, a little too high"),
    (4.5, 4.127, "close, 9 % too high"),
    (3, 4.127, "27 % too low"),
    (40, 4.0, "10 times too high"),
    ("1 GiB", 2.5, "2.5 times too low"),
    (0, 32, "too low"),
    (3, 0, "too high"),
    (0, 0, "right"),
    (-1, 2.0, "too low"),
    (-4, -2, "2 times too low"),
    (23_592_960, 4, "5,898,240 times too high"),
]


@pytest.mark.parametrize(("guess", "found", "said"), WORDS)
def test_how_near_a_guess_is(guess, found, said, capsys):
    compare_guess("x", guess, found)
    printed = capsys.readouterr().out
    assert printed.endswith(f" · {said}\n")
    assert printed.startswith("x: your guess ")


def test_a_large_guess_is_printed_in_full(capsys):
    compare_guess("x", 23_592_961, 23_592_961)
    assert capsys.readouterr().out == "x: your guess 23,592,961 · measured 23,592,961 · right\n"


def test_no_guess_and_a_guess_without_a_number(capsys):
    compare_guess("x", None, 1234567, "bytes", how="counted")
    assert capsys.readouterr().out == "x: no guess yet · counted 1,234,567 bytes\n"
    compare_guess("x", "many", 2.0, "s")
    assert capsys.readouterr().out == "x: your guess 'many' holds no number · measured 2 s\n"


def test_a_panel_says_that_it_draws():
    seen = []

    @draws
    def plot(ax, x):
        """Nothing."""
        seen.append([child.value for child in panel[0].children[1:-1]] if panel else None)

    panel = []
    panel.append(explore(plot, x=float_slider("x", 0.0, 0, 1, 0.1)))
    panel[0].children[0].value = 0.5
    assert seen == [None, ["drawing …"]]
    assert panel[0].children[1].value == "drawn"


def test_what_was_not_measured_is_said(capsys):
    compare_guess("exact match", 80, float("nan"), "%")
    compare_guess("exact match", None, float("nan"), "%")
    assert capsys.readouterr().out == (
        "exact match: your guess 80 % · not measured here\n"
        "exact match: no guess yet · not measured here\n"
    )
