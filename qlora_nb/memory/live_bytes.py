"""Bytes of every tensor while it lives, counted by a dispatch mode."""

import weakref

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every tensor made inside the context while it lives: `live` now, `peak`
    the most of it.

    A new phase begins when `peak` is set to `live`.

    Works on real tensors and on *meta* ones. The tensors of `model` are not counted; neither is
    what a kernel allocates and frees inside itself, which is why real runs are measured by `weigh`.

    >>> with LiveBytes() as count:
    ...     a = torch.zeros(1000)
    ...     del a
    >>> count.live, count.peak
    (0, 4000)
    """

    def __init__(self, model: nn.Module | None = None, all_true: bool = True):
        super().__init__()
        self.live = self.peak = 0
        held = (*model.parameters(), *model.buffers()) if model else ()
        self.known = {
            tensor.untyped_storage()._cdata: None for tensor in held
        }  # a view of them is nothing new
        self.all_true = all_true

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return (
                self.all_true
            )  # "is the attention mask all ones?" cannot be asked of a tensor without values
        result = func(*args, **(kwargs or {}))
        for tensor in (result,) if isinstance(result, torch.Tensor) else tree_leaves(result):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.untyped_storage()._cdata not in self.known
            ):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)

        def forget(_):
            del self.known[key]
            self.live -= size

        self.known[key] = weakref.ref(storage, forget)
