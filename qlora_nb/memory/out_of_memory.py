"""When memory runs out after all: what was held, what to change, and how the memory of the failed
step is freed.

An exception keeps its traceback, the traceback its frames, and they keep the activations of the
step that failed: until it is gone nothing can be tried again. `freed_memory_of` lets go of it,
`explained` turns the error into a refusal with the next option to take.
"""

import gc
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from qlora_nb import cards
from qlora_nb.errors import KitError, is_out_of_memory
from qlora_nb.memory import budget, ledger


def freed_memory_of(error: BaseException) -> bool:
    """Whether memory ran out; if it did, what the failed computation held is free again.

    The error loses its traceback, whose frames and closures hold the activations of the step that
    failed: a notebook keeps its last error, and with it they would stay until the next one.
    """
    if not is_out_of_memory(error):
        return False
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
    gc.collect()
    torch.cuda.empty_cache()
    return True


@contextmanager
def explained(settings, model) -> Iterator[None]:
    """Inside, running out of memory becomes a `KitError` (see `explain`)."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not freed_memory_of(error):
            raise
        raise explain(error, settings, model, None) from error


def explain(error: BaseException, settings, model, optimizer) -> KitError:
    """What an out-of-memory error becomes: the ledger of that moment and the next option to take.
    Gradients are freed.
    """
    held = ledger.measure(model, optimizer)
    model.zero_grad(set_to_none=True)
    largest = sorted(held.lines, key=lambda line: -line.bytes)[:4]
    parts = ", ".join(f"{line.name} {line.bytes / cards.GIB:.2f}" for line in largest)
    remedy = "choose a smaller model, or close other programs"
    with suppress(Exception):  # a family whose activations cannot be counted: no option is named
        remedy = str(budget.options(settings, model.config)[0])
    said = str(error).split("GPU ")[0].strip() or type(error).__name__
    asked = said.splitlines()[0].rstrip(".")[:120]
    what = f"memory ran out ({asked}); held at that moment {held.total_gib:.2f} GiB: {parts}"
    return KitError(what, remedy=remedy)
