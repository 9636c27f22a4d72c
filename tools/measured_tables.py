"""Predictions beside measurements that a laptop cannot repeat: write the tables that notebooks 01
and 06 show, `qlora_nb/recorded/gpu_table.json` and `true_size_table.json`.

    python tools/measured_tables.py

What was measured stands in the records of `benchmarks/gpu.py` and `benchmarks/true_size.py`; what
is predicted now is the ledger's. A few seconds. `tests/test_on_a_card.py` and
`tests/test_true_size.py` compare what is committed with the records and what is predicted now.
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


TABLES = {"gpu_table": on_a_card, "true_size_table": at_true_size}
"""Name in `qlora_nb/recorded` → what makes its rows."""


if __name__ == "__main__":
    for name, make in TABLES.items():
        text = json.dumps(make(), indent=1, ensure_ascii=False) + "\n"
        (recorded.FOLDER / f"{name}.json").write_text(text, encoding="utf-8")
