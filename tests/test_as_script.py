"""The notebooks as scripts: `jupyter nbconvert --to script` makes files that Python runs, from any
folder, with parameters as papermill takes them.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import NOTEBOOKS, ROOT
from nbconvert import ScriptExporter

NAMES = sorted(path.stem for path in NOTEBOOKS.glob("[0-9]*.ipynb"))
RESOLVES = "settings = resolve(globals())"


@pytest.fixture(params=[False, True], ids=["with prompts", "no prompt"])
def script(request, tmp_path):
    """`script(name, replace={})` → the file that nbconvert writes, also with --no-prompt."""

    def write(name: str, replace: tuple[str, str] = ("", ""), only_resolve: bool = False):
        exporter = ScriptExporter(exclude_input_prompt=request.param)
        source, resources = exporter.from_filename(str(NOTEBOOKS / f"{name}.ipynb"))
        assert resources["output_extension"] == ".py"
        source = source.replace(*replace, 1)
        if only_resolve:
            before, line, _ = source.partition(RESOLVES)
            source = f"{before}{line}\nprint(settings.changed())"
        path = tmp_path / f"{name}.py"
        path.write_text(source, encoding="utf-8")
        return path

    return write


def python(*words, cwd, timeout=60):
    own = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": ""}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env=own,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.mark.fault(55)
@pytest.mark.parametrize("name", NAMES)
def test_every_notebook_becomes_a_script_that_takes_parameters(script, name, tmp_path):
    path = script(name)
    compile(path.read_text(encoding="utf-8"), path.name, "exec")
    path = script(name, only_resolve=True)
    for words, changed in ((), {}), (("-p", "seed", "3", "-p", "r", "None"), {"seed": 3}):
        done = python(path, *words, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines()[-1] == repr(changed)


@pytest.mark.fault(55)
@pytest.mark.fault(1)
@pytest.mark.parametrize("script", [True], ids=["no prompt"], indirect=True)
@pytest.mark.parametrize(
    ("replace", "words", "said"),
    [
        (("seed: Optional[int]", "sed: Optional[int]"), (), "unknown parameter 'sed'"),
        (("", ""), ("-p", "max_stepz", "4"), "unknown parameter 'max_stepz'"),
        (("", ""), ("-p", "seed", "-1"), "seed (seed of everything random)"),
        (("", ""), ("-p", "seed"), "not understood (got '-p')"),
        (("", ""), ("--seed", "4"), "not understood (got '--seed')"),
        (("", ""), ("-p", "seed", "4", "-p", "seed", "5"), "given twice"),
    ],
)
def test_a_scripts_refusal_is_one_sentence(script, replace, words, said, tmp_path):
    path = script("03_nf4_explained", replace, only_resolve=True)
    done = python(path, *words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.fault(55)
def test_own_variables_of_a_script_are_its_own(script, tmp_path):
    own = "DRIVE = '/x'\nfor i in range(2):\n    pass\n\n\nfrom typing import Optional\n"
    path = script("01_setup", ("from typing import Optional\n", own), only_resolve=True)
    path.write_text(path.read_text().replace(RESOLVES, f"late = 3\n\n{RESOLVES}"))
    done = python(path, cwd=tmp_path)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "{}"), done.stderr


def test_another_programs_arguments_are_not_the_scripts(script, tmp_path):
    """Run by a program of another name, as pytest or a debugger does it."""
    path = script("01_setup", only_resolve=True)
    program = "import runpy, sys; runpy.run_path(sys.argv[1])"
    done = python("-c", program, path, "--port", "7", cwd=tmp_path)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "{}"), done.stderr


def test_another_error_keeps_its_traceback(script, tmp_path):
    path = script("01_setup", (RESOLVES, f"{RESOLVES}\n1 / 0\n"))
    done = python(path, cwd=tmp_path)
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.slow
@pytest.mark.parametrize("script", [False], ids=["with prompts"], indirect=True)
@pytest.mark.parametrize(
    ("name", "words", "last"),
    [
        ("01_setup", (), "6.4 in 4 bit, 11.0 when fine-tuned"),
        (
            "06_finetune_pythia_12b",
            ("-p", "max_steps", "4", "-p", "eval_rows", "20", "-p", "output_dir", "runs here"),
            "status done",
        ),
    ],
)
def test_a_whole_notebook_runs_as_a_script_from_another_folder(script, name, words, last, tmp_path):
    done = python(script(name), *words, cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.rstrip().endswith(last)
    assert "Traceback" not in done.stderr
    if words:
        assert len(list((tmp_path / "runs here" / "tiny").glob("06_*/adapter"))) == 1
