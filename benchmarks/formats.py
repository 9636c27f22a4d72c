"""Formats of four bits that people meet outside QLoRA, beside NF4 at equal bits.

    python benchmarks/formats.py              into qlora_nb/recorded/formats.json

All cut a row into blocks of consecutive weights and keep an index of four bits for each weight and
a scale for each block; a weight comes back as value · scale. They differ in the values, in the size
of a block, in the datatype of the scale and in how it is chosen:

* Q4_0 (llama.cpp): blocks of 32, integers -8 … 7, a 16-bit scale: the largest weight becomes -8.
* IQ4_NL (llama.cpp): blocks of 32, sixteen uneven values, a 16-bit scale that is *searched*: of
  sixteen, the one that leaves the least squared error, where large weights count more.
* MXFP4 (Open Compute Project): blocks of 32, E2M1 numbers, the scale a power of two, in 8 bits.
* NVFP4 (NVIDIA): blocks of 16, E2M1 numbers, the scale an 8-bit floating-point number (E4M3), and
  one 32-bit scale for the whole tensor.

Packing is left out: what the bytes look like, and that the `gguf` package reads the same numbers
back from them, is in tests/test_formats.py.

Sources: ggml/src/ggml-quants.c of llama.cpp (`quantize_row_q4_0_ref`, `quantize_row_iq4_nl_impl`);
OCP Microscaling Formats (MX) Specification v1.0, sections 5.3.3 and 6.3; NVFP4 as described in
arXiv 2509.25149, section 2.
"""

from __future__ import annotations

from typing import NamedTuple

import provenance
import torch
from torch import Tensor

from qlora_nb.answer import quality
from qlora_nb.model import load
from qlora_nb.settings import validate
from qlora_nb.theory import blockwise, codebooks, double_quant
from qlora_nb.theory.blockwise import SMALLEST_SCALE, midpoints

MAGNITUDES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E2M1 = torch.cat([MAGNITUDES, -MAGNITUDES])
"""FP4 as textbooks have it: a sign, two bits of exponent, one of fraction; in the order of its bit
patterns.
"""
IQ4_NL = torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113.0])
"""llama.cpp's uneven values. None of them is zero."""


class Blocks(NamedTuple):
    """A tensor in blocks: `index` (n, size) int64, `scale` (n, 1) float32, and what an index means,
    `values` (16,).
    """

    index: Tensor
    scale: Tensor
    values: Tensor


def q4_0(x: Tensor) -> Blocks:
    """Q4_0.

    Args:
        x: float32, its size a multiple of 32.
    """
    blocks = x.reshape(-1, 32)
    scale = _largest(blocks) / -8
    index = (blocks / scale + 8.5).nan_to_num(8.5).clamp(0, 15).long()  # of zeros alone: 8
    return Blocks(index, scale.half().float(), torch.arange(-8.0, 8.0))


def iq4_nl(x: Tensor) -> Blocks:
    """IQ4_NL without an importance matrix: a weight's squared error counts with its square, as in
    llama.cpp.

    Args:
        x: float32, its size a multiple of 32.
    """
    blocks = x.reshape(-1, 32)
    weights = blocks.square()
    largest = _largest(blocks)
    best_gain = torch.zeros_like(largest)
    best_scale = torch.zeros_like(largest)
    for becomes in (127, *range(-134, -119)):  # the largest weight, before rounding
        values = IQ4_NL[_nearest(blocks * (becomes / largest), IQ4_NL)]
        product = (weights * values * blocks).sum(dim=1, keepdim=True)
        square = (weights * values.square()).sum(dim=1, keepdim=True)
        scale = product / square  # of least squares, for these values
        gain = product * scale  # squared error of storing zeros less that of storing these
        best_scale = torch.where(gain > best_gain, scale, best_scale)
        best_gain = torch.maximum(gain, best_gain)
    return Blocks(_nearest(blocks / best_scale, IQ4_NL), best_scale.half().float(), IQ4_NL)


def mxfp4(x: Tensor) -> Blocks:
    """MXFP4: the scale puts the largest weight between 4 and 8; what is above 6 becomes 6.

    Args:
        x: float32, its size a multiple of 32.
    """
    blocks = x.reshape(-1, 32)
    scale = 2 ** (_largest(blocks).abs().log2().floor() - 2).clamp(min=-127)
    return Blocks(_nearest(blocks / scale, E2M1), scale, E2M1)


def nvfp4(x: Tensor) -> Blocks:
    """NVFP4: the tensor's scale puts the largest block scale at 448, the largest E4M3 number.

    Args:
        x: float32, its size a multiple of 16.
    """
    blocks = x.reshape(-1, 16)
    wanted = _largest(blocks).abs() / 6
    of_the_tensor = wanted.max().clamp(min=SMALLEST_SCALE) / 448
    scale = (wanted / of_the_tensor).to(torch.float8_e4m3fn).float() * of_the_tensor
    return Blocks(_nearest((blocks / scale).nan_to_num(), E2M1), scale, E2M1)


