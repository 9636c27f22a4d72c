"""The report of a batch run: one static page that opens anywhere, years later, without a network.

No script, no style sheet from elsewhere, figures inside the file as PNG. Everything that came out of a notebook is escaped:
a model may have answered with HTML. Each figure carries the text that stands under it in the notebook, for readers who
cannot see it.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat

from qlora_nb.engine.runs import write_atomically

_STYLE = """
:root { color-scheme: light dark; --line: #c8c8c8; --quiet: #555; --good: #00694c; --bad: #a33c00; }
@media (prefers-color-scheme: dark) { :root { --line: #4a4a4a; --quiet: #b0b0b0; --good: #4fd0a5; --bad: #ff9a5c; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; min-width: 44rem; table-layout: fixed; }
col.name { width: 29%; } col.status { width: 6rem; } col.time { width: 4.5rem; } col.memory { width: 6.5rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem; border-bottom: 1px solid var(--line); }
td.n { text-align: right; white-space: nowrap; }
dl { display: grid; grid-template-columns: 3fr 2fr; gap: 0 .8rem; margin: 0; font-size: .85rem; }
dt { color: var(--quiet); overflow-wrap: anywhere; } dd { margin: 0; overflow-wrap: anywhere; }
.done, .bad { color: var(--good); font-weight: 600; overflow-wrap: anywhere; } .bad { color: var(--bad); }
.quiet, figcaption { color: var(--quiet); font-size: .9rem; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; background: #fff; }
"""


def write(summary: dict, folder: Path) -> Path:
    """Write `report.html` into a sequence folder from its summary and the executed notebooks beside it."""
    target = folder / "report.html"
    write_atomically(target, page(summary, folder))
    return target


def page(summary: dict, folder: Path) -> str:
    """The report as HTML text."""
    notebooks = {o["notebook"]: _read(folder / f"{o['notebook']}.ipynb") for o in summary["notebooks"]}
    rows = "".join(_row(outcome, _title(notebooks[outcome["notebook"]])) for outcome in summary["notebooks"])
    sections = "".join(_section(name, notebook) for name, notebook in notebooks.items() if notebook)
    machine = _machine(summary.get("hardware", {}))
    times = f"Started {summary['started']}, {summary.get('wall_s', '?')} s in all."
    settings = ", ".join(f"{k}={v}" for k, v in summary.get("parameters", {}).items())
    versions = ", ".join(f"{k} {v}" for k, v in summary.get("versions", {}).items())
    columns = "".join(f'<col class="{name}">' for name in ("name", "status", "time", "memory", "results"))
    head = "<tr><th>Notebook<th>Status<th>Time (s)<th>Peak memory (MiB)<th>Key results</tr>"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>qlora-nb report</title>
<style>{_STYLE}</style></head><body>
<h1>qlora-nb: {_safe(summary["status"])}</h1>
<p>{_safe(times)} {_safe(machine)}.</p>
<p class="quiet">Parameters: {_safe(settings)}</p>
<div class="wide"><table><colgroup>{columns}</colgroup><thead>{head}</thead><tbody>{rows}</tbody></table></div>
<p class="quiet">Time includes the start of the process. Memory is the resident memory of the kernel and its children, sampled
four times a second.</p>
{sections}
<details><summary>Versions</summary><p class="quiet">{_safe(versions)}</p></details>
</body></html>
"""


def figures(notebook: nbformat.NotebookNode) -> Iterator[tuple[str, str]]:
    """(base64 PNG, caption) of every figure; the caption is the alt text, else the first paragraph under the figure."""
    cells = notebook.cells
    for i, cell in enumerate(cells):
        for output in cell.get("outputs", []):
            if png := output.get("data", {}).get("image/png"):
                below = cells[i + 1].source if i + 1 < len(cells) and cells[i + 1].cell_type == "markdown" else ""
                alt = output.get("metadata", {}).get("alt") or output.get("metadata", {}).get("image/png", {}).get("alt")
                yield "".join("".join(png).split()), alt or _plain(below)


def _section(name: str, notebook: nbformat.NotebookNode) -> str:
    pictures = "".join(
        f'<figure><img alt="{_safe(caption or f"figure {n} of {name}")}" src="data:image/png;base64,{_safe(png)}">'
        f"<figcaption>{_safe(caption)}</figcaption></figure>"
        for n, (png, caption) in enumerate(figures(notebook), 1)
    )
    return f"<h2>{_safe(_title(notebook) or name)}</h2>{pictures}" if pictures else ""


def _row(outcome: dict, title: str) -> str:
    kind, mark = ("done", "✓") if outcome["status"] == "done" else ("bad", "✗")  # never colour alone
    results = "".join(f"<dt>{_safe(k)}</dt><dd>{_safe(_number(v))}</dd>" for k, v in outcome["results"].items())
    problems = "".join(f'<p class="bad">{_safe(p)}</p>' for p in outcome["problems"])
    return (
        f'<tr><td><b>{_safe(outcome["notebook"])}</b><br><span class="quiet">{_safe(title)}</span></td>'
        f'<td class="{kind}">{mark} {_safe(outcome["status"])}</td><td class="n">{outcome["wall_s"]:.1f}</td>'
        f'<td class="n">{outcome["peak_bytes"] / 2**20:.0f}</td><td>{problems}<dl>{results}</dl></td></tr>'
    )


def _machine(hardware: dict) -> str:
    cards = ", ".join(card["name"] for card in hardware.get("gpus", ())) or "no GPU"
    cpu, n_cores, python = (hardware.get(k, "?") for k in ("cpu", "n_cores", "python"))
    return f"{cpu}, {n_cores} cores, {hardware.get('ram_bytes', 0) / 2**30:.0f} GiB, {cards}, Python {python}"


def _read(path: Path) -> nbformat.NotebookNode | None:
    try:
        return nbformat.read(path, 4)
    except (OSError, ValueError):
        return None  # it never started, or was cut off: the row says so


def _title(notebook: nbformat.NotebookNode | None) -> str:
    sources = [c.source for c in notebook.cells if c.cell_type == "markdown"] if notebook else []
    heads = [match[1] for source in sources if (match := re.search(r"^# (.+)$", source, re.MULTILINE))]
    return _plain(heads[0]) if heads else ""


def _plain(markdown: str) -> str:
    """The first paragraph without Markdown's marks; a heading is no caption."""
    paragraph = markdown.strip().split("\n\n")[0].replace("\n", " ")
    if match := re.match(r"\*Alt text: (.+?)\*", paragraph):  # as the notebooks write it
        return match[1]
    if paragraph.startswith(("#", "|", "<", "- ")):
        return ""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", paragraph)
    return re.sub(r"[*_`$]+(?=\S)|(?<=\S)[*`$]+", "", text)[:500]


def _number(value: object) -> object:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value


def _safe(value: object) -> str:
    return html.escape(str(value))
