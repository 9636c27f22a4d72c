"""A card that is not there: the code's CUDA branches run on a CPU.

Two stand-ins, each for what the other cannot show:

- `card(monkeypatch, …)` makes the kit believe in NVIDIA cards while every tensor stays on the CPU.
  transformers' Trainer then runs with accelerate's own autocast and torch's own gradient scaler,
  both of which exist for the CPU too. Numbers are real.
- `Meta` takes torch's *meta* device for the card beside real tensors in the host's memory. An
  operation that mixes the two is an error, as it is on a card; what comes back from the card has
  the right shape and is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import accelerate
import bitsandbytes.functional
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_nb import cards, machine
from qlora_nb.model import device

GIB = 2**30


def card(
    monkeypatch,
    capability: tuple[int, int] = (7, 5),
    n_cards: int = 1,
    total_bytes: int = 15 * GIB,
    free_bytes: int | None = None,
) -> SimpleNamespace:
    """Let the kit, and the kit alone, see `n_cards` NVIDIA cards; everything is computed on the
    CPU.

    The libraries see none: of torch.cuda only what the kit itself calls is stood in for.

    Returns:
        `emptied`: how often the allocator's cache was given back; `scalers`: how many gradient
            scalers were made.
    """
    seen = SimpleNamespace(emptied=0, scalers=0)
    gpu = cards.Gpu(
        "rehearsed card", total_bytes, total_bytes if free_bytes is None else free_bytes, capability
    )

    def empty_cache() -> None:
        seen.emptied += 1

    stand_ins: dict[str, Callable] = {
        "empty_cache": empty_cache,
        "memory_reserved": lambda: 0,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 0,
        "reset_peak_memory_stats": lambda: None,
        "mem_get_info": lambda: (gpu.free_bytes, gpu.total_bytes),
        "get_rng_state": torch.random.get_rng_state,
        "set_rng_state": torch.random.set_rng_state,
    }
    for name, function in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(machine, "gpus", lambda: (gpu,) * n_cards)
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    monkeypatch.setattr(device, "compute_device", lambda: torch.device("cpu"))

    arguments_class = transformers.TrainingArguments

    def arguments(**options):
        made = arguments_class(**options)
        made._n_gpu = (
            0 if options["use_cpu"] else n_cards
        )  # what transformers finds on such a machine
        return made

    monkeypatch.setattr(transformers, "TrainingArguments", arguments)

    begin = accelerate.Accelerator.__init__

    def begin_with_scaler(self, *args, **options):
        begin(self, *args, **options)
        if self.state.mixed_precision == "fp16":  # on a CPU accelerate would leave both out
            self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu")
            seen.scalers += 1

    monkeypatch.setattr(accelerate.Accelerator, "__init__", begin_with_scaler)
    return seen


class PageManager:
    """bitsandbytes' managed memory, recorded: `live` buffers and how many were ever asked for."""

    def __init__(self, monkeypatch):
        self.asked: list[torch.Tensor] = []

        def get_paged(*shape, dtype=torch.float32, device=None):
            buffer = torch.zeros(*shape, dtype=dtype)
            buffer.is_paged, buffer.page_deviceid = True, 0
            self.asked.append(buffer)
            return buffer

        def get_state_buffer(optimizer, parameter, dtype=torch.float32):
            """As bitsandbytes 0.50.2's `Optimizer8bit.get_state_buffer` on a card."""
            if not optimizer.is_paged or parameter.numel() < 1e5:
                return torch.zeros_like(parameter, dtype=dtype)
            buffer = bitsandbytes.functional.get_paged(
                *parameter.shape, dtype=dtype, device=parameter.device
            )
            optimizer.page_mng.paged_tensors.append(buffer)
            return buffer

        monkeypatch.setattr(bitsandbytes.functional, "get_paged", get_paged)
        monkeypatch.setattr(
            bitsandbytes.functional, "prefetch_tensor", lambda tensor, to_cpu=False: None
        )
        monkeypatch.setattr(
            bitsandbytes.optim.optimizer.Optimizer8bit, "get_state_buffer", get_state_buffer
        )


def paged_states(optimizer) -> tuple[int, int]:
    """(states that lie in pages, states that should: of at least 100,000 numbers)."""
    inner = getattr(optimizer, "optimizer", optimizer)
    found = [state[name] for state in inner.state.values() for name in ("state1", "state2")]
    return sum(getattr(t, "is_paged", False) for t in found), sum(t.numel() >= 1e5 for t in found)


class Meta(TorchDispatchMode):
    """Inside, *meta* is the card: operations that mix it with the host's tensors fail, what is read
    back from it is zero.
    """

    CARD = torch.device("meta")
    _COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    _INDEXED = (
        torch.ops.aten.index.Tensor,
        torch.ops.aten._index_put_impl_.default,
        torch.ops.aten.index_put_.default,
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if func is torch.ops.aten._local_scalar_dense.default and tensors[0].is_meta:
            return torch.zeros((), dtype=tensors[0].dtype).item()
        if func in self._COPIES:
            return self._copy(func, args, kwargs)
        places = {
            t.device.type for t in tensors if t.dim() or t.is_meta
        }  # a number from the host may meet any tensor
        if len(places) > 1 and func not in self._INDEXED:
            raise RuntimeError(
                f"{func}: expected all tensors on the same device, found {', '.join(sorted(places))}"
            )
        return func(*args, **kwargs)

    def _copy(self, func, args, kwargs):
        source = args[1] if func is torch.ops.aten.copy_.default else args[0]
        if not source.is_meta:
            return func(*args, **kwargs)
        if func is torch.ops.aten.copy_.default:
            return args[0] if args[0].is_meta else args[0].zero_()
        to = kwargs.get("device")
        if to is None or to.type == "meta":
            return func(*args, **kwargs)
        return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype, device=to)
