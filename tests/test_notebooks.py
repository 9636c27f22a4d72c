"""The notebooks: one papermill pass, whose results all these checks share.

How long a notebook takes is printed, never asserted: a busy machine is not a fault.
"""

from __future__ import annotations

import ast
import html
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill.cli
import pytest
from click.testing import CliRunner
from conftest import NOTEBOOKS, ROOT, Listener, python_of
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from qlora_nb import machine
from qlora_nb.batch import one_notebook, report
from qlora_nb.errors import KitError
from qlora_nb.settings import Settings

NAMES = [p.stem for p in sorted(NOTEBOOKS.glob("[01]*.ipynb"))]
each = pytest.mark.parametrize("name", NAMES)


def test_all_are_there():
    names = [
        "setup",
        "lora",
        "nf4_explained",
        "double_quantization",
        "paged_optimizers",
        "finetune_pythia_12b",
        "inference",
        "optimizers",
        "claims_checked",
        "scale_out",
    ]
    assert [f"{i:02d}_{name}" for i, name in enumerate(names, 1)] == NAMES


# ---- what is committed
# -----------------------------------------------------------------------------------------------


@each
def test_committed_form(name):
    """Fresh generated cells, execution counts, tags, parameters typed and commented, budget, size,
    no stored error.
    """
    from build_notebooks import format_problems

    assert format_problems(NOTEBOOKS / f"{name}.ipynb", NAMES) == []


@pytest.mark.fault(36)
@each
def test_no_cell_takes_a_parameters_name_for_something_else(name):
    """Run again, the cell that resolves the parameters would read it."""
    cells = [
        c for c in nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells if c.cell_type == "code"
    ]
    others = [python_of(c) for c in cells if "parameters" not in c.metadata.get("tags", [])]
    stored = [
        n for source in others for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name)
    ]
    assert {
        n.id for n in stored if isinstance(n.ctx, ast.Store)
    } & Settings.model_fields.keys() == set()


@each
def test_help_shows_every_parameter_with_its_meaning(name):
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)
    (source,) = [c.source for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    wanted = [
        line.partition(":")[0]
        for line in source.splitlines()
        if ": " in line and not line.startswith("#")
    ]
    told = CliRunner().invoke(
        papermill.cli.papermill, ["--help-notebook", str(NOTEBOOKS / f"{name}.ipynb")]
    )
    shown = told.stdout.splitlines()
    lines = {line.strip().partition(":")[0]: i for i, line in enumerate(shown)}
    assert "profile" in wanted
    for parameter in wanted:
        assert parameter in lines, f"papermill does not see {parameter}"
        assert shown[lines[parameter] + 1].strip(), f"{parameter} has no meaning"


# ---- the papermill pass
# ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcomes(papermill_pass):
    return {o["notebook"]: o for o in papermill_pass["notebooks"]}


@pytest.fixture(scope="module")
def executed(papermill_pass):
    return {name: Path(papermill_pass["folder"]) / f"{name}.ipynb" for name in NAMES}


@each
def test_runs_to_the_end(name, outcomes):
    assert outcomes[name]["problems"] == []
    assert outcomes[name]["exit_code"] == 0
    assert outcomes[name]["results"], "no key results"


@each
def test_no_stored_error(name, executed):
    assert one_notebook.stored_errors(nbformat.read(executed[name], 4)) == []


def told_beside_the_outputs(path: Path) -> list[str]:
    """What a notebook's cells wrote to stderr, progress bars left out."""
    from build_notebooks import _NOISE

    lines = []
    for cell in nbformat.read(path, 4).cells:
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                lines += [line for line in output.text.splitlines() if line.strip()]
    return [line for line in lines if not _NOISE.search(line)]


@each
def test_no_library_warns_of_what_a_reader_cannot_change(name, executed):
    """Neither in what is committed nor when it is run: a warning that matters is a sentence of the
    kit's in the cell's own output.
    """
    assert told_beside_the_outputs(NOTEBOOKS / f"{name}.ipynb") == []
    assert told_beside_the_outputs(executed[name]) == []


def test_a_warning_would_be_found(toy):
    folder = toy("01_warns", "import warnings; warnings.warn('old name', FutureWarning)")
    path = folder / "01_warns.ipynb"
    notebook = nbformat.read(path, 4)
    text = "Loading weights: 100%|##| 2/2 [00:00<00:00]\nFutureWarning: old name\n"
    notebook.cells[-2].outputs = [nbformat.v4.new_output("stream", name="stderr", text=text)]
    nbformat.write(notebook, path)
    assert told_beside_the_outputs(path) == ["FutureWarning: old name"]


@pytest.mark.fault(37)
@each
def test_has_a_figure_and_a_widget(name, executed):
    notebook = nbformat.read(executed[name], 4)
    assert list(report.figures(notebook))
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    for output in outputs:
        if "image/png" in output.get("data", {}):
            alt = output.metadata["image/png"]["alt"]
            assert alt.strip()
            assert f'<img alt="{html.escape(alt)}"' in output.data["text/html"]
    text = "\n".join(cell.source for cell in notebook.cells)
    assert "Alt text" not in text, "it stands in the image"
    assert text.count("not measured") <= 1
    state = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]
    usual = ("DropdownModel", "ButtonModel", "ToggleButtonsModel", "TextareaModel")
    assert any("Slider" in m["model_name"] or m["model_name"] in usual for m in state.values())
    assert not [m for m in state.values() if m["model_name"] == "OutputModel"], (
        "papermill can wait for ever (widgets.explore)"
    )


