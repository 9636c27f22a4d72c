"""The peak of memory while a model works, measured by torch itself.

On a GPU torch's allocator keeps the peak. On a CPU torch's profiler records every allocation and
every release with its time; their running sum is the memory in use, its maximum the peak.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.autograd.profiler import profile

from qlora_nb.model import device


@dataclass
class PeakMemory:
    """The most bytes in use at once besides what was there at the start; known when `measure_peak`
    ends.
    """

    peak_bytes: int = 0


@contextmanager
def measure_peak() -> Iterator[PeakMemory]:
    """Measure the peak of what is allocated inside the context, in bytes."""
    moved = PeakMemory()
    if device.on_gpu():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield moved
        moved.peak_bytes = torch.cuda.max_memory_allocated() - before
        return
    # torch.profiler is made of this one; in torch 2.10 and 2.11 it warns of cycles at every use
    with profile(profile_memory=True, use_kineto=True) as profiler:
        yield moved
    events = profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    in_use = itertools.accumulate(event.nbytes() for event in changes)
    moved.peak_bytes = max(in_use, default=0)
