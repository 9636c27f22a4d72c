"""The ledger against live objects: what stays, to the byte, and the peak memory of a step, as
torch's profiler sees it.

    python benchmarks/memory.py [pocket smollm2 70m 410m]      into benchmarks/results/memory.json

Pythias have their true shape and random weights. A peak is measured over a whole second step
(forward, loss, backward) on the
CPU in float32: every allocation and release of torch's allocator in order, the largest running sum.
Activations on a GPU are not measured here.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
import warnings
from contextlib import nullcontext
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import bitsandbytes as bnb
import provenance
import torch
from provenance import open_cells
from transformers import AutoModelForCausalLM

from qlora_nb.memory import budget, ledger, profiler
from qlora_nb.memory.plan import plan_of
from qlora_nb.model import chunked_loss, configs, load
from qlora_nb.settings import validate

TARGET = provenance.ROOT / "benchmarks" / "results" / "memory.json"
SHAPES = [(1, 64), (4, 128), (1, 512)]
SETTINGS = [
    (*shape, *levers)
    for shape, levers in itertools.product(SHAPES, itertools.product((True, False), (0, 128)))
]
OPTIMIZERS = {
    "paged_adamw_32bit": bnb.optim.PagedAdamW32bit,
    "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
}


def weigh_a_step(model, rows: int, tokens: int, loss_chunk: int) -> int:
    """Peak bytes of forward, loss and backward; all tokens train."""
    ids = torch.randint(
        5, model.config.vocab_size - 1, (rows, tokens), generator=torch.Generator().manual_seed(1)
    )
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    if rows > 1:
        inputs["attention_mask"][0, -3:] = 0
    with (
        profiler.measure_peak() as moved,
        chunked_loss.chunked_head(model, loss_chunk) if loss_chunk else nullcontext() as loss,
    ):
        (loss(model(**inputs), ids) if loss_chunk else model(**inputs, labels=ids).loss).backward()
    model.zero_grad(set_to_none=True)
    return moved.peak_bytes


def peaks(model_id: str) -> list[dict]:
    """Predicted and measured peak for every setting."""
    found = []
    for rows, tokens, checkpointing, loss_chunk in SETTINGS:
        values = {
            "gradient_checkpointing": checkpointing,
            "loss_chunk": loss_chunk,
            "max_length": tokens,
        }
        settings = validate({"model_id": model_id, "per_device_train_batch_size": rows, **values})
        lines = budget.peak(plan_of(settings, on_gpu=False))
        predicted = lines.sum((ledger.GRADIENTS, budget.KEPT, budget.WORK))
        model = open_cells.attach_adapter(load.load_base(settings), settings).train()
        measured = weigh_a_step(model, rows, tokens, loss_chunk)
        found.append(
            {"rows": rows, "tokens": tokens, **values, "predicted": predicted, "measured": measured}
        )
        found[-1]["off_percent"] = round(100 * (predicted / measured - 1), 2)
        print(model_id.rsplit("/", 1)[-1], found[-1], flush=True)
    return found


def static(model_id: str) -> list[dict]:
    """Model, adapter, gradients and states after a real step, line by line; the number of bytes
    that differ.
    """
    found = []
    for double_quant, (optim, kind) in itertools.product((True, False), OPTIMIZERS.items()):
        settings = validate({"model_id": model_id, "double_quant": double_quant, "optim": optim})
        model = open_cells.attach_adapter(load.load_base(settings), settings).train()
        optimizer = kind([p for p in model.parameters() if p.requires_grad])
        ids = torch.arange(5, 17).reshape(1, 12)
        model(input_ids=ids, labels=ids).loss.backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a CPU has nothing to page
            optimizer.step()
        measured, predicted = ledger.measure(model, optimizer), ledger.predict(plan_of(settings))
        apart = sum(abs(measured[name] - predicted[name]) for name in ledger.ORDER)
        row = {
            "double_quant": double_quant,
            "optim": optim,
            "bytes": measured.total_bytes,
            "bytes_apart": apart,
        }
        print(model_id.rsplit("/", 1)[-1], row, flush=True)
        found.append(row)
    return found


def main() -> None:
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:] or ["pocket", "smollm2", "70m", "410m"]:
            model_id = name
            if name not in ("pocket", "smollm2"):
                model_id = str(Path(folder) / f"pythia-{name}")
                torch.manual_seed(0)
                config = configs.pythia_config(name)
                AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(
                    model_id
                )
            results[name] = {"static": static(model_id), "peaks": peaks(model_id)}
    worst = max(abs(row["off_percent"]) for model in results.values() for row in model["peaks"])
    apart = sum(row["bytes_apart"] for model in results.values() for row in model["static"])
    n = sum(len(model["peaks"]) for model in results.values())
    summary = {"settings": n, "largest_miss_percent": worst, "static_bytes_apart": apart}
    provenance.write(
        TARGET,
        {**provenance.provenance((0, 1)), "summary": summary, "unit": "bytes", "models": results},
    )


if __name__ == "__main__":
    main()