FORMATS = {
    "Q4_0": (4.5, q4_0),
    "IQ4_NL": (4.5, iq4_nl),
    "MXFP4": (4.25, mxfp4),
    "NVFP4": (4.5, nvfp4),
}
"""Name → bits a weight, scales included, and the function."""


def round_trip(x: Tensor, name: str) -> Tensor:
    """What a format of `FORMATS` leaves of float32 numbers, a multiple of 32 of them; same shape.

    >>> round_trip(torch.tensor([8.0, -7.0] + [0.0] * 30), "Q4_0")[:2].tolist()
    [8.0, -7.0]
    >>> round_trip(torch.tensor([7.0, 1.0] + [0.0] * 30), "MXFP4")[:3].tolist()
    [6.0, 1.0, 0.0]
    """
    _, store = FORMATS[name]
    index, scale, values = store(x)
    return (values[index] * scale).reshape(x.shape)


def _largest(blocks: Tensor) -> Tensor:
    """The number of largest magnitude of each block, with its sign, (n, 1)."""
    where = blocks.abs().argmax(dim=1, keepdim=True)
    return blocks.gather(1, where)


def _nearest(scaled: Tensor, values: Tensor) -> Tensor:
    """Index of the nearest value."""
    borders, order = midpoints(values)
    return order[torch.bucketize(scaled, borders)]


def lloyd_max(samples: Tensor, weights: Tensor, start: Tensor) -> Tensor:
    """Fit a code to samples: repeat "nearest value" and "each value moves to the mean of its
    samples" until it stands.

    Args:
        samples: (n,) numbers to be coded, finite (for a block-wise code: weight / absmax of its
            block).
        weights: (n,) how much each sample's squared error counts (for a block-wise code: absmax²,
            so that the error is that of the weights and not of the scaled numbers).
        start: (k,) sorted code to start from.

    Returns:
        (k,) float32, sorted. A value no sample chose stays where it was. A repetition lowers the
        error or leaves it; there are a hundred at most.

    By hand: samples 0, 1, 9, 11 from the start 0, 8 go to their means 0.5 and 10, and stay.

    >>> samples = torch.tensor([0.0, 1, 9, 11])
    >>> lloyd_max(samples, torch.ones(4), start=torch.tensor([0.0, 8])).tolist()
    [0.5, 10.0]
    """
    x, order = samples.double().sort()
    w = weights.double()[order]
    code = start.double()
    for _ in range(100):
        borders = (code[:-1] + code[1:]) / 2
        edges = torch.tensor([0, *torch.searchsorted(x, borders), len(x)])
        mass = torch.segment_reduce(w, "sum", offsets=edges)
        moment = torch.segment_reduce(w * x, "sum", offsets=edges)
        moved = torch.where(mass > 0, moment / mass, code)
        if torch.equal(moved, code):
            break
        code = moved
    return code.float()


def fitted_code(x: Tensor) -> Tensor:
    """A Lloyd-Max code for `x` in blocks of 64, starting from NF4: least squared error of the
    weights themselves, no value held fixed.

    Args:
        x: weights, as in `quantize`.

    Returns:
        (16,) float32, sorted. Its ends come to lie inside ±1: only one weight in a block is
        ±absmax.
    """
    code = codebooks.nf4_code()
    _, absmax = blockwise.quantize(x, code)
    scale = absmax.clamp(min=SMALLEST_SCALE).repeat_interleave(64)[: x.numel()]
    scaled = x.detach().flatten().float() / scale
    return lloyd_max(scaled, scale.square(), start=code)


def errors_of(data: Tensor) -> dict[str, dict[str, float]]:
    """Format → bits a weight, scales included → RMSE, in the data's unit. NF4 stands there with
    32-bit scales and with double quantization, each in three sizes of block.
    """
    nf4 = codebooks.nf4_code()
    found = {"NF4": {}, "NF4+DQ": {}}
    for size in (128, 64, 32):
        restored = blockwise.round_trip(data, nf4, size)
        bits = double_quant.bits_per_weight(size, None)
        found["NF4"][str(bits)] = blockwise.rmse(data, restored)
    for size in (64, 32, 16):
        restored = double_quant.round_trip(data, size)
        bits = double_quant.bits_per_weight(size)
        found["NF4+DQ"][str(bits)] = blockwise.rmse(data, restored)
    for name, (bits, _) in FORMATS.items():
        found[name] = {str(bits): blockwise.rmse(data, round_trip(data, name))}
    return found


def main() -> None:
    record = provenance.provenance((0,))
    pocket = load.load_base(quality.comparison_settings(validate({})), four_bit=False)
    data = {
        "bell curve": torch.randn(2**20, generator=torch.Generator().manual_seed(0)),
        "the pocket model's weights": quality.normalized_weights(pocket),
    }
    record["fitted code"] = fitted_code(data["bell curve"]).tolist()
    record["rmse"] = {whose: errors_of(numbers) for whose, numbers in data.items()}
    provenance.write(provenance.ROOT / "qlora_nb" / "recorded" / "formats.json", record)


if __name__ == "__main__":
    main()
