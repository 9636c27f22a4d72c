"""Tables that depend on nothing that a reader sets: write `gpu_table.json`, `true_size_table.json`
and `cards_table.json` into `qlora_nb/recorded`, which notebooks 01 and 06 show.

    python tools/recorded_tables.py

The first two set predictions beside measurements that a laptop cannot repeat, the records of
`benchmarks/gpu.py` and `benchmarks/true_size.py`; the third says what fits a card. What is
predicted is the ledger's. A few seconds. `tests/test_on_a_card.py`, `tests/test_true_size.py` and
`tests/test_panels.py` compare what is committed with the records and with what is predicted now.
"""

from __future__ import annotations

import json

from qlora_nb import cards, recorded
from qlora_nb.memory import budget
from qlora_nb.memory.plan import plan_of
from qlora_nb.model import configs
from qlora_nb.settings import validate


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


if __name__ == "__main__":
    tables = {
        "gpu_table": on_a_card(),
        "true_size_table": at_true_size(),
        "cards_table": what_fits(validate({"profile": "full"})),
    }
    for name, rows in tables.items():
        text = json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
        (recorded.FOLDER / f"{name}.json").write_text(text, encoding="utf-8")
