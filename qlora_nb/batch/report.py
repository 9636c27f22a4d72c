"""The report of a batch run: one static page that opens anywhere, years later, without a network.

The page is `report.html.j2`: no script, no style sheet from elsewhere, figures inside the file as
PNG. Jinja escapes everything that came out of a notebook: a model may have answered with HTML. Each
figure carries its alt text.
"""

import re
from contextlib import suppress
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
    """(base64 PNG, alt text) of every figure."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            png = output.get("data", {}).get("image/png")
            if png:
                described = output.metadata.get("image/png", {})
                found.append(("".join(png.split()), described.get("alt", "")))
    return found


def _title(notebook: nbformat.NotebookNode) -> str:
    """The notebook's first heading."""
    for cell in notebook.cells:
        heading = re.search(r"^# (.+)$", cell.source, re.MULTILINE)
        if heading and cell.cell_type == "markdown":
            return heading[1]
    return ""
