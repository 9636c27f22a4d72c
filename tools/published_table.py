"""Published memory figures beside the ledger's predictions: write `docs/published_figures.md` and
the table that notebook 06 shows, `qlora_nb/recorded/published.json`.

    python tools/published_table.py

`published.toml` holds the QLoRA paper's figures, the 2023 article's and others', each entered as a
configuration and predicted with the same constants. A constant fitted to one of them would miss the
others; the table shows that none is.

Half a minute on one core. `tests/test_published.py` compares what is committed with what is written
now, so that no prediction changes unseen.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import torch
from transformers import AutoConfig

from qlora_nb import recorded
from qlora_nb.memory import budget
from qlora_nb.memory.plan import Plan
from qlora_nb.model import configs

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "published_figures.md"
SOURCE = Path(__file__).with_name("published.toml")
FIGURES = recorded.FOLDER / "published.json"
ALLOCATOR = ROOT / "benchmarks" / "results" / "allocator.json"
COLUMNS = ("figure", "published", "predicted", "difference", "their own code, counted", "cause")

TEXT = """# Published memory figures

What others have measured or calculated, beside what `budget.peak` predicts for the same
configuration, in GB (10^9 bytes). Configurations were taken from the sources and entered before
anything was predicted; no constant is fitted to a figure.

A prediction is for *this kit's* libraries. Where a source's own code of that time could be run
without memory (on torch's *meta* device), its weights and the tensors alive at the peak were
counted too: that tells a difference in code from a fault of the ledger. Sources were looked at on
{looked_at}.

Counted was litgpt at three commits, its 4-bit layers keeping and unpacking what bitsandbytes 0.41
and 0.42 do; qlora.py with transformers 4.31 and PEFT 0.4; Unsloth's neighbour with transformers
4.47 and PEFT 0.14. Attention is fused in all but qlora.py's. Two things about litgpt were found by
comparing and are not said by its sources. Its resource tables name commit 8641822, which counts
13.08 and 21.39 GB for 7B and 13B; the column has 0cc02af, eight days younger, whose RMSNorm
computes in float32. And its 2 × 512 stands for two full micro-batches one after the other; the
first alone counts 12.05, 12.46, 15.64, 9.30, 5.06 GB in the order of the table (e549398, 00af8b0).

The same count meets figures of litgpt that the ledger has no plan for: phi-1.5 and StableLM-3B in
NF4 3.70 and 6.17 GB (published 3.72, 6.19), without quantization and 1, 2, 4 rows 4.79, 6.74, 10.64
(4.82, 6.76, 10.68) and 9.68, 12.08, 16.87 (9.69, 12.10, 16.92), Llama-2-7B with 1 and 2 rows 21.22
and 28.95 (21.30, 29.07), 13B with 1 row 37.94 (38.12).

"""


def published_figures() -> list[dict[str, object]]:
    """Every figure of `published.toml` beside its prediction.

    Returns:
        Rows with figure, published and predicted (both in 10^9 bytes), remark (why they differ) and
        source.
    """
    tables = tomllib.loads(SOURCE.read_text(encoding="utf-8"))
    rows = []
    for name, entry in tables["figures"].items():
        shape = tables["shapes"][entry["shape"]]
        rows.append(
            {
                "figure": name,
                "published": entry["published_gb"],
                "predicted": predicted_bytes(shape, entry) / 1e9,
                "remark": entry["why"],
                "source": entry["source"],
            }
        )
    return rows


def predicted_bytes(shape: dict, entry: dict) -> int:
    """Predicted peak of an entry, or the bytes of all weights, as it says."""
    if "pythia" in shape:
        config = configs.pythia_config(shape["pythia"])
    else:
        config = AutoConfig.for_model(**shape)
    if "bytes_per_parameter" in entry:
        n_parameters = sum(p.numel() for p in configs.meta_model(config).parameters())
        return entry["bytes_per_parameter"] * n_parameters
    fields = dict(entry["plan"])
    for name in ("dtype", "rest_dtype"):
        if name in fields:
            fields[name] = getattr(torch, fields[name])
    if "target_modules" in fields:
        fields["target_modules"] = tuple(fields["target_modules"])
    return budget.peak(Plan(config, **fields)).total_bytes


def table(figures: dict[str, dict], rows: list[dict[str, object]]) -> list[str]:
    """Lines of the table: a figure a line."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        counted = figures[row["figure"]].get("counted_gb", "")
        difference = row["predicted"] / row["published"] - 1
        if counted:
            of_counted = counted / row["published"] - 1
            counted = f"{counted:.2f} ({of_counted:+.1%})"
        cells = [
            row["figure"],
            f"{row['published']:.2f}",
            f"{row['predicted']:.2f}",
            f"{difference:+.1%}",
            counted,
            row["remark"],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def configurations(figures: dict[str, dict]) -> list[str]:
    """Lines of a list: where each figure stands, what was read, and its configuration."""
    lines = []
    for name, entry in figures.items():
        lines.append(f"- **{name}**: [{entry['source']}]({entry['address']}).")
        lines.append(f"  Read: {entry['measured']}. {entry['setup']}.")
    return lines


def allocator() -> str:
    """What is added for the allocator, beside the simulation."""
    summary = json.loads(ALLOCATOR.read_text(encoding="utf-8"))["summary"]
    added = f"{budget.SLACK:.0%}"
    simulated = f"{summary['smallest']:.0%} to {summary['largest']:.0%}"
    return (
        f"Of changing memory {added} are added for what the allocator holds in reserve "
        "(`budget.SLACK`, as measured on one card: [gpu.md](gpu.md)). A simulation of torch's "
        f"allocator on whole steps of pythia-1.4b and 12b reserves {simulated} more than their "
        "tensors hold ([benchmarks/results/allocator.json](../benchmarks/results/allocator.json)); "
        "what is reserved and not used torch gives back before it runs out of memory. Figures of "
        "allocated memory, litgpt's among them, do not contain it."
    )


def render(rows: list[dict[str, object]]) -> str:
    """The whole page, from `published_figures`."""
    tables = tomllib.loads(SOURCE.read_text(encoding="utf-8"))
    figures = tables["figures"]
    lines = [
        TEXT.format(looked_at=tables["looked_at"]).strip(),
        "",
        *table(figures, rows),
        "",
        "## The allocator",
        "",
        allocator(),
        "",
        "## Sources and configurations",
        "",
        *configurations(figures),
        "",
        "Written by `tools/published_table.py` from `tools/published.toml`.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    found = published_figures()
    PAGE.write_text(render(found), encoding="utf-8")
    FIGURES.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
