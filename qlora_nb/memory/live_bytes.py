"""Bytes of every tensor while it lives, counted by a dispatch mode.

torch hands every operation to the innermost `TorchDispatchMode`, which runs it and sees what comes
out. A storage that was not there before is added; a weak reference takes it off when the last
tensor on it is gone. That works on real tensors and on *meta* ones, which have no memory at all.
"""

import weakref

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every tensor made inside the context while it lives: `live` now, `peak`
    the most of it.

    A new phase begins when `peak` is set to `live`.

    The tensors of `model` are not counted; neither is what a kernel allocates and frees inside
    itself, which is why real runs are measured by `profiler.measure_peak`. `all_true` is the answer
    to "is this mask all ones?", which a tensor without values cannot give.

    >>> with LiveBytes(nn.Module()) as count:
    ...     a = torch.zeros(1000)
    ...     del a
    >>> count.live, count.peak
    (0, 4000)
    """

    def __init__(self, model: nn.Module, all_true: bool = True):
        super().__init__()
        self.live = 0
        self.peak = 0
        self.all_true = all_true
        self.known = {}  # by storage; a view of a known one is nothing new
        for tensor in (*model.parameters(), *model.buffers()):
            self.known[tensor.untyped_storage()._cdata] = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return self.all_true
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.known:
                    self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)

        def forget(_):
            del self.known[key]
            self.live -= size

        self.known[key] = weakref.ref(storage, forget)
