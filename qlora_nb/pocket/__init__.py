"""The pocket model: a small GPT-NeoX, really trained, that ships with its data.

It has the architecture of the Pythias (parallel attention and feed-forward, rotary positions, an
untied head) with 2 million parameters, and it was trained on stories about a made-up micro-world.
So every notebook runs offline on a CPU, and a fine-tuning run of a minute changes its answers.
Two adapters ship with it: `adapter` answers questions about a story, `rewriter` makes a question of
a sentence. Model, adapters and data are made by `tools/build_pocket.py` from
`tools/micro_world.py`; `seal.json` holds their hashes.
"""

import gzip
import json
from pathlib import Path

HERE = Path(__file__).parent

MODEL_DIR = HERE / "model"
ADAPTER_DIR = HERE / "adapter"
REWRITER_DIR = HERE / "rewriter"
DATA_DIR = HERE / "data"


def read(name: str) -> list[dict[str, str]]:
    """Rows of a data file: `train`, `test` (instruction, input, output, kind), `almanac` (prompt,
    answer), `stories` (text), `sentences` (as `train`: what `rewriter` is asked to rewrite).
    """
    with gzip.open(DATA_DIR / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
