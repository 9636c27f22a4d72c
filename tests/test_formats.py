"""Formats of llama.cpp, OCP and NVIDIA: our indices and scales, packed into their bytes, are read by
the `gguf` package; where it can write a format, it writes the same.
"""

from __future__ import annotations

import doctest
import sys

import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb
from conftest import ROOT
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_nb import recorded
from qlora_nb.errors import KitError
from qlora_nb.theory import blockwise

sys.path.insert(0, str(ROOT / "benchmarks"))

import formats

FILES = {name: GGMLQuantizationType[name] for name in formats.FORMATS}


def draw(kind: str, n: int = 2**15) -> torch.Tensor:
    generator = torch.Generator().manual_seed(12)
    x = torch.randn(n, generator=generator)
    if kind == "heavy tails":
        x = x**3
    if kind == "small":
        x = 0.01 * x
    if kind == "zeros":  # whole blocks of them, and single ones
        x = x * (x.abs() > 1)
        x[: n // 2] = 0
    return x


KINDS = ["normal", "heavy tails", "small", "zeros"]


def halves(index: torch.Tensor, size: int) -> np.ndarray:
    """ggml's order in a block: the first half of the weights in the low four bits, the second half
    in the high ones.
    """
    low, high = index.reshape(-1, 2, size // 2).numpy().astype(np.uint8).transpose(1, 0, 2)
    return low | (high << 4)


def packed(name: str, x: torch.Tensor) -> tuple[np.ndarray, float]:
    """The bytes of a file, and the factor that the file does not hold (NVFP4's scale of the
    tensor).
    """
    index, scale, _ = formats.FORMATS[name][1](x)
    if name in ("Q4_0", "IQ4_NL"):
        assert torch.equal(scale, scale.half().float()), "the scale fits in 16 bits"
        first = scale.half().numpy().view(np.uint8)
        return np.concatenate([first, halves(index, 32)], axis=1), 1.0
    if name == "MXFP4":
        exponent = scale.log2() + 127
        assert torch.equal(exponent, exponent.round()), "the scale is a power of two"
        return np.concatenate([exponent.numpy().astype(np.uint8), halves(index, 32)], axis=1), 1.0
    of_the_tensor = x.abs().max().item() / 6 / 448
    scale = (scale / of_the_tensor).to(torch.float8_e4m3fn)
    first = scale.view(torch.uint8).numpy().reshape(-1, 4)
    return np.concatenate([first, halves(index, 16).reshape(-1, 32)], axis=1), of_the_tensor


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_gguf_reads_back_what_we_say_is_left(name, kind):
    x = draw(kind)
    content, factor = packed(name, x)
    theirs = factor * quants.dequantize(content, FILES[name]).reshape(-1)
    assert np.isfinite(theirs).all()
    assert formats.round_trip(x, name).numpy() == pytest.approx(theirs, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("name", FILES)
def test_bits_a_weight_are_those_of_the_file(name):
    x = draw("normal")
    content, _ = packed(name, x)
    assert formats.FORMATS[name][0] == 8 * content.nbytes / x.numel()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["Q4_0", "MXFP4"])
def test_gguf_writes_the_same(name, kind):
    """Bytes too, where a value has one index: E2M1 has two zeros."""
    x = draw(kind)
    theirs = quants.quantize(x.numpy(), FILES[name]).reshape(-1)
    if name == "Q4_0" and kind != "zeros":
        ours, _ = packed(name, x)
        assert np.array_equal(ours.reshape(-1), theirs)
    restored = quants.dequantize(theirs, FILES[name])
    assert formats.round_trip(x, name).tolist() == restored.tolist()


def iq4_nl_in_loops(block: list[float]) -> tuple[float, list[int]]:
    """`quantize_row_iq4_nl_impl` of llama.cpp, without an importance matrix, for one block."""
    values = formats.IQ4_NL.tolist()

    def nearest(x: float) -> int:
        return min(range(16), key=lambda i: abs(values[i] - x))

    largest = max(block, key=abs)
    best = 0.0
    scale = 0.0
    for inverse in [-values[0] / largest] + [(k + values[0]) / largest for k in range(-7, 8)]:
        taken = [values[nearest(inverse * x)] for x in block]
        product = sum(x**2 * value * x for x, value in zip(block, taken))
        square = sum(x**2 * value**2 for x, value in zip(block, taken))
        if product**2 > best * square:
            scale = product / square
            best = scale * product
    return scale, [nearest(x / scale) for x in block]


def test_iq4_nl_searches_as_llama_cpp_does():
    x = draw("normal", 32 * 200)
    index, scale, _ = formats.iq4_nl(x)
    for i, block in enumerate(x.reshape(-1, 32).double().tolist()):
        expected, indices = iq4_nl_in_loops(block)
        assert scale[i].item() == pytest.approx(expected, rel=1e-3), "rounded to 16 bits"
        assert sum(a != b for a, b in zip(index[i].tolist(), indices)) <= 1, "at a border"


@pytest.mark.parametrize("kind", KINDS)
def test_e4m3_scales_put_no_block_far_outside(kind):
    """An 8-bit scale is off by a sixteenth at most, so the largest weight comes back nearly; scales
    below the smallest E4M3 number are lost.
    """
    x = draw(kind).reshape(-1, 16)
    restored = formats.round_trip(x, "NVFP4")
    scale = x.abs().amax(dim=1)
    kept = scale > x.abs().max() / 448 / 64
    off = (restored - x).abs().amax(dim=1) / scale.clamp(min=1e-30)
    assert off[kept].max() < 0.2
    assert not restored[scale == 0].any()


def test_what_03_says_of_the_formats():
    x = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    nf4 = bnb.get_4bit_type("nf4", device="cpu")
    error = {name: blockwise.rmse(x, formats.round_trip(x, name)) for name in formats.FORMATS}
    nf4_64 = blockwise.rmse(x, blockwise.round_trip(x, nf4, 64))
    nf4_16 = blockwise.rmse(x, blockwise.round_trip(x, nf4, 16))
    assert error["IQ4_NL"] < nf4_16 < error["Q4_0"] < nf4_64 < error["NVFP4"] < error["MXFP4"]
    e2m1 = blockwise.rmse(x, blockwise.round_trip(x, formats.E2M1 / 6, 64))
    int4 = blockwise.rmse(x, blockwise.round_trip(x, torch.arange(-7.0, 8.0) / 7, 64))
    assert e2m1 < int4


def test_what_03_draws_is_what_the_formats_do():
    x = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    record, _ = recorded.read("formats")
    assert set(record["rmse"]) == {"bell curve", "the pocket model's weights"}
    of_bell = record["rmse"]["bell curve"]
    assert set(of_bell) == {"NF4", "NF4+DQ", *formats.FORMATS}
    for name, (bits, _) in formats.FORMATS.items():
        theirs = blockwise.rmse(x, formats.round_trip(x, name))
        assert of_bell[name] == {str(bits): pytest.approx(theirs, rel=1e-4)}
    by_bits = {str(4 + 32 / size): size for size in (128, 64, 32)}
    for bits, error in of_bell["NF4"].items():
        packed, state = bnb.quantize_4bit(x, blocksize=by_bits[bits], quant_type="nf4")
        restored = bnb.dequantize_4bit(packed, state)
        assert error == pytest.approx(blockwise.rmse(x, restored), rel=1e-4)
    smaller = list(of_bell["NF4+DQ"].values())
    assert smaller == sorted(smaller, reverse=True)


def test_e2m1_has_two_bits_of_exponent_and_one_of_fraction():
    magnitudes = [0.0, 0.5]
    for exponent in (1, 2, 3):
        magnitudes += [2 ** (exponent - 1) * (1 + fraction / 2) for fraction in (0, 1)]
    assert formats.E2M1.tolist() == magnitudes + [-magnitude for magnitude in magnitudes]


def lloyd_max_loops(samples, weights, code):
    """Plain loops, nothing shared with the fast version."""
    for _ in range(100):
        nearest = [min(range(len(code)), key=lambda i: abs(code[i] - x)) for x in samples]
        moved = []
        for i, value in enumerate(code):
            mine = [(w, x) for w, x, n in zip(weights, samples, nearest) if n == i]
            mass = sum(w for w, _ in mine)
            moved.append(sum(w * x for w, x in mine) / mass if mine else value)
        code = moved
    return code


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 60))
def test_lloyd_max_equals_loops(seed, n):
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(n, generator=generator, dtype=torch.float64)
    weights = torch.rand(n, generator=generator, dtype=torch.float64) + 0.01
    start = torch.linspace(-1, 1, 5, dtype=torch.float64)
    got = formats.lloyd_max(samples, weights, start)
    slow = lloyd_max_loops(samples.tolist(), weights.tolist(), start.tolist())
    assert got.tolist() == pytest.approx(slow, abs=1e-6)


def test_a_fitted_code_refuses_nonsense():
    with pytest.raises(KitError, match="position 1"):
        formats.fitted_code(torch.tensor([1.0, float("nan")]))


def test_lloyd_max_beats_nf4_by_some_percent_on_fresh_data():
    draw = torch.Generator().manual_seed(3)
    seen, fresh = (torch.randn(2**19, generator=draw) for _ in range(2))
    fitted, nf4 = formats.fitted_code(seen), bnb.get_4bit_type("nf4", device="cpu")
    left = [blockwise.rmse(fresh, blockwise.round_trip(fresh, code)) for code in (fitted, nf4)]
    assert 0.03 < 1 - left[0] / left[1] < 0.08


def test_the_recorded_code_is_the_fitted_one():
    x = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    record, _ = recorded.read("formats")
    assert record["fitted code"] == pytest.approx(formats.fitted_code(x).tolist(), abs=1e-6)


def test_examples_in_docstrings():
    assert doctest.testmod(formats).failed == 0
