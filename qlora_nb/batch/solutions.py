"""The folded solutions of a notebook's exercises, put in the place of its stubs.

An exercise is a code cell tagged `exercise`. It holds a function whose body raises
NotImplementedError, or a line `name = None`; the Markdown cell below folds its hint and its
solution away. A solution is the function in a fenced block, or the line in <code>.
"""

import ast
import html
import re
from itertools import pairwise
from pathlib import Path

import nbformat

from qlora_nb.batch import one_notebook

_SOLUTION = re.compile(
    r"<summary>Solution</summary>\s*(?:```python\n(.*?)```|.*?<code>(.*?)</code>)", re.DOTALL
)


def exercises(notebook: nbformat.NotebookNode) -> list[tuple[nbformat.NotebookNode, str]]:
    """Every cell that asks, with the code of the solution in the cell below."""
    found = []
    for cell, below in pairwise(notebook.cells):
        if "exercise" in cell.metadata.get("tags", []):
            folded = _SOLUTION.search(below.source)
            found.append((cell, folded[1] or html.unescape(folded[2])))
    return found


def solved(asking: str, solution: str) -> str:
    """The code of an exercise's cell with the solution in the place of what it asks for."""
    name = _asked(ast.parse(solution).body[0])
    lines = asking.split("\n")
    for part in ast.parse(asking).body:
        if _asked(part) == name:
            lines[part.lineno - 1 : part.end_lineno] = [solution.rstrip()]
            break
    return "\n".join(lines)


def _asked(part: ast.stmt) -> str | None:
    """The name that a statement defines."""
    if isinstance(part, ast.FunctionDef):
        return part.name
    if isinstance(part, ast.Assign):
        return ast.unparse(part.targets[0])
    return None


def copy_solved(source: Path, target: Path) -> None:
    """Copy a folder's notebooks, with all their exercises answered."""
    for path in source.glob("*.ipynb"):
        notebook = one_notebook.read(path)
        for cell, solution in exercises(notebook):
            cell.source = solved(cell.source, solution)
        nbformat.write(notebook, target / path.name)
