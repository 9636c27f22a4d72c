"""Checkers of the exercises in notebook 05; the right answers are computed, not written down."""

from qlora_nb.theory import paging
from qlora_nb.ui.checks import exercise

hint = "lora_A has r · in elements, lora_B has out · r; the rule is 100,000 elements"
_paged = exercise("[lora_A, lora_B] paged", [int(paging.is_paged(16 * side)) for side in (5120, 20480)], hint)


def check_paged(answer: object) -> bool:
    """Exercise 1: which states of pythia-12b's dense_h_to_4h (5120 → 20480) are paged at r = 16: [lora_A, lora_B], bools too."""
    return _paged([int(v) if isinstance(v, bool) else v for v in answer] if isinstance(answer, (list, tuple)) else answer)


hint = "two states of one byte an element, and for each state one float32 a block of 256"
check_bytes_8bit = exercise("bytes", paging.state_bytes(81_920, 8), hint, 1e-9)
"""Exercise 2: bytes of both 8-bit Adam states of a tensor with 81,920 elements."""

hint = "the second touch of page 0 makes page 1 the least recently used, so page 3 pushes out page 1"
check_faults = exercise("faults", paging.replay_spec([("touch", page) for page in (0, 1, 2, 0, 3, 1)], 3)[0], hint)
"""Exercise 3: page faults when 0, 1, 2, 0, 3, 1 are touched with room for three pages, least recently used out first."""

hint = "the pages travel twice: out for the spike, and back for the optimizer"
check_overflow = exercise("seconds", paging.StepRecord(0, True, bytes_in=12 * 10**8, bytes_out=12 * 10**8).seconds(12), hint)
"""Exercise 4: seconds to push 1.2 · 10^9 bytes out and bring them back over a bus of 12 · 10^9 bytes a second."""
