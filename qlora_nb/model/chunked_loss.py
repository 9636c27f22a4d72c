"""Cross entropy in chunks of tokens, so that the logits of a batch are never held at once.

A vocabulary is wide: pythia-12b's 50,688 logits in float32 are 99 MiB for 512 tokens, and the plain
loss holds three to four copies at once. But only answer tokens count, and they can be taken a chunk
at a time: the head is applied to the chunk, its loss and the gradient with respect to its hidden
states are computed together, then its logits are forgotten. Value and gradient are those of the
plain loss.

The idea is known from torchtune's chunked cross entropy, Liger-Kernel and Cut Cross-Entropy
(arXiv 2411.09009). Theirs do not know GPT-NeoX or a head in 4 bit, so it is written out here: an
`autograd.Function` for the loss, and a context in which the model returns hidden states in place of
logits.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest.mock import patch

import torch
from torch import nn
from torch.nn.functional import cross_entropy

IGNORED = -100
"""Label of a token that does not train: PyTorch's default `ignore_index`."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, labels, head, chunk):
        total = hidden.new_zeros((), dtype=torch.float32)
        gradients = []
        for states, wanted in zip(hidden.split(chunk), labels.split(chunk), strict=True):
            with torch.enable_grad():
                leaf = states.detach().requires_grad_()
                loss = cross_entropy(head(leaf).float(), wanted, reduction="sum")
            if hidden.requires_grad:
                gradients += torch.autograd.grad(loss, leaf)
            total += loss.detach()
        ctx.gradient = torch.cat(gradients) if gradients else None
        return total

    @staticmethod
    def backward(ctx, upstream):
        return ctx.gradient * upstream.to(ctx.gradient.dtype), None, None, None


summed_cross_entropy = _ChunkedCrossEntropy.apply
"""(hidden (tokens, width), labels (tokens,), head, chunk) → cross entropy of the labels (nats),
summed, a chunk of tokens at a time.
"""


def chunked_cross_entropy(
    hidden: torch.Tensor, labels: torch.Tensor, head: Callable, chunk: int, n_items=None
) -> torch.Tensor:
    """Next-token cross entropy of the labelled tokens, `chunk` of them at a time.

    Args:
        hidden: (rows, tokens, width) last hidden state, before the head.
        labels: (rows, tokens) token ids; -100 is not counted. They are shifted here, as
            transformers does.
        head: function or frozen module from width to vocabulary; its own weights get no gradient.
        chunk: tokens in one chunk.
        n_items: divide the sum by this; None: by the number of labelled tokens.

    Returns:
        Scalar float32 (nats).
    """
    wanted = labels[:, 1:].to(hidden.device)
    counts = wanted != IGNORED
    if n_items is None:
        n_items = counts.sum()
    return summed_cross_entropy(hidden[:, :-1][counts], wanted[counts], head, chunk) / n_items


def logits_cross_entropy(
    outputs, labels: torch.Tensor, num_items_in_batch: int | None = None
) -> torch.Tensor:
    """The same loss from a model's whole logits (rows, tokens, vocabulary), for a model whose head
    cannot be applied apart.
    """
    head = nn.Identity()
    return chunked_cross_entropy(
        outputs.logits, labels, head, chunk=labels.numel(), n_items=num_items_in_batch
    )


@contextmanager
def chunked_head(model: nn.Module, chunk: int) -> Iterator[Callable]:
    """Inside, the model returns its last hidden state as `logits`; yields the loss function that
    applies the head to a chunk of tokens at a time.

    The function has the signature of `Trainer(compute_loss_func=…)`: (outputs, labels,
    num_items_in_batch). It is the model's own loss only where nothing is computed after the head,
    which `dry_run.head_is_last` finds out.
    """
    head = model.get_output_embeddings()
    forward = head.forward  # the head stays where it is; only its call is suspended
    weight = getattr(head, "weight", None)  # a head in 4 bit has none, and casts by itself

    def logits(hidden):
        # accelerate's autocast ends with the model's forward and hands out float32: the head may be
        # float16
        if weight is not None:
            hidden = hidden.to(weight.dtype)
        return forward(hidden)

    def loss(outputs, labels, num_items_in_batch=None):
        return chunked_cross_entropy(outputs.logits, labels, logits, chunk, num_items_in_batch)

    def suspended(hidden):
        return hidden

    suspended.instead_of = forward
    with patch.object(head, "forward", suspended):
        yield loss


def whole_head(model: nn.Module) -> AbstractContextManager:
    """Inside, a model in `chunked_head` gives logits again, for example to answer a prompt between
    two steps.
    """
    head = model.get_output_embeddings()
    forward = getattr(head.forward, "instead_of", head.forward)
    return patch.object(head, "forward", forward)
