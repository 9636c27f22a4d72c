"""The simulated steps against hand-checked traces and Python's own cache; bitsandbytes' rule and
bytes against real optimizers.
"""

import functools
import inspect
import itertools
import warnings
from dataclasses import replace
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_nb.memory import ledger
from qlora_nb.model import configs
from qlora_nb.theory import paging


def sizes(layer=10, unit=1):
    """A step of two layers; `unit` is what all sizes are multiplied by (bytes)."""
    stored = {"weights": 20, "adapter": 1, "gradients": 2, "paged": 8, "fixed": 1}
    now = {"kept": 3, "forward": layer, "backward": layer, "loss": 4}
    parts = {name: unit * size for name, size in (stored | now).items()}
    return paging.StepSizes(n_layers=2, **parts)


def test_timeline_by_hand():
    moments = paging.step_timeline(sizes())
    always = 20 + 1 + 8 + 1
    assert [m.total - always for m in moments] == [13, 16, 10, 16, 14, 2]
    assert [m.phase for m in moments] == [
        "forward",
        "forward",
        "loss",
        "backward",
        "backward",
        "optimizer",
    ]


def test_paging_survives_a_spike_that_kills():
    page = paging.PAGE_BYTES
    usual, spike = sizes(unit=page), sizes(layer=16, unit=page)
    run = [usual, usual, spike, usual]
    budget = 50 * page  # usual peak 22 + 16 + 8 = 46; spike 22 + 22 + 8 = 52
    dead = paging.simulate(run, budget, paging=False)
    assert [r.survived for r in dead] == [True, True, False]
    alive = paging.simulate(run, budget)
    assert [r.survived for r in alive] == [True] * 4
    assert [r.bytes_out for r in alive] == [0, 0, 2 * page, 0]  # two pages too many go out …
    assert [r.bytes_in for r in alive] == [
        0,
        0,
        2 * page,
        0,
    ]  # … and come back when the optimizer asks
    assert [r.faults for r in alive] == [8, 0, 2, 0]
    assert [r.faults for r in paging.simulate(run, budget, prefetch=True)] == [0] * 4
    too_large = sizes(layer=30, unit=page)  # ordinary memory alone is too much
    assert not paging.simulate([too_large], budget)[0].survived
    assert alive[2].seconds(1e-9) == 4 * page


@pytest.mark.parametrize("with_pages", [True, False])
@pytest.mark.parametrize("budget", [0, -1, 1])
def test_no_step_survives_on_a_card_without_memory(budget, with_pages):
    [record] = paging.simulate([sizes(), sizes()], budget, paging=with_pages)
    assert not record.survived


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(0, 14), st.integers(1, 4), st.booleans())
def test_pages_move_as_in_pythons_least_recently_used_cache(n_pages, room, n_steps, prefetch):
    """Steps without ordinary memory: a card with room for some pages of the optimizer's states."""

    @functools.lru_cache(maxsize=room)
    def page(number):
        return number

    misses = [0]
    for _ in range(n_steps):
        for number in range(n_pages):
            page(number)
        misses.append(page.cache_info().misses)
    step = paging.StepSizes(1, kept=0, forward=0, backward=0, loss=0, gradients=0)
    step = replace(step, paged=n_pages * paging.PAGE_BYTES)
    records = paging.simulate([step] * n_steps, room * paging.PAGE_BYTES, prefetch=prefetch)
    if room == 0:
        assert [record.survived for record in records] == [False]
        return
    faults = [after - before for before, after in itertools.pairwise(misses)]
    assert [record.faults for record in records] == [0 if prefetch else n for n in faults]
    copied = [0] + [paging.PAGE_BYTES * n for n in faults[1:]]  # the first step makes the pages
    assert [record.bytes_in for record in records] == copied
    on_card = min(room, n_pages)
    sent = [paging.PAGE_BYTES * n for n in faults]
    assert [record.bytes_out for record in records] == [
        sent[0] - on_card * paging.PAGE_BYTES,
        *sent[1:],
    ]


@pytest.mark.parametrize(
    ("name", "bits"), [("PagedAdamW32bit", 32), ("PagedAdamW8bit", 8), ("AdamW8bit", 8)]
)
@pytest.mark.parametrize("numel", [100, 4095, 4096, 5000, 100_001])
def test_state_bytes_are_those_of_real_optimizers(name, bits, numel):
    p = torch.nn.Parameter(torch.randn(numel))
    p.grad = torch.randn(numel)
    optimizer = getattr(bnb.optim, name)([p])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
    state = optimizer.state[p]
    parts = [state[k] for k in ("state1", "state2", "absmax1", "absmax2") if k in state]
    assert state["state1"].dtype == (torch.uint8 if bits == 8 and numel >= 4096 else torch.float32)
    assert sum(t.nbytes for t in parts) == paging.state_bytes(numel, bits)


def test_the_rule_is_bitsandbytes_own():
    source = inspect.getsource(bnb.optim.optimizer.Optimizer8bit.get_state_buffer)
    assert "p.numel() < 1e5" in source
    p = torch.nn.Parameter(torch.randn(200_000))
    p.grad = torch.randn(200_000)
    optimizer = bnb.optim.PagedAdamW32bit([p])
    with pytest.warns(UserWarning, match="not supported on CPU"):
        optimizer.step()
    assert not getattr(optimizer.state[p]["state1"], "is_paged", False)
    assert paging.is_paged(100_000)
    assert not paging.is_paged(99_999)
    assert not paging.is_paged(200_000, on_gpu=False)


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu"])
@pytest.mark.parametrize("numel", [99_999, 100_000])
def test_every_gpu_pages_not_nvidias_alone(device, numel, monkeypatch):
    """bitsandbytes' own decision for a tensor that says where it lies; AMD's cards call themselves
    cuda in torch.
    """
    paged, ordinary = torch.zeros(1), torch.zeros(1)
    monkeypatch.setattr(bnb.functional, "get_paged", lambda *shape, dtype, device: paged)
    monkeypatch.setattr(bnb.functional, "fill", lambda *given: None)
    monkeypatch.setattr(torch, "zeros_like", lambda *given, **more: ordinary)
    optimizer = bnb.optim.PagedAdamW32bit([torch.nn.Parameter(torch.ones(1))])
    asked = SimpleNamespace(device=torch.device(device), shape=(numel,), numel=lambda: numel)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = optimizer.get_state_buffer(asked)
    assert (state is paged) == paging.is_paged(numel, on_gpu=device != "cpu")


def test_which_pythia_pages_what():
    share = {}
    for size in ("14m", "410m", "12b"):
        model = configs.meta_model(configs.pythia_config(size))
        for r in (8, 16, 64):
            paged, fixed = paging.paged_bytes(ledger.lora_numels(model, r))
            share[size, r] = paged / (paged + fixed)
    assert share["14m", 16] == share["410m", 8] == share["410m", 16] == 0
    assert share["12b", 16] == 901_120 / 1_310_720
    assert share["12b", 64] == 1
