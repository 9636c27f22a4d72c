"""Build the site: the notebooks as they are committed, the guides of docs/, and pages made of the
docstrings of `qlora_nb/theory/`, with a search.

    make site                  into build/site/html; open index.html there
    python tools/build_site.py --serve      and show it at http://127.0.0.1:8000

`stage` copies the pages into build/site/source, where they lie as in the repository; Sphinx reads
them there with site/conf.py. The only changes on the way: a notebook's navigation bar and its cell
for Colab are left out (the site has its own navigation and no kernel), hidden code is marked in
MyST-NB's words, each figure gets its alternative text, and links lead to pages of the site.
"""

from __future__ import annotations

import argparse
import ast
import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "site"
SITE = BUILD / "html"
START = Path("notebooks/start.md")
FOLDERS = ("docs", "notebooks", ".")
LEFT_OUT = {"nav", "colab-guard"}
WIDGET = re.compile(r"\b(widgets\.explore|panels\.\w+)\(")
IN_JUPYTER = "*In Jupyter this cell shows controls, which redraw the figure or ask the model.*"
LINK = re.compile(r'(?P<before>\]\(|\b(?:href|src)=")(?P<target>[^)\s"#]+)')
HTML_LINK = re.compile(r'<a href="(?P<target>[^"#:]+)">(?P<label>.*?)</a>')
LABELLED = re.compile(r"\[(?P<label>[^\[\]]+)\]\((?P<target>[^)\s#]+)\)")
# What a reader asks first; the other guides follow by name, and last those about the kit itself.
FIRST = ["README.md", "install.md", "usage.md", "own_data.md", "troubleshooting.md"]
ABOUT = {"architecture.md", "dependencies.md", "testing.md"}
# What the math font keeps: Latin, Greek, arrows, operators, italic letters, accents.
MATH_CHARACTERS = "20-7E,A0-FF,302-305,370-3FF,2010-2044,2070-209F,2100-214F,2190-22FF"
MATH_CHARACTERS += ",2308-230B,27E8-27EB,1D434-1D467,1D6A4-1D6E1"


def relative(folder: str, pattern: str) -> list[Path]:
    """Files of a folder of the repository, relative to it, sorted."""
    return sorted(path.relative_to(ROOT) for path in (ROOT / folder).glob(pattern))


def home() -> Path:
    """The page that opens first: the landing page where there is one, else the README."""
    if (ROOT / START).is_file():
        return START
    return Path("README.md")


def sections() -> dict[str, list[Path]]:
    """Heading of the site's menu → its pages, in order. Every notebook and every guide is there."""
    found = {
        "Notebooks": relative("notebooks", "*.ipynb"),
        "Guides": [],
        "中文": [],
        "About the kit": [],
    }
    for page in [page for folder in FOLDERS for page in relative(folder, "*.md")]:
        if ".zh-CN" in page.name:
            found["中文"].append(page)
        elif page.parent == Path("docs") and page.name not in ABOUT:
            found["Guides"].append(page)
        elif page != home():
            found["About the kit"].append(page)
    found["Guides"].sort(key=asked_first)
    return found


def asked_first(page: Path) -> int:
    """Place of a guide among those that are named in FIRST; all others come after them."""
    if page.name in FIRST:
        return FIRST.index(page.name)
    return len(FIRST)


def modules() -> dict[str, str]:
    """Name of a module of `theory/` → the first line of its docstring."""
    found = {}
    for path in relative("qlora_nb/theory", "*.py"):
        if path.stem != "__init__":
            text = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8")))
            found[path.stem] = text.partition("\n")[0]
    return found


def places() -> dict[Path, Path]:
    """Page of the repository → where it lies in the site."""
    found = {home(): Path("index.md")}
    for pages in sections().values():
        for page in pages:
            found[page] = page
    return found


def with_links_of_the_site(text: str, page: Path) -> str:
    """The text of a page, its links as they are from its place in the site.

    A link to a file of the repository that is no page brings the file along, to be downloaded. A
    link to a folder, or one in HTML to such a file, becomes plain text.
    """
    known = places()

    def of(match: re.Match) -> Path:
        return Path(os.path.normpath(page.parent / match["target"]))

    def without_folders(match: re.Match) -> str:
        if (ROOT / of(match)).is_dir():
            return match["label"]
        return match[0]

    def without_files(match: re.Match) -> str:
        if of(match) in known:
            return match[0]
        return match["label"]

    def moved(match: re.Match) -> str:
        file = of(match)
        if ":" in match["target"] or not (ROOT / file).is_file():
            return match[0]
        if file not in known:
            copied = BUILD / "source" / file
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, copied)
        there = Path(os.path.relpath(known.get(file, file), known[page].parent))
        if match["before"].startswith("href"):
            there = there.with_suffix(".html")
        return match["before"] + there.as_posix()

    text = LABELLED.sub(without_folders, text)
    text = HTML_LINK.sub(without_files, text)
    return LINK.sub(moved, text)


