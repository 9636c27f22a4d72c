"""The report of a batch run: one static page that opens anywhere, years later, without a network.

The page is `report.html.j2`: no script, no style sheet from elsewhere, figures inside the file as
PNG. Jinja escapes everything that came out of a notebook: a model may have answered with HTML. Each
figure carries the text that stands under it in the notebook, for readers who cannot see it.
"""

import re
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import nbformat
from jinja2 import Environment, FileSystemLoader

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)


def page(summary: dict, folder: Path) -> str:
    """The report as HTML text, from a sequence's summary and the executed notebooks in its
    folder.
    """
    titles = {}
    pictures = {}
    for outcome in summary["notebooks"]:
        name = outcome["notebook"]
        notebook = nbformat.v4.new_notebook()
        with suppress(OSError, ValueError):  # it never started, or was cut off: its row says so
            notebook = nbformat.read(folder / f"{name}.ipynb", 4)
        titles[name] = _title(notebook)
        pictures[name] = figures(notebook)
    template = _TEMPLATES.get_template("report.html.j2")
    return template.render(summary=summary, titles=titles, figures=pictures)


def figures(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    """(base64 PNG, caption) of every figure; the caption is the first paragraph under the
    figure.
    """
    found = []
    for cell, below in pairwise([*notebook.cells, nbformat.v4.new_markdown_cell()]):
        caption = _plain(below.source) if below.cell_type == "markdown" else ""
        for output in cell.get("outputs", []):
            png = output.get("data", {}).get("image/png")
            if png:
                found.append(("".join(png.split()), caption))
    return found


def _title(notebook: nbformat.NotebookNode) -> str:
    for cell in notebook.cells:
        heading = re.search(r"^# (.+)$", cell.source, re.MULTILINE)
        if heading and cell.cell_type == "markdown":
            return _plain(heading[1])
    return ""


def _plain(markdown: str) -> str:
    """The first paragraph without Markdown's marks; a heading is no caption."""
    paragraph = markdown.strip().split("\n\n")[0].replace("\n", " ")
    alt_text = re.match(r"\*Alt text: (.+?)\*", paragraph)  # as the notebooks write it
    if alt_text:
        return alt_text[1]
    if paragraph.startswith(("#", "|", "<", "- ")):
        return ""
    without_links = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", paragraph)
    return re.sub(r"[*_`$]+(?=\S)|(?<=\S)[*`$]+", "", without_links)[:500]
