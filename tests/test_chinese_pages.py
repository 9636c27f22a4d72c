"""README.zh-CN.md, docs/own_data.zh-CN.md and docs/glossary.md: their numbers, samples, commands and
messages are those of the kit.
"""

from __future__ import annotations

import json
import lzma
import os
import re
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
from conftest import NOTEBOOKS, ROOT
from test_own_data_page import blocks, output_of
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from qlora_nb import sources
from qlora_nb.cli import app
from qlora_nb.errors import KitError
from qlora_nb.model import data as model_data
from qlora_nb.model import reading
from qlora_nb.model.load import load_tokenizer
from qlora_nb.model.tables import read_table
from qlora_nb.pocket import MODEL_DIR
from qlora_nb.settings import validate

README = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
OWN_DATA = (ROOT / "docs" / "own_data.zh-CN.md").read_text(encoding="utf-8")
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
CHINESE = re.compile("[\u4e00-\u9fff]")

# ---- the README ------------------------------------------------------------------------------------

TIMES = {
    "half a minute": "半分钟",
    "under a minute": "不到 1 分钟",
    "one minute": "1 分钟",
    "about a minute": "约 1 分钟",
    "two and a half minutes": "两分半钟",
    "an hour": "1 小时",
    "90 minutes": "90 分钟",
}
"""How long, as the notebooks say it and as the Chinese table does; "about 35 s" is 约 35 秒."""


def in_chinese(time: str) -> str:
    return TIMES.get(time) or re.sub(r"^about (\d+) s$", r"约 \1 秒", time)


def notebook_texts(path: Path) -> list[str]:
    cells = nbformat.read(path, 4).cells
    return [cell.source for cell in cells if cell.cell_type == "markdown"]


def test_the_readme_is_short():
    """A Chinese text has about 1.6 characters where an English one has a word."""
    text = re.sub(r"\]\([^)]*\)", "", README)
    words = [word for word in text.split() if re.search(r"\w", word) and not CHINESE.search(word)]
    assert len(CHINESE.findall(text)) / 1.6 + len(words) <= 900


def test_the_parts_stand_in_the_order_of_the_english_readme():
    parts = [
        "适合只有笔记本电脑",
        "学完之后",
        "(docs/qlora_layer.png)",
        "before:",
        "## 快速开始",
        "git clone",
        "\nmake run ",
        "\nmake lab ",
        "### 中国大陆的网络",
        "## 十个笔记本",
        "## 使用自己的数据",
        "## 把训练带走",
        "## 更大的模型",
        "docs/claims.md",
    ]
    places = [README.index(part) for part in parts]
    assert places == sorted(places)
    assert "[English](README.md)" in README
    assert "README.zh-CN.md" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_first_screen_says_for_whom_what_and_how():
    first = README[: README.index("![")]
    for word in ("学生", "教师", "开发者", "微调一个语言模型", "`make run`", "`make lab`"):
        assert word in first
    assert first.count("\n") <= 12
    assert len(CHINESE.findall(first)) <= 260


def test_the_size_of_the_environment_is_that_of_the_install_page():
    install = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    [cpu, cuda] = re.findall(r"环境约 (\d+) GB（CUDA 版约 (\d+) GB）", README)[0]
    assert f"about {cpu} GB of disk with a CPU build, {cuda} GB with a CUDA one" in install


def test_the_table_of_notebooks_is_what_they_say():
    row = r"^\| (\d+) \| \[(.+)\]\((.+)\) \| (.+) \| (.+) \|$"
    rows = re.findall(row, README, re.MULTILINE)
    names = sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))
    assert [name for _, _, name, _, _ in rows] == [f"notebooks/{name}" for name in names]
    said = r"\*Time:?\*+ (.+?)(?: to run| in profile `tiny`), (.+?) to work"
    for number, question, name, to_run, to_work in rows:
        assert CHINESE.search(question)
        [title] = [text for text in notebook_texts(ROOT / name) if text.startswith(f"# {number} ")]
        found = re.search(said, title)
        assert [in_chinese(time) for time in found.groups()] == [to_run, to_work], name


def test_numbers_and_answers_are_those_of_the_english_readme():
    english = (ROOT / "README.md").read_text(encoding="utf-8")
    assert dict(blocks(README, "text")) == dict(blocks(english, "text"))
    for pattern in (r"[\d.]+ ?%", r"^\| `(?:t4|full).*\| \D*([\d.]+)\D*$", r"[\d.]+ GiB[^)）]"):
        numbers = [re.sub(r"[^\d.]", "", n).strip(".") for n in re.findall(pattern, README, re.M)]
        expected = [re.sub(r"[^\d.]", "", n).strip(".") for n in re.findall(pattern, english, re.M)]
        assert numbers == expected
        assert numbers
    [own] = [text for _, text in blocks(README, "bash") if "qlora-nb data" in text]
    [theirs] = [text for _, text in blocks(english, "bash") if "qlora-nb data" in text]
    commands = [
        [line.split("#")[0].strip() for line in text.splitlines()] for text in (own, theirs)
    ]
    assert commands[0] == commands[1]


