"""The checker of a function that the reader writes (`ui/written.py`), on a function of its own."""

import pytest
import torch

from qlora_nb.ui.written import Written


def scaled(x, factor):
    return x * factor


def inputs():
    return [(torch.tensor([1.0, 2.0]), 3), (torch.ones(2, 3), 2)]


CHECK = Written(
    "scaled",
    scaled,
    inputs,
    "torch's product",
    "multiply by the factor",
    {"the factor multiplies, it is not added": lambda x, factor: x + factor},
)


def stub(x, factor):
    raise NotImplementedError


def in_place(x, factor):
    return x.mul_(factor)


FAULTS = {
    "not written yet. Put your lines in the place of `raise`": stub,
    "called with a tensor of shape (2,), 3 it raises ZeroDivisionError": lambda x, factor: 1 / 0,
    "it returns nothing: its last line must be `return …`": lambda x, factor: None,
    "it changes what it is given: work on a copy": in_place,
    "a tensor is needed, yours is of type list": lambda x, factor: (x * factor).tolist(),
    "shape wrong: yours is (2, 1), needed is (2,). Hint: multiply": lambda x, f: x[:, None] * f,
    "datatype wrong: yours is torch.float64, needed is torch.float32": lambda x, f: x.double() * f,
    "values wrong: 2 of 2, the first at [0]: yours is 4, needed is 3. Hint: the factor multiplies,": (
        lambda x, factor: x + factor
    ),
    "values wrong: 1 of 2, the first at [1]: yours is 5, needed is 6. Hint: multiply by the": (
        lambda x, factor: torch.tensor([3.0, 5.0])
    ),
    "values wrong: 1 of 2, the first at [1]: yours is nan, needed is 6": (
        lambda x, factor: torch.tensor([3.0, float("nan")])
    ),
}


@pytest.mark.parametrize("said", FAULTS)
def test_one_fault_is_told_in_one_line_and_the_reference_goes_on(said, capsys):
    assert CHECK(FAULTS[said]) is scaled
    printed = capsys.readouterr().out
    assert printed.startswith(f"scaled: {said}")
    assert printed.count("\n") == 1


def test_an_error_of_torch_is_no_stub(capsys):
    def shifts_floats(x, factor):
        return x << 4

    CHECK(shifts_floats)
    assert "it raises NotImplementedError" in capsys.readouterr().out


def test_a_sum_in_another_order_is_right_and_a_small_factor_is_not(capsys):
    def inputs():
        return [(torch.linspace(-3000, 3000, 4001), 3)]

    check = Written("scaled", scaled, inputs, "torch's product", "multiply by the factor")

    def in_another_order(x, factor):
        return (x + 1.0) * factor - factor

    def a_little_more(x, factor):
        return x * (factor + 1e-3)

    assert check(in_another_order) is in_another_order
    assert check(a_little_more) is scaled


def test_the_notebooks_random_numbers_go_on_as_they_were():
    def draws(x, factor):
        return x * factor + 0 * torch.randn(x.shape)

    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    CHECK(draws)
    assert torch.equal(torch.rand(3), wanted)


def test_a_right_function_goes_on_itself(capsys):
    def mine(x, factor):
        return factor * x

    assert CHECK(mine) is mine
    assert capsys.readouterr().out == "scaled: right, equal to torch's product.\n"


def test_a_fault_that_only_a_later_call_shows_is_found(capsys):
    CHECK(lambda x, factor: x * 3)
    assert "values wrong: 6 of 6, the first at [0, 0]: yours is 3, needed is 2" in (
        capsys.readouterr().out
    )


def test_several_results_are_compared_one_after_the_other(capsys):
    def pair(x, factor):
        return x.int(), x * factor

    check = Written("pair", pair, inputs, "torch", "first the whole numbers")
    check(lambda x, factor: x.int())
    assert "2 results are needed, as in `return first, second`" in capsys.readouterr().out
    check(lambda x, factor: (x.int(), x))
    assert "result 2 of 2: values wrong: 2 of 2, the first at [0]" in capsys.readouterr().out
    check(lambda x, factor: (x, x))
    assert "result 1 of 2: datatype wrong" in capsys.readouterr().out
    assert check(pair) is pair


def test_a_large_whole_number_must_be_equal(capsys):
    check = Written("bytes", lambda n: 16 * n, lambda: [(81_920,)], "the sum", "count again")
    check(lambda n: 16 * n + 1)
    assert "values wrong: 1.31072e+06 is too large" in capsys.readouterr().out


def test_lists_are_compared_as_numbers(capsys):
    check = Written("labels", lambda ids, n: [-100] * n + ids[n:], lambda: [([1, 2], 1)], "a", "b")
    check(lambda ids, n: ids)
    assert "values wrong at position 0: 1 is too large. Hint: b" in capsys.readouterr().out

    def drops(ids, n):
        del ids[:n]
        return [-100] * n + ids

    check(drops)
    assert "it changes what it is given" in capsys.readouterr().out
