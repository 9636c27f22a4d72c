"""Published memory figures, each entered as a configuration and predicted with the same constants.

`published.toml` holds the QLoRA paper's figures, the 2023 article's and others'. A constant fitted
to one of them would miss the others; the table in notebook 06 shows that none is.
"""

import tomllib
from pathlib import Path

import torch
from transformers import AutoConfig

from qlora_nb.memory import budget
from qlora_nb.memory.plan import Plan
from qlora_nb.model import configs


def published_figures() -> list[dict[str, object]]:
    """Every figure of `published.toml` beside its prediction.

    Returns:
        Rows with figure, published and predicted (both in 10^9 bytes), remark (why they differ) and
        source.
    """
    text = Path(__file__).with_name("published.toml").read_text(encoding="utf-8")
    tables = tomllib.loads(text)
    rows = []
    for name, entry in tables["figures"].items():
        shape = tables["shapes"][entry["shape"]]
        rows.append(
            {
                "figure": name,
                "published": entry["published_gb"],
                "predicted": _predicted_bytes(shape, entry) / 1e9,
                "remark": entry["why"],
                "source": entry["source"],
            }
        )
    return rows


def _predicted_bytes(shape: dict, entry: dict) -> int:
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
