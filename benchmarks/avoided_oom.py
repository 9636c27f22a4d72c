"""An out-of-memory error that paged states avoid, on a CUDA card, with the very cells of notebook
05.

    python benchmarks/avoided_oom.py        into qlora_nb/recorded/avoided_oom.json, which the
    notebook shows without a GPU

A reader's run of the notebook writes nothing.
"""

from __future__ import annotations

import bitsandbytes as bnb
import provenance
import torch
from provenance import open_cells

from qlora_nb import recorded

NOTEBOOK = provenance.ROOT / "notebooks" / "05_paged_optimizers.ipynb"
TARGET = provenance.ROOT / "qlora_nb" / "recorded" / "avoided_oom.json"


def run_cells(device: str, **names: object) -> dict[str, object]:
    """Execute the tagged cells; returns their names (`avoided`, `numel`, `capped_step`).

    Args:
        device: where the tensors are made.
        **names: stand-ins for `torch`, `bnb` or `recorded`.
    """
    space = {"torch": torch, "bnb": bnb, "recorded": recorded, "device": device} | names
    for source in open_cells.tagged(NOTEBOOK, "avoided-oom"):
        exec(source, space)
    return space


def measured() -> dict[str, object]:
    """What the cells find on this card, and its size in bytes."""
    free, total = torch.cuda.mem_get_info()
    space = run_cells("cuda")
    return {
        "numel": space["numel"],
        "free_bytes": free,
        "total_bytes": total,
        "avoided": space["avoided"],
    }


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing is measured and nothing is written")
        return 1
    provenance.write(TARGET, provenance.provenance() | measured())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
