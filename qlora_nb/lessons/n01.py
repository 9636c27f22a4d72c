"""Notebook 01, setup: QLoRA as a whole, and what this machine can do, before a model is loaded.

- `check_layer`: an exercise, a QLoRA layer written by the reader;
- `check_weight_gib`: an exercise, GiB of 4-bit weights;
- `profiles_here`: table of the four profiles, each with its predicted peak, and why one is refused;
- `downloads`: what would come from the hub.
"""

import torch
from bitsandbytes import functional
from torch import Tensor

from qlora_nb import cards, machine, sources
from qlora_nb.errors import KitError
from qlora_nb.lessons import n02
from qlora_nb.memory import budget, preflight
from qlora_nb.memory.plan import plan_of
from qlora_nb.pythia import PYTHIA
from qlora_nb.settings import PROFILES, validate
from qlora_nb.ui import checks
from qlora_nb.ui.written import Written


def by_libraries(x, codes, table, scales, *adapter) -> Tensor:
    """A QLoRA layer: bitsandbytes unpacks the weights, PEFT adds the adapter.

    Args:
        x: (…, in) inputs.
        codes: (blocks, weights of a block) places in the table.
        table: (values,) what a code stands for.
        scales: (blocks,) the largest weight of each block.
        *adapter: A (r, in), B (out, r) and alpha.

    Returns:
        (…, out).
    """
    block = codes.shape[1]
    packed = codes.to(torch.uint8)
    flat = functional.dequantize_blockwise(packed, absmax=scales, code=table, blocksize=block)
    weight = flat.view(-1, x.shape[-1])
    return n02.in_peft(x, weight, *adapter)


def two_layers() -> list[tuple]:
    """Arguments of `by_libraries`: to check by hand, and as bitsandbytes quantizes a matrix."""
    x, _, *adapter = n02.BY_HAND
    codes = torch.tensor([[2, 0], [1, 2]])
    table = torch.tensor([-1.0, 0.0, 1.0])
    scales = torch.tensor([0.5, 3.0])
    by_hand = (x, codes, table, scales, *adapter)

    x, weight, *adapter = n02.at_random()
    packed, state = functional.quantize_4bit(weight, quant_type="nf4")
    codes = torch.hstack([packed >> 4, packed & 15]).view(-1, state.blocksize)
    return [by_hand, (x, codes.long(), state.code, state.absmax, *adapter)]


check_layer = Written(
    "qlora_layer",
    by_libraries,
    two_layers,
    "bitsandbytes and PEFT together",
    "a weight is its value in the table times the scale of its block; then it is a LoRA layer",
)
"""Exercise: `qlora_layer(x, codes, table, scales, A, B, alpha)`."""

check_weight_gib = checks.exercise(
    "GiB of weights",
    want=11.8e9 / 2 / cards.GIB,
    hint="4 bits are half a byte, and a GiB has 2^30 bytes, not 10^9",
    tolerance=0.01,
)
"""Exercise: memory of 11.8 billion weights of 4 bits."""


def profiles_here(here: machine.Machine) -> list[dict[str, str]]:
    """One row a profile: its model, the predicted peak of its fine-tuning (GiB), and whether it
    runs on this machine.
    """
    rows = []
    for name in PROFILES:
        settings = validate({"profile": name})
        row = {
            "profile": name,
            "model": settings.model_id,
            "peak, fine-tuning (GiB)": "known after its fetch",
            "runs here": "yes",
        }
        rows.append(row)
        try:
            plan = plan_of(settings, on_gpu=name in ("t4", "full"))
            row["peak, fine-tuning (GiB)"] = f"{budget.peak(plan).total_gib:.2f}"
            if not here.gpus:
                size = sources.download_bytes(settings.model_id)
                preflight.refuse_on_cpu(settings.model_id, size or 0, here)
            preflight.require_fit(settings, here)
        except KitError as error:
            reason = error.what.split(":")[0].split(", this machine")[0]
            row["runs here"] = f"no: {reason}"
    return rows


def downloads(settings) -> list[str]:
    """One sentence for model, data and pythia-12b each: how much would come from the hub (GB of
    10^9 bytes).
    """
    lines = []
    for what, name in (("model", settings.model_id), ("dataset", settings.dataset)):
        size = sources.download_bytes(name)
        if sources.is_here(name) or sources.in_hub_cache(name, what):
            said = "already here, nothing to download"
        elif size is None:
            said = "size known only to the hub to download"
        else:
            said = f"about {size / 1e9:.1f} GB to download"
        lines.append(f"{what} {name}: {said}")
    size = f"{2 * PYTHIA['12b'].n_parameters / 1e9:.1f} GB"
    unit = "GB of 10^9 bytes, as disks are sold"
    return [*lines, f"for comparison, EleutherAI/pythia-12b: {size} ({unit})"]
