"""The build script: generated cells are fresh, noise is dropped, every rule of form can be broken
and is then named.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.metadata
import importlib.util
import io
import re
import shlex
import sys
import types
from pathlib import Path

import build_notebooks as build
import nbformat
import pandas
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from IPython.core.interactiveshell import InteractiveShell
from packaging.requirements import Requirement
from PIL import Image

NAMES = ["01_a", "02_b", "03_c"]
PARAMETERS = 'from typing import Optional\nprofile: str = "tiny"  # the world\nr: Optional[int] = None  # LoRA rank'


def good() -> nbformat.NotebookNode:
    """A notebook as it is after a build."""

    def code(source, *tags):
        return nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)} if tags else {})

    text = nbformat.v4.new_markdown_cell
    cells = [
        text("# A"),
        code(PARAMETERS, "parameters"),
        text("then"),
        code("x = 1"),
        text("so"),
        code("x", "key-results"),
    ]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=build.KERNEL)
    build.put_generated_cells(notebook, "02_b", NAMES)
    for n, cell in enumerate((c for c in notebook.cells if c.cell_type == "code"), 1):
        cell.execution_count = n
    return notebook


def problems(notebook, tmp_path) -> list[str]:
    path = tmp_path / "02_b.ipynb"
    nbformat.write(notebook, path)
    return build.format_problems(path, NAMES)


def test_a_built_notebook_has_no_problem(tmp_path):
    assert problems(good(), tmp_path) == []


def _edit(change):
    notebook = good()
    change(notebook)
    return notebook


def _add_error(nb):
    nb.cells[-2].outputs = [nbformat.v4.new_output("error", ename="KitError", evalue="bad")]


def picture(alt: str) -> nbformat.NotebookNode:
    """A figure as a kernel gives it."""
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG")
    shown = {"image/png": base64.b64encode(buffer.getvalue()).decode()}
    shown |= {"text/html": "<img>", "text/plain": alt}
    about = {"image/png": {"alt": alt, "width": 2}}
    return nbformat.v4.new_output("display_data", data=shown, metadata=about)


def test_a_committed_figure_is_a_png_with_its_alt_text():
    kept = build._normal_output(picture("a line"))
    assert list(kept.data) == ["image/png"]
    assert kept.metadata == {"image/png": {"alt": "a line"}}
    nbformat.validate(_edit(lambda nb: nb.cells[5].update(outputs=[kept])))


BREAKS = {
    "not fresh": lambda nb: nb.cells.pop(),
    "guard, navigation": lambda nb: nb.cells[0].update(source="pip install -U torch"),
    "key-results tag not fresh": lambda nb: nb.cells[-2].metadata.update(tags=["key-results"]),
    "or key-results tag": lambda nb: nb.cells[-2].metadata.pop("jupyter"),
    "widget state": lambda nb: nb.metadata.update(widgets={}),
    "execution counts": lambda nb: nb.cells[3].update(execution_count=None),
    "0 cells tagged key-results": lambda nb: nb.cells[-2].metadata.update(tags=[]),
    "0 cells tagged parameters": lambda nb: nb.cells[3].metadata.update(tags=[]),
    "without type or comment": lambda nb: nb.cells[3].update(
        source="profile = 'tiny'  # the world"
    ),
    "write Optional": lambda nb: nb.cells[3].update(source="r: int | None = None  # LoRA rank"),
    "9 parameters, at most 8": lambda nb: nb.cells[3].update(
        source="\n".join(f"p{i}: int = 1  # one" for i in range(9))
    ),
    "has 26 lines": lambda nb: nb.cells[5].update(source="x = 1\n" * 26),
    "median of 6": lambda nb: [
        c.update(source=c.source + "\nx = 1" * 5) for c in nb.cells if c.cell_type == "code"
    ],
    "code cells in a row": lambda nb: [nb.cells.pop(4), nb.cells.pop(5)],
    "not the last cell before": lambda nb: nb.cells.insert(-1, nb.cells.pop(2)),
    "figure without alt text": lambda nb: nb.cells[5].update(outputs=[picture(alt="")]),
    "KiB, at most 400": lambda nb: nb.cells[-3].update(source="x" * 420_000),
    "path of this machine": lambda nb: nb.cells[-3].update(source=str(build.ROOT)),
    "bad": _add_error,
}


@pytest.mark.parametrize("words", BREAKS)
def test_each_rule_can_be_broken(words, tmp_path):
    found = problems(_edit(BREAKS[words]), tmp_path)
    assert any(words in p for p in found), found


@pytest.mark.parametrize(
    "line",
    [
        "tokenizing:  16%|█▋        | 8484/51734 [00:02<00:10, 4192.63 examples/s]",
        "tokenizing: 100%|██████████| 60/60 [1:00:04<00:00,  1.00row/s]",
        "Generating train split: 100 examples [00:03, 33.1 examples/s]",
        "\rdownloading:   0%|          | 0.00/93.0M [00:00<?, ?B/s]",
    ],
)
def test_a_progress_bar_is_noise_and_a_table_is_not(line):
    assert build._NOISE.search(line)
    for kept in (
        "held-out loss 2.1 [nats], 16 % of rows",
        "x[0], y[12]",
        "exact match 95 % | 3 seeds",
    ):
        assert not build._NOISE.search(kept)


def test_navigation_and_refreshing():
    notebook = good()
    bar = notebook.cells[1].source
    assert bar == notebook.cells[-1].source
    assert "[← 01 a](01_a.ipynb)" in bar
    assert "**[02](02_b.ipynb)**" in bar
    assert "[03 c →](03_c.ipynb)" in bar
    before = nbformat.writes(notebook)
    build.put_generated_cells(notebook, "02_b", NAMES)
    assert nbformat.writes(notebook) == before, "building twice changes nothing"
    assert "←" not in build.nav_source("01_a", NAMES)
    assert "→" not in build.nav_source("03_c", NAMES)


def test_without_an_address_there_is_no_badge(monkeypatch):
    monkeypatch.setattr(build, "repository", lambda: ("", "0.1.0"))
    assert "http" not in build.nav_source("01_a", NAMES) + build.guard_source()
    assert "git+" not in build.guard_source()


def test_with_an_address_badges_and_install_line_are_made_from_it(monkeypatch):
    monkeypatch.setattr(build, "repository", lambda: ("https://github.com/o/r", "0.1.0"))
    bar, guard = build.nav_source("02_b", NAMES), build.guard_source()
    assert "https://colab.research.google.com/github/o/r/blob/v0.1.0/notebooks/02_b.ipynb" in bar
    assert "https://mybinder.org/v2/gh/o/r/v0.1.0?urlpath=lab/tree/notebooks/02_b.ipynb" in bar
    assert "git+https://github.com/o/r@v0.1.0" in guard
    assert "%pip install" in guard
    assert "-U" not in guard
    assert "--upgrade" not in guard
    assert all(name in guard for name in ("torch", "numpy", "ipywidgets")), (
        "held at Colab's versions"
    )


def test_the_guard_does_nothing_here(monkeypatch, capsys):
    before = set(globals())
    scope: dict = {}
    exec(TransformerManager().transform_cell(build.guard_source()), scope)
    assert capsys.readouterr().out == ""
    # resolve refuses plain values that are no parameter, so the guard may leave none
    assert not [
        k
        for k, v in scope.items()
        if not k.startswith("_") and isinstance(v, (str, int, float, list, dict, tuple))
    ]
    assert set(globals()) == before


class Colab:
    """The guard's very text, executed by an IPython shell in which `google.colab` is loaded and
    `%pip` writes down what it was asked to do.
    """

    def __init__(self, monkeypatch, folder: Path):
        self.asked: list[str] = []
        self.here = folder / "content"
        self.drive = folder / "MyDrive"
        self.here.mkdir()
        self.kit_is_there = False
        monkeypatch.chdir(self.here)
        monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
        found = importlib.util.find_spec

        def find_spec(name, *more):
            hidden = name == "qlora_nb" and not self.kit_is_there
            return None if hidden else found(name, *more)

        monkeypatch.setattr(importlib.util, "find_spec", find_spec)

    def run(self) -> BaseException | None:
        """What the cell raised, if anything."""
        source = build.guard_source()
        assert len(source.splitlines()) <= 25
        mounted = "/content/drive/MyDrive"
        if not build.repository()[0]:
            assert source.count(mounted) == 1
        shell = InteractiveShell()
        shell.register_magic_function(self.asked.append, "line", "pip")
        with contextlib.redirect_stdout(io.StringIO()):
            done = shell.run_cell(source.replace(mounted, str(self.drive)))
        left = set(shell.user_ns_hidden.keys() ^ shell.user_ns.keys())
        self.left = sorted(name for name in left if not name.startswith("_"))
        return done.error_before_exec or done.error_in_exec


@pytest.fixture
def colab(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "repository", lambda: ("", "0.1.0"))
    return Colab(monkeypatch, tmp_path)


def wheel(folder: Path, version: str) -> str:
    """The path of a file that is called as the kit's wheel is."""
    folder.mkdir(exist_ok=True)
    path = folder / f"qlora_nb-{version}-py3-none-any.whl"
    path.touch()
    return str(path)


