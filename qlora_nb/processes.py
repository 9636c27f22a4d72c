"""Several processes that train one run: who is the first of them, and what all must agree on.

torch starts and watches them (`torchrun`), each with its number in the environment, its *rank*;
they talk through torch's process group (gloo between CPUs, NCCL between cards). What stands here is
the little that the kit asks of that group. In a process that is alone every answer is its own, and
torch is not loaded for it.
"""

import os
import sys


def _group():
    """torch.distributed in a process that is one of several, else None."""
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        return distributed
    return None


def count() -> int:
    """How many processes train this run, 1 or more."""
    group = _group()
    return group.get_world_size() if group else 1


def rank() -> int:
    """The number of this process, from 0. The first writes files and speaks."""
    group = _group()
    return group.get_rank() if group else 0


def card() -> int:
    """The number of this process's card: of several on one machine each has its own, which its
    launcher numbers (`LOCAL_RANK`).
    """
    return int(os.environ.get("LOCAL_RANK", "0")) if count() > 1 else 0


def gathered(value: object) -> list:
    """The values that all processes give, by rank. All must ask, and equally often."""
    group = _group()
    if group is None:
        return [value]
    values = [None] * group.get_world_size()
    group.all_gather_object(values, value)
    return values


def wait() -> None:
    """Go on when all have come here."""
    gathered(None)


def leave(code: int) -> None:
    """End one of several processes with this exit code, at once, when its files are written. Ended
    in the usual way, torch 2.13 now and then aborts one of them in its own clearing up ("terminate
    called without an active exception"), and a run that is done would count as failed.
    """
    if _group():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
