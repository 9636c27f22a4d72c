"""Sophia-G by hand against sophia-opt, an independent package, and its estimate against the exact
diagonal of the Gauss–Newton matrix.
"""

import pytest
import torch
from sophia_opt import SophiaG as Reference
from torch.func import functional_call, jacrev
from torch.nn.functional import cross_entropy

from qlora_nb.theory import sophia

SHAPES = [(1,), (8, 64), (3, 5, 7)]
N_TOKENS = 37


def both(shape, dtype, rho, weight_decay, seed, steps=50):
    """The same gradients to both, an estimate every tenth step, a new learning rate in each."""
    random = torch.Generator().manual_seed(seed)
    start = torch.randn(shape, generator=random, dtype=dtype)
    ours = torch.nn.Parameter(start.clone())
    theirs = torch.nn.Parameter(start.clone())
    options = {"lr": 1.0, "rho": rho, "weight_decay": weight_decay}
    mine = sophia.SophiaG([ours], **options)
    reference = Reference([theirs], **options)
    for step in range(steps):
        for optimizer in (mine, reference):
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        if step % 10 == 0:
            ours.grad = torch.randn(shape, generator=random, dtype=dtype) / 10
            theirs.grad = ours.grad.clone()
            mine.estimate(N_TOKENS)
            reference.update_hessian()
        ours.grad = torch.randn(shape, generator=random, dtype=dtype) / 10
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step(bs=N_TOKENS)
        yield ours.detach(), theirs.detach(), mine


# float64: some hundred roundings of 1e-16; float32 likewise of 6e-8. Over 20 seeds the largest
# relative difference was 9e-16 and 2.4e-7 (here run the first three).
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rho", [0.04, 10.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_fifty_steps_equal_the_reference(shape, dtype, tolerance, rho, weight_decay, seed):
    shares = []
    for ours, theirs, optimizer in both(shape, dtype, rho, weight_decay, seed):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
        shares.append(optimizer.clipped())
    if shape != (1,):
        assert max(shares[10:]) > 0  # both branches of the clip are met
        assert rho < 1 or min(shares[10:]) < 1


def test_the_share_clipped_is_counted():
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = sophia.SophiaG([weight], betas=(0.0, 0.0), rho=1.0, lr=1.0, weight_decay=0.0)
    weight.grad = torch.tensor([1.0, 1.0, 1.0, 2.0])
    optimizer.estimate(1)  # h = 1, 1, 1, 4
    weight.grad = torch.tensor([0.5, -3.0, 1.5, 3.9])
    optimizer.step()
    assert optimizer.clipped() == 0.5
    assert torch.allclose(weight, -torch.tensor([0.5, -1.0, 1.0, 3.9 / 4]))


def test_states_are_two_float32_a_number():
    weight = torch.nn.Parameter(torch.ones(10, 10))
    weight.grad = torch.ones(10, 10)
    optimizer = sophia.SophiaG([weight])
    optimizer.step()
    bytes_ = [state.nbytes for state in optimizer.state[weight].values()]
    assert bytes_ == [400, 400]
    assert torch.optim.AdamW([weight]).__class__ is torch.optim.AdamW  # as many as Adam's two means


def test_what_has_no_gradient_is_left_alone():
    still, moves = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    moves.grad = torch.ones(2)
    optimizer = sophia.SophiaG([still, moves])
    optimizer.estimate(1)
    optimizer.step()
    assert torch.equal(still.detach(), torch.ones(2))
    assert (moves < 1).all()
    assert still not in optimizer.state


def test_sampled_labels_follow_the_models_probabilities():
    torch.manual_seed(0)
    probabilities = torch.tensor([0.6, 0.3, 0.1])
    logits = probabilities.log().expand(40, 101, 3)
    labels = torch.zeros(40, 101, dtype=torch.long)
    labels[:, 50:] = -100
    labels[:, 0] = 2
    drawn = sophia.sampled_labels(logits, labels)
    assert (drawn[:, 50:] == -100).all()
    assert (drawn[:, 0] == 2).all()
    seen = drawn[:, 1:50].flatten().bincount(minlength=3) / (40 * 49)
    # three standard deviations of a share of 1,960
    assert ((seen - probabilities).abs() < 3 * (probabilities / 1960).sqrt()).all()
    assert (labels[:, 1:50] == 0).all(), "the given labels are not changed"


def test_labels_are_drawn_from_the_logits_one_place_before():
    logits = torch.full((1, 4, 5), -100.0)
    for place, token in enumerate([4, 3, 2, 1]):
        logits[0, place, token] = 100.0
    drawn = sophia.sampled_labels(logits, torch.zeros(1, 4, dtype=torch.long))
    assert drawn.tolist() == [[0, 4, 3, 2]]


def test_the_estimate_is_on_average_the_exact_gauss_newton_diagonal():
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 4, bias=False).double()
    x = torch.randn(6, 5, dtype=torch.float64)

    def logits_of(weight):
        return functional_call(layer, {"weight": weight}, (x,))

    jacobian = jacrev(logits_of)(layer.weight.detach())  # (6, 4, *weight)
    p = logits_of(layer.weight.detach()).softmax(-1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    exact = torch.einsum("nikl,nij,njkl->kl", jacobian, inner, jacobian) / len(x)
    total = torch.zeros_like(exact)
    n = 4000
    for _ in range(n):
        labels = torch.multinomial(p, 1)[:, 0]
        (gradient,) = torch.autograd.grad(cross_entropy(layer(x), labels), layer.weight)
        total += len(x) * gradient**2
    # the mean of 4,000 draws; over 20 seeds the largest entry was off by 6.5 % at most
    assert (total / n / exact - 1).abs().max() < 0.15
