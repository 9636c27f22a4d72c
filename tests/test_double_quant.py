"""Double quantization: the ledger, the second level bit for bit against bitsandbytes, and its
error.
"""

from __future__ import annotations

import doctest

import pytest
import torch
from bitsandbytes import functional as bnb
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_nb.lessons import n04
from qlora_nb.theory import blockwise, codebooks, double_quant


def test_examples_in_docstrings():
    assert doctest.testmod(double_quant).failed == 0


@pytest.mark.parametrize(
    ("blocksize", "plain", "double"),
    [(32, 5.0, 4.254), (64, 4.5, 4.127), (128, 4.25, 4.063), (1024, 4.031, 4.008)],
)
def test_bits_a_weight_of_the_facts(blocksize, plain, double):
    assert double_quant.bits_per_weight(blocksize, None) == pytest.approx(plain, abs=5e-4)
    assert double_quant.bits_per_weight(blocksize) == pytest.approx(double, abs=5e-4)


def test_bytes_of_pythia_12b():
    n = 11_324_620_800
    assert sum(double_quant.storage_bytes(n, None).values()) == 6_370_099_200
    found = double_quant.storage_bytes(n)
    assert sum(found.values()) - found["mean"] == 5_842_022_400


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 50_000))
def test_storage_bytes_are_those_of_the_librarys_tensors(n):
    x = torch.ones(n)
    packed, state = bnb.quantize_4bit(x, blocksize=64, quant_type="nf4", compress_statistics=True)
    sizes = {
        "codes": packed.nbytes,
        "scales": state.absmax.nbytes,
        "scales of scales": state.state2.absmax.nbytes,
        "mean": state.offset.nbytes,
    }
    assert double_quant.storage_bytes(n) == sizes


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_equal_to_bitsandbytes(quant_type, blocksize):
    g = torch.Generator().manual_seed(blocksize)
    code = codebooks.code_by_name(quant_type)
    for n in (64 * 300, 2**19, 4096 * 70 + 1):
        for x in (
            torch.randn(n, generator=g),
            torch.rand(n, generator=g) ** 4 * 1e-3,
            torch.randn(n, generator=g) * 1e3,
        ):
            theirs, state = bnb.quantize_4bit(
                x, blocksize=blocksize, quant_type=quant_type, compress_statistics=True
            )
            ours, absmax = blockwise.quantize_4bit(x, code, blocksize)
            second = double_quant.quantize_absmax(absmax)
            assert torch.equal(ours, theirs)
            assert torch.equal(second.index, state.absmax)
            assert torch.equal(second.absmax, state.state2.absmax)
            assert torch.equal(second.absmax_mean, state.offset)
            if blocksize < 2048 and n % 2 == 0:
                restored = double_quant.dequantize_absmax(second)
                back = blockwise.dequantize(
                    blockwise.unpack(ours, x.numel()), restored, code, blocksize
                ).reshape(x.shape)
                assert torch.equal(back, bnb.dequantize_4bit(theirs, state).reshape(-1))


def test_equal_scales_zeros_and_one_scale():
    for absmax in (torch.full((300,), 0.25), torch.zeros(256), torch.tensor([3.0])):
        index, state = bnb.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
        second = double_quant.quantize_absmax(absmax)
        assert torch.equal(second.index, index)
        assert torch.equal(second.absmax, state.absmax)
        assert torch.equal(double_quant.dequantize_absmax(second), absmax)


