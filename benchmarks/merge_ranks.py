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
        `gap`: median distance of the largest logit from the second; `ways`: way → what `scores`
        returns.
    """
    tokenizer = load.load_tokenizer(settings)
    _, rows = data.load(settings)
    encoded = data.tokenize_rows(rows, tokenizer, settings)
    inputs = [torch.tensor([ids]) for ids in encoded["input_ids"][:N_INPUTS]]

    @torch.no_grad()
    def answered(model) -> tuple[torch.Tensor, dict]:
        logits = torch.cat([model(input_ids=ids).logits[0] for ids in inputs])
        return logits, evaluate.held_out(model, tokenizer, rows, settings)

    trained = adapters.load_adapter(load.load_base(settings), adapter)
    before = answered(trained)
    first, second = before[0].topk(2).values.unbind(-1)
    ways = {"not merged": scores(before, before)}
    for way in merge.ways_for(settings):
        ways[way] = scores(before, answered(merge.merged(settings, adapter, way)))
    return {"gap": round((first - second).median().item(), 4), "ways": ways}


def scores(before: tuple[torch.Tensor, dict], after: tuple[torch.Tensor, dict]) -> dict[str, float]:
    """What is recorded of one way, from logits and `evaluate.held_out` before merging and after."""
    differences = (after[0] - before[0]).abs()
    pairs = list(zip(before[1]["said"], after[1]["said"], strict=True))
    changed = [old != new for old, new in pairs]
    return {
        "mean difference (logits)": float(f"{differences.mean():.4g}"),
        "largest difference (logits)": float(f"{differences.max():.4g}"),
        "answers that change (%)": round(100 * sum(changed) / len(changed), 2),
        "held-out loss (nats)": round(after[1]["loss"], 5),
        "exact match (%)": round(100 * after[1]["exact_match"]["all"], 2),
    }


def main() -> None:
    target = provenance.ROOT / "qlora_nb" / "recorded" / "merge_ranks.json"
    known = json.loads(target.read_text())["by_rank"] if target.is_file() else {}
    record = provenance.provenance((0,))  # before a file is written: the working copy is clean
    for r in map(int, sys.argv[1:] or ("2", "8", "32")):
        with tempfile.TemporaryDirectory() as folder:
            settings = validate(
                {"r": r, "lora_alpha": 2 * r, "save_steps": 0, "seed": 0, "output_dir": folder}
            )
            known[str(r)] = compare(settings, train(settings))
        print(r, known[str(r)], flush=True)
        shown = {
            name: settings.model_dump()[name]
            for name in ("model_id", "dataset", "max_steps", "learning_rate", "eval_rows")
        }
        shown["lora_alpha / r"] = 2
        by_rank = {r: known[r] for r in sorted(known, key=int)}
        provenance.write(target, {**record, "settings": shown, "by_rank": by_rank})


if __name__ == "__main__":
    main()
