"""The sizes of one QLoRA step of a Pythia, for the arithmetic of notebook 05.

`theory.paging` simulates steps of any sizes; here they are those of a real model: stored bytes from
the ledger, activations from the dry run. They change a thousand times while a reader moves a
slider, so what does not depend on the rank or the length is counted once.
"""

import bisect
import functools
from dataclasses import asdict

from qlora_nb.memory import dry_run, ledger
from qlora_nb.memory.plan import Plan
from qlora_nb.model import configs
from qlora_nb.theory import paging


def step_sizes(pythia: str, r: int, tokens: int, bits: int = 32) -> paging.StepSizes:
    """Sizes of one QLoRA step of a Pythia: NF4 with double quantization, rest float16, LoRA on
    every linear layer, checkpointing.

    Activations are counted for the powers of two next to `tokens`; between them they grow in
    proportion.

    Args:
        pythia: size, "14m" … "12b".
        r: LoRA rank.
        tokens: tokens in one forward pass (rows × length).
        bits: 32 or 8, width of the optimizer states.
    """
    config = configs.pythia_config(pythia)
    weights, sides = _pythia_parts(pythia)
    paged, fixed = state_split(pythia, r, bits)
    adapter = 4 * r * sum(sides)
    low = 2 ** (max(tokens, 1).bit_length() - 1)
    activations = asdict(dry_run.dry_run(Plan(config, length=low, r=r)))
    if tokens > low:
        double = asdict(dry_run.dry_run(Plan(config, length=2 * low, r=r)))
        for name, near in activations.items():
            activations[name] = near + (double[name] - near) * (tokens - low) // low
    return paging.StepSizes(
        n_layers=config.num_hidden_layers,
        weights=weights,
        adapter=adapter,
        gradients=adapter,
        paged=paged,
        fixed=fixed,
        **activations,
    )


def state_split(pythia: str, r: int, bits: int = 32) -> tuple[int, int]:
    """(paged, not paged) bytes of Adam's states on a GPU for a Pythia with LoRA of rank r on every
    linear layer.
    """
    _, sides = _pythia_parts(pythia)
    return paging.paged_bytes([r * side for side in sides], bits)


@functools.cache
def _pythia_parts(pythia: str) -> tuple[int, list[int]]:
    """Frozen bytes, and the long side of every lora_A and lora_B."""
    config = configs.pythia_config(pythia)
    frozen = ledger.predict(Plan(config)).total_bytes
    return frozen, ledger.lora_numels(configs.meta_model(config), r=1)


def longest_pass(pythia: str, r: int, budget_bytes: int, paged: bool) -> int:
    """Tokens in one forward pass that just fit a card, with or without paged optimizer states; 0 if
    not even one fits.
    """

    def needed(tokens: int) -> int:
        sizes = step_sizes(pythia, r, tokens)
        peak = max(moment.total for moment in paging.step_timeline(sizes))
        return peak - sizes.paged if paged else peak

    return bisect.bisect_right(range(1, 2**22 + 1), budget_bytes, key=needed)
