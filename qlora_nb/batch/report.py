"""The report of a batch run: one static page that opens anywhere, years later, without a network.

The page is `report.html.j2`: no script, no style sheet from elsewhere, figures inside the file as
PNG. Jinja escapes everything that came out of a notebook: a model may have answered with HTML. Each
figure carries its alt text. Links are relative and lead to what lies beside the page: the executed
notebooks, and the folders of the runs that they made.
"""

import re
from contextlib import suppress
from pathlib import Path

import nbformat
from jinja2 import Environment, FileSystemLoader

from qlora_nb.record import runs

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)


_OF_A_RUN = ("", "train.py", "ask.py", "rows.jsonl", "adapter", "metrics.jsonl", "manifest.json")
"""What is linked of a run's folder, which comes first."""


def page(summary: dict, folder: Path) -> str:
    """The report as HTML text, from a sequence's summary, the executed notebooks in its folder and
    the folders of the runs that they made, which lie beside it.
    """
    sections = []
    metrics = {}
    for outcome in summary["notebooks"]:
        name = outcome["notebook"]
        notebook = nbformat.v4.new_notebook()
        with suppress(OSError, ValueError):  # it never started, or was cut off: its row says so
            notebook = nbformat.read(folder / f"{name}.ipynb", 4)
        links = [f"{name}.ipynb"]
        for manifest in sorted(folder.parent.glob(f"*/{runs.MANIFEST}")):
            record = runs.read_record(manifest)
            is_of_it = record.get("notebook") == name
            if is_of_it and str(record.get("started")) >= summary["started"]:
                links += [f"../{manifest.parent.name}/{file}" for file in _OF_A_RUN]
                metrics = record.get("metrics", metrics)
        section = {**outcome, "title": _title(notebook), "figures": figures(notebook)}
        section["links"] = [link for link in links if (folder / link).exists()]
        sections.append(section)
    template = _TEMPLATES.get_template("report.html.j2")
    return template.render(summary=summary, sections=sections, metrics=metrics)


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
