"""Build the committed notebooks: generated cells, a clean execution, and a normal form that changes
only when the content does.

    python tools/build_notebooks.py                  execute in profile tiny and write in place
    python tools/build_notebooks.py --check          execute, compare with what is committed, write
    nothing python tools/build_notebooks.py --check-format   execute nothing: form, budget and
    generated cells only python tools/build_notebooks.py --only 03,04     only these

Why outputs are committed at all: GitHub shows them to readers, and nbval compares only cells that
have an execution count, so a stripped notebook would pass every check by having nothing to check.
Widget state and papermill's notes are dropped: they change with every run and break GitHub's view.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import os
import re
import statistics
import sys
import tempfile
import tomllib
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
MAX_BYTES = 400 * 1024
MAX_LINES, MEDIAN_LINES, CODE_CELLS_IN_A_ROW = 25, 5, 2
PARAMETER_LINES = {"06": 24, "07": 24}  # the others: 8
WIDGET = "application/vnd.jupyter.widget-view+json"
KERNEL = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    # nbconvert asks these which kind of script a notebook becomes
    "language_info": {
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "name": "python",
        "nbconvert_exporter": "python",
    },
}
_PARAMETER = re.compile(r"^[a-z_]\w*: (?P<type>[\w\[\], |]+) = (?P<default>[^#]+?)  # \S.*$")
_BAR = (
    r"\r|\d+%\||\[(\d+:)?\d\d:\d\d[<,]"  # a progress bar, which shows how long a thing took today
)
_NOISE = re.compile(f"gemm_4bit_forward from kernels|{_BAR}")
_TIME_OF_DAY = re.compile(r"\b\d{1,2}:\d{2}:\d{2}\b")


def repository() -> tuple[str, str]:
    """(address, version) from pyproject.toml; the address is empty while it is not set there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project.get("urls", {}).get("Repository", "").removesuffix(".git").rstrip("/"), project[
        "version"
    ]


# ---- generated cells
# -------------------------------------------------------------------------------------------------


HELD = """    # What Colab has stays as it is: a running session does not survive another torch.
    _held = [f"{name}=={version(name)}\\n" for name in ("torch", "numpy", "ipywidgets")]
    Path("/tmp/keep.txt").write_text("".join(_held))
"""

FROM_A_WHEEL = """    from packaging.utils import parse_wheel_filename

    def _release(wheel):
        return parse_wheel_filename(wheel.name)[1]

    _places = [Path.cwd(), Path("/content/drive/MyDrive")]
    _wheels = [wheel for place in _places for wheel in place.glob("qlora_nb-*-any.whl")]
    if not _wheels:
        raise FileNotFoundError(
            "Upload qlora_nb-….whl into this folder (Files, on the left) or into your Drive, "
            "and run this cell again. `make dist` in the kit's repository makes that file."
        )
    _wheel = max(_wheels, key=_release)
"""


def guard_source() -> str:
    """The first cell: in Colab it installs the kit if it is missing, from the repository if its
    address is set, else from the newest wheel that was uploaded. It does nothing elsewhere.
    """
    address, version = repository()
    imports = "    from importlib.metadata import version\n    from pathlib import Path\n\n"
    if address:
        find, what = "", f"qlora-nb @ git+{address}@v{version}"
    else:
        find, what = FROM_A_WHEEL, "{_wheel}"
    return f"""\
# In Colab this installs the kit if it is missing there; anywhere else it does nothing.
import sys
from importlib.util import find_spec

if "google.colab" in sys.modules and find_spec("qlora_nb") is None:
{imports}{find}{HELD}    %pip install -q -c /tmp/keep.txt "{what}\""""


def nav_source(current: str, names: list[str]) -> str:
    """Links to the start page, to the notebooks before and after this one and to all of them; plain
    links, so opening asks no other host.
    """
    i = names.index(current)
    every = " · ".join(
        f"**[{n[:2]}]({n}.ipynb)**" if n == current else f"[{n[:2]}]({n}.ipynb)" for n in names
    )
    before = f"[← {_spoken(names[i - 1])}]({names[i - 1]}.ipynb) · " if i else ""
    after = f" · [{_spoken(names[i + 1])} →]({names[i + 1]}.ipynb)" if i + 1 < len(names) else ""
    line = f"[start](start.md) · {before}{every}{after}"
    address, version = repository()
    match = re.fullmatch(r"https://github\.com/([^/]+/[^/]+)", address)
    if match:
        colab = f"https://colab.research.google.com/github/{match[1]}/blob/v{version}/notebooks/{current}.ipynb"
        binder = f"https://mybinder.org/v2/gh/{match[1]}/v{version}?urlpath=lab/tree/notebooks/{current}.ipynb"
        line += f" · [open in Colab]({colab}) · [open in Binder]({binder})"
    return line