@pytest.mark.fault(39)
@each
def test_memory_stays_under_two_gib(name, outcomes):
    assert 50 * 2**20 < outcomes[name]["peak_bytes"] <= 2 * 2**30


def test_no_connection_was_tried(papermill_pass):
    assert papermill_pass["calls"] == []


def test_the_listener_would_have_heard():
    """The check above can fail: a hub call of the real library does reach the listener."""
    listener = Listener()
    program = "from huggingface_hub import HfApi\ntry:\n    HfApi().model_info('a/b', timeout=3)\nexcept Exception:\n    pass"
    try:
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | listener.environment(),
            check=True,
            timeout=60,
        )
    finally:
        listener.close()
    assert listener.calls


def test_the_report_is_there_and_stands_alone(papermill_pass):
    folder = Path(papermill_pass["folder"])
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("<tr>") == len(NAMES) + 1
    assert page.count("data:image/png") >= len(NAMES)
    assert "<script" not in page
    assert 'src="http' not in page
    assert 'href="http' not in page
    assert (
        json.loads((folder / "summary.json").read_text())["status"]
        == papermill_pass["status"]
        == "done"
    )


# ---- the committed key results
# ---------------------------------------------------------------------------------------


def nbval_differences(request, committed: Path, run: nbformat.NotebookNode) -> list[str]:
    """What nbval itself, called lax, objects to in a notebook that was run: nbval's cells and
    comparison, no kernel.

    The cell that papermill puts in is left out. Every other cell must be the committed one.
    """
    from nbval.plugin import IPyNbFile, coalesce_streams

    file = IPyNbFile.from_parent(request.session, path=committed)
    file.compare_outputs = False  # lax: only cells that are tagged
    cells = [
        cell for cell in run.cells if "injected-parameters" not in cell.metadata.get("tags", [])
    ]
    found, n_compared = [], 0
    for item, cell in zip(file.collect(), (c for c in cells if c.cell_type == "code"), strict=True):
        assert cell.source == item.cell.source
        if not item.options["check"]:
            continue
        assert item.cell.execution_count is not None, (
            "nbval does not compare a cell that was never run"
        )
        n_compared += 1
        if not item.compare_outputs(
            coalesce_streams(cell.outputs), coalesce_streams(item.cell.outputs)
        ):
            found.append("\n".join(item.comparison_traceback))
    assert n_compared == 1, "the key results, once"
    return found


@each
def test_the_committed_key_results_are_found_again(name, request, executed):
    """What `pytest --nbval-lax notebooks/` compares, on the notebooks that papermill has run
    already.
    """
    assert (
        nbval_differences(request, NOTEBOOKS / f"{name}.ipynb", nbformat.read(executed[name], 4))
        == []
    )


