"""README.md, docs/ and the other pages: short enough, every link leads somewhere, every message is
one of the code's, every number of the README by the kit's own functions.
"""

from __future__ import annotations

import ast
import re
import tomllib

import matplotlib
import nbformat
import parameters_page
import pytest
import readme_pictures
import yaml
from conftest import NOTEBOOKS, ROOT
from PIL import Image
from typer.testing import CliRunner

from qlora_nb import machine, recorded
from qlora_nb.cli import app
from qlora_nb.memory import budget, shares
from qlora_nb.memory.plan import plan_of
from qlora_nb.model import configs
from qlora_nb.settings import Settings, validate

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *NOTEBOOKS.glob("*.md")]
LINK = re.compile(r"(?<!\!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")


def text_without_code(path) -> str:
    text = path.read_text(encoding="utf-8")
    return re.sub(r"^( *)```.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE)


# ---- links
# ------------------------------------------------------------------------------------------------


def anchors(path) -> set[str]:
    """Of the headings of a page, as GitHub and myst name them."""
    found = set()
    for title in re.findall(r"^#+ (.*)$", text_without_code(path), re.MULTILINE):
        plain = re.sub(r"[^\w\s-]", "", title.lower())
        found.add(re.sub(r"\s", "-", plain.strip()))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_relative_link_leads_somewhere(page):
    links = ["".join(found) for found in LINK.findall(text_without_code(page))]
    for link in links:
        if re.match(r"https?://|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert ROOT in (target, *target.parents), link
        if anchor:
            assert anchor in anchors(target), link


def test_a_link_that_leads_nowhere_would_be_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One `two`: three?\n\n```\n# no heading\n```\n[a](b.md#c) ![d](e.png)\n")
    assert anchors(page) == {"one-two-three"}
    assert ["".join(found) for found in LINK.findall(text_without_code(page))] == [
        "b.md#c",
        "e.png",
    ]


HOUSE_WORDS = ("fullest moment", "gone on with", "go on with", "goes on with", "weighed", "lever")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_pages_use_the_fields_words(page):
    text = " ".join(page.read_text(encoding="utf-8").split()).lower()
    assert not [word for word in HOUSE_WORDS if re.search(rf"\b{word}s?\b", text)]


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "docs").glob("*.md"):
        if path.name != "README.md" and not path.name.endswith(".zh-CN.md"):
            assert f"({path.name}" in index, path.name


# ---- the README
# ------------------------------------------------------------------------------------------------


def test_the_readme_is_short_and_has_each_part():
    assert len(README.split()) <= 900
    parts = (
        "for students",
        "for teachers",
        "At the end you have",
        "(docs/qlora_layer.png)",
        "before:",
        "after:",
        "git clone",
        "make run",
        "make lab",
        "docs/install.md#windows",
        "## The notebooks",
        "## Your own data",
        "## Take it home",
        "## Bigger",
        "README.zh-CN.md",
        "docs/README.md",
        "docs/claims.md",
        "CONTRIBUTING.md",
    )
    places = [README.find(part) for part in parts if part != "README.zh-CN.md"]
    assert min(places) > 0
    first = [README.find(part) for part in parts[:14]]
    assert first == sorted(first)  # in the order of a reader's thirty seconds


def test_the_picture_is_the_kits_own():
    """Byte for byte with the matplotlib that drew it, in size with another one."""
    drawn = readme_pictures.picture()
    committed = readme_pictures.PICTURE.read_bytes()
    with Image.open(readme_pictures.PICTURE) as image:
        by = image.text["Software"].split(",")[0]
        size = image.size
    if by == f"Matplotlib version{matplotlib.__version__}":
        assert drawn == committed
    assert size == (960, 560)


def test_the_answers_are_those_of_the_committed_notebook():
    assert readme_pictures.BLOCK.findall(README) == [readme_pictures.answers()]
    cells = nbformat.read(NOTEBOOKS / "07_inference.ipynb", 4).cells
    printed = "".join(o.get("text", "") for cell in cells for o in cell.get("outputs", []))
    [share] = re.findall(r"^base: .*\n +exact match ([\d.]+%)", printed, re.MULTILINE)
    assert f"it gets {share.replace('%', ' %')} right before" in README
    [share] = re.findall(r"^tuned: .*\n +exact match ([\d.]+%)", printed, re.MULTILINE)
    assert f"and {share.replace('%', ' %')} after" in README
    assert f"Of {validate({}).eval_rows} questions" in README


def test_the_table_of_notebooks_is_what_they_say():
    rows = re.findall(r"^\| (\d+) \| \[(.+)\]\((.+)\) \| (.+) \| (.+) \|$", README, re.MULTILINE)
    names = sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))
    assert [row[2] for row in rows] == [f"notebooks/{name}" for name in names]
    for number, question, name, run, work in rows:
        texts = [
            cell.source
            for cell in nbformat.read(ROOT / name, 4).cells
            if cell.cell_type == "markdown"
        ]
        [text] = [text for text in texts if text.startswith(f"# {number} · {question}\n")]
        assert re.search(
            rf"\*Time:?\*+ {re.escape(run)}( to run| in profile `tiny`), {re.escape(work)} to work",
            text,
        ), name


