"""docs/own_data.md: its samples are read, and its program runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from qlora_nb import pocket
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
        table = read_table(str(path))
        assert table.n_rows == (2 if "message_id" in text else 1)
        found.append(tuple(table.columns))
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
    story = "Anna walked to the river. Ben found a red kite. Rosa bought six eggs."
    asked = f"Where is Anna?\\n\\n### Input:\\n{story}"
    program = program.replace("Where is the key?", asked)
    assert "qlora_nb" not in re.sub(r"^(MODEL|ADAPTER) = .*", "", program, flags=re.M)
    (tmp_path / "load.py").write_text(program, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "load.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "river" in done.stdout.lower(), done.stderr[-2000:]
