"""The exercises of all notebooks as a reader finds them: each cell is run as it stands, with the
folded solution, and wrongly.
"""

from __future__ import annotations

import ast
import math
import re

import nbformat
import pytest
from conftest import NOTEBOOKS

from qlora_nb.settings import validate

EXPECTED = {
    "01_setup": 1,
    "02_lora": 4,
    "03_nf4_explained": 4,
    "04_double_quantization": 3,
    "05_paged_optimizers": 4,
    "06_finetune_pythia_12b": 3,
    "07_inference": 2,
}
PER_EXERCISE = [(name, number) for name, count in EXPECTED.items() for number in range(count)]


def cells_of(name: str) -> list:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells


def exercises(name: str) -> list[tuple[str, str]]:
    """(code of the cell that asks, code of the solution folded beside it) of a notebook, in
    order.
    """
    asking, solutions = [], []
    for cell in cells_of(name):
        if cell.cell_type == "code" and re.search(r"\.check_\w+\(", cell.source):
            asking.append(cell.source)
        if cell.cell_type == "markdown":
            solutions += re.findall(
                r"<summary>solution</summary>(.*?)</details>", cell.source, re.S | re.I
            )
    codes = [re.findall(r"<code>(.*?)</code>", solution, re.S) for solution in solutions]
    assert all(len(found) == 1 for found in codes), "one <code> in each solution"
    return [(cell, found[0]) for cell, found in zip(asking, codes, strict=True)]


def named(name: str, code: str) -> dict[str, object]:
    """What the code of a cell names: modules, by the notebook's own imports of them, and the
    settings of profile tiny.
    """
    used = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    space = {"math": math}
    for cell in cells_of(name):
        if cell.cell_type != "code":
            continue
        for line in ast.parse(cell.source).body:
            if not isinstance(line, ast.ImportFrom) or not line.module.startswith("qlora_nb"):
                continue
            line.names = [alias for alias in line.names if (alias.asname or alias.name) in used]
            if line.names:
                exec(compile(ast.Module([line], []), name, "exec"), space)
    if "settings" in used:
        space["settings"] = validate({})
    return space


def run(name: str, code: str, answer: ast.expr | None, **more) -> object:
    """Run an exercise's cell, with an expression in the place of its None if there is one; the
    value of its last line.
    """
    space = named(name, code) | more
    *lines, check = ast.parse(code).body
    assert isinstance(check, ast.Expr), "the last line checks"
    asked = [
        line for line in lines if isinstance(line, ast.Assign) and ast.unparse(line.value) == "None"
    ]
    assert len(asked) == 1, "one thing is asked"
    if answer is not None:
        asked[0].value = answer
    exec(compile(ast.fix_missing_locations(ast.Module(lines, [])), name, "exec"), space)
    return eval(compile(ast.Expression(check.value), name, "eval"), space)


def solved(code: str, solution: str) -> ast.expr:
    """The right side of a solution; a name on its left is the one that the cell asks for."""
    [line] = ast.parse(solution).body
    if isinstance(line, ast.Assign):
        assert f"{ast.unparse(line.targets[0])} = None" in code
    return line.value


@pytest.mark.parametrize("name", EXPECTED)
def test_no_exercise_is_left_out(name):
    text = "\n".join(cell.source for cell in cells_of(name) if cell.cell_type == "markdown")
    assert len(exercises(name)) == EXPECTED[name]
    assert len(re.findall(r"<summary>hint</summary>", text, re.I)) == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_every_exercise_has_minutes_and_a_rating(name):
    text = "\n".join(cell.source for cell in cells_of(name) if cell.cell_type == "markdown")
    numbered = re.findall(r"^\*\*(\d+)\W*★+\W+\d+ minutes", text, re.M)
    assert numbered == [str(number + 1) for number in range(EXPECTED[name])]


@pytest.mark.parametrize(("name", "number"), PER_EXERCISE)
def test_the_solution_in_the_notebook_passes(name, number, capsys):
    code, solution = exercises(name)[number]
    assert run(name, code, solved(code, solution)) == True  # noqa: E712  (a Verdict is an int that equals True)
    said = capsys.readouterr().out
    assert said.endswith(": right.\n")
    assert said.count("\n") == 1


@pytest.mark.parametrize(("name", "number"), PER_EXERCISE)
def test_a_cell_that_is_not_touched_says_so_in_one_line(name, number, capsys):
    code, _ = exercises(name)[number]
    assert run(name, code, None) == False  # noqa: E712
    said = capsys.readouterr().out
    assert re.fullmatch(
        r"[^\n:]+: not attempted yet\. Replace None and run the cell again\.\n", said
    )


