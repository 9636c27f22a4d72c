"""Double quantization: the scales are quantized too, from 4.5 to 4.127 bits a weight.

A block of 64 weights has one float32 scale: 32/64 = 0.5 bit a weight, 4 GB for a model of 65
billion parameters. Double quantization stores each scale in 8 bits:

* scales are positive, and 8-bit codes are symmetric around zero: the mean is subtracted first (one
  float32 a tensor, `absmax_mean`; bitsandbytes calls it `offset`);
* the centred scales are quantized block-wise again, 256 to a block, one float32 a block.

Together 4 + 8/64 + 32/(64 · 256) = 4.127 bits a weight.

The paper writes FP8 for the second level. bitsandbytes uses its *dynamic 8-bit map*
(`codebooks.dynamic_code`), and on a CPU not even the nearest value of it: [-1, 1] is cut into
65,536 bins and a table says which value a bin means. This is repeated here, so that codes and
scales are equal bit for bit. Sources: QLoRA, arXiv 2305.14314, section 3 ("Double Quantization");
bitsandbytes/functional.py (`quantize_4bit` with `compress_statistics=True`), csrc/cpu_ops.cpp.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_nb.theory.blockwise import dequantize, midpoints, quantize
from qlora_nb.theory.codebooks import dynamic_code, nf4_code

SECOND_BLOCKSIZE = 256
"""Scales that share one second-level scale in the paper and in bitsandbytes."""
N_BINS = 65_536
"""Bins of bitsandbytes' lookup table on a CPU."""


def ledger(
    blocksize: int = 64, second_blocksize: int | None = SECOND_BLOCKSIZE
) -> dict[str, float]:
    """Bits a weight, item by item.

    Args:
        blocksize: weights that share one scale.
        second_blocksize: scales that share one second-level scale; None is no double quantization.

    Returns:
        Bits a weight of "codes", "scales" and "scales of scales". The one mean a tensor is left
        out.

    By hand: 8/64 = 0.125 and 32/(64 · 256) = 0.00195.

    >>> ledger(64, None)
    {'codes': 4.0, 'scales': 0.5, 'scales of scales': 0.0}
    >>> ledger(64)
    {'codes': 4.0, 'scales': 0.125, 'scales of scales': 0.001953125}
    """
    bits = {"codes": 4.0, "scales": 32 / blocksize, "scales of scales": 0.0}
    if second_blocksize is not None:
        bits["scales"] = 8 / blocksize
        bits["scales of scales"] = 32 / (blocksize * second_blocksize)
    return bits


def bits_per_weight(blocksize: int = 64, second_blocksize: int | None = SECOND_BLOCKSIZE) -> float:
    """Sum of the ledger.

    >>> bits_per_weight(64, None), round(bits_per_weight(64), 3)
    (4.5, 4.127)
    """
    return sum(ledger(blocksize, second_blocksize).values())


def storage_bytes(
    n_weights: int, second_blocksize: int | None = SECOND_BLOCKSIZE
) -> dict[str, int]:
    """Bytes of one real tensor in blocks of 64, with every block rounded up and the mean counted.

    Args:
        n_weights: weights in the tensor.
        second_blocksize: as in `ledger`.

    Returns:
        {"codes", "scales", "scales of scales", "mean"} in bytes. The two code tables (16 and 256
        float32, the same for every tensor) are left out.

    By hand: 1000 weights are 500 bytes and 16 blocks; 16 · 4 = 64 bytes of scales, or 16 + 4 + 4
    with double quantization.

    >>> storage_bytes(1000, None)
    {'codes': 500, 'scales': 64, 'scales of scales': 0, 'mean': 0}
    >>> storage_bytes(1000)
    {'codes': 500, 'scales': 16, 'scales of scales': 4, 'mean': 4}
    """
    blocks = math.ceil(n_weights / 64)
    size = {
        "codes": math.ceil(n_weights / 2),
        "scales": 4 * blocks,
        "scales of scales": 0,
        "mean": 0,
    }
    if second_blocksize is not None:
        size["scales"] = blocks
        size["scales of scales"] = 4 * math.ceil(blocks / second_blocksize)
        size["mean"] = 4
    return size


