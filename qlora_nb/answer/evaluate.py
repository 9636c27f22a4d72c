"""How good is it: loss on held-out answers, exact match by kind of question, and two baselines that
know nothing.

The loss is the mean cross-entropy of the answers' tokens, given the prompt: it moves with every
step, but has no scale of its own. Exact match counts answers that are right to the letter. It is
only worth something beside what costs nothing: always giving the commonest training answer, or
copying a fixed place of the input. Both are means over few rows, so both come with a 95 % interval:
Wilson's (1927) for a share, resampled rows (the bootstrap, Efron 1979) for a loss.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import product
from types import SimpleNamespace

import datasets
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_nb.answer import generate
from qlora_nb.memory import dry_run
from qlora_nb.model import batching, chunked_loss, data

BATCH = 8
"""Rows in one forward pass."""

CHUNK = 256
"""Tokens whose logits are held at once."""


@torch.no_grad()
def row_losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, encoded: Sequence[dict]
) -> torch.Tensor:
    """(rows, 2): summed cross-entropy (nats) and number of the labelled tokens of each row: answer
    and end token, no prompt.

    The head is applied in slices, as whole logits would be the largest thing in memory; where a
    model computes something after its head (`dry_run.head_is_last`), its own logits count, and rows
    go one at a time.
    """
    collate = batching.collator(tokenizer)
    if dry_run.head_is_last(model.config):
        head = chunked_loss.chunked_head(model, CHUNK)
        rows_at_once = BATCH
    else:
        head = nullcontext(chunked_loss.logits_cross_entropy)
        rows_at_once = 1
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]["input_ids"]))
    groups = batching.groups(order, rows_at_once)
    found = torch.zeros(len(encoded), 2, dtype=torch.float64)
    with head as loss:
        for group in tqdm(groups, desc="held-out loss", unit="batch", leave=False):
            padded = collate([encoded[i] for i in group])
            wanted = padded.pop("labels")
            # in slices these are hidden states, to which `loss` applies the head
            batch = model(**padded.to(model.device)).logits
            for i, logits, labels in zip(group, batch, wanted, strict=True):
                # the tokens of a trained prompt stand before the row's own
                row = SimpleNamespace(logits=logits[None, -len(labels) :])
                found[i, 0] = loss(row, labels[None], num_items_in_batch=1)
                found[i, 1] = (labels[1:] != chunked_loss.IGNORED).sum()
    return found


def mean_loss(rows: torch.Tensor) -> torch.Tensor:
    """(…, rows, 2) as `row_losses` gives them → (…,) cross-entropy a labelled token (nats): long
    answers count for more.
    """
    total, n = rows.sum(-2).unbind(-1)
    return total / n


def response_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, encoded: Sequence[dict]
) -> float:
    """Mean cross-entropy (nats) of every labelled token in the encoded rows."""
    return mean_loss(row_losses(model, tokenizer, encoded)).item()


def loss_interval(
    rows: torch.Tensor, before: torch.Tensor | None = None, n: int = 2000
) -> tuple[float, float]:
    """95 % interval of the mean loss, or with `before` of its change on the same rows: percentiles
    of `n` resamples of rows.
    """
    drawn = torch.randint(len(rows), (n, len(rows)), generator=torch.Generator().manual_seed(0))
    found = mean_loss(rows[drawn])
    if before is not None:
        found -= mean_loss(before[drawn])
    low, high = found.quantile(found.new_tensor([0.025, 0.975])).tolist()
    return low, high


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share that was seen in `n` rows (Wilson, 1927); it stays between 0 and 1,
    also at the ends.

    >>> [round(end, 3) for end in wilson(0.5, 10)]
    [0.237, 0.763]
    """
    z = 1.96
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def exact_match(said: list[str | None], rows: list[dict]) -> dict[str, float]:
    """Share of answers equal to the row's output, for all rows and by `kind`; without rows an empty
    dictionary.

    A kind with a row that nothing could be said to (None) is left out, and then so is the share of
    all rows.

    >>> rows = [{"output": "Red.", "kind": "a"}, {"output": "Six.", "kind": "b"}]
    >>> exact_match(["Red.", "Two."], rows)
    {'all': 0.5, 'a': 1.0, 'b': 0.0}
    """
    by_kind = defaultdict(list)
    for text, row in zip(said, rows, strict=True):
        is_right = None if text is None else text.strip() == row["output"].strip()
        by_kind["all"].append(is_right)
        by_kind[row.get("kind", "all rows")].append(is_right)
    return {kind: sum(found) / len(found) for kind, found in by_kind.items() if None not in found}


def held_out(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset, settings
) -> dict:
    """Loss on held-out rows, and exact match where the answers are short enough for it (the
    micro-world's rows, which name a kind).

    Returns:
        `loss` (nats a token), `rows` (`row_losses`), `exact_match` ({kind: share}) and `said` (the
        answers), both empty where answers are open.
    """
    losses = row_losses(model, tokenizer, data.tokenize_rows(rows, tokenizer, settings))
    found = {"loss": mean_loss(losses).item(), "rows": losses, "exact_match": {}, "said": []}
    if "kind" in rows.column_names:
        asked = list(rows)
        found["said"] = generate.answer_all(model, tokenizer, asked, settings)
        found["exact_match"] = exact_match(found["said"], asked)
    return found


def majority_baseline(train: list[dict], rows: list[dict]) -> list[str | None]:
    """For every row the commonest answer among the training rows of its kind; None if training has
    no row of that kind.
    """
    answers = defaultdict(Counter)
    for row in train:
        answers[row.get("kind")][row["output"]] += 1
    return [_commonest(answers[row.get("kind")]) for row in rows]


def copy_baseline(train: list[dict], rows: list[dict]) -> list[str | None]:
    """For every kind, copy from the input the window of words (which sentence, first or last words,
    how many) that was right most often in training: what can be had by copying without reading the
    question. None as above.
    """
    rules = list(product((0, 1, 2, -1, -2, -3), ("first", "last"), (1, 2, 3)))
    n_right = defaultdict(Counter)
    for row in train:
        for rule in rules:
            n_right[row.get("kind")][rule] += _copy(row["input"], *rule) == row["output"]
    copied = []
    for row in rows:
        best = _commonest(n_right[row.get("kind")])
        copied.append(_copy(row["input"], *best) if best else None)
    return copied


def _commonest(counted: Counter):
    """What was counted most often; None if nothing was."""
    return max(counted, key=counted.get, default=None)


def _copy(text: str, index: int, end: str, n: int) -> str:
    """The first or last `n` words of one sentence of a text, as a sentence; "" if there is no such
    sentence.
    """
    sentences = [sentence for sentence in text.split(". ") if sentence]
    if not -len(sentences) <= index < len(sentences):
        return ""
    words = sentences[index].rstrip(".").split()
    picked = " ".join(words[:n] if end == "first" else words[-n:])
    return f"{picked[:1].upper()}{picked[1:]}."