def _spoken(name: str) -> str:
    return name.replace("_", " ")


def put_generated_cells(notebook: nbformat.NotebookNode, name: str, names: list[str]) -> None:
    """Insert or refresh the guard and the two navigation bars; nbval finds the key results by a
    tag, and their input is hidden.
    """
    own = {"colab-guard", "nav"}
    cells = [c for c in notebook.cells if not own & set(tags(c))]
    old_guard = next((c for c in notebook.cells if "colab-guard" in tags(c)), None)
    guard = nbformat.v4.new_code_cell(
        guard_source(),
        id="colab-guard",
        metadata={"tags": ["colab-guard"], "jupyter": {"source_hidden": True}},
    )
    if old_guard is not None:
        guard.execution_count, guard.outputs = old_guard.execution_count, old_guard.outputs
    top, bottom = (
        nbformat.v4.new_markdown_cell(
            nav_source(name, names), id=f"nav-{where}", metadata={"tags": ["nav"]}
        )
        for where in ("top", "bottom")
    )
    for cell in cells:
        if "key-results" in tags(cell):
            cell.metadata["tags"] = sorted({*tags(cell), "nbval-check-output"})
            cell.metadata["jupyter"] = {"source_hidden": True}
    notebook.cells = [guard, top, *cells, bottom]


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.get("metadata", {}).get("tags", [])


# ---- execution and normal form
# ---------------------------------------------------------------------------------------


