"""Tables that depend on nothing that a reader sets: write `gpu_table.json`, `true_size_table.json`,
`cards_table.json` and `steps_table.json` into `qlora_nb/recorded`, which notebooks 01 and 06 show.

    python tools/recorded_tables.py

The first two set predictions beside measurements that a laptop cannot repeat, the records of
`benchmarks/gpu.py` and `benchmarks/true_size.py`; the third says what fits a card, the fourth what
each idea of QLoRA removes. What is predicted is the ledger's. A few seconds.
`tests/test_on_a_card.py`, `tests/test_true_size.py`, `tests/test_panels.py` and
`tests/test_figures_setup.py` compare what is committed with the records and with what is predicted
now.
"""

from __future__ import annotations

import json
from dataclasses import replace

from qlora_nb import cards, recorded
from qlora_nb.memory import budget, ledger
from qlora_nb.memory.plan import plan_of
from qlora_nb.model import configs
from qlora_nb.settings import validate
from qlora_nb.theory import paging
from qlora_nb.ui import charts


def on_a_card() -> dict[str, dict[str, float]]:
    """One row for each setting whose peak was measured on a card (`benchmarks/gpu.py`): predicted
    before a card was seen, predicted with what that one showed of CUDA's own share, and measured.
    """
    record, _ = recorded.read("gpu")
    config = configs.pythia_config(record["shape"])
    how = {"profile": "full", "compute_dtype": "bfloat16", "gradient_accumulation_steps": 2}
    rows = {}
    for name, found in record["peaks"].items():
        settings = validate({**how, **found["values"]})
        now = budget.peak(plan_of(settings, config=config, on_gpu=True)).total_bytes
        rows[f"pythia-{record['shape']}, {name}"] = {
            "predicted before (GiB)": found["predicted"] / cards.GIB,
            "now (GiB)": now / cards.GIB,
            "measured (GiB)": found["process"] / cards.GIB,
            "off (%)": 100 * (now / found["process"] - 1),
        }
    return rows


def at_true_size() -> dict[str, dict[str, float]]:
    """One row for each Pythia whose training was measured at its true size on a CPU
    (`benchmarks/true_size.py`): seconds of a step, estimated before and measured; peak memory,
    predicted and measured.
    """
    record, _ = recorded.read("true_size")
    rows = {}
    for case, stages in record["cases"].items():
        trained = stages["train"]
        peak = trained["lines"]["peak"]
        seconds = trained["seconds_at_each_step"]
        rows[f"pythia-{case}"] = {
            "step, estimated (s)": trained["estimated_seconds_a_step"],
            "step, measured (s)": seconds[-1] / len(seconds),
            "peak, predicted (GiB)": peak["predicted"] / cards.GIB,
            "peak, measured (GiB)": peak["measured"] / cards.GIB,
            "off (%)": trained["peak_off_percent"],
        }
    return rows


CARDS_GIB = (8.0, 12.0, 16.0, 24.0, 48.0)


def what_fits(settings) -> list[dict[str, str]]:
    """One row for each of `CARDS_GIB`: the largest Pythia that answers on it, that fine-tunes with
    these settings, and that fine-tunes with options that save memory, which are named.
    """
    rows = []
    for size_gib in CARDS_GIB:
        row = {"card": f"{size_gib:g} GiB"}
        ways = {
            "answering": (False, False),
            "fine-tuning": (True, False),
            "fine-tuning with options": (True, True),
        }
        for way, (train, with_options) in ways.items():
            fit = budget.largest_pythia(settings, size_gib * cards.GIB, train, with_options)
            row[way] = "none"
            if fit is not None:
                size, peak, options = fit
                row[way] = f"{size} ({peak.total_gib:.1f} GiB)"
        row["options"] = "none is enough"
        if fit is not None:
            taken = []
            for option in options:
                taken.append(", ".join(f"{name}={new}" for name, new in option.changes.items()))
            row["options"] = "; ".join(taken) if taken else "none needed"
        rows.append(row)
    return rows


def tuned_whole(plan) -> ledger.Ledger:
    """Predicted peak when every weight is tuned: a gradient in 16 bit and Adam's two states in
    float32 for each. Activations are taken to be those of the same plan with LoRA.
    """
    n_weights = configs.meta_model(plan.config).num_parameters()
    states = ledger.optimizer_bytes([n_weights], "adamw_torch")
    sizes = {ledger.LORA: 0, ledger.GRADIENTS: 2 * n_weights, ledger.STATES: states}
    return _with(sizes, budget.peak(plan))


def with_pages(plan) -> ledger.Ledger:
    """Predicted peak, with the states that bitsandbytes pages in a line of their own."""
    shapes = configs.meta_model(plan.config)
    numels = ledger.lora_numels(shapes, plan.r, plan.target_modules)
    paged, rest = paging.paged_bytes(numels)
    return _with({ledger.STATES: rest, charts.PAGED: paged}, budget.peak(plan))


def _with(sizes: dict[str, int], found: ledger.Ledger) -> ledger.Ledger:
    """A ledger with these lines instead of its own."""
    lines = [line for line in found.lines if line.name not in sizes]
    for name, size in sizes.items():
        lines.append(ledger.Line(name, size, ""))
    return ledger.Ledger(found.title, tuple(lines))


def steps_to_qlora(settings) -> dict[str, dict[str, int]]:
    """The predicted peak of fine-tuning on a card, line by line (bytes), from every weight trained
    in 16 bit to QLoRA: each step has one more of its ideas.
    """
    qlora = plan_of(settings, on_gpu=True)
    unpaged = replace(qlora, optim="adamw_torch")
    once_quantized = replace(unpaged, double_quant=False)
    in_16_bit = replace(unpaged, four_bit=False)
    steps = {
        "every weight trained, 16 bit": tuned_whole(in_16_bit),
        "+ LoRA": budget.peak(in_16_bit),
        "+ NF4": budget.peak(once_quantized),
        "+ double quantization": budget.peak(unpaged),
        "+ paged optimizer": with_pages(qlora),
    }
    rows = {}
    for step, peak in steps.items():
        rows[step] = {line.name: line.bytes for line in peak.lines}
    return rows


if __name__ == "__main__":
    tables = {
        "gpu_table": on_a_card(),
        "true_size_table": at_true_size(),
        "cards_table": what_fits(validate({"profile": "full"})),
        "steps_table": steps_to_qlora(validate({"profile": "full"})),
    }
    for name, rows in tables.items():
        text = json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
        (recorded.FOLDER / f"{name}.json").write_text(text, encoding="utf-8")
