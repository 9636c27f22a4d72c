"""The exercises of all notebooks as a reader finds them: each cell is run as it stands, with the
folded solution, and wrongly (`wrong_answers/nNN.py`).
"""

from __future__ import annotations

import ast
import importlib
import math
import re

import nbformat
import pytest
from conftest import NOTEBOOKS, python_of

from qlora_nb.batch import solutions
from qlora_nb.settings import validate

NAMES = [path.stem for path in sorted(NOTEBOOKS.glob("[01]*.ipynb"))]
CELLS = {name: nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells for name in NAMES}
ASKED = {name: solutions.exercises(nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)) for name in NAMES}
EACH = [(name, number) for name in NAMES for number in range(len(ASKED[name]))]
WRITTEN = [
    (name, number)
    for name, number in EACH
    if "raise NotImplementedError" in ASKED[name][number][0].source
]


def named(name: str, code: str) -> dict[str, object]:
    """What the code of a cell names: by the notebook's own imports, and the settings of profile
    tiny.
    """
    used = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    space = {"math": math}
    for cell in CELLS[name]:
        if cell.cell_type != "code":
            continue
        for line in ast.parse(python_of(cell)).body:
            if not isinstance(line, ast.Import | ast.ImportFrom):
                continue
            line.names = [alias for alias in line.names if (alias.asname or alias.name) in used]
            if line.names:
                exec(compile(ast.Module([line], []), name, "exec"), space)
    if "settings" in used:
        space["settings"] = validate({})
    return space


def run(name: str, code: str, capsys, **more) -> str:
    """Run the cell of an exercise; what it prints."""
    space = named(name, code) | more
    exec(compile(code, name, "exec"), space)
    return capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_every_notebook_asks_and_no_exercise_is_left_out(name):
    """What calls a checker is tagged, so that its solution is found; a function is written in
    each but 09, where claims are judged.
    """
    calling = [
        cell.source
        for cell in CELLS[name]
        if cell.cell_type == "code" and re.search(r"\.check_\w+\(", cell.source)
    ]
    assert [cell.source for cell, _ in ASKED[name]] == calling
    if name != "09_claims_checked":
        assert name in {notebook for notebook, _ in WRITTEN}
    text = "\n".join(cell.source for cell in CELLS[name] if cell.cell_type == "markdown")
    for fold in ("Hint", "Solution"):
        assert text.count(f"<summary>{fold}</summary>") == len(calling)


def test_at_least_twelve_functions_are_written():
    assert len(WRITTEN) >= 12


@pytest.mark.parametrize("name", NAMES)
def test_every_exercise_has_a_number_a_rating_and_minutes(name):
    text = "\n".join(cell.source for cell in CELLS[name] if cell.cell_type == "markdown")
    numbered = re.findall(r"^\*\*Exercise (\d+) \(★{1,3}, \d+ minutes\)\.\*\*", text, re.M)
    assert numbered == [str(number + 1) for number in range(len(ASKED[name]))]


@pytest.mark.parametrize(("name", "number"), EACH)
def test_the_solution_in_the_notebook_passes(name, number, capsys):
    cell, solution = ASKED[name][number]
    said = run(name, solutions.solved(cell.source, solution), capsys)
    assert re.fullmatch(r"[^\n:]+: right(, equal to [^\n]+)?\.\n", said)


@pytest.mark.parametrize(("name", "number"), EACH)
def test_a_cell_that_is_not_touched_says_so_in_one_line(name, number, capsys):
    said = run(name, ASKED[name][number][0].source, capsys)
    what = "written yet. Put your lines in the place of `raise`"
    if (name, number) not in WRITTEN:
        what = "attempted yet. Replace None"
    assert said.endswith(f": not {what} and run the cell again.\n")
    assert said.count("\n") == 1


@pytest.mark.parametrize(("name", "number"), WRITTEN)
def test_a_stub_says_what_goes_in_and_what_comes_out(name, number):
    [function] = [
        part
        for part in ast.parse(ASKED[name][number][0].source).body
        if isinstance(part, ast.FunctionDef)
    ]
    assert ast.get_docstring(function)
    assert isinstance(function.body[-1], ast.Raise)


def wrong_answers(name: str) -> dict[int, dict[str, str]]:
    """Exercise (from 1) → {what the reader puts in place of the solution: part of what is said}."""
    return importlib.import_module(f"wrong_answers.n{name[:2]}").WRONG


WRONG = [
    (name, number, answer, said)
    for name in NAMES
    for number, answers in wrong_answers(name).items()
    for answer, said in answers.items()
]


@pytest.mark.parametrize(("name", "number", "answer", "said"), WRONG)
def test_a_wrong_answer_gets_the_message_meant_for_it(name, number, answer, said, capsys):
    cell, _ = ASKED[name][number - 1]
    printed = run(name, solutions.solved(cell.source, answer), capsys)
    assert said in printed
    assert ": right" not in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(("name", "number"), WRITTEN)
def test_three_wrong_functions_are_told_apart(name, number):
    answers = wrong_answers(name)[number + 1]
    assert len(set(answers.values())) >= 3, "three typical mistakes, each with its own message"
