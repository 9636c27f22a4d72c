"""What merging changes, at several ranks: the trained model beside itself merged into the
dequantized, the packed and the original weights.

    python benchmarks/merge_ranks.py 2 8 32                       into
    qlora_nb/recorded/merge_ranks.json

Each rank is trained in profile tiny with notebook 06's own cells, with alpha = 2 r, so that the
factor alpha / r is the same. Run it again with other ranks and they are added.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import provenance
import torch
from provenance import open_cells

from qlora_nb.answer import adapters, evaluate, merge
from qlora_nb.model import data, load
from qlora_nb.record import runs
from qlora_nb.settings import validate

N_INPUTS = 16
"""Held-out rows, prompt and answer, whose logits are compared."""


def train(settings) -> Path:
    """A whole training; the folder of its adapter."""
    tokenizer = load.load_tokenizer(settings)
    model = open_cells.attach_adapter(load.load_base(settings), settings)
    rows, _ = data.load(settings)
    encoded = data.tokenize_rows(rows, tokenizer, settings)
    run = runs.Run(settings, "merge_ranks")
    with contextlib.redirect_stdout(io.StringIO()):
        found = open_cells.finetune(
            model, tokenizer, encoded, settings, run, report=lambda step: None
        )
    return found["adapter"]


def compare(settings, adapter: Path) -> dict[str, object]:
    """The model that was trained, and each way of merging it.

    Returns:
        `gap`: median distance of the largest logit from the second; `ways`: way → `logits` (largest
        difference), `answers` (share that change), `loss` (nats), `exact_match`.
    """
    tokenizer = load.load_tokenizer(settings)
    _, rows = data.load(settings)
    encoded = data.tokenize_rows(rows, tokenizer, settings)
    inputs = [torch.tensor([ids]) for ids in encoded["input_ids"][:N_INPUTS]]
    trained = adapters.load_adapter(load.load_base(settings), adapter)
    with torch.no_grad():
        wanted = [trained(input_ids=ids).logits for ids in inputs]
    first, second = torch.cat(wanted, dim=1).topk(2).values.unbind(-1)
    before = evaluate.held_out(trained, tokenizer, rows, settings)
    ways = {"not merged": scores(before, before, 0.0)}
    for way in merge.ways_for(settings):
        merged = merge.merged(settings, adapter, way)
        differ = merge.logit_difference(merged, wanted, inputs)
        after = evaluate.held_out(merged, tokenizer, rows, settings)
        ways[way] = scores(before, after, differ)
    return {"gap": round((first - second).median().item(), 4), "ways": ways}


def scores(before: dict, after: dict, differ: float) -> dict[str, float]:
    """What is recorded of one way, from `evaluate.held_out` before merging and after it."""
    changed = [old != new for old, new in zip(before["said"], after["said"], strict=True)]
    return {
        "logits": float(f"{differ:.4g}"),
        "answers": round(sum(changed) / len(changed), 4),
        "loss": round(after["loss"], 5),
        "exact_match": round(after["exact_match"]["all"], 4),
    }


def main() -> None:
    target = provenance.ROOT / "qlora_nb" / "recorded" / "merge_ranks.json"
    known = json.loads(target.read_text())["by_rank"] if target.is_file() else {}
    for r in map(int, sys.argv[1:] or ("2", "8", "32")):
        with tempfile.TemporaryDirectory() as folder:
            settings = validate(
                {"r": r, "lora_alpha": 2 * r, "save_steps": 0, "output_dir": folder}
            )
            known[str(r)] = compare(settings, train(settings))
        print(r, known[str(r)], flush=True)
        shown = {
            name: settings.model_dump()[name]
            for name in ("model_id", "dataset", "max_steps", "learning_rate", "eval_rows")
        }
        shown["lora_alpha / r"] = 2
        record = provenance.provenance((settings.seed,))
        by_rank = {r: known[r] for r in sorted(known, key=int)}
        provenance.write(target, {**record, "settings": shown, "by_rank": by_rank})


if __name__ == "__main__":
    main()
