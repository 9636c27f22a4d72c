"""The exercises of notebooks 02 to 05 as a reader finds them: the folded solution passes the
checker of its own cell.
"""

from __future__ import annotations

import math
import re

import nbformat
import pytest
from conftest import NOTEBOOKS

from qlora_nb.lessons import n02, n03, n04, n05

CHECKERS = {"n02": n02, "n03": n03, "n04": n04, "n05": n05}
EXPECTED = {
    "02_lora": 4,
    "03_nf4_explained": 4,
    "04_double_quantization": 3,
    "05_paged_optimizers": 4,
}


def exercises(name: str) -> list[tuple[str, str, str]]:
    """(module, checker, solution's code) of a notebook, in order."""
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells
    checks = [
        m
        for c in cells
        if c.cell_type == "code"
        for m in re.findall(r"^(n0\d)\.(check_\w+)\(answer\)", c.source, re.M)
    ]
    text = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    solutions = re.findall(r"<summary>solution</summary>(.*?)</details>", text, re.S | re.I)
    codes = [re.findall(r"<code>(.*?)</code>", s) for s in solutions]
    assert len(checks) == len(codes)
    assert all(len(c) == 1 for c in codes), "one <code> in each solution"
    return [(*check, code[0]) for check, code in zip(checks, codes)]


@pytest.mark.parametrize("name", EXPECTED)
def test_solutions_in_the_notebook_pass(name, capsys):
    found = exercises(name)
    assert len(found) == EXPECTED[name]
    for module, check, solution in found:
        answer = eval(solution, {"math": math})
        assert getattr(CHECKERS[module], check)(answer), (check, solution)
        assert "right" in capsys.readouterr().out


@pytest.mark.parametrize("name", EXPECTED)
def test_every_exercise_has_minutes_a_rating_and_a_hint(name):
    text = "\n".join(c.source for c in nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells)
    assert len(re.findall(r"\(?★+, \d+ minutes\)", text)) == EXPECTED[name]
    assert len(re.findall(r"<summary>hint</summary>", text, re.I)) == EXPECTED[name]
