"""The report of a batch run: one static page that opens anywhere, years later, without a network.

The page is `report.html.j2`: no script, no style sheet from elsewhere, figures inside the file as
PNG. Jinja escapes everything that came out of a notebook: a model may have answered with HTML. Each
figure carries the text that stands under it in the notebook, for readers who cannot see it.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import nbformat
from jinja2 import Environment, FileSystemLoader

from qlora_nb.record import files

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write(summary: dict, folder: Path) -> None:
    """Write `report.html` into a sequence folder from its summary and the executed notebooks beside
    it.
    """
    files.write_atomically(folder / "report.html", page(summary, folder))


def page(summary: dict, folder: Path) -> str:
    """The report as HTML text."""
    notebooks = {
        outcome["notebook"]: _read(folder / f"{outcome['notebook']}.ipynb")
        for outcome in summary["notebooks"]
    }
    return _TEMPLATES.get_template("report.html.j2").render(
        summary=summary,
        titles={name: _title(notebook) for name, notebook in notebooks.items()},
        figures={name: list(figures(notebook)) for name, notebook in notebooks.items()},
    )


def figures(notebook: nbformat.NotebookNode) -> Iterator[tuple[str, str]]:
    """(base64 PNG, caption) of every figure; the caption is the first paragraph under the
    figure.
    """
    for cell, below in pairwise([*notebook.cells, nbformat.v4.new_markdown_cell()]):
        for output in cell.get("outputs", []):
            if png := output.get("data", {}).get("image/png"):
                yield (
                    "".join(png.split()),
                    _plain(below.source) if below.cell_type == "markdown" else "",
                )


def _read(path: Path) -> nbformat.NotebookNode:
    with suppress(OSError, ValueError):
        return nbformat.read(path, 4)
    return nbformat.v4.new_notebook()  # it never started, or was cut off: the row says so


def _title(notebook: nbformat.NotebookNode) -> str:
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    match = re.search(r"^# (.+)$", text, re.MULTILINE)
    return _plain(match[1]) if match else ""


def _plain(markdown: str) -> str:
    """The first paragraph without Markdown's marks; a heading is no caption."""
    paragraph = markdown.strip().split("\n\n")[0].replace("\n", " ")
    if match := re.match(r"\*Alt text: (.+?)\*", paragraph):  # as the notebooks write it
        return match[1]
    if paragraph.startswith(("#", "|", "<", "- ")):
        return ""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", paragraph)
    return re.sub(r"[*_`$]+(?=\S)|(?<=\S)[*`$]+", "", text)[:500]
