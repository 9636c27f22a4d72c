"""The Pythia suite as its authors publish it, and what plain loops make of it."""

from __future__ import annotations

PYTHIAS = {  # layers, hidden size, all parameters (arXiv 2304.01373, table 1, and the model cards)
    "14m": (6, 128, 14_067_712),
    "70m": (6, 512, 70_426_624),
    "160m": (12, 768, 162_322_944),
    "410m": (24, 1024, 405_334_016),
    "1b": (16, 2048, 1_011_781_632),
    "1.4b": (24, 2048, 1_414_647_808),
    "2.8b": (32, 2560, 2_775_208_960),
    "6.9b": (32, 4096, 6_857_302_016),
    "12b": (36, 5120, 11_846_072_320),
}
LAYERS = {  # the linear layers of a block: (in, out) in hidden sizes
    "query_key_value": [(1, 3)],
    "attention": [(1, 3), (1, 1)],
    "feed-forward": [(1, 4), (4, 1)],
    "all-linear": [(1, 3), (1, 1), (1, 4), (4, 1)],
}


def adapter_numels(size: str, r: int, targets: str = "all-linear") -> list[int]:
    """Elements of every A (r · in) and every B (out · r)."""
    n_layers, hidden, _ = PYTHIAS[size]
    numels = []
    for _ in range(n_layers):
        for n_in, n_out in LAYERS[targets]:
            numels.append(r * n_in * hidden)
            numels.append(n_out * hidden * r)
    return numels


def state_bytes(size: str, r: int, bits: int = 32) -> tuple[int, int]:
    """(paged, not paged) bytes of Adam's two states: those of 100,000 elements or more are paged.

    States of 8 bits have a float32 scale a block of 256, which is never paged; below 4,096 elements
    they have 32 bits.
    """
    paged = 0
    fixed = 0
    for numel in adapter_numels(size, r):
        width = 1 if bits == 8 and numel >= 4096 else 4
        scales = 2 * 4 * -(-numel // 256) if width == 1 else 0
        fixed += scales
        if numel >= 100_000:
            paged += 2 * width * numel
        else:
            fixed += 2 * width * numel
    return paged, fixed


def frozen_bytes(size: str) -> int:
    """NF4 with double quantization, the rest in 16 bit; the rotary frequencies are left out.

    They are some hundred bytes.
    """
    n_layers, hidden, n_parameters = PYTHIAS[size]
    total = 0
    n_linear = 0
    for n_in, n_out in LAYERS["all-linear"] * n_layers:
        n_weights = n_in * hidden * n_out * hidden
        n_blocks = n_weights // 64
        total += n_weights // 2  # two codes a byte
        total += n_blocks  # a scale in a byte
        total += 4 * -(-n_blocks // 256)  # their scales
        total += 4 * (16 + 256 + 1)  # two tables of code values and the mean
        n_linear += n_weights
    return total + 2 * (n_parameters - n_linear)