def execute(notebook: nbformat.NotebookNode) -> list[str]:
    """Run all cells in a new kernel, in the repository's root as the batch run does; returns the
    errors found.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    from qlora_nb.batch import one_notebook

    with tempfile.TemporaryDirectory() as folder:
        os.environ["QLORA_NB_RESULTS"] = f"{folder}/results.json"
        client = NotebookClient(
            notebook,
            kernel_name="python3",
            timeout=1800,
            resources={"metadata": {"path": str(ROOT)}},
            coalesce_streams=True,
        )
        try:
            client.execute()
        except CellExecutionError:
            return one_notebook.stored_errors(notebook)
        finally:
            del os.environ["QLORA_NB_RESULTS"]
    return one_notebook.stored_errors(notebook)


def normalize(notebook: nbformat.NotebookNode) -> list[str]:
    """Drop what changes from run to run; returns warnings about what is left of that kind."""
    warnings = []
    notebook.metadata = nbformat.from_dict(KERNEL)
    for i, cell in enumerate(notebook.cells):
        kept = {
            k: v for k, v in cell.metadata.items() if k in ("tags", "jupyter", "collapsed") and v
        }
        cell.metadata = nbformat.from_dict(kept)
        if cell.cell_type != "code":
            continue
        cell.outputs = [o for o in map(_normal_output, cell.outputs) if o is not None]
        for output in cell.outputs:
            text = _text(output)
            if output.output_type == "stream" and output.name == "stderr":
                warnings.append(f"cell {i}: stderr: {text.strip()[:150]}")
            if _TIME_OF_DAY.search(text):
                warnings.append(f"cell {i}: a time of day: {_TIME_OF_DAY.search(text)[0]}")
    return warnings


def _normal_output(output: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    if WIDGET in output.get("data", {}):
        return None  # lives only with a kernel; its static twin stands beside it
    if output.output_type == "stream":
        lines = output.text.split("\n")
        if output.name == "stderr":
            lines = [line for line in lines if not _NOISE.search(line)]
        output.text = _without_machine("\n".join(lines))
        return output if output.text.strip() else None
    for kind in ("text/plain", "text/html", "text/markdown"):
        if kind in output.get("data", {}):
            output.data[kind] = _without_machine(_lasting_id(output.data[kind]))
    if "image/png" in output.get("data", {}):
        alt = output.metadata.get("image/png", {}).get("alt", "")
        output.data = {"image/png": _smaller_png(output.data["image/png"])}
        output.metadata = nbformat.from_dict({"image/png": {"alt": alt}})
    return output


def _lasting_id(text: str) -> str:
    """pandas names a styled table at random: here after what it holds."""
    if drawn := re.search(r"\bT_[0-9a-f]{5}\b", text):
        return text.replace(
            drawn[0], "T_" + hashlib.sha256(text.replace(drawn[0], "").encode()).hexdigest()[:5]
        )
    return text


def _smaller_png(text: str) -> str:
    """The same picture with a palette of 256 colours, about a third of the bytes; drawings do not
    show the difference.
    """
    from PIL import Image

    picture = Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")
    buffer = io.BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    smaller = base64.b64encode(buffer.getvalue()).decode()
    return smaller if len(smaller) < len(text) else text


def _without_machine(text: str) -> str:
    """No folder of this machine, no time stamp of a run, no memory address."""
    text = text.replace(str(ROOT), ".").replace(str(Path.home()), "~")
    text = re.sub(re.escape(tempfile.gettempdir()) + r"/[\w.-]+", "(temporary)", text)
    text = re.sub(r"\b20\d{6}-\d{6}(-\d+)?\b", "(time)", text)
    return re.sub(r"\b0x[0-9a-f]{8,}\b", "0x…", text)


def _text(output: nbformat.NotebookNode) -> str:
    return output.get("text", "") or output.get("data", {}).get("text/plain", "")


def structure(notebook: nbformat.NotebookNode) -> list[tuple]:
    """What must not drift: cells, their sources, the kinds of their outputs."""

    def kinds(cell) -> list[str]:
        found = set()
        for output in cell.get("outputs", []):
            found |= set(output.get("data", {"stream": 0}))
        return sorted(found)

    return [(c.cell_type, c.id, c.source, kinds(c)) for c in notebook.cells]


def key_results_of(notebook: nbformat.NotebookNode) -> list[str]:
    """The printed key results, the part that nbval compares."""
    return [
        "".join(_text(o) for o in c.outputs) for c in notebook.cells if "key-results" in tags(c)
    ]


def drift(committed: nbformat.NotebookNode, fresh: nbformat.NotebookNode) -> list[str]:
    """Differences in key results and structure, empty if there are none."""
    found = []
    if key_results_of(committed) != key_results_of(fresh):
        found.append(
            f"key results differ:\n  committed {key_results_of(committed)}\n"
            f"  now       {key_results_of(fresh)}"
        )
    before, after = structure(committed), structure(fresh)
    if len(before) != len(after):
        found.append(f"{len(before)} cells committed, {len(after)} now")
    found += [f"cell {i} ({a[1]}) differs" for i, (a, b) in enumerate(zip(before, after)) if a != b]
    return found


# ---- form ----------------------------------------------------------------------------------------


def format_problems(path: Path, names: list[str]) -> list[str]:
    """Everything about a committed notebook that can be judged without running it."""
    from qlora_nb.batch import one_notebook

    notebook = nbformat.read(path, 4)
    problems = one_notebook.stored_errors(notebook)
    expected = nbformat.from_dict(notebook)
    put_generated_cells(expected, path.stem, names)

    def shape(nb) -> list[tuple]:
        return [(c.cell_type, c.source, tags(c), c.metadata.get("jupyter")) for c in nb.cells]

    if shape(notebook) != shape(expected):
        problems.append("guard, navigation or key-results tag not fresh: build it again")
    if "widgets" in notebook.metadata or "papermill" in notebook.metadata:
        problems.append("widget state or papermill metadata is stored")
    code = [c for c in notebook.cells if c.cell_type == "code"]
    counts = [c.execution_count for c in code]
    if counts != list(range(1, len(code) + 1)):
        problems.append(f"execution counts are not 1 to {len(code)}: not from a clean run")
    problems += _tag_problems(notebook, PARAMETER_LINES.get(path.stem[:2], 8))
    pictures = [o for c in code for o in c.outputs if "image/png" in o.get("data", {})]
    if not all(o.metadata.get("image/png", {}).get("alt") for o in pictures):
        problems.append("a figure without alt text")
    problems += _budget_problems(notebook)
    if path.stat().st_size > MAX_BYTES:
        problems.append(f"{path.stat().st_size // 1024} KiB, at most {MAX_BYTES // 1024}")
    leaks = [
        word
        for word in (str(ROOT), str(Path.home()) + "/")
        if word in path.read_text(encoding="utf-8")
    ]
    return problems + [f"a path of this machine is stored: {word}" for word in leaks]


def _tag_problems(notebook: nbformat.NotebookNode, parameter_lines: int) -> list[str]:
    problems = []
    for tag in ("parameters", "key-results"):
        n = sum(tag in tags(c) for c in notebook.cells)
        if n != 1:
            problems.append(f"{n} cells tagged {tag}, one is needed")
    if "key-results" not in tags(notebook.cells[-2]):
        problems.append("the key results are not the last cell before the navigation")
    for cell in notebook.cells:
        if "parameters" in tags(cell):
            problems += _parameter_problems(cell.source, parameter_lines)
    return problems


def _parameter_problems(source: str, limit: int) -> list[str]:
    lines = [
        line
        for line in source.splitlines()
        if line.strip() and not line.startswith(("#", "from typing import"))
    ]
    problems = [f"{len(lines)} parameters, at most {limit}"] if len(lines) > limit else []
    for line in lines:
        match = _PARAMETER.match(line)
        if not match:
            problems.append(f"parameter without type or comment: {line!r}")
        elif "|" in match["type"]:
            problems.append(f"papermill hides a type with '|', write Optional[…]: {line!r}")
    return problems


def _budget_problems(notebook: nbformat.NotebookNode) -> list[str]:
    counted = [c for c in notebook.cells if c.cell_type == "code" and "colab-guard" not in tags(c)]
    lengths = [
        sum(bool(x.strip()) and not x.strip().startswith("#") for x in c.source.splitlines())
        for c in counted
    ]
    problems = []
    if lengths and statistics.median(lengths) > MEDIAN_LINES:
        problems.append(
            f"code cells have a median of {statistics.median(lengths):g} lines, "
            f"at most {MEDIAN_LINES}"
        )
    problems += [
        f"cell {c.id} has {n} lines of code, at most {MAX_LINES}"
        for c, n in zip(counted, lengths)
        if n > MAX_LINES
    ]
    row = 0
    for cell in notebook.cells:
        row = row + 1 if cell.cell_type == "code" else 0
        if row == CODE_CELLS_IN_A_ROW + 1:
            problems.append(
                f"more than {CODE_CELLS_IN_A_ROW} code cells in a row, up to cell {cell.id}"
            )
    return problems


# ---- command -------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="execute and compare, write nothing")
    parser.add_argument("--check-format", action="store_true", help="execute nothing")
    parser.add_argument("--only", default="", help="beginnings of names, as 03,04")
    parser.add_argument("--folder", type=Path, default=NOTEBOOKS, help="the notebooks' folder")
    options = parser.parse_args(arguments)
    starts = tuple(s.strip() for s in options.only.split(",") if s.strip()) or ("",)
    every = sorted(options.folder.glob("[0-9]*.ipynb"))
    names, bad = [p.stem for p in every], 0
    for path in (p for p in every if p.stem.startswith(starts)):
        problems = (
            format_problems(path, names)
            if options.check_format
            else _build(path, names, write=not options.check)
        )
        bad += bool(problems)
        print(
            f"{path.stem}: {'ok' if not problems else ''}",
            *problems,
            sep="\n  " if problems else "",
        )
    return 1 if bad else 0


def _build(path: Path, names: list[str], write: bool) -> list[str]:
    committed = nbformat.read(path, 4)
    fresh = nbformat.from_dict(committed)
    put_generated_cells(fresh, path.stem, names)
    errors = execute(fresh)
    if errors:
        return errors
    for warning in normalize(fresh):
        print(f"{path.stem}: warning: {warning}")
    if not write:
        return drift(committed, fresh)
    temporary = path.with_suffix(".tmp")
    nbformat.write(fresh, temporary)
    os.replace(temporary, path)
    return format_problems(path, names)


if __name__ == "__main__":
    sys.exit(main())
