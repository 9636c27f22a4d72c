"""The sizes of one QLoRA step of a Pythia, for the arithmetic of notebook 05."""

import bisect
import functools
from dataclasses import asdict

from qlora_nb.memory import dry_run, ledger
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
    config, (weights, sides) = configs.pythia_config(pythia), _pythia_parts(pythia)
    paged, fixed = paging.paged_bytes([r * side for side in sides], bits)
    adapter = 4 * r * sum(sides)
    low = 2 ** (max(tokens, 1).bit_length() - 1)
    near, far = (
        asdict(dry_run.dry_run(config, dry_run.Step(1, n, r)))
        for n in (low, 2 * low if tokens > low else low)
    )
    between = {k: near[k] + (far[k] - near[k]) * (tokens - low) // low for k in near}
    return paging.StepSizes(
        config.num_hidden_layers, weights, adapter, adapter, paged, fixed, **between
    )


def state_split(pythia: str, r: int, bits: int = 32) -> tuple[int, int]:
    """(paged, not paged) bytes of Adam's states on a GPU for a Pythia with LoRA of rank r on every
    linear layer.
    """
    return paging.paged_bytes([r * side for side in _pythia_parts(pythia)[1]], bits)


@functools.cache
def _pythia_parts(pythia: str) -> tuple[int, tuple[int, ...]]:
    """Frozen bytes, and the long side of every lora_A and lora_B."""
    config = configs.pythia_config(pythia)
    return ledger.predict(config=config).total_bytes, tuple(
        ledger.lora_numels(configs.meta_model(config), 1)
    )


def longest_pass(pythia: str, r: int, budget_bytes: int, paged: bool, bits: int = 32) -> int:
    """Tokens in one forward pass that just fit a card, with or without paged optimizer states; 0 if
    not even one fits.
    """

    def needed(tokens: int) -> int:
        sizes = step_sizes(pythia, r, tokens, bits)
        return max(m.total for m in paging.step_timeline(sizes)) - (sizes.paged if paged else 0)

    return bisect.bisect_right(range(1, 2**22 + 1), budget_bytes, key=needed)