def key_results(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The output of the cell of the key results."""
    [cell] = [cell for cell in notebook.cells if "key-results" in cell.metadata.get("tags", [])]
    return cell.outputs[0]


CHANGES = {
    "another digit": lambda output: output.data.update(
        {"text/plain": output.data["text/plain"].replace("4.127", "4.128", 1)}
    ),
    "another truth": lambda output: output.data.update(
        {"text/plain": output.data["text/plain"].replace("True", "False", 1)}
    ),
    "no text": lambda output: output.data.pop("text/plain"),
    "a picture more": lambda output: output.data.update({"image/svg+xml": "<svg/>"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_key_result_is_found(change, request):
    """In the committed notebook, as if it had been run: nothing differs; with one change it
    does.
    """
    path = NOTEBOOKS / "04_double_quantization.ipynb"
    run = nbformat.read(path, 4)
    assert nbval_differences(request, path, run) == []
    CHANGES[change](key_results(run))
    assert len(nbval_differences(request, path, run)) == 1


def test_nbval_itself_runs_a_notebook(tmp_path):
    """What a teacher types, on a small notebook (on all of them: `make verify`, nbval): the right
    result passes.
    """
    code = nbformat.v4.new_code_cell(
        "6 * 7", execution_count=1, metadata={"tags": ["nbval-check-output"]}
    )
    code.outputs = [
        nbformat.v4.new_output("execute_result", data={"text/plain": "42"}, execution_count=1)
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        str(ROOT / "pyproject.toml"),
        "-p",
        "no:cacheprovider",
        "--nbval-lax",
    ]
    for name, answer in (("right", "42"), ("wrong", "43")):
        code.outputs[0].data["text/plain"] = answer
        nbformat.write(
            nbformat.v4.new_notebook(cells=[code], metadata={"kernelspec": kernel}),
            tmp_path / f"{name}.ipynb",
        )
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "1 failed, 1 passed" in done.stdout
    assert "wrong.ipynb::Cell 0" in done.stdout
    assert "Cell outputs differ" in done.stdout


# ---- refusals inside a notebook
# --------------------------------------------------------------------------------------


def run_until_refused(name: str, **parameters) -> tuple[str, dict]:
    """A notebook's first cells, up to the one that resolves the parameters, with papermill's own
    injected cell among them.

    Returns:
        The source of the last cell that began, and the names that are there after it.
    """
    notebook = parameterize_notebook(
        load_notebook_node(str(NOTEBOOKS / f"{name}.ipynb")), parameters
    )
    names = {"__name__": "__main__", "In": [""]}
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        names["In"].append(cell.source)  # as IPython keeps what was run
        try:
            exec(compile(python_of(cell), name, "exec"), names)
        except KitError as refusal:
            names["refusal"] = refusal
            return cell.source, names
        if "resolve(globals())" in cell.source:
            return cell.source, names
    raise AssertionError("no cell resolves the parameters")


@each
def test_without_a_wrong_parameter_nothing_is_refused(name):
    source, names = run_until_refused(name, seed=3)
    assert "resolve(globals())" in source
    assert "refusal" not in names
    assert (names["settings"].profile, names["settings"].seed) == ("tiny", 3)


@pytest.mark.fault(1)
@each
def test_a_misspelt_parameter_is_refused(name):
    source, names = run_until_refused(name, max_stepz=3)
    assert "resolve(globals())" in source
    assert "did you mean max_steps" in str(names["refusal"])
    assert "settings" not in names


@pytest.mark.skipif(bool(machine.gpus()), reason="this machine has a GPU")
@each
def test_profile_full_is_refused_naming_the_need(name):
    """Where the notebook takes a model: the cell that resolves the parameters refuses, before any
    download.
    """
    source, names = run_until_refused(name, profile="full")
    assert "resolve(globals())" in source
    assert "EleutherAI/pythia-12b needs a GPU" in str(names["refusal"])
    assert "no NVIDIA GPU" in str(names["refusal"])


REFUSALS = [("06_finetune_pythia_12b", "max_stepz", "3", "did you mean max_steps")]
if not machine.gpus():
    REFUSALS.append(("01_setup", "profile", "full", "EleutherAI/pythia-12b needs a GPU"))


@pytest.mark.fault(1)
@pytest.mark.parametrize(("name", "parameter", "value", "said"), REFUSALS)
def test_a_refusal_ends_plain_papermill(name, parameter, value, said, tmp_path):
    """The same through papermill and a kernel: it ends there and says why."""
    out = tmp_path / "out.ipynb"
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(NOTEBOOKS / f"{name}.ipynb"),
        str(out),
        "--cwd",
        str(ROOT),
    ]
    command += ["--no-progress-bar", "-p", parameter, value]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode != 0
    assert said in done.stderr
