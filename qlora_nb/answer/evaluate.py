"""How good is it: loss on held-out answers, exact match by kind of question, and two baselines that
know nothing.

Exact match is only worth something beside what costs nothing: always giving the commonest training
answer, or copying a fixed place of the input.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace

import datasets
import pandas
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_nb.answer import generate
from qlora_nb.model import batching, chunked_loss, data, probes

BATCH = 8
"""Rows in one forward pass."""


@torch.no_grad()
def row_losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, encoded: Sequence[dict]
) -> torch.Tensor:
    """(rows, 2): summed cross-entropy (nats) and number of the labelled tokens of each row: answer
    and end token, no prompt.

    The head is applied in slices, as whole logits would be the largest thing in memory; where a
    model computes something after its head (`probes.head_is_last`), its own logits count, and rows
    go one at a time.
    """
    collate = batching.collator(tokenizer)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]["input_ids"]))
    found = torch.zeros(len(encoded), 2, dtype=torch.float64)
    in_slices = probes.head_is_last(model)
    rows_at_once = BATCH if in_slices else 1
    head = (
        chunked_loss.chunked_head(model, chunk=256)
        if in_slices
        else nullcontext(chunked_loss.logits_cross_entropy)
    )
    with head as loss:
        for group in tqdm(
            batching.groups(order, rows_at_once), desc="held-out loss", unit="batch", leave=False
        ):
            padded = collate([encoded[i] for i in group])
            outputs = model(
                **{k: padded[k].to(model.device) for k in ("input_ids", "attention_mask")}
            ).logits
            for i, vectors, labels in zip(group, outputs, padded["labels"]):
                found[i, 0] = loss(
                    SimpleNamespace(logits=vectors[None]), labels[None], num_items_in_batch=1
                )
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
    found = mean_loss(rows[drawn]) - (0 if before is None else mean_loss(before[drawn]))
    return tuple(found.quantile(torch.tensor([0.025, 0.975]).double()).tolist())


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share that was seen in `n` rows (Wilson, 1927); it stays between 0 and 1,
    also at the ends.

    >>> [round(end, 3) for end in wilson(0.5, 10)]
    [0.237, 0.763]
    """
    middle, half = (
        share + z * z / (2 * n),
        z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)),
    )
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def exact_match(said: list[str | None], rows: list[dict]) -> dict[str, float]:
    """Share of answers equal to the row's output, for all rows and by `kind`; without rows an empty
    dictionary.

    A kind with a row that nothing could be said to (None) is left out, and then so is the share of
    all rows.

    >>> exact_match(["Red.", "Two."], [{"output": "Red.", "kind": "a"}, {"output": "Six.", "kind": "b"}])
    {'all': 0.5, 'a': 1.0, 'b': 0.0}
    """
    right = [
        text is not None and text.strip() == row["output"].strip()
        for text, row in zip(said, rows, strict=True)
    ]
    kinds = [row.get("kind", "all rows") for row in rows]
    shares = pandas.Series(right, dtype=float).groupby(kinds, sort=False).mean().to_dict()
    unanswered = {kind for kind, text in zip(kinds, said) if text is None}
    if rows and not unanswered:
        return {"all": sum(right) / len(right), **shares}
    return {kind: share for kind, share in shares.items() if kind not in unanswered}


def exact_match_by_kind(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset, settings
) -> dict:
    """Held-out loss, and exact match where the answers are short enough for it (the micro-world's
    rows, which name a kind).

    Returns:
        `loss` (nats a token), `rows` (`row_losses`), `exact_match` ({kind: share}, empty for open
        answers), `said` (the answers).
    """
    losses = row_losses(model, tokenizer, data.tokenize_rows(rows, tokenizer, settings))
    said = (
        generate.answer_all(model, tokenizer, list(rows), settings)
        if "kind" in rows.column_names
        else []
    )
    match = exact_match(said, list(rows)) if said else {}
    return {"loss": mean_loss(losses).item(), "rows": losses, "exact_match": match, "said": said}


def majority_baseline(train: list[dict], rows: list[dict]) -> list[str | None]:
    """For every row the commonest answer among the training rows of its kind; None if training has
    no row of that kind.
    """
    by_kind = defaultdict(Counter)
    for row in train:
        by_kind[row.get("kind")][row["output"]] += 1
    return [_commonest(by_kind[row.get("kind")]) for row in rows]


def copy_baseline(train: list[dict], rows: list[dict]) -> list[str | None]:
    """For every kind, copy from the input the window of words (which sentence, first or last words,
    how many) that was
    right most often in training: what can be had by copying without reading the question. None as
        above."""
    rules = [
        (s, end, n) for s in (0, 1, 2, -1, -2, -3) for end in ("first", "last") for n in (1, 2, 3)
    ]
    scores = defaultdict(Counter)
    for row in train:
        for rule in rules:
            scores[row.get("kind")][rule] += _copy(row["input"], *rule) == row["output"]
    best = [_commonest(scores[row.get("kind")]) for row in rows]
    return [_copy(row["input"], *rule) if rule else None for row, rule in zip(rows, best)]


def _commonest(counted: Counter):
    for found, _ in counted.most_common(1):
        return found
    return None


def _copy(text: str, index: int, end: str, n: int) -> str:
    sentences = [s for s in text.split(". ") if s]
    if not -len(sentences) <= index < len(sentences):
        return ""
    words = sentences[index].rstrip(".").split()
    picked = " ".join(words[:n] if end == "first" else words[-n:])
    return f"{picked[:1].upper()}{picked[1:]}."