def test_the_predicted_peaks_of_the_readme():
    def gib(**values):
        return budget.peak(plan_of(validate(values), on_gpu=True)).total_gib

    small = {"optim": "paged_adamw_8bit", "embedding_on_cpu": True, "head_4bit": True, "r": 16}
    settings = validate({"profile": "full", "optim": "adamw_torch"})
    config = configs.pythia_config("12b")
    _, each, _ = shares.planned(settings, 2, "fsdp", config, on_gpu=True)
    rows = {
        "| `t4` |": f"| a card such as a T4 | {gib(profile='t4'):.1f} |",
        "| `full` |": f"| a 12 GB card | {gib(profile='full'):.1f} |",
        "| `full`, four": f"| an 8 GB card | {gib(profile='full', **small):.1f} |",
        "| `full`, `--p": f"| two 8 GB cards | {each.total_gib:.1f} each |",
    }
    for beginning, end in rows.items():
        [row] = [line for line in README.splitlines() if line.startswith(beginning)]
        assert row.endswith(end)
    table = recorded.FOLDER / "gpu_table.json"
    measured = yaml.safe_load(table.read_text())["pythia-12b, r 64, 512 tokens, as profile full"]
    assert f"took {measured['measured (GiB)']:.2f} GiB" in README


def test_commands_of_the_pages_exist():
    """Every `qlora-nb` line: the command is there, and its help names each option."""
    pages = [ROOT / "README.md", ROOT / "docs" / "usage.md", ROOT / "docs" / "install.md"]
    lines = set()
    for page in pages:
        text = page.read_text(encoding="utf-8")
        lines |= set(re.findall(r"(?:^|`|\\)(qlora-nb [^\n#`]+)", text, re.MULTILINE))
    assert len(lines) > 20
    helps = {}
    for line in lines:
        words = line.split()
        name = words[1]
        if name == "--version" or name.isupper():
            continue
        if name not in helps:
            told = CliRunner().invoke(
                app, [name, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}
            )
            assert told.exit_code == 0, line
            helps[name] = told.output
        for option in re.findall(r"--[a-z-]+", line):
            assert option in helps[name], line


def test_windows_is_told_what_make_does():
    """The same extras in the same order as the Makefile, and the Pythons that the project allows."""
    install = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    setup = makefile[makefile.index("\n$(READY):") : makefile.index("\nsetup:")]
    [extras] = re.findall(r'-c constraints.txt -e "(.*?)"', setup)
    assert f'-c constraints.txt -e "{extras}"' in install
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    low, high = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", project["requires-python"]).groups()
    every = [f"3.{minor}" for minor in range(int(low), int(high))]
    for page in (README, install, makefile):
        assert f"Python {', '.join(every[:-1])} or {every[-1]}" in page


# ---- messages
# ------------------------------------------------------------------------------------------------


