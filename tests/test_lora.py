"""LoRA as notebook 02 writes it, in the solutions folded there: against plain loops and PEFT."""

import ast

import nbformat
import pytest
import torch
from conftest import NOTEBOOKS
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from qlora_nb.batch import solutions
from qlora_nb.errors import KitError
from qlora_nb.model import load
from qlora_nb.model.linear_layers import dense_weight, linear_layers
from qlora_nb.settings import validate
from qlora_nb.theory import lora

WRITTEN = {}
"""The functions of notebook 02's solutions by their names."""
for _, solution in solutions.exercises(nbformat.read(NOTEBOOKS / "02_lora.ipynb", 4)):
    exec(solution, WRITTEN)
forward = WRITTEN["lora_forward"]
merge = WRITTEN["lora_merge"]


def forward_in_loops(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    lora_alpha: float,
) -> torch.Tensor:
    """`lora_forward` for one input vector (in,), as plain loops: what the formula says, number by
    number.
    """

    def product(matrix: list[list[float]], vector: list[float]) -> list[float]:
        sums = []
        for row in matrix:
            total = 0.0
            for entry, number in zip(row, vector):
                total += entry * number
            sums.append(total)
        return sums

    frozen = product(weight.tolist(), x.tolist())
    thin = product(lora_a.tolist(), x.tolist())
    learnt = product(lora_b.tolist(), thin)
    y = []
    for base, change in zip(frozen, learnt):
        y.append(base + lora_alpha / len(lora_a) * change)
    return torch.tensor(y, dtype=x.dtype)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 4),
    st.floats(0.1, 64),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_forward_equals_the_loops(n_in, n_out, r, alpha, dtype):
    torch.manual_seed(n_in + 10 * n_out + 100 * r)
    x, w, a, b = (
        torch.randn(s, dtype=dtype) for s in ((n_in,), (n_out, n_in), (r, n_in), (n_out, r))
    )
    torch.testing.assert_close(
        forward(x, w, a, b, alpha), forward_in_loops(x, w, a, b, alpha), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        forward(x, w, a, b, alpha), x @ merge(w, a, b, alpha).T, rtol=1e-4, atol=1e-4
    )


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 4),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from(["random", "B zero", "constant", "denormal"]),
)
def test_loops_in_16_bit_and_on_awkward_numbers(n_in, n_out, r, dtype, kind):
    torch.manual_seed(n_in + 10 * n_out + 100 * r)
    x, w, a, b = (torch.randn(s) for s in ((n_in,), (n_out, n_in), (r, n_in), (n_out, r)))
    if kind == "B zero":
        b = torch.zeros_like(b)
    if kind == "constant":
        x, a = torch.full_like(x, 0.5), torch.full_like(a, -0.25)
    if kind == "denormal":
        w, b = w * 1e-40, b * 1e-40
    x, w, a, b = (t.to(dtype) for t in (x, w, a, b))
    fast, slow = forward(x, w, a, b, 8), forward_in_loops(x, w, a, b, 8)
    assert fast.dtype == slow.dtype == dtype
    size = (
        (
            x.abs().float() @ w.abs().float().T
            + 8 / r * x.abs().float() @ a.abs().float().T @ b.abs().float().T
        )
        .max()
        .item()
    )
    rounding = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(fast, slow, rtol=0, atol=rounding * size + 1e-38)
    if kind == "B zero":
        assert torch.equal(fast, x @ w.T)


class Holder(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def copy_of(layer):
    twin = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    twin.weight.data = dense_weight(layer).clone()
    if layer.bias is not None:
        twin.bias.data = layer.bias.detach().float().clone()
    return twin


def pocket_layer():
    return linear_layers(load.load_base(validate({}), four_bit=False))[
        "gpt_neox.layers.2.mlp.dense_h_to_4h"
    ]


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(40, 56), lambda: nn.Linear(33, 17, bias=False), pocket_layer]
)
def test_output_gradients_and_merged_weight_are_pefts(make):
    torch.manual_seed(0)
    base = make()
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["layer"], init_lora_weights=False)
    theirs = get_peft_model(Holder(copy_of(base)), config)
    peft_layer = theirs.base_model.model.layer
    weight = dense_weight(base).float()
    a = peft_layer.lora_A["default"].weight.detach().clone().requires_grad_()
    b = peft_layer.lora_B["default"].weight.detach().clone().requires_grad_()
    x = torch.randn(5, 7, base.in_features)
    y_ours, y_theirs = forward(x, weight, a, b, 16), theirs(x)
    if base.bias is not None:
        y_ours = y_ours + base.bias.detach().float()
    torch.testing.assert_close(y_ours, y_theirs, rtol=1e-5, atol=1e-5)
    (y_ours**2).mean().backward()
    (y_theirs**2).mean().backward()
    torch.testing.assert_close(
        a.grad, peft_layer.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-7
    )
    torch.testing.assert_close(
        b.grad, peft_layer.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-7
    )
    merged = merge(weight, a, b, 16)
    torch.testing.assert_close(merged, theirs.merge_and_unload().layer.weight)


def test_what_lora_saves_in_operations_as_02_counts_it():
    """By hand: a full layer makes three products; with a frozen W two stay, and A and B make three
    thin ones each.
    """
    n_in, n_out, r, rows = 48, 96, 4, 8
    cells = nbformat.read(NOTEBOOKS / "02_lora.ipynb", 4).cells
    source = next(cell.source for cell in cells if "def operations(" in cell.source)
    function = next(
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "operations"
    )
    names = {"FlopCounterMode": FlopCounterMode, "x": torch.randn(rows, n_in), "torch": torch}
    exec(compile(ast.Module([function], []), "02", "exec"), names)
    plain = nn.Linear(n_in, n_out, bias=False)
    config = LoraConfig(r=r, target_modules=["0"])
    adapted = get_peft_model(nn.Sequential(nn.Linear(n_in, n_out, bias=False)), config)
    product, thin = 2 * rows * n_in * n_out, 2 * rows * r * (n_in + n_out)
    assert names["operations"](plain) == [product, product, product]
    assert names["operations"](adapted) == [product + thin, product + thin, thin]


def test_both_at_zero_never_move():
    a = torch.zeros(2, 8, requires_grad=True)
    b = torch.zeros(8, 2, requires_grad=True)
    forward(torch.randn(4, 8), torch.randn(8, 8), a, b, 2).sum().backward()
    assert not a.grad.any()
    assert not b.grad.any()


def test_best_rank_is_the_best():
    torch.manual_seed(0)
    update = torch.randn(20, 12)
    energy = lora.captured_energy(update)
    assert energy.shape == (12,)
    assert abs(energy[-1] - 1) < 1e-5
    for r in (1, 5, 12):
        a, b = lora.best_rank(update, r)
        assert (a.shape, b.shape) == ((r, 12), (20, r))
        lost = ((update - b @ a) ** 2).sum() / (update**2).sum()
        assert abs(1 - lost - energy[r - 1]) < 1e-5
        other = torch.randn(20, r)
        fit = other @ torch.linalg.lstsq(other, update).solution
        assert ((update - fit) ** 2).sum() >= ((update - b @ a) ** 2).sum() - 1e-4


def test_refusals():
    with pytest.raises(KitError, match="NaN"):
        lora.captured_energy(torch.tensor([[float("nan")]]))
    with pytest.raises(KitError, match="zero"):
        lora.captured_energy(torch.zeros(2, 2))
    assert lora.n_parameters(16, [(5120, 15360)]) == 16 * (5120 + 15360)
