"""Checkers of the exercises in notebook 05; the right answers are computed, not written down."""

from qlora_nb.theory import paging
from qlora_nb.ui.checks import verdict

TRACE = (0, 1, 2, 0, 3, 1)
"""Exercise 3: pages touched on a card with room for three."""


def check_faults(answer: object) -> bool:
    """Exercise 3: page faults of TRACE with room for three pages, least recently used out first."""
    faults = paging.replay_spec([("touch", page) for page in TRACE], 3)[0]
    hint = "the second touch of page 0 makes page 1 the least recently used, so page 3 pushes out page 1"
    return verdict(answer, faults, "faults", hint)


def check_paged(answer: object) -> bool:
    """Exercise 1: which states of pythia-12b's dense_h_to_4h (5120 → 20480) are paged at r = 16: [lora_A, lora_B]."""
    want = [int(paging.is_paged(16 * 5120)), int(paging.is_paged(16 * 20480))]
    given = [int(v) if isinstance(v, bool) else v for v in answer] if isinstance(answer, (list, tuple)) else answer
    hint = "lora_A has r · in elements, lora_B has out · r; the rule is 100,000 elements"
    return verdict(given, want, "[lora_A, lora_B] paged", hint)


def check_bytes_8bit(answer: object) -> bool:
    """Exercise 2: bytes of both 8-bit Adam states of a tensor with 81,920 elements."""
    hint = "two states of one byte an element, and for each state one float32 a block of 256"
    return verdict(answer, paging.state_bytes(81_920, 8), "bytes", hint, tolerance=1e-9)


def check_overflow(answer: object) -> bool:
    """Exercise 4: seconds to push 1.2 · 10^9 bytes out and bring them back over a bus of 12 · 10^9 bytes a second."""
    want = paging.StepRecord(0, survived=True, bytes_in=1_200_000_000, bytes_out=1_200_000_000).seconds(12)
    return verdict(answer, want, "seconds", "the pages travel twice: out for the spike, and back for the optimizer")
