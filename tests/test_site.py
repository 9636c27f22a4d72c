"""The site's sources, as tools/build_site.py lays them out. The site itself is built and looked at in
`make verify`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import build_site
import nbformat
import pytest
import site_check

FOLDERS = ("notebooks", "docs", ".")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A repository of a few pages, of which the site is made."""
    pages = {
        "README.md": "# Kit\n",
        "CHANGELOG.md": "# Changes\n",
        "notebooks/start.md": "# Start\n\n[one](01_one.ipynb) [data](../docs/own_data.md#rows)\n",
        "docs/own_data.md": "# Data\n",
        "docs/own_data.zh-CN.md": "# 数据\n",
        "docs/picture.png": "",
        "records/run.json": "{}",
        "qlora_nb/theory/lora.py": '"""LoRA in a line.\n\nMore."""\n',
    }
    for name, text in pages.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# One")])
    nbformat.write(notebook, tmp_path / "notebooks/01_one.ipynb")
    monkeypatch.setattr(build_site, "ROOT", tmp_path)
    monkeypatch.setattr(build_site, "BUILD", tmp_path / "build/site")
    return tmp_path


def menu_of(text: str) -> list[str]:
    """The pages that a first page's menus name."""
    blocks = re.findall(r"```\{toctree\}\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith(":")]


def test_every_notebook_and_every_page_is_in_the_menu_once(root):
    written = set()
    for folder in FOLDERS:
        for name in os.listdir(root / folder):
            if name.endswith((".ipynb", ".md")):
                written.add(os.path.normpath(f"{folder}/{name}"))
    written.remove(str(build_site.home()))
    expected = sorted(name.rsplit(".", 1)[0] for name in written)
    assert sorted(menu_of(build_site.index())) == sorted([*expected, "api/index"])


def test_pages_of_other_folders_are_told_apart(small):
    sections = {
        caption: [str(p) for p in pages] for caption, pages in build_site.sections().items()
    }
    assert sections == {
        "Notebooks": ["notebooks/01_one.ipynb"],
        "Guides": ["docs/own_data.md"],
        "中文": ["docs/own_data.zh-CN.md"],
        "About the kit": ["CHANGELOG.md", "README.md"],
    }
    assert build_site.home() == Path("notebooks/start.md")
    (small / "notebooks/start.md").unlink()
    assert build_site.home() == Path("README.md")
    assert [str(p) for p in build_site.sections()["About the kit"]] == ["CHANGELOG.md"]


def test_the_landing_page_becomes_the_first_page(small):
    text = build_site.index()
    assert "[one](notebooks/01_one.ipynb) [data](docs/own_data.md#rows)" in text


@pytest.mark.parametrize(
    ("page", "before", "after"),
    [
        ("docs/own_data.md", "[s](../notebooks/start.md)", "[s](../index.md)"),
        ("docs/own_data.md", "[n](../notebooks/01_one.ipynb#x)", "[n](../notebooks/01_one.ipynb#x)"),
        ("docs/own_data.md", "![p](picture.png)", "![p](picture.png)"),
        ("docs/own_data.md", "[r](../records/run.json)", "[r](../records/run.json)"),
        ("docs/own_data.md", "the [records](../records) of it", "the records of it"),
        ("docs/own_data.md", "[h](https://example.org/a.md)", "[h](https://example.org/a.md)"),
        ("docs/own_data.md", "[x](#rows)", "[x](#rows)"),
        ("docs/own_data.md", "[no](nowhere.md)", "[no](nowhere.md)"),
        ("notebooks/01_one.ipynb", '<a href="../docs/own_data.md">d</a>', '<a href="../docs/own_data.html">d</a>'),
        ("notebooks/01_one.ipynb", '<a href="start.md">s</a>', '<a href="../index.html">s</a>'),
        ("notebooks/01_one.ipynb", '<a href="../records/run.json">r</a>', "r"),
        ("notebooks/01_one.ipynb", '<a href="https://example.org">e</a>', '<a href="https://example.org">e</a>'),
        ("notebooks/start.md", '<img src="../docs/picture.png">', '<img src="docs/picture.png">'),
    ],
)  # fmt: skip
def test_links_lead_to_pages_of_the_site(small, page, before, after):
    assert build_site.with_links_of_the_site(before, Path(page)) == after


def test_a_linked_record_comes_along(small):
    build_site.with_links_of_the_site("[r](../records/run.json)", Path("docs/own_data.md"))
    assert (small / "build/site/source/records/run.json").read_text() == "{}"


def test_notebooks_are_shown_as_they_are_committed(root):
    for page in build_site.sections()["Notebooks"]:
        committed = nbformat.read(root / page, 4)
        staged = nbformat.reads(build_site.staged_notebook(page), 4)
        left_out = {"nav-top", "nav-bottom", committed.cells[0].id}
        assert "colab-guard" in committed.cells[0].metadata["tags"]
        expected = [c for c in committed.cells if c.id not in left_out]
        shown = [c for c in staged.cells if c.source != build_site.IN_JUPYTER]
        assert [c.id for c in shown] == [c.id for c in expected]
        for was, now in zip(expected, shown, strict=True):
            if was.cell_type == "code":
                assert now.source == was.source
                assert now.outputs == was.outputs
                hidden = was.metadata.get("jupyter", {}).get("source_hidden", False)
                assert ("hide-input" in now.metadata.get("tags", [])) == hidden
                pictures = [o for o in was.outputs if "image/png" in o.get("data", {})]
                assert len(pictures) <= 1, "MyST-NB takes one text for all images of a cell"
                for picture in pictures:
                    alt = now.metadata["mystnb"]["image"]["alt"]
                    assert alt == picture.metadata["image/png"]["alt"] != ""


def test_where_a_widget_would_be_the_page_says_so():
    page = Path("notebooks/03_nf4_explained.ipynb")
    cells = nbformat.reads(build_site.staged_notebook(page), 4).cells
    told = [n for n, cell in enumerate(cells) if cell.source == build_site.IN_JUPYTER]
    assert told
    for n in told:
        assert "widgets.explore(" in cells[n - 1].source
        assert cells[n - 1].outputs == []


def test_each_module_of_the_theory_has_a_page(root, tmp_path):
    build_site.stage_api(tmp_path / "api")
    listed = (tmp_path / "api/index.md").read_text(encoding="utf-8")
    for path in (root / "qlora_nb/theory").glob("[a-z]*.py"):
        page = (tmp_path / f"api/{path.stem}.rst").read_text(encoding="utf-8")
        assert f".. automodule:: qlora_nb.theory.{path.stem}\n" in page
        assert f"[{path.stem}]({path.stem}.rst)" in listed
        assert path.stem in menu_of(listed)


def test_the_first_line_of_a_module_stands_beside_its_name(small):
    assert build_site.modules() == {"lora": "LoRA in a line."}


@pytest.mark.parametrize(
    ("target", "leads"),
    [
        ("docs/a.html", True),
        ("docs/a.html#rows", True),
        ("docs/a.html#%E8%A1%8C", True),
        ("docs/a.html#no", False),
        ("docs/b.html", False),
        ("", True),
        ("search.html?q=a", False),
    ],
)
def test_a_link_leads_to_a_file_and_a_place(tmp_path, monkeypatch, target, leads):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/a.html").touch()
    (tmp_path / "index.html").touch()
    monkeypatch.setattr(build_site, "SITE", tmp_path)
    assert site_check.leads_somewhere(target, {"docs/a.html": {"rows", "行"}}) is leads


@pytest.fixture(scope="module")
def conf(root):
    """site/conf.py, read by a process of its own: it is Sphinx's, and changes Sphinx's tables."""
    pytest.importorskip("sphinx", reason="make site installs it")
    program = (
        "import json, sys; sys.path.insert(0, 'site'); import conf;"
        "split = conf.SearchEnglishAndChinese({}).split;"
        "call = 'JSON.stringify(splitQuery(%s))';"
        "import quickjs; browser = quickjs.Context(); browser.eval('var window = globalThis');"
        "browser.eval(conf.SPLITTER);"
        "asked = lambda text: json.loads(browser.eval(call % json.dumps(text)));"
        "texts = json.loads(sys.stdin.read());"
        "print(json.dumps({'index': [split(t) for t in texts], 'query': [asked(t) for t in texts],"
        " 'formula': conf.mathml(r'Y = X\\,\\mathrm{dequant}(W)^\\top + \\frac{\\alpha}{r} XAB', True)}))"
    )
    texts = ["双重量化把缩放因子再量化一次", "双重量化", "秩", "absmax 与 NF4", "4-bit NormalFloat"]
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(texts),
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_chinese_word_is_found_in_the_middle_of_a_sentence(conf):
    sentence, word = conf["index"][0], conf["query"][1]
    assert word == ["双重", "重量", "量化"]
    assert set(word) <= set(sentence)
    assert conf["query"][2] == ["秩"]
    assert set(conf["query"][3]) == {"absmax", "与", "NF4"} <= set(conf["index"][3])
    assert conf["query"][4] == ["4", "bit", "NormalFloat"] == conf["index"][4]


def test_formulas_become_mathml_without_a_browser(conf):
    text = conf["formula"]
    assert text.startswith('<span class="katex"><math')
    assert "<mfrac>" in text
    assert "\\" not in text, "TeX is left over"