@pytest.mark.parametrize("text", [README, OWN_DATA], ids=["README", "own_data"])
def test_no_address_but_papers_and_a_blank_to_fill_in(text):
    hosts = set(re.findall(r'https?://([^/\s`")]+)', text))
    assert hosts <= {"arxiv.org", "<镜像地址>"}


@pytest.mark.parametrize("text", [README, OWN_DATA], ids=["README", "own_data"])
def test_every_command_exists(text):
    lines = set(re.findall(r"(?:^|`|  )(qlora-nb [^\n#`]+)", text, re.MULTILINE))
    assert len(lines) >= 4
    for line in lines:
        name = line.split()[1]
        told = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
        assert told.exit_code == 0, line
        for option in re.findall(r"--[a-z-]+", line):
            assert option in told.output, line


# ---- own data --------------------------------------------------------------------------------------


def test_every_sample_is_read(tmp_path):
    found = []
    for i, (kind, text) in enumerate(blocks(OWN_DATA, "json|jsonl|csv")):
        path = tmp_path / f"数据{i}.{kind}"
        path.write_text(text, encoding="utf-8")
        columns = {"instruction": "问题", "output": "回答"} if "问题" in text else {}
        rows = reading.read(str(path), columns)
        assert len(rows.kept) == rows.n_read
        assert CHINESE.search(rows.kept[0]["output"])
        names, table = read_table(str(path), ())
        assert len(table) == rows.n_read
        found.append((tuple(names), rows.n_read))
    assert found == [
        (("instruction", "input", "output"), 3),
        (("问题", "回答", "来源"), 2),
        (("prompt", "completion"), 1),
        (("messages",), 1),
        (("conversations",), 1),
        (("instruction", "input", "output", "history"), 1),
    ]
    assert '-p columns "instruction=问题,output=回答"' in OWN_DATA


@pytest.fixture
def saved_by_an_old_program(tmp_path):
    [text] = [text for kind, text in blocks(OWN_DATA, "csv")]
    path = tmp_path / "rows.csv"
    path.write_text(text, encoding="gb18030")
    return path


@pytest.mark.parametrize("way", ["iconv", "Python"])
def test_a_file_in_gb18030_is_refused_as_said_and_converted(saved_by_an_old_program, way):
    path = saved_by_an_old_program
    columns = {"instruction": "问题", "output": "回答"}
    with pytest.raises(KitError) as refused:
        reading.read(str(path), columns)
    [quoted] = [text for _, text in blocks(OWN_DATA, "text") if "rows.csv" in text]
    beginning, _, end = quoted.strip().partition("…/rows.csv")
    assert str(refused.value).startswith(f"{beginning}{path}{end}")
    assert "UTF-8" in refused.value.remedy
    if way == "iconv":
        if not shutil.which("iconv"):
            pytest.skip("no iconv on this machine")
        [command] = [text for _, text in blocks(OWN_DATA, "bash") if text.startswith("iconv")]
        subprocess.run(command, shell=True, cwd=path.parent, check=True)
    else:
        [program] = [text for _, text in blocks(OWN_DATA, "python") if "gb18030" in text]
        output_of(program, path.parent)
    kept = reading.read(str(path.with_name("rows_utf8.csv")), columns).kept
    assert kept["output"][0] == "在公园后面。"


def test_a_byte_order_mark_does_no_harm(tmp_path):
    [text] = [text for kind, text in blocks(OWN_DATA, "csv")]
    path = tmp_path / "rows.csv"
    path.write_text(text, encoding="utf-8-sig")
    names, _ = read_table(str(path), ())
    assert next(iter(names)) == "问题"


def test_the_program_is_that_of_the_english_page():
    """Which is run as it stands (test_own_data_page.py)."""
    [own] = [text for _, text in blocks(OWN_DATA, "python") if "PeftModel" in text]
    english = (ROOT / "docs" / "own_data.md").read_text(encoding="utf-8")
    [(_, theirs)] = blocks(english, "python")

    def code(program):
        lines = [line.split("  # ")[0].rstrip() for line in program.splitlines()]
        return [line for line in lines if not line.startswith("# ")]

    assert [line.replace("钥匙在哪里？", "Where is the key?") for line in code(own)] == code(theirs)


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "Qwen/Qwen3-0___6B"])
def test_a_folder_as_modelscope_leaves_it_is_a_model(tmp_path, monkeypatch, capsys, name):
    assert name.split("/")[1] in OWN_DATA
    folder = tmp_path / name
    shutil.copytree(MODEL_DIR, folder)
    for more in ("configuration.json", ".msc", ".mv"):
        (folder / more).write_text("{}")
    monkeypatch.chdir(tmp_path)
    sources.require_reachable("model", name, "a model")
    assert "taken from the folder" in capsys.readouterr().out
    for model_id in (name, folder.as_posix()):
        tokenizer = load_tokenizer(validate({"model_id": model_id}))
        assert len(tokenizer) == len(AutoTokenizer.from_pretrained(MODEL_DIR))