def staged_notebook(page: Path) -> str:
    """A notebook as the site shows it: its text, code and outputs are not touched."""
    notebook = nbformat.read(ROOT / page, as_version=4)
    cells = []
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if LEFT_OUT.intersection(tags):
            continue
        if cell.cell_type == "markdown":
            cell.source = with_links_of_the_site(cell.source, page)
        if cell.metadata.get("jupyter", {}).get("source_hidden"):
            cell.metadata["tags"] = [*tags, "hide-input"]
        for output in cell.get("outputs", []):
            described = output.get("metadata", {}).get("image/png", {}).get("alt")
            if described:
                cell.metadata["mystnb"] = {"image": {"alt": described}}
        cells.append(cell)
        if cell.cell_type == "code" and WIDGET.search(cell.source) and not cell.outputs:
            cells.append(nbformat.v4.new_markdown_cell(IN_JUPYTER, id=f"{cell.id}-widget"))
    notebook.cells = cells
    return nbformat.writes(notebook)


def menu(caption: str, documents: list[str]) -> str:
    """A part of the menu beside every page."""
    options = [":hidden:", ":titlesonly:", f":caption: {caption}"]
    return "\n".join(["```{toctree}", *options, "", *documents, "```"])


def index() -> str:
    """The first page: the landing page, and the menu."""
    text = with_links_of_the_site((ROOT / home()).read_text(encoding="utf-8"), home())
    parts = [text.rstrip()]
    for caption, pages in sections().items():
        if pages:
            parts.append(menu(caption, [page.with_suffix("").as_posix() for page in pages]))
    parts.append(menu("Theory in code", ["api/index"]))
    return "\n\n".join(parts) + "\n"


def stage_api(folder: Path) -> None:
    """A page for each module of `theory/`, and one that lists them."""
    folder.mkdir(parents=True)
    rows = []
    for name, about in modules().items():
        title = f"qlora_nb.theory.{name}"
        underline = "=" * len(title)
        text = f"{title}\n{underline}\n\n.. automodule:: {title}\n   :members:\n"
        (folder / f"{name}.rst").write_text(text, encoding="utf-8")
        rows.append(f"- [{name}]({name}.rst): {about}")
    text = [
        "# Theory in code",
        "What the notebooks teach, as pure functions on tensors. Each is tested against a library: "
        "bitsandbytes, PEFT, onnxruntime, Sophia's own code.",
        "\n".join(rows),
        "```{toctree}\n:hidden:\n\n" + "\n".join(modules()) + "\n```",
    ]
    (folder / "index.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")


def write_math_font(path: Path) -> None:
    """The characters that formulas use of STIX Two Math, as a web font. Many systems have no font
    for mathematics; without one, brackets and roots do not grow with what they hold.
    """
    import ziamath
    from fontTools import subset

    options = subset.Options()
    options.flavor = "woff"
    options.layout_features = ["*"]
    options.name_IDs = ["*"]  # with the licence that the font carries
    font = subset.load_font(
        str(Path(ziamath.__file__).parent / "fonts" / "STIXTwoMath-Regular.ttf"), options
    )
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=subset.parse_unicodes(MATH_CHARACTERS))
    subsetter.subset(font)
    subset.save_font(font, str(path), options)


def stage() -> Path:
    """All sources of the site in one folder."""
    source = BUILD / "source"
    shutil.rmtree(source, ignore_errors=True)
    for page, place in places().items():
        (source / place).parent.mkdir(parents=True, exist_ok=True)
        if page == home():
            text = index()
        elif page.suffix == ".ipynb":
            text = staged_notebook(page)
        else:
            text = with_links_of_the_site((ROOT / page).read_text(encoding="utf-8"), page)
        (source / place).write_text(text, encoding="utf-8")
    stage_api(source / "api")
    write_math_font(BUILD / "math.woff")
    return source


def build() -> None:
    """Stage, then call Sphinx. A warning is an error: a link that leads nowhere, for example."""
    source = stage()
    shutil.rmtree(SITE, ignore_errors=True)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    command += ["-c", str(ROOT / "site"), "-d", str(BUILD / "doctrees"), str(source), str(SITE)]
    done = subprocess.run(command, cwd=ROOT, check=False)
    if done.returncode:
        sys.exit("the site was not built: Sphinx's reasons stand above")


def serve(port: int) -> None:
    """Show the site on this machine until Ctrl-C."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        print(f"http://127.0.0.1:{server.server_port}")
        server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--serve", action="store_true", help="show it at a local address")
    parser.add_argument("--port", type=int, default=8000, help="of the local address")
    asked = parser.parse_args()
    build()
    size = sum(path.stat().st_size for path in SITE.rglob("*") if path.is_file())
    print(f"{SITE.relative_to(ROOT)}/index.html · {size / 1e6:.1f} MB")
    if asked.serve:
        serve(asked.port)


if __name__ == "__main__":
    main()
