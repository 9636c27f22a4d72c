"""docs/own_data.md: its samples are read, and its program runs as it stands."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest

from qlora_nb import pocket
from qlora_nb.model import data, reading
from qlora_nb.model.tables import read_table


@pytest.fixture
def page(root):
    return (root / "docs" / "own_data.md").read_text(encoding="utf-8")


def blocks(page, kinds):
    return re.findall(rf"^```({kinds})\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def test_every_sample_is_read(page, tmp_path):
    found = []
    for i, (kind, text) in enumerate(blocks(page, "json|jsonl|csv")):
        path = tmp_path / f"{i}.{kind}"
        path.write_text(text, encoding="utf-8")
        names, table = read_table(str(path), ())
        assert len(table) == (2 if "message_id" in text else 1)
        columns = {"instruction": "question", "output": "answer"} if "question" in text else {}
        rows = reading.read(str(path), columns)
        assert len(rows.kept) == 1
        assert not rows.left_out
        found.append(tuple(names))
    assert found == [
        ("instruction", "input", "output"),
        ("question", "answer", "source"),
        ("prompt", "completion"),
        ("messages",),
        ("conversations",),
        ("text",),
        ("message_id", "parent_id", "role", "text", "rank"),
    ]


@pytest.mark.slow
def test_the_program_loads_an_adapter_without_the_kit(page, tmp_path):
    ((_, program),) = blocks(page, "python")
    for name, value in (
        ("MODEL", pocket.MODEL_DIR),
        ("ADAPTER", pocket.MODEL_DIR.parent / "adapter"),
    ):
        program, n = re.subn(rf'^{name} = "[^"]*"', f"{name} = {str(value)!r}", program, flags=re.M)
        assert n == 1
    prompt = re.search(r"^PROMPT = (\(.*?^\))", program, re.MULTILINE | re.DOTALL)[1]
    assert ast.literal_eval(prompt) == data.TEMPLATES["alpaca"][1]
    program = program.replace(prompt, repr(data.TEMPLATES["alpaca_short"][1]))  # the pocket model's
    story = "Anna walked to the river. Ben found a red kite. Rosa bought six eggs."
    asked = f"Where is Anna?\\n\\n### Input:\\n{story}"
    program = program.replace("Where is the key?", asked)
    assert "qlora_nb" not in re.sub(r"^(MODEL|ADAPTER) = .*", "", program, flags=re.M)
    assert "river" in output_of(program, tmp_path).lower()


@pytest.mark.slow
def test_the_lines_for_chats_run_too(page, tmp_path):
    ((_, program),) = blocks(page, "python")
    lines = re.search(r"^# turns = .*?^# \)\S+$", program, re.MULTILINE | re.DOTALL)[0]
    template = "{% for turn in messages %}<{{ turn.content }}>{% endfor %}"
    before = f"""
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(pocket.MODEL_DIR)!r})
tokenizer.chat_template = {template!r} + "{{% if add_generation_prompt %}}Yes:{{% endif %}}"
"""
    after = "\nprint(tokenizer.decode(ids[0]))"
    said = output_of(before + re.sub("^# ", "", lines, flags=re.MULTILINE) + after, tmp_path)
    assert said.strip() == "<Where is the key?>Yes:"


def output_of(program, folder):
    (folder / "program.py").write_text(program, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
