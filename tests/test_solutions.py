"""Solutions in the place of the exercises (`batch/solutions.py`), and the command that runs them."""

import nbformat
from nbformat import v4
from typer.testing import CliRunner

from qlora_nb import cli, sources
from qlora_nb.batch import sequence, solutions

STUB = '''def double(x):
    """Twice x."""
    raise NotImplementedError


double = check(double)'''
FOLDED = """**Why.** Text.

<details><summary>Hint</summary>Two times.</details>
<details><summary>Solution</summary>

```python
def double(x):
    return 2 * x
```

</details>"""


def notebook(*cells):
    return v4.new_notebook(cells=list(cells))


def asking(source):
    return v4.new_code_cell(source, metadata={"tags": ["exercise"]})


def test_a_function_takes_the_place_of_its_stub():
    made = notebook(v4.new_code_cell("x = None"), asking(STUB), v4.new_markdown_cell(FOLDED))
    [(cell, solution)] = solutions.exercises(made)
    assert cell.source == STUB
    assert solutions.solved(STUB, solution) == (
        "def double(x):\n    return 2 * x\n\n\ndouble = check(double)"
    )


def test_a_number_takes_the_place_of_none():
    folded = (
        "<details><summary>Solution</summary>Why: <code>n = 4 if 3 &gt; 2 else 5</code></details>"
    )
    made = notebook(asking("n = None  # yours\ncheck(n)"), v4.new_markdown_cell(folded))
    [(cell, solution)] = solutions.exercises(made)
    assert solutions.solved(cell.source, solution) == "n = 4 if 3 > 2 else 5\ncheck(n)"


def test_the_command_runs_solved_copies(monkeypatch):
    seen = {}

    def run(given, names, notebooks, **more):
        for path in notebooks.glob("*.ipynb"):
            seen[path.name] = "\n".join(cell.source for cell in nbformat.read(path, 4).cells)
        return {"status": "done"}

    monkeypatch.setattr(sequence, "run_sequence", run)
    assert CliRunner().invoke(cli.app, ["run", "--solutions"]).exit_code == 0
    committed = sorted(path.name for path in (sources.project_root() / "notebooks").glob("*.ipynb"))
    assert sorted(seen) == committed
    assert all("raise NotImplementedError" not in source for source in seen.values())