def asked_for(what: str) -> list[str]:
    return ["install", "-q", "-c", "/tmp/keep.txt", what]


def test_in_colab_the_guard_installs_from_the_address_and_holds_what_runs(colab, monkeypatch):
    monkeypatch.setattr(build, "repository", lambda: ("https://github.com/o/r", "0.1.0"))
    wheel(colab.here, "9.0")  # the address comes first
    assert colab.run() is None
    (asked,) = colab.asked
    assert shlex.split(asked) == asked_for("qlora-nb @ git+https://github.com/o/r@v0.1.0")
    held = Path("/tmp/keep.txt").read_text().splitlines()
    assert held == [
        f"{name}=={importlib.metadata.version(name)}" for name in ("torch", "numpy", "ipywidgets")
    ]
    for line in held:
        assert Requirement(line)


def test_in_colab_the_newest_wheel_is_installed(colab):
    """By its version, not by its name: 0.10 is newer than 0.9. What a browser calls "(1)" pip would
    refuse.
    """
    wheel(colab.here, "0.9")
    newest = wheel(colab.here, "0.10.0")
    (colab.here / "qlora_nb-0.11.0-py3-none-any (1).whl").touch()
    (colab.here / "other-9.0-py3-none-any.whl").touch()
    assert colab.run() is None
    (asked,) = colab.asked
    assert shlex.split(asked) == asked_for(newest)