ANSWERS = {  # notebook → for each exercise: the answer by hand, and wrong ones with what is said of them
    "01_setup": [
        (
            5.9e9 / 1_073_741_824,
            {
                "5.9": "too large. Hint: that is GB of 10^9 bytes; a GiB has 2^30",
                "4 * 11.8e9 / 2**30": "too large. Hint: that counts bytes where there are bits",
                "11.8e9 / 2**30": "too large. Hint: eight bits are a byte, 2^30 bytes a GiB",
                "0": "too small. Hint: eight bits are a byte",
                "float('nan')": "a number is needed, nan is not one. Hint: eight bits are a byte",
                "'5.5'": "shape wrong: a number is needed, '5.5' is not one. Hint: ",
                "[5.49]": "shape wrong: yours is (1,), needed is (). Hint: ",
            },
        )
    ],
    "06_finetune_pythia_12b": [
        (
            16,
            {
                "1": "too small. Hint: rows in a forward pass, times forward passes in a step",
                "17": "too large. Hint: rows in a forward pass",
                "True": "too small. Hint: rows in a forward pass",
            },
        ),
        (
            4 + 4 + 4 + 4,
            {
                "12": "too small. Hint: Adam keeps two states for each number",
                "4": "too small. Hint: weight, gradient and two states, four bytes each",
                "8": "too small. Hint: weight, gradient and two states, four bytes each",
                "[4, 4, 8]": "shape wrong: yours is (3,), needed is (). Hint: ",
            },
        ),
        (
            [-100, -100, -100, -100, -100, 21, 22, 0],
            {
                "ids": "wrong at position 0: 11 is too large. Hint: the prompt must not train",
                "[-100] * 5 + [21, 22, -100]": "at position 7: -100 is too small. Hint: the end token must",
                "[-100] * 8": "at position 5: -100 is too small. Hint: the end token must train",
                "[-100] * 4 + [15, 21, 22, 0]": "at position 4: 15 is too large. Hint: the prompt",
                "[-100] * 6 + [22, 0]": "at position 5: -100 is too small. Hint: the prompt",
                "[21, 22, 0]": "shape wrong: yours is (3,), needed is (8,). Hint: ",
                "7": "shape wrong: yours is (), needed is (8,). Hint: ",
            },
        ),
    ],
    "07_inference": [
        (
            737_280,
            {
                "36 * 5120 * 2": "too small. Hint: each layer keeps a key and a value",
                "2 * 36 * 5120": "too small. Hint: each layer keeps a key and a value",
                "2 * 36 * 5120 * 4": "too large. Hint: 2 × layers × hidden × bytes of one number",
                "2 * 5120 * 2": "too small. Hint: 2 × layers × hidden × bytes of one number",
            },
        ),
        (
            2,
            {
                "1": "too small. Hint: add the largest probabilities until top_p is reached",
                "3": "too large. Hint: add the largest probabilities until top_p is reached",
                "[0.5, 0.35]": "shape wrong: yours is (2,), needed is (). Hint: ",
            },
        ),
    ],
}
BY_HAND = [
    (name, number, *answer)
    for name, all_of in ANSWERS.items()
    for number, answer in enumerate(all_of)
]


@pytest.mark.parametrize(("name", "number", "right", "wrong"), BY_HAND)
def test_answers_by_hand(name, number, right, wrong, capsys):
    code, _ = exercises(name)[number]
    assert len(ANSWERS[name]) == EXPECTED[name]
    assert run(name, code, ast.parse(repr(right)).body[0].value) == True  # noqa: E712
    assert capsys.readouterr().out.endswith(": right.\n")
    for answer, said in wrong.items():
        assert run(name, code, ast.parse(answer).body[0].value) == False, answer  # noqa: E712
        printed = capsys.readouterr().out
        assert said in printed, answer
        assert printed.count("\n") == 1


CHANGED = [  # another cell than the one in the notebook: what is replaced, the right answer, the notebook's own answer
    (
        "01_setup",
        0,
        {"11_800_000_000": "2_775_208_960", "n_bits=4": "n_bits=8"},
        2_775_208_960 / 2**30,
        5.4948,
    ),
    (
        "06_finetune_pythia_12b",
        2,
        {"n_prompt=5": "n_prompt=2"},
        [-100, -100, 13, 14, 15, 21, 22, 0],
        [-100] * 5 + [21, 22, 0],
    ),
    (
        "07_inference",
        0,
        {"n_layers=36": "n_layers=6", "5120": "512", "bytes_per_value=2": "bytes_per_value=4"},
        24_576,
        737_280,
    ),
    ("07_inference", 1, {"top_p=0.8": "top_p=0.86"}, 3, 2),
    ("07_inference", 1, {"top_p=0.8": "top_p=0.5"}, 1, 2),
    ("07_inference", 1, {"top_p=0.8": "top_p=1.0"}, 4, 2),
]


@pytest.mark.parametrize(("name", "number", "changes", "right", "wrong"), CHANGED)
def test_checkers_look_at_what_the_cell_gives_them(name, number, changes, right, wrong):
    code, _ = exercises(name)[number]
    for old, new in changes.items():
        assert code.count(old) == 1
        code = code.replace(old, new)
    assert run(name, code, ast.parse(repr(right)).body[0].value) == True  # noqa: E712
    assert run(name, code, ast.parse(repr(wrong)).body[0].value) == False  # noqa: E712


def test_rows_in_a_step_are_those_of_the_settings():
    name = "06_finetune_pythia_12b"
    code, solution = exercises(name)[0]
    settings = validate({"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5})
    assert run(name, code, solved(code, solution), settings=settings) == True  # noqa: E712
    assert run(name, code, ast.Constant(15), settings=settings) == True  # noqa: E712
    for wrong in (3, 5, 8, 16):
        assert run(name, code, ast.Constant(wrong), settings=settings) == False  # noqa: E712
