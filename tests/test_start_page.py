"""The start page says what the notebooks say: titles, times, what comes before; its links lead
somewhere; and it opens as a page in JupyterLab, wherever that is started.
"""

from __future__ import annotations

import json
import re

import nbformat
from conftest import NOTEBOOKS, ROOT

PAGE = (NOTEBOOKS / "start.md").read_text(encoding="utf-8")
ROW = re.compile(
    r"^\| (?P<number>\d+) \| \[(?P<title>.+?)\]\((?P<file>.+?)\) \| (?P<run>.+?) \| (?P<work>.+?) \|"
    r" (?P<after>.*?) ?\|$",
    re.MULTILINE,
)
ROWS = [match.groupdict() for match in ROW.finditer(PAGE)]


def opening(name: str) -> str:
    """The text of a notebook's cells before its first code, the guard aside."""
    texts = []
    for cell in nbformat.read(NOTEBOOKS / name, 4).cells[1:]:
        if cell.cell_type == "code":
            break
        texts.append(cell.source)
    return "\n".join(texts)


def test_every_notebook_has_a_row_in_reading_order():
    there = sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))
    assert [row["file"] for row in ROWS] == there
    assert [int(row["number"]) for row in ROWS] == [int(name[:2]) for name in there]


def test_titles_and_times_are_the_notebooks_own():
    for row in ROWS:
        text = opening(row["file"])
        assert f"# {row['number']} · {row['title']}\n" in text
        assert re.search(rf"{row['run']} (to run|in profile `tiny`), {row['work']} to work", text)


def test_what_comes_before_comes_before():
    """The notebooks that one stands on, as its own text names them, and never a later one."""
    for row in ROWS:
        number = int(row["number"])
        named = [int(word) for word in re.findall(r"\d+", row["after"])]
        assert all(earlier < number for earlier in named)
        [said] = re.findall(r"(?:Before this|Prerequisite)[:*]*(.*)$", opening(row["file"]), re.M)
        for earlier in named:
            assert re.search(rf"\[0?{earlier}\]|`0?{earlier}_", said), (row["file"], earlier)


def test_it_is_short_and_its_links_lead_somewhere():
    assert len(PAGE.split()) <= 450
    links = re.findall(r"\]\(([^)]+)\)", PAGE)
    assert len(links) > len(ROWS)
    for link in links:
        assert (NOTEBOOKS / link).is_file(), link


def test_the_three_paths_are_there():
    assert re.findall(r"^## (.+)$", PAGE, re.MULTILINE) == ["Learn", "Teach", "Tune"]


def test_defaults_of_jupyterlab_are_known_to_it():
    """A setting that JupyterLab does not know would be ignored in silence."""
    folder = ROOT / "tools/lab_defaults/labconfig"
    overrides = json.loads((folder / "default_setting_overrides.json").read_text())
    from jupyterlab.commands import get_app_dir

    for plugin, values in overrides.items():
        package, name = plugin.split(":")
        schema_file = f"{get_app_dir()}/schemas/{package}/{name}.json"
        with open(schema_file, encoding="utf-8") as file:
            known = json.load(file)["properties"]
        assert set(values) <= set(known)
