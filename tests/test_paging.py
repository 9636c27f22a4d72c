"""The page simulator against plain loops and hand-checked traces; bitsandbytes' rule and bytes
against real optimizers.
"""

import inspect
import warnings
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_nb.errors import KitError
from qlora_nb.memory import ledger
from qlora_nb.model import configs
from qlora_nb.theory import paging

EVENT = st.one_of(
    st.tuples(st.just("reserve"), st.integers(0, 5)),
    st.tuples(st.sampled_from(["touch", "prefetch"]), st.integers(0, 9)),
)


def by_loops(events: list[tuple[str, int]], budget_pages: int) -> tuple[int, int, int, list[int]]:
    """(faults, pages_in, pages_out, resident) of a list of ("reserve" | "touch" | "prefetch", n),
    in plain loops over a list; the card must have room.
    """
    resident = []  # least recently used first
    known = []
    reserved = 0
    faults = 0
    pages_in = 0
    pages_out = 0
    for kind, n in events:
        needed = 1
        if kind == "reserve":
            reserved = n
            needed = 0
        elif n in resident:
            resident.remove(n)
        else:
            if kind == "touch":
                faults += 1
            if n in known:
                pages_in += 1
            known.append(n)
        while len(resident) + reserved + needed > budget_pages:
            resident.pop(0)
            pages_out += 1
        if kind != "reserve":
            resident.append(n)
    return faults, pages_in, pages_out, resident


@settings(max_examples=300, deadline=None)
@given(st.lists(EVENT, max_size=60), st.integers(6, 12))
def test_memory_equals_the_loops(events, budget):
    memory = paging.UnifiedMemory(budget)
    for kind, n in events:
        getattr(memory, kind)(n)
        assert len(memory.resident) + memory.reserved <= budget
    assert (
        memory.faults,
        memory.pages_in,
        memory.pages_out,
        list(memory.resident),
    ) == by_loops(events, budget)


def test_a_cyclic_sweep_one_page_short_misses_everything():
    memory = paging.UnifiedMemory(9)
    for _ in range(3):
        for page in range(10):
            memory.touch(page)
    assert memory.faults == 30
    assert memory.pages_in == 20
    roomy = paging.UnifiedMemory(10)
    for _ in range(3):
        for page in range(10):
            roomy.touch(page)
    assert (roomy.faults, roomy.pages_in, roomy.pages_out) == (10, 0, 0)


def test_out_of_memory():
    with pytest.raises(MemoryError):
        paging.UnifiedMemory(3).reserve(4)
    memory = paging.UnifiedMemory(3)
    memory.reserve(3)
    with pytest.raises(MemoryError):
        memory.touch(0)


def sizes(layer=10, paged=8):
    now = {"kept": 3, "forward": layer, "backward": layer, "loss": 4}
    return paging.StepSizes(2, weights=20, adapter=1, gradients=2, paged=paged, fixed=1, **now)


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
    usual, spike = sizes(), sizes(layer=16)
    run = [usual, usual, spike, usual]
    budget = 50  # usual peak 22 + 16 + 8 = 46; spike 22 + 22 + 8 = 52
    dead = paging.simulate(run, budget, paging=False)
    assert [r.survived for r in dead] == [True, True, False]
    alive = paging.simulate(run, budget, page_bytes=1)
    assert [r.survived for r in alive] == [True] * 4
    assert [r.bytes_out for r in alive] == [0, 0, 2, 0]  # two bytes too many go out …
    assert [r.bytes_in for r in alive] == [0, 0, 2, 0]  # … and come back when the optimizer asks
    assert [r.faults for r in alive] == [8, 0, 2, 0]
    assert [r.faults for r in paging.simulate(run, budget, page_bytes=1, prefetch=True)] == [0] * 4
    assert not paging.simulate([sizes(layer=30)], budget, page_bytes=1)[
        0
    ].survived  # ordinary memory alone is too much
    assert alive[2].seconds(1e-9) == 4


def test_refusals():
    with pytest.raises(KitError, match="positive"):
        paging.simulate([sizes()], 0)
    with pytest.raises(KitError, match="bandwidth"):
        paging.StepRecord(True).seconds(0)
    with pytest.raises(KitError, match="8, 32"):
        paging.state_bytes(10, 16)


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
