"""Published memory figures, each entered as a configuration and predicted with the same
constants.
"""

import tomllib
from pathlib import Path

import torch
from transformers import AutoConfig

from qlora_nb.memory import budget, dry_run
from qlora_nb.model import configs


def published_figures() -> list[dict[str, object]]:
    """Every figure of `published.toml`, entered as a configuration and predicted with the same
    constants.

    Returns:
        Rows with figure, published and predicted (both in 10^9 bytes), remark (why they differ) and
        source.
    """
    rows = []
    for name, row in tomllib.loads(
        (Path(__file__).parent / "published.toml").read_text(encoding="utf-8")
    ).items():
        shape = row["config"]
        config = (
            configs.pythia_config(shape["pythia"])
            if "pythia" in shape
            else AutoConfig.for_model(**shape)
        )
        if row["moment"] == "peak":
            step = {
                name: getattr(torch, value) if "dtype" in name else value
                for name, value in row["step"].items()
            }
            predicted = budget.peak(
                budget.Plan(config, dry_run.Step(**step), **row.get("plan", {}))
            ).total_bytes
        else:  # all weights, alone or with everything that full fine-tuning keeps for each of them
            predicted = row["bytes_per_parameter"] * sum(
                p.numel() for p in configs.meta_model(config).parameters()
            )
        figures = {"figure": name, "published": row["published_gb"], "predicted": predicted / 1e9}
        rows.append(figures | {"remark": row["why"], "source": row["source"]})
    return rows
