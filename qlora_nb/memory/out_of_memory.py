"""When memory runs out after all: what was held, what to change, and how the memory of the failed
step is freed.
"""

import gc
import traceback
from contextlib import suppress

import torch

from qlora_nb import cards
from qlora_nb.errors import KitError
from qlora_nb.memory import budget, ledger


def free_memory_of(error: BaseException) -> None:
    """Free what an error keeps alive: its traceback holds the activations of the step that failed,
    in frames and in closures.

    A notebook keeps its last error, so the memory would stay taken until the next one. The error
    loses its traceback.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
    gc.collect()
    torch.cuda.empty_cache()


def explain(error: BaseException, settings, model, optimizer) -> KitError:
    """What an out-of-memory error becomes: the ledger of that moment and the next lever to pull.
    Gradients are freed.
    """
    held = ledger.measure(model, optimizer)
    model.zero_grad(set_to_none=True)
    parts = ", ".join(
        f"{line.name} {line.bytes / cards.GIB:.2f}"
        for line in sorted(held.lines, key=lambda x: -x.bytes)[:4]
    )
    more = []
    with suppress(Exception):  # a family whose activations cannot be counted: no lever is named
        more = budget.options(settings, model.config)
    asked = str(error).split("GPU ")[0].splitlines()[0].strip().rstrip(".")[:120]
    what = f"memory ran out ({asked}); held at that moment {held.total_gib:.2f} GiB: {parts}"
    return KitError(
        what, remedy=str(more[0]) if more else "choose a smaller model, or close other programs"
    )
