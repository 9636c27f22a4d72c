"""The peak of memory while a model works, measured by torch itself."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from qlora_nb.model import device


@dataclass
class PeakMemory:
    """The most bytes that lived at once besides what was there at the start; known when `weigh`
    ends.
    """

    peak_bytes: int = 0


@contextmanager
def measure_peak() -> Iterator[PeakMemory]:
    """Measure what moves while a model works: torch's allocator tells, on a GPU directly, on a CPU
    through torch's profiler.
    """
    moved = PeakMemory()
    if device.on_gpu():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield moved
        moved.peak_bytes = torch.cuda.max_memory_allocated() - before
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield moved
    events = [
        event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    sizes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    moved.peak_bytes = max(itertools.accumulate(sizes), default=0)
