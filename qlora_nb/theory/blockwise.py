"""Block-wise quantization: a tensor becomes 4-bit indices and a few scales, and back.

A code covers [-1, 1], weights do not. So a tensor is cut into blocks of `blocksize` consecutive
numbers, each block is divided by its largest magnitude (`absmax`, one float32), and every number
becomes the index of the nearest code value: the number of borders, midpoints between neighbouring
code values, that lie below it. Two indices share a byte, the first in the high four bits.

Back again: code[index] · absmax. The error of one number is at most half the widest gap of the code
times absmax; therefore one outlier makes its whole block coarse, and small blocks are more accurate
and cost more scales.

Rounding follows bitsandbytes' CPU version: full blocks are multiplied by 1/absmax, a shorter last
block is divided by absmax, scales below 1e-38 count as 1e-38. Bytes and scales are equal bit for
bit. Source: QLoRA, arXiv 2305.14314, section 2, equations 1 and 2;
bitsandbytes/backends/default/ops.py (`quantize_4bit`).
"""

import torch
from torch import Tensor, nn

from qlora_nb.errors import KitError

SMALLEST_SCALE = 1e-38
"""Scales below it count as this much when dividing (bitsandbytes' number)."""


def midpoints(code: Tensor) -> tuple[Tensor, Tensor]:
    """Borders between neighbouring code values, and which index each interval between them means.

    Args:
        code: (k,) float32 in any order.

    Returns:
        (k-1,) sorted float32 borders; (k,) int64 order, so that interval i means index `order[i]`.

    >>> midpoints(torch.tensor([-1.0, 0, 1]))[0].tolist()
    [-0.5, 0.5]
    """
    ordered, order = code.sort(stable=True)
    return (ordered[:-1] + ordered[1:]) / 2, order


def quantize(x: Tensor, code: Tensor, blocksize: int = 64) -> tuple[Tensor, Tensor]:
    """Indices into `code` and one scale a block.

    Args:
        x: any shape, float32, float16 or bfloat16, every value finite; read row by row.
        code: (k,) float32 with k ≤ 256 values in [-1, 1], any order.
        blocksize: numbers that share one scale; the last block may be shorter.

    Returns:
        (n,) uint8 indices; (ceil(n / blocksize),) float32 absmax.

    Raises:
        KitError: a NaN or infinity.

    By hand: in [2, -4, 1] absmax is 4 and the scaled numbers are 0.5, -1, 0.25. With the code [-1,
    0, 1] (borders ±0.5; a number on a border goes down) the indices are 1, 0, 1.

    >>> code = torch.tensor([-1.0, 0, 1])
    >>> quantize(torch.tensor([2.0, -4, 1]), code, blocksize=4)
    (tensor([1, 0, 1], dtype=torch.uint8), tensor([4.]))
    """
    flat = _finite(x)
    n = flat.numel()
    blocks = nn.functional.pad(flat, (0, -n % blocksize)).reshape(-1, blocksize)
    absmax = blocks.abs().amax(dim=1)
    divisor = absmax.clamp(min=SMALLEST_SCALE)
    scaled = blocks * (1.0 / divisor)[:, None]
    if n % blocksize:
        absmax[-1] = divisor[-1]
        scaled[-1] = blocks[-1] / divisor[-1]
    scaled = scaled.flatten()[:n]
    borders, order = midpoints(code.to(flat.device))
    index = torch.zeros_like(scaled, dtype=torch.uint8)
    for border in borders.tolist():  # twice as fast as torch.bucketize, which searches
        index += scaled > border
    index = order.to(torch.uint8).index_select(0, index.int())
    return index, absmax