def said_by_the_code() -> list[str]:
    """Every text in the package and the Makefile, with … in the places of values."""
    texts = (ROOT / "Makefile").read_text(encoding="utf-8").split('"')
    for path in (ROOT / "qlora_nb").rglob("*.toml"):
        texts.append(path.read_text(encoding="utf-8"))
    for path in (ROOT / "qlora_nb").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            if isinstance(node, ast.JoinedStr):
                parts = [
                    part.value if isinstance(part, ast.Constant) else "…" for part in node.values
                ]
                texts.append("".join(parts))
    return texts


def test_every_message_of_troubleshooting_is_one_of_the_codes():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^### `(.*)`$", page, re.MULTILINE)
    assert len(messages) >= 12
    texts = said_by_the_code()
    for message in (*messages, *IN_THE_TEXT):
        assert f"`{message}`" in page
        parts = [part.strip(" ,:()") for part in message.split("…")]
        for part in filter(None, parts):
            assert any(part in text for text in texts), (message, part)


IN_THE_TEXT = (
    "the weights of this adapter are a pickle",
    "out of memory in step …: it is done again in … passes of …",
    "cannot be written",
)
"""Further messages that the page quotes."""


# ---- for who contributes
# ------------------------------------------------------------------------------------------------


def test_the_workflow_tests_every_python_of_the_project():
    path = ROOT / ".github" / "workflows" / "test.yml"
    text = path.read_text(encoding="utf-8")
    flow = yaml.safe_load(text)
    assert set(flow[True]) == {"push", "pull_request"}  # YAML 1.1 reads `on` as true
    assert flow["permissions"] == {"contents": "read"}
    [job] = flow["jobs"].values()
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert job["strategy"]["fail-fast"] is False
    for step in job["steps"]:
        assert ("uses" in step) != ("run" in step), step
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]), step
        else:
            assert "${{" not in step["run"], "values go through env, not into the shell's text"
    assert any("make test" in step.get("run", "") for step in job["steps"])
    assert "https://" not in text  # no index, no host: they come from the repository's variables


KINDS = {"markdown", "textarea", "input", "dropdown", "checkboxes"}


@pytest.mark.parametrize("name", ["bug", "question"])
def test_issue_forms_have_what_github_asks_for(name):
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert {"name", "description", "body"} <= set(form)
    assert set(form) <= {"name", "description", "title", "labels", "assignees", "body"}
    ids = [field["id"] for field in form["body"] if "id" in field]
    assert len(ids) == len(set(ids))
    assert any(field["type"] != "markdown" for field in form["body"])
    for field in form["body"]:
        assert field["type"] in KINDS
        assert set(field) <= {"type", "id", "attributes", "validations"}
        if field["type"] == "markdown":
            assert set(field["attributes"]) == {"value"}
            continue
        assert re.fullmatch(r"[a-z0-9_-]+", field["id"])
        assert field["attributes"]["label"]
        assert set(field.get("validations", {})) <= {"required"}
        if field["type"] in ("dropdown", "checkboxes"):
            assert field["attributes"]["options"]
    labels = [field["attributes"].get("label") for field in form["body"]]
    assert len(labels) == len(set(labels))


def test_a_bug_is_asked_for_with_the_doctors_report():
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    [field] = [field for field in form["body"] if field.get("id") == "doctor"]
    assert "qlora-nb doctor --json" in field["attributes"]["description"]
    assert field["validations"] == {"required": True}
    config = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml").read_text())
    assert set(config) <= {"blank_issues_enabled", "contact_links"}


def test_changes_and_citation_have_this_version():
    version = machine.installed("qlora-nb")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)", changes, re.MULTILINE)[0] == version
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == version
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)
    assert citation["authors"] == [{"name": "The qlora-nb developers"}]


def test_the_page_of_parameters_is_what_the_schema_and_the_profiles_say():
    """Written again by `make parameters`."""
    written = parameters_page.PAGE.read_text(encoding="utf-8")
    assert parameters_page.page() == written
    for name in set(Settings.model_fields) - {"profile"}:
        assert f"| `{name}` |" in written
