"""The codes: derived values against bitsandbytes' tables, and where their values lie."""

from __future__ import annotations

import doctest
from statistics import NormalDist

import pytest
import torch
from bitsandbytes import functional as bnb

from qlora_nb.theory import codebooks


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


def test_codes_by_their_names():
    for name, code in (("nf4", codebooks.nf4_code()), ("INT4", codebooks.int4_code())):
        assert torch.equal(codebooks.code_by_name(name), code)