def dequantize(index: Tensor, absmax: Tensor, code: Tensor, blocksize: int = 64) -> Tensor:
    """code[index] · absmax of its block.

    Args:
        index: (n,) uint8.
        absmax: (ceil(n / blocksize),) float32.
        code: (k,) float32.
        blocksize: as in `quantize`.

    Returns:
        (n,) float32.

    >>> index = torch.tensor([1, 0, 1])
    >>> dequantize(index, torch.tensor([4.0]), torch.tensor([-1.0, 0, 1]), blocksize=4).tolist()
    [0.0, -4.0, 0.0]
    """
    out = code.to(index.device).index_select(0, index.int())
    out *= absmax.repeat_interleave(blocksize)[: len(index)]
    return out


def pack(index: Tensor, filler: int = 0) -> Tensor:
    """Two 4-bit indices in a byte, the first in the high nibble.

    Args:
        index: (n,) uint8, each 0 … 15.
        filler: index that fills the last half byte if n is odd.

    Returns:
        (ceil(n / 2),) uint8.

    By hand: 10 and 3 are 1010 and 0011, together 10100011 = 16 · 10 + 3 = 163.

    >>> pack(torch.tensor([10, 3, 1], dtype=torch.uint8), filler=7).tolist()
    [163, 23]
    """
    if index.numel() % 2:
        index = torch.cat([index, index.new_tensor([filler])])
    return (index[0::2] << 4) | index[1::2]


def unpack(packed: Tensor, n: int) -> Tensor:
    """The first `n` indices out of packed bytes.

    >>> unpack(torch.tensor([163, 23], dtype=torch.uint8), 3).tolist()
    [10, 3, 1]
    """
    packed = packed.flatten()
    return torch.stack([packed >> 4, packed & 0xF], dim=1).flatten()[:n]


def quantize_4bit(x: Tensor, code: Tensor, blocksize: int = 64) -> tuple[Tensor, Tensor]:
    """`quantize` and `pack`: the bytes and scales that `bitsandbytes.functional.quantize_4bit`
    makes on a CPU.

    Returns:
        (ceil(n / 2), 1) uint8 bytes, the shape bitsandbytes gives them; (ceil(n / blocksize),)
        float32 absmax.
    """
    index, absmax = quantize(x, code, blocksize)
    zero = int(code.abs().argmin())
    return pack(index, filler=zero)[:, None], absmax


def round_trip(x: Tensor, code: Tensor, blocksize: int = 64) -> Tensor:
    """What is left of `x` after quantizing and dequantizing; same shape and dtype.

    >>> round_trip(torch.tensor([2.0, -4, 1]), torch.tensor([-1.0, 0, 1]), blocksize=4).tolist()
    [0.0, -4.0, 0.0]
    """
    index, absmax = quantize(x, code, blocksize)
    return dequantize(index, absmax, code, blocksize).reshape(x.shape).to(x.dtype)


def rmse(x: Tensor, y: Tensor) -> float:
    """Root of the mean squared difference, in the unit of `x`.

    >>> rmse(torch.tensor([0.0, 0.0]), torch.tensor([3.0, 4.0])) == 12.5**0.5
    True
    """
    return (x.double() - y.double()).square().mean().sqrt().item()


def code_usage(index: Tensor) -> Tensor:
    """Share of the numbers that chose each of sixteen indices, (16,) float64, sum 1.

    >>> code_usage(torch.tensor([0, 1, 1, 1]))[:3].tolist()
    [0.25, 0.75, 0.0]
    """
    counts = torch.bincount(index, minlength=16)
    return counts.double() / index.numel()


def entropy_bits(share: Tensor) -> float:
    """Bits a perfect compressor would need for each index: -Σ p log2 p.

    >>> entropy_bits(torch.full((16,), 1 / 16))
    4.0
    """
    used = share[share > 0]
    return -(used * used.log2()).sum().item()


def _finite(x: Tensor) -> Tensor:
    """`x` flat and in float32, or a refusal."""
    flat = x.detach().flatten().float()
    if not flat.abs().amax().isfinite():
        first = int((~flat.isfinite()).nonzero()[0])
        raise KitError(
            f"a NaN or infinity cannot be quantized; the first is at flat position {first}",
            value=flat[first].item(),
            allowed="finite numbers",
            remedy="look for the layer that produced it",
        )
    return flat
