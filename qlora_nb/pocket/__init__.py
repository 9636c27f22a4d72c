"""The pocket model: a small GPT-NeoX, really trained, that ships with its data so that everything
runs offline.

Model, adapter and data are made by `tools/build_pocket.py` from the micro-world in
`tools/micro_world.py`.
"""

import gzip
import json
from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
ADAPTER_DIR = Path(__file__).parent / "adapter"
DATA_DIR = Path(__file__).parent / "data"


def read(name: str) -> list[dict[str, str]]:
    """Rows of a data file: `train`, `test` (instruction, input, output, kind), `almanac` (prompt,
    answer), `stories` (text).
    """
    with gzip.open(DATA_DIR / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
