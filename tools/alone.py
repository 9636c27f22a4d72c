"""The check `opened_alone` of `make verify`: a notebook that somebody was sent by mail, or opened
in Colab, has nothing beside it. Everything it shows must come out of the installed wheel.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import build_notebooks
import build_wheel
import hosts
import nbformat

from qlora_nb.batch import one_notebook

ROOT = Path(__file__).resolve().parent.parent


def opened_alone() -> dict:
    """Each notebook copied alone into an empty folder and run with the installed wheel: the same
    key results and as many figures as the committed ones.
    """
    outcomes = {}
    with tempfile.TemporaryDirectory(prefix="alone-") as name:
        folder = Path(name)
        wheel = build_wheel.build(folder / "dist")
        python = environment_with(wheel, folder / "venv")
        for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
            place = folder / path.stem
            outcomes[path.stem] = run_alone(path, place, python)
        used = hosts.call([python, "-c", "import qlora_nb; print(qlora_nb.__file__)"], cwd=folder)
        from_wheel = used.stdout.startswith(str(folder / "venv"))
    return {
        "passed": from_wheel and all(not found["problems"] for found in outcomes.values()),
        "wheel": wheel.name,
        "the wheel's package is the one that ran": from_wheel,
        "dependencies": "those of the environment of make verify, by a .pth file",
        "notebooks": outcomes,
    }


def environment_with(wheel: Path, folder: Path) -> Path:
    """Make an empty virtual environment, install the wheel, and nothing of the repository; returns
    its Python. What the wheel depends on lies where this Python has it: gigabytes are not copied.
    """
    hosts.must([sys.executable, "-m", "venv", "--without-pip", folder])
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    # a copy of the kit on this Python's path is no reason to leave the wheel out
    hosts.must([*install, "--no-deps", "--ignore-installed", wheel])
    [packages] = folder.glob("lib/python*/site-packages")
    # .pth files that lie there, as that of an editable install, are not read along
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run_alone(path: Path, place: Path, python: Path) -> dict:
    """Run one notebook in a folder of its own, with a home of its own; seconds and problems."""
    home = place / "home"
    home.mkdir(parents=True)
    shutil.copy(path, place)
    programs = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    env = {"HOME": str(home), "PATH": programs, "HF_HUB_OFFLINE": "1"}
    for kind in ("CONFIG", "DATA", "RUNTIME"):
        env[f"JUPYTER_{kind}_DIR"] = str(home / kind)
    env["IPYTHONDIR"] = str(home / "ipython")
    started = time.time()
    command = [python, "-m", "papermill", path.name, "out.ipynb", "--log-level", "ERROR"]
    done = hosts.call([*command, "--no-progress-bar"], cwd=place, env=env)
    problems = differences(nbformat.read(path, 4), place / "out.ipynb")
    if done.returncode:
        problems.append(f"papermill ended with {done.returncode}: {done.stderr[-300:]}")
    return {"seconds": round(time.time() - started, 1), "problems": problems}


def differences(committed: nbformat.NotebookNode, executed: Path) -> list[str]:
    """What a notebook that was run alone lacks beside the committed one."""
    if not executed.is_file():
        return ["it was not executed"]
    notebook = nbformat.read(executed, 4)
    problems = one_notebook.stored_errors(notebook)
    notebook.metadata.pop("widgets", None)
    notebook.cells = [cell for cell in notebook.cells if not _is_papermills(cell)]
    before = build_notebooks.key_results_of(committed)
    after = build_notebooks.key_results_of(notebook)
    if before != after:
        problems.append(f"key results: committed {before}, alone {after}")
    figures = [n_figures(committed), n_figures(notebook)]
    if figures[0] != figures[1]:
        problems.append(f"{figures[1]} figures, committed are {figures[0]}")
    return problems


def _is_papermills(cell: nbformat.NotebookNode) -> bool:
    return not {"injected-parameters", "papermill-error-cell-tag"}.isdisjoint(
        build_notebooks.tags(cell)
    )


def n_figures(notebook: nbformat.NotebookNode) -> int:
    """How many outputs are pictures."""
    return sum(
        "image/png" in output.get("data", {})
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    )
