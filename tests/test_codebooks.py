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


@pytest.mark.parametrize("n_bits", [2, 3, 4, 8])
def test_normal_floats_of_any_number_of_bits(n_bits):
    """The recipe of NF4 with 2^n values, in double precision by torch's quantiles."""
    n = 2**n_bits
    tail = 1 - (1 / (2 * n) + 1 / (2 * (n - 1))) / 2
    above = torch.special.ndtri(torch.linspace(tail, 0.5, n // 2 + 1, dtype=torch.float64))
    below = torch.special.ndtri(torch.linspace(tail, 0.5, n // 2, dtype=torch.float64))
    values = torch.cat([-below[:-1], above[:-1], torch.zeros(1)]).sort().values
    code = codebooks.normal_float(n_bits)
    assert code.dtype == torch.float32
    assert (code - values / values.max()).abs().max() < 3e-6
    assert [code[0], code[n // 2 - 1], code[-1]] == [-1, 0, 1]
    assert (code < 0).sum() == n // 2 - 1


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
