"""Codebooks: the sixteen values that a 4-bit code can store.

Four bits name one of sixteen values, scaled so that the largest magnitude is 1; a weight is stored
as the index of the nearest one. NF4, FP4 and INT4 differ only in where their values lie:

* INT4 lies evenly, -7/7 … 7/7. Best for uniform data.
* FP4 is a tiny floating-point format: two exponent bits, one bit of fraction. Coarse at the ends,
  and with a hole beside zero: bitsandbytes' has nothing between 0.005 and 0.167.
* NF4 lies at quantiles of N(0, 1); the weights of a layer look like a bell curve.

A bell curve never ends, so NF4 stops at the quantile t = 1 - (1/32 + 1/30)/2 = 0.96770833: the
middle of 1/32 (half of one of 16 equal shares) and 1/30 (half of one of 15). bitsandbytes writes
0.9677083 and calls it "offset"; here it is `tail_quantile`. `normal_float` follows the same recipe
for another number of bits.

Sources: QLoRA, arXiv 2305.14314, section 3 and appendix E; bitsandbytes/functional.py
(`create_normal_map`, `get_4bit_type`, `create_dynamic_map`); 8-bit optimizers, arXiv 2110.02861,
section 1.3 (dynamic map); where the tail quantile comes from, arXiv 2306.06965.
"""

from statistics import NormalDist

import torch
from torch import Tensor

TAIL_QUANTILE = 1 - (1 / 32 + 1 / 30) / 2
"""Where NF4 cuts the bell curve's tail (a probability)."""


def normal_float(n_bits: int) -> Tensor:
    """The 2^n_bits values of a NormalFloat: normal quantiles in bitsandbytes' single-precision
    steps.

    Half of the values are positive, one less is negative: quantiles at evenly spaced probabilities
    between the tail and one half. Zero is added (padding and pruned weights must stay exactly
    zero); all are divided by the largest. The tail is cut at 1 - (1/(2·n) + 1/(2·(n-1)))/2, n being
    the number of values.

    Args:
        n_bits: 2 to 8; 4 bits are NF4. The paper defines NFk for any k; where the tail is cut for
            other k than 4 is this kit's reading of the library's rule.

    Returns:
        (2^n_bits,) float32, sorted, from -1 to 1, with an exact 0 at index 2^(n_bits-1) - 1.

    By hand, for 4 bits: the largest quantile is inv_cdf(0.96770833) = 1.8481, the next one
    inv_cdf(0.96770833 - 0.46770833/8) = 1.3361, so the second largest code value is 1.3361/1.8481 =
    0.723.

    >>> [round(v, 3) for v in normal_float(2).tolist()]
    [-1.0, 0.0, 0.436, 1.0]
    """
    n = 2**n_bits
    tail_quantile = round(1 - (1 / n + 1 / (n - 1)) / 4, 7)  # as bitsandbytes has it, 0.9677083

    def upper(n: int) -> list[float]:
        """Quantiles at n evenly spaced probabilities from the tail down to one half, left out."""
        probabilities = torch.linspace(tail_quantile, 0.5, n + 1)[:-1]
        return [NormalDist().inv_cdf(probability) for probability in probabilities.tolist()]

    negative = [-quantile for quantile in upper(n // 2 - 1)]
    values = torch.tensor([*negative, 0.0, *upper(n // 2)]).sort().values
    return values / values.max()


def nf4_code() -> Tensor:
    """The sixteen NF4 values, equal to bitsandbytes' table in every bit. In double precision and
    with `TAIL_QUANTILE` the values are within 2e-7 of these: notebook 03 derives them so.

    >>> [round(v, 3) for v in nf4_code()[-3:].tolist()], nf4_code()[7].item()
    ([0.563, 0.723, 1.0], 0.0)
    """
    return normal_float(4)


def fp4_code() -> Tensor:
    """FP4 (sign, two exponent bits, one fraction bit) in the order of its bit patterns, as
    bitsandbytes stores it.

    Exponent field e and fraction bit m mean (1 + m/2) · 2^(3-e) for e = 0 … 2 in bitsandbytes' own
    order (patterns 010 011 · 100 101 · 110 111 are 8 12 · 4 6 · 2 3); pattern 001 is 0.0625 and 000
    is 0. Divided by 12. There are two zeros, +0 and -0, so FP4 has only fifteen different values.

    Returns:
        (16,) float32, not sorted but by bit pattern; the high bit is the sign.

    >>> [round(v, 4) for v in fp4_code()[:4].tolist()]
    [0.0, 0.0052, 0.6667, 1.0]
    """
    magnitudes = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3])
    return torch.cat([magnitudes, 0 - magnitudes]) / 12


def int4_code() -> Tensor:
    """Symmetric 4-bit integers -7 … 7 divided by 7: fifteen even steps, the sixteenth pattern is
    unused.

    >>> int4_code().numel(), round(int4_code()[8].item(), 4)
    (15, 0.1429)
    """
    return torch.arange(-7, 8, dtype=torch.float32) / 7


def dynamic_code() -> Tensor:
    """bitsandbytes' signed dynamic 8-bit map: the 256 values that store the scales in double
    quantization.

    The further from 1, the fewer bits are left for the fraction: decade 10^0 has 64 values a side,
    10^-1 has 32, …, 10^-6 has one. In each decade the values are the centres of equal steps from
    0.1 to 1. Add 0 and 1: 2·127 + 2 = 256. It is neither a floating-point format nor the FP8 of
    the paper.

    Returns:
        (256,) float32, sorted, from -0.993 to 1.

    >>> code = dynamic_code()
    >>> code.numel(), round(code[0].item(), 4), code[127].item(), code[255].item()
    (256, -0.993, 0.0, 1.0)
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        centres = 10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += centres.tolist()
        values += (-centres).tolist()
    return torch.tensor(sorted(values))


def code_by_name(name: str) -> Tensor:
    """NF4, FP4 or INT4 by the name used in figures (any case)."""
    codes = {"NF4": nf4_code, "FP4": fp4_code, "INT4": int4_code}
    return codes[name.upper()]()