KINDS = {
    "random": lambda x: x + 0.5,
    "zeros": torch.zeros_like,
    "constant": lambda x: torch.full_like(x, 0.3),
    "tiny": lambda x: x * 1e-30,
    "outlier": lambda x: torch.where(torch.arange(len(x)) == len(x) // 2, 100.0, x),
}


def by_loops(absmax: torch.Tensor) -> tuple[list[int], list[float], float]:
    """The second level as the paper means it: subtract the mean, scale, take the nearest of 256
    values.

    Differs from `quantize_absmax` where the 65,536-bin table and true nearness disagree: by one
    index beside a border, by a few around zero, where the values lie closer together than the bins.
    """
    scales = absmax.tolist()
    code = codebooks.dynamic_code().tolist()
    mean = sum(scales) / len(scales)
    indices = []
    seconds = []
    for start in range(0, len(scales), 256):
        block = [scale - mean for scale in scales[start : start + 256]]
        second = max(abs(centred) for centred in block)
        seconds.append(second)
        for centred in block:
            scaled = code[0]
            if second > 0:
                scaled = centred / second
            distances = [abs(value - scaled) for value in code]
            indices.append(distances.index(min(distances)))
    return indices, seconds, mean


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 600),
    st.sampled_from(list(KINDS)),
)
def test_loops_differ_by_one_neighbour_at_most(seed, n, kind):
    absmax = KINDS[kind](torch.rand(n, generator=torch.Generator().manual_seed(seed)))
    second = double_quant.quantize_absmax(absmax)
    index, scales, mean = by_loops(absmax)
    assert second.absmax_mean.item() == pytest.approx(mean, rel=1e-5)
    rounding = (
        1e-6 * absmax.max().item()
    )  # float32 means differ in the last bits from the loops' double precision
    assert second.absmax.tolist() == pytest.approx(scales, rel=1e-4, abs=rounding)
    if (
        second.absmax.max() <= rounding
    ):  # equal scales: what is left to store is rounding, and neither version may invent more
        assert (double_quant.dequantize_absmax(second) - absmax).abs().max() <= 2 * rounding
        return
    code = codebooks.dynamic_code()
    theirs = (code[torch.tensor(index)] - code[second.index.int()]).abs()
    assert theirs.max() < 0.02  # the distance of neighbouring values is 0.014 at most


def test_what_the_reader_writes_is_compared_with_bitsandbytes_itself():
    """Where the reader's scales are tried, the nearest value is that of bitsandbytes' table too, and
    no rounding decides: every scale is further from a border than rounding could carry it.
    """
    for absmax, code in n04.scales_to_try():
        index, seconds, mean = n04.nearest_by_bitsandbytes(absmax, code)
        blocks = torch.ones(len(absmax), 64) * absmax[:, None]
        _, state = bnb.quantize_4bit(
            blocks, blocksize=64, quant_type="nf4", compress_statistics=True
        )
        assert torch.equal(index, state.absmax)
        assert torch.equal(seconds, state.state2.absmax)
        assert torch.equal(mean, state.offset)
        assert (index.tolist(), [*map(pytest.approx, seconds.tolist())]) == by_loops(absmax)[:2]
        scaled = (absmax - mean) / seconds.repeat_interleave(256)[: len(absmax)]
        borders = (code[:-1] + code[1:]) / 2
        assert (scaled[:, None] - borders).abs().min() > 1e-5


@pytest.mark.parametrize("n", [2, 62, 64, 126, 4096, 100_000])
def test_bytes_with_given_indices_are_those_of_the_packing(n):
    index = torch.randint(16, (n,), generator=torch.Generator().manual_seed(n)).to(torch.uint8)
    packed = n04.packed_by_bitsandbytes(index)
    assert packed.tolist() == [16 * a + b for a, b in index.reshape(-1, 2).tolist()]
    assert torch.equal(n04.unpacked_by_bitsandbytes(packed), index)


def test_the_table_is_not_the_nearest_value():
    code = codebooks.dynamic_code()
    x = torch.linspace(-1e-4, 1e-4, 2001)
    nearest = torch.bucketize(x, (code[:-1] + code[1:]) / 2)
    assert (nearest != double_quant.table_index(x, code)).float().mean() > 0.3
    x = torch.linspace(0.2, 1, 2001)
    nearest = torch.bucketize(x, (code[:-1] + code[1:]) / 2)
    assert (nearest != double_quant.table_index(x, code)).float().mean() < 0.01


@pytest.mark.parametrize("blocksize", [32, 64, 128, 1024])
def test_added_error_is_below_1e_4(blocksize):
    x, code = torch.randn(2**21, generator=torch.Generator().manual_seed(1)), codebooks.nf4_code()
    plain = blockwise.rmse(x, blockwise.round_trip(x, code, blocksize))
    double = blockwise.rmse(x, double_quant.round_trip(x, blocksize=blocksize))
    assert abs(double - plain) < 1e-4