def test_messages_that_are_quoted_are_the_codes():
    sources = (ROOT / "qlora_nb" / "sources.py").read_text(encoding="utf-8")
    for words in (
        "taken from the folder",
        "HF_ENDPOINT was set after the hub's library had read it",
    ):
        assert words in OWN_DATA
        assert words in sources
    assert "hub: https://<镜像地址> can be reached" in OWN_DATA


DATA = Path(os.environ.get("QLORA_NB_DATA", "not given"))


@pytest.mark.skipif(
    not (DATA / "alpaca_zh_demo.json").is_file(),
    reason="no real data: set QLORA_NB_DATA to a folder that has it",
)
def test_tokens_per_character():
    with lzma.open(DATA / "alpaca" / "alpaca_data.json.xz") as file:
        english = json.load(file)[:2000]
    chinese = json.loads((DATA / "alpaca_zh_demo.json").read_text(encoding="utf-8"))
    assert len(chinese) == 1000
    pythia = PreTrainedTokenizerFast(tokenizer_file=str(DATA / "gpt_neox_20b_tokenizer.json"))
    pocket = AutoTokenizer.from_pretrained(MODEL_DIR)
    rows = re.findall(r"^\| .+ \| ([\d.]+) \| ([\d.]+) \|$", OWN_DATA, re.MULTILINE)
    for tokenizer, written in zip((pythia, pocket), rows, strict=True):
        for data, ratio in zip((chinese, english), written, strict=True):
            texts = [row["instruction"] + row["input"] + row["output"] for row in data]
            n_tokens = sum(len(ids) for ids in tokenizer(texts)["input_ids"])
            assert f"{n_tokens / sum(map(len, texts)):.2f}" == ratio
    assert "`max_length=512` 大约容得下 430 个字符" in OWN_DATA
    assert 430 <= 512 / float(rows[0][0]) < 440
    assert "提示模板还要占去几十个词元" in OWN_DATA
    for template in model_data.TEMPLATES["alpaca"]:
        text = template.format(instruction="", input="")
        assert 20 < len(pythia(text)["input_ids"]) < 60


# ---- the glossary ----------------------------------------------------------------------------------

ROW = r"^\| (.+?) \| (.+?) \| (.*?) \| \[(\d\d)\]\(\.\./notebooks/(.+?)\) (.+) \|$"
TERMS = re.findall(ROW, GLOSSARY, re.MULTILINE)
ELSEWHERE = re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", GLOSSARY, re.MULTILINE)[1:]


def order(term: str) -> str:
    return re.sub(r"[^a-z0-9 ]", "", term.lower())


def test_terms_are_many_sorted_and_each_there_once():
    assert len(TERMS) >= 60
    lines = re.findall(r"^\| (?!English|---)", GLOSSARY, re.MULTILINE)
    assert len(lines) == len(TERMS) + len(ELSEWHERE)
    for table in ([row[0] for row in TERMS], [row[0] for row in ELSEWHERE]):
        assert table == sorted(table, key=order)
    english = [row[0] for row in TERMS] + [row[0] for row in ELSEWHERE]
    chinese = [row[1] for row in TERMS] + [row[1] for row in ELSEWHERE]
    assert len(set(english)) == len(english)
    assert len(set(chinese)) == len(chinese)
    assert {"低秩适配", "双重量化", "分页优化器", "反量化", "困惑度", "张量并行"} <= set(chinese)


def sections(path: Path) -> dict[str, str]:
    """Heading → the text and code beneath it."""
    found: dict[str, str] = {}
    heading = ""
    for cell in nbformat.read(path, 4).cells:
        pieces = [cell.source]
        if cell.cell_type == "markdown":
            pieces = re.split(r"^(#+ .*)$", cell.source, flags=re.MULTILINE)
        for piece in pieces:
            title = re.fullmatch(r"#+ (.*)", piece)
            if title and cell.cell_type == "markdown":
                heading = title[1]
            found[heading] = found.get(heading, "") + piece
    return found


def test_each_term_stands_in_the_section_that_is_named():
    read = {path.name: sections(path) for path in NOTEBOOKS.glob("*.ipynb")}
    for english, _, _, number, name, section in TERMS:
        assert name.startswith(number)
        text = " ".join(read[name][section].lower().split())
        names = [english.split(" (")[0], *re.findall(r"\((.*?)\)", english)]
        assert any(name.lower() in text for name in names), (english, section)


def test_every_symbol_of_the_notebooks_is_in_it():
    known = {symbol for row in TERMS for symbol in re.findall(r"\$(.+?)\$", row[2])}
    asked = set()
    for path in NOTEBOOKS.glob("*.ipynb"):
        tables = re.findall(
            r"^\| symbol .*\n\|[-| ]+\n((?:\|.*\n?)+)", "\n".join(notebook_texts(path)), re.M
        )
        for table in tables:
            for row in table.splitlines():
                asked |= set(re.findall(r"\$(.+?)\$", row.split("|")[1]))
    assert len(asked) > 40
    assert asked <= known, asked - known
