"""The codes: derived values against bitsandbytes' tables, and what fitting a code does."""

from __future__ import annotations

import doctest
from statistics import NormalDist

import pytest
import torch
from bitsandbytes import functional as bnb
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_nb.errors import KitError
from qlora_nb.theory import blockwise, codebooks


def test_examples_in_docstrings():
    assert doctest.testmod(codebooks).failed == 0


def test_nf4_is_within_2e_7_of_quantiles_in_double_precision():
    assert abs(codebooks.TAIL_QUANTILE - 0.96770833) < 1e-8
    quantile, span = NormalDist().inv_cdf, codebooks.TAIL_QUANTILE - 0.5
    above = [quantile(codebooks.TAIL_QUANTILE - span * i / 8) for i in range(8)]
    below = [-quantile(codebooks.TAIL_QUANTILE - span * i / 7) for i in range(7)]
    derived = torch.tensor(sorted([*below, 0.0, *above]), dtype=torch.float64) / above[0]
    assert (codebooks.nf4_code() - derived).abs().max() <= 2e-7


def test_nf4_in_the_librarys_steps_is_its_table_bit_for_bit():
    assert torch.equal(codebooks.nf4_code(), bnb.get_4bit_type("nf4", device="cpu"))


def test_fp4_and_dynamic_map_equal_the_library():
    assert torch.equal(codebooks.fp4_code(), bnb.get_4bit_type("fp4", device="cpu"))
    assert torch.equal(codebooks.dynamic_code(), bnb.create_dynamic_map())
    assert codebooks.int4_code().tolist() == pytest.approx([i / 7 for i in range(-7, 8)])


def test_af4_derived_within_3e_5_of_the_library():
    table = bnb.get_4bit_type("af4", device="cpu").sort().values
    assert (codebooks.af4_code() - table).abs().max() <= 3e-5
    assert torch.equal(codebooks.code_by_name("af4"), codebooks.af4_code())


@pytest.mark.parametrize("blocksize", [32, 64, 1024])
def test_af4_halves_have_least_absolute_error(blocksize):
    """Each inner value is the median of the scaled numbers that choose it, when a border lies at
    zero; checked on samples.
    """
    x = torch.randn(2**21, generator=torch.Generator().manual_seed(4)).reshape(-1, blocksize)
    scaled = (x / x.abs().amax(dim=1, keepdim=True)).flatten()
    upper = codebooks.af4_code(blocksize)[8:]
    borders = [0.0, *((upper[1:] + upper[:-1]) / 2).tolist()]
    for value, low, high in zip(upper[:-1].tolist(), borders, borders[1:]):
        assert scaled[(scaled > low) & (scaled <= high)].median().item() == pytest.approx(
            value, abs=2e-3
        )


def test_code_by_name_refuses_others():
    assert torch.equal(codebooks.code_by_name("nf4"), codebooks.nf4_code())
    with pytest.raises(KitError, match="NF4, FP4, INT4"):
        codebooks.code_by_name("int8")


def lloyd_max_loops(samples, code, steps):
    """Plain loops, nothing shared with the fast version."""
    for _ in range(steps):
        nearest = [min(range(len(code)), key=lambda i: abs(code[i] - x)) for x in samples]
        groups = [[x for x, n in zip(samples, nearest) if n == i] for i in range(len(code))]
        code = [sum(g) / len(g) if g else c for g, c in zip(groups, code)]
    return code


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 60))
def test_lloyd_max_equals_loops(seed, n):
    samples = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    start = torch.linspace(-1, 1, 5, dtype=torch.float64)
    got = codebooks.lloyd_max(samples, start, steps=8)
    assert got.tolist() == pytest.approx(
        lloyd_max_loops(samples.tolist(), start.tolist(), 8), abs=1e-6
    )


def test_lloyd_max_refuses_nonsense():
    for bad in (torch.tensor([]), torch.tensor([1.0, float("nan")])):
        with pytest.raises(KitError):
            codebooks.lloyd_max(bad, codebooks.nf4_code())


@pytest.mark.parametrize("blocksize", [64, 128, 1000])
def test_lloyd_max_beats_nf4_by_some_percent_on_fresh_data(blocksize):
    draw = torch.Generator().manual_seed(3)
    seen, fresh = (torch.randn(2**19, generator=draw) for _ in range(2))
    fitted, nf4 = blockwise.fitted_code(seen, blocksize), codebooks.nf4_code()
    gain = 1 - blockwise.rmse(
        fresh, blockwise.round_trip(fresh, fitted, blocksize)
    ) / blockwise.rmse(fresh, blockwise.round_trip(fresh, nf4, blocksize))
    assert 0.03 < gain < 0.08