def test_in_colab_a_wheel_in_a_mounted_drive_is_installed(colab):
    in_drive = wheel(colab.drive, "0.2.0")
    assert colab.run() is None
    wheel(colab.here, "0.1.0")
    assert colab.run() is None
    assert [shlex.split(asked) for asked in colab.asked] == [asked_for(in_drive)] * 2


def test_in_colab_without_anything_the_guard_says_which_file_to_upload(colab):
    error = colab.run()
    assert colab.asked == []
    assert isinstance(error, FileNotFoundError)  # and Run all stops here
    assert "Upload qlora_nb-….whl into this folder" in str(error)
    assert "make dist" in str(error)
    assert str(error).count(". ") == 1


def test_in_colab_the_guard_installs_once(colab):
    wheel(colab.here, "0.2.0")
    colab.kit_is_there = True
    assert colab.run() is None
    assert colab.asked == []


def test_in_colab_the_guard_leaves_no_plain_value(colab):
    """`resolve` would refuse a plain value that is no parameter."""
    wheel(colab.here, "0.2.0")
    assert colab.run() is None
    assert set(colab.left) <= {"sys", "find_spec", "version", "Path", "parse_wheel_filename"}
    assert "find_spec" in colab.left


def test_notebook_01_says_restart_when_an_install_changed_what_is_loaded(root, monkeypatch, capsys):
    """After an install into a running session the old module is still loaded: the very cell of
    notebook 01 names it.
    """
    import numpy

    from qlora_nb import machine

    notebook = nbformat.read(root / "notebooks" / "01_setup.ipynb", 4)
    (source,) = [
        c.source for c in notebook.cells if c.cell_type == "code" and "if v.problem]" in c.source
    ]
    exec(source, {"machine": machine})
    assert "packages are in their ranges" in capsys.readouterr().out
    monkeypatch.setattr(numpy, "__version__", "1.99.0")
    exec(source, {"machine": machine})
    said = capsys.readouterr().out
    assert "numpy: 1.99.0 is loaded but" in said
    assert "Colab: restart the runtime" in said


@pytest.mark.slow
def test_build_check_and_drift(tmp_path, capsys):
    notebook = good()
    bar = " 10%|#  | 1/9 [00:01<00:02,  9.0it/s]"
    noisy = f"import sys\nfrom pathlib import Path\nprint(Path.cwd(), object())\nprint({bar!r}, file=sys.stderr)"
    notebook.cells[5].source = noisy
    notebook.cells[-2].source = "{'answer': 42}"
    notebook.cells[5].metadata = nbformat.from_dict(
        {"papermill": {"duration": 1}, "execution": {"a": "b"}}
    )
    path = tmp_path / "02_b.ipynb"
    nbformat.write(notebook, path)
    folder = ["--folder", str(tmp_path)]
    assert build.main(folder) == 0, capsys.readouterr().out
    built = nbformat.read(path, 4)
    assert [o.text for o in built.cells[5].outputs] == [". <object object at 0x…>\n"]
    assert dict(built.cells[5].metadata) == {}
    assert build.main([*folder, "--check"]) == 0, capsys.readouterr().out
    assert build.main([*folder, "--check-format"]) == 0
    # a committed answer that is not the one the code gives
    path.write_text(path.read_text().replace("{'answer': 42}", "{'answer': 43}", 1))
    was = path.read_text()
    assert build.main([*folder, "--check"]) == 1
    assert path.read_text() == was, "--check writes nothing"
    assert "key results differ" in capsys.readouterr().out
    path.write_text(was.replace("print(Path.cwd(), object())", "raise ValueError('oh')", 1))
    assert build.main(folder) == 1
    assert "ValueError: oh" in capsys.readouterr().out


def test_a_styled_table_is_the_same_in_every_build():
    """pandas draws a new name for it each time; two tables in a notebook keep two names."""

    def shown(number):
        return build._normal_output(
            nbformat.v4.new_output(
                "display_data",
                data={"text/html": pandas.DataFrame({"a": [number]}).style.to_html()},
            )
        )["data"]["text/html"]

    assert shown(1) == shown(1)
    assert re.search(r"T_\w{5}", shown(1))[0] != re.search(r"T_\w{5}", shown(2))[0]
