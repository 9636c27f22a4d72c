"""How good is it: loss on held-out answers, exact match by kind of question, and two baselines that know nothing.

Exact match is only worth something beside what costs nothing: always giving the commonest training answer, or copying a
fixed place of the input.
"""

from collections import Counter, defaultdict

import datasets
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_nb.engine import data, generation, objective


@torch.no_grad()
def response_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, encoded: datasets.Dataset, batch: int = 8) -> float:
    """Mean cross-entropy (nats) of every labelled token in the encoded rows: answers and end tokens, no prompts."""
    collate = data.collator(tokenizer)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]["input_ids"]))
    total = 0.0
    with objective.sliced_head(model, chunk=256) as loss:  # whole logits would be the largest thing in memory
        for start in range(0, len(order), batch):
            padded = collate([encoded[i] for i in order[start : start + batch]])
            inputs = {k: padded[k].to(model.device) for k in ("input_ids", "attention_mask")}
            total += loss(model(**inputs), padded["labels"], num_items_in_batch=1).item()
    return total / sum(label != data.IGNORED for labels in encoded["labels"] for label in labels[1:])


def exact_match(said: list[str], rows: list[dict]) -> dict[str, float]:
    """Share of answers equal to the row's output, for all rows and by `kind`.

    >>> exact_match(["Red.", "Two."], [{"output": "Red.", "kind": "a"}, {"output": "Six.", "kind": "b"}])
    {'all': 0.5, 'a': 1.0, 'b': 0.0}
    """
    hits = defaultdict(list)
    for text, row in zip(said, rows, strict=True):
        right = text.strip() == row["output"].strip()
        hits["all"].append(right)
        hits[row.get("kind", "all rows")].append(right)
    return {kind: sum(h) / len(h) for kind, h in hits.items()}


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset, settings) -> dict:
    """Held-out loss, and exact match where the answers are short enough for it (the micro-world's rows, which name a kind).

    Returns:
        `loss` (nats per answer token), `exact_match` ({kind: share}, empty for open answers), `said` (the answers).
    """
    encoded = data.encode(rows, tokenizer, settings)
    result = {"loss": response_loss(model, tokenizer, encoded), "exact_match": {}, "said": []}
    if "kind" in rows.column_names:
        rows = list(rows)
        result["said"] = generation.answer_all(model, tokenizer, rows, settings)
        result["exact_match"] = exact_match(result["said"], rows)
    return result


def majority_baseline(train: list[dict], rows: list[dict]) -> list[str]:
    """For every row the commonest answer among the training rows of its kind."""
    by_kind = defaultdict(Counter)
    for row in train:
        by_kind[row.get("kind")][row["output"]] += 1
    return [by_kind[row.get("kind")].most_common(1)[0][0] for row in rows]


def copy_baseline(train: list[dict], rows: list[dict]) -> list[str]:
    """For every kind, copy from the input the window of words (which sentence, first or last words, how many) that was
    right most often in training: what can be had by copying without reading the question."""
    rules = [(s, end, n) for s in (0, 1, 2, -1, -2, -3) for end in ("first", "last") for n in (1, 2, 3)]
    scores = defaultdict(Counter)
    for row in train:
        for rule in rules:
            scores[row.get("kind")][rule] += _copy(row["input"], rule) == row["output"]
    return [_copy(row["input"], scores[row.get("kind")].most_common(1)[0][0]) for row in rows]


def _copy(text: str, rule: tuple[int, str, int]) -> str:
    index, end, n = rule
    sentences = [s for s in text.split(". ") if s]
    if not -len(sentences) <= index < len(sentences):
        return ""
    words = sentences[index].rstrip(".").split()
    picked = " ".join(words[:n] if end == "first" else words[-n:])
    return f"{picked[:1].upper()}{picked[1:]}."