@dataclass(frozen=True)
class SecondLevel:
    """Scales in 8 bits.

    Attributes:
        index: (n_blocks,) uint8 index into `dynamic_code()`.
        absmax: (ceil(n_blocks / 256),) float32, scale of the centred scales.
        absmax_mean: () float32, what was subtracted (bitsandbytes: `offset`).
    """

    index: Tensor
    absmax: Tensor
    absmax_mean: Tensor


def table_index(scaled: Tensor, code: Tensor) -> Tensor:
    """Index of a number in [-1, 1] by bitsandbytes' CPU table: which of 65,536 bins, then the code
    nearest to that bin.

    No bin is centred on zero (their number is even), so zero becomes index 131, which means
    0.0000212 and not 0 (index 127).

    Args:
        scaled: any shape, float32 in [-1, 1].
        code: (k,) float32, sorted.

    Returns:
        uint8 indices, same shape.

    >>> table_index(torch.tensor([-1.0, 0.0, 1.0]), dynamic_code()).tolist()
    [0, 131, 255]
    """
    position = ((scaled.clamp(-1, 1) + 1) * 0.5 * (N_BINS - 1) + 0.5).int()
    centre = -1 + 2 * position / (N_BINS - 1)
    borders, _ = midpoints(code)
    return torch.bucketize(centre, borders).to(torch.uint8)


def quantize_absmax(absmax: Tensor) -> SecondLevel:
    """The second level: subtract the mean, scale blocks of 256, store 8-bit indices.

    Args:
        absmax: (n_blocks,) float32 scales of the first level.

    By hand: scales 1 and 3 have mean 2; centred they are -1 and 1; their absmax is 1; the indices
    are the two ends, 0 (which means -0.993) and 255 (which means 1). Back: 1.007 and 3. Where all
    scales of a block are the mean, the index is 0 too.

    >>> second = quantize_absmax(torch.tensor([1.0, 3.0]))
    >>> second.index.tolist(), second.absmax.tolist(), second.absmax_mean.item()
    ([0, 255], [1.0], 2.0)
    """
    absmax_mean = absmax.mean()
    scales = []
    scaled = []
    for block in (absmax - absmax_mean).split(SECOND_BLOCKSIZE):
        scale = block.abs().amax()
        scales.append(scale)
        scaled.append((block / scale).nan_to_num(-1))  # 0 / 0 where all scales are the mean
    index = table_index(torch.cat(scaled), dynamic_code().to(absmax.device))
    return SecondLevel(index, torch.stack(scales), absmax_mean)


def dequantize_absmax(second: SecondLevel) -> Tensor:
    """code[index] · absmax + mean: the scales as the dequantizer will see them, (n_blocks,)
    float32.

    >>> [round(v, 3) for v in dequantize_absmax(quantize_absmax(torch.tensor([1.0, 3.0]))).tolist()]
    [1.007, 3.0]
    """
    centred = dequantize(second.index, second.absmax, dynamic_code(), SECOND_BLOCKSIZE)
    return centred + second.absmax_mean


def round_trip(x: Tensor, blocksize: int = 64) -> Tensor:
    """What is left of `x` after NF4 with double quantization; same shape and dtype (see
    `blockwise.round_trip`).

    Args:
        x: any shape, float32, float16 or bfloat16.
        blocksize: weights that share one scale.
    """
    code = nf4_code().to(x.device)
    index, absmax = quantize(x, code, blocksize)
    restored = dequantize_absmax(quantize_absmax(absmax))
    return dequantize(index, restored, code, blocksize).reshape(x.shape).to(x.dtype)
