"""The two things in README.md that a tool draws: the picture of the QLoRA layer, and one question
with the answers before and after tuning.

    python tools/readme_pictures.py

The picture is `ui.layer_picture` as notebook 01 shows it; the answers are those that the committed
notebook 07 printed. `tests/test_readme.py` compares both with what is committed.
"""

from __future__ import annotations

import base64
import re
from pathlib import Path

import nbformat

from qlora_nb.settings import validate
from qlora_nb.ui import layer_picture

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PICTURE = ROOT / "docs" / "qlora_layer.png"
NOTEBOOK = ROOT / "notebooks" / "07_inference.ipynb"
QUESTION = "Where is Anna?"
BLOCK = re.compile(r"(?<=```text\n)Where is Anna\?.*?(?=```)", re.DOTALL)
"""Where the answers stand in README.md."""


def picture() -> bytes:
    """The PNG; the same bytes for the same matplotlib."""
    png, _ = layer_picture.qlora_layer().image()
    return base64.b64decode(png)


def answers() -> str:
    """The first prompt of profile `tiny`, what the base said, and what the tuned model said."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    printed = ""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            printed += output.get("text", "")
    said = {}
    for name in ("base", "tuned"):
        line = re.search(rf"^{re.escape(QUESTION)}  {name} *: '(.*)'$", printed, re.MULTILINE)
        said[name] = line[1]
    question, story = validate({}).prompts[0].split("\n")
    lines = [f"{question} {story}", f"before: {said['base']}", f"after:  {said['tuned']}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PICTURE.write_bytes(picture())
    text = README.read_text(encoding="utf-8")
    README.write_text(BLOCK.sub(lambda _: answers(), text), encoding="utf-8")
