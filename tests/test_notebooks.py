"""The notebooks: one papermill pass and one nbval pass, whose results all these checks share.

How long a notebook takes is printed, never asserted: a busy machine is not a fault.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys

import nbformat
import pytest
from conftest import NOTEBOOKS, ROOT, Listener

from qlora_nb import machine
from qlora_nb.batch import one_notebook, report
from qlora_nb.settings import Settings

NAMES = [p.stem for p in sorted(NOTEBOOKS.glob("0*.ipynb"))]
each = pytest.mark.parametrize("name", NAMES)


def test_all_seven_are_there():
    numbers = [
        "setup",
        "lora",
        "nf4_explained",
        "double_quantization",
        "paged_optimizers",
        "finetune_pythia_12b",
        "inference",
    ]
    assert [f"{i:02d}_{name}" for i, name in enumerate(numbers, 1)] == NAMES


# ---- what is committed
# -----------------------------------------------------------------------------------------------


@each
def test_committed_form(name):
    """Fresh generated cells, execution counts, tags, parameters typed and commented, budget, size,
    no stored error.
    """
    from build_notebooks import format_problems

    assert format_problems(NOTEBOOKS / f"{name}.ipynb", NAMES) == []


@each
def test_no_cell_takes_a_parameters_name_for_something_else(name):
    """Run again, the cell that resolves the parameters would read it."""
    cells = [
        c for c in nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells if c.cell_type == "code"
    ]
    others = [c.source for c in cells if "parameters" not in c.metadata.get("tags", [])]
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
    command = [
        sys.executable,
        "-m",
        "papermill",
        "--help-notebook",
        str(NOTEBOOKS / f"{name}.ipynb"),
    ]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
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
    from pathlib import Path

    return {name: Path(papermill_pass["folder"]) / f"{name}.ipynb" for name in NAMES}


@each
def test_runs_to_the_end(name, outcomes):
    assert outcomes[name]["problems"] == []
    assert outcomes[name]["exit_code"] == 0
    assert outcomes[name]["results"], "no key results"


@each
def test_no_stored_error(name, executed):
    assert one_notebook.stored_errors(nbformat.read(executed[name], 4)) == []


@each
def test_has_a_figure_and_a_widget(name, executed):
    notebook = nbformat.read(executed[name], 4)
    assert list(report.figures(notebook))
    assert all(alt for _, alt in report.figures(notebook)), (
        "a figure without alt text in the markdown under it"
    )
    state = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]
    usual = ("DropdownModel", "ButtonModel", "ToggleButtonsModel", "TextareaModel")
    assert any("Slider" in m["model_name"] or m["model_name"] in usual for m in state.values())
    assert not [m for m in state.values() if m["model_name"] == "OutputModel"], (
        "papermill can wait for ever (widgets.explore)"
    )


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
    from pathlib import Path

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


# ---- the nbval pass --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nbval_pass(tmp_path_factory):
    """nbval runs the committed notebooks again and compares the cells tagged nbval-check-output:
    the key results.
    """
    junit = tmp_path_factory.mktemp("nbval") / "result.xml"
    files = [str(NOTEBOOKS / f"{n}.ipynb") for n in NAMES]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--nbval-lax",
        "--nbval-cell-timeout",
        "900",
        f"--junitxml={junit}",
    ]
    done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout, junit


@each
def test_nbval_finds_the_committed_key_results(name, nbval_pass):
    from xml.etree import ElementTree

    output, junit = nbval_pass
    cases = [
        c
        for c in ElementTree.parse(junit).iter("testcase")
        if name in c.get("classname", "") + c.get("file", "") + c.get("name", "")
    ]
    bad = [
        c.get("name") for c in cases if c.find("failure") is not None or c.find("error") is not None
    ]
    assert len(cases) > 5, output[-2000:]
    assert not bad, output[-4000:]


# ---- refusals inside a notebook
# --------------------------------------------------------------------------------------


def _papermill(name: str, tmp_path, *parameters: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(NOTEBOOKS / f"{name}.ipynb"),
        str(tmp_path / "out.ipynb"),
        "--cwd",
        str(ROOT),
    ]
    return subprocess.run(
        [*command, "--no-progress-bar", *parameters],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


@pytest.mark.skipif(not NAMES, reason="no notebooks")
@pytest.mark.parametrize("name", NAMES[:1] + NAMES[-2:])
def test_a_misspelt_parameter_is_refused_by_plain_papermill(name, tmp_path):
    done = _papermill(name, tmp_path, "-p", "max_stepz", "3")
    assert done.returncode != 0
    assert "did you mean max_steps" in done.stderr


@pytest.mark.skipif(bool(machine.gpus()), reason="this machine has a GPU")
@pytest.mark.parametrize("name", NAMES)
def test_profile_full_is_refused_naming_the_need(name, tmp_path):
    """Where the notebook takes a model: the resolve cell refuses, before any download."""
    done = _papermill(name, tmp_path, "-p", "profile", "full")
    assert done.returncode != 0
    assert "EleutherAI/pythia-12b needs a GPU" in done.stderr
    assert "no NVIDIA GPU" in done.stderr
