"""From encoded rows to batches: the order in which they are trained, packing, padding.

A batch is padded to its longest row, and padding costs as much as text. Two ways to have little of
it: rows of similar length share a step (`in_training_order`), or several rows share one sequence
(`pack`). Both follow from the seed and the rows alone, which is what lets a stopped run be resumed
exactly.

transformers has a collator for packing as well (`DataCollatorWithFlattening`): it lays the rows of
one batch end to end. It is not used, as the length of a batch would then be whatever its rows add
up to; packs made beforehand have at most `max_length` tokens, and the peak memory is known before
the run.
"""

import copy
from collections.abc import Callable
from random import Random

import datasets
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import BatchEncoding, DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from qlora_nb.model import chunked_loss

SORTED_STEPS = 16
"""Rows are sorted by length within so many steps: enough to save most padding, few enough to keep
the order random.
"""

OPEN_PACKS = 32
"""A row is tried in so many of the newest packs before a new one is begun."""


def in_training_order(rows: datasets.Dataset, settings) -> datasets.Dataset:
    """The rows of every step of a run, one after another: drawn without repetition, again and
    again, rows of similar length together.

    The shuffled rows are sorted by length, but only within `SORTED_STEPS` steps at a time, and the
    steps are shuffled again: a long row still meets different company in every pass over the data.
    """
    rows_in_a_step = settings.rows_in_a_step
    n_rows = settings.max_steps * rows_in_a_step
    lengths = [len(ids) for ids in rows["input_ids"]]
    random = Random(settings.seed)
    order: list[int] = []
    while len(order) < n_rows:
        drawn = random.sample(range(len(rows)), len(rows))
        for group in groups(drawn, SORTED_STEPS * rows_in_a_step):
            by_length = sorted(group, key=lambda i: lengths[i])
            steps = groups(by_length, rows_in_a_step)
            for step in random.sample(steps, len(steps)):
                order += step
    return rows.select(order[:n_rows])


def groups(items: list[int], n: int) -> list[list[int]]:
    """The items in order, `n` at a time; the last group may be smaller."""
    return [items[start : start + n] for start in range(0, len(items), n)]


def pack(rows: datasets.Dataset, max_length: int) -> datasets.Dataset:
    """Put several rows into one sequence of at most `max_length` tokens, each into the first of the
    open ones with room.

    `position_ids` begin anew with every row. From that transformers knows where a row begins and
    lets none see another (`masking_utils.find_packed_sequence_indices`, as long as no attention
    mask is given).
    """
    packs: list[dict[str, list[int]]] = []
    for row in tqdm(rows, desc="packing", unit="row"):
        n_tokens = len(row["input_ids"])
        for pack in packs[-OPEN_PACKS:]:
            if len(pack["input_ids"]) + n_tokens <= max_length:
                break
        else:
            pack = {"input_ids": [], "labels": [], "position_ids": [], "row": []}
            packs.append(pack)
        pack["input_ids"] += row["input_ids"]
        # no row predicts the first token of the next one
        pack["labels"] += [chunked_loss.IGNORED, *row["labels"][1:]]
        pack["position_ids"] += range(n_tokens)
        pack["row"].append(row["row"])
    return datasets.Dataset.from_list(packs)


def collator(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict]], BatchEncoding]:
    """A function that pads a batch on the right to its longest row; padding is masked and its
    labels are -100.

    Packed sequences get no mask (see `pack`): padding stands behind all text, where nothing that
    trains can see it.
    """
    right = copy.copy(tokenizer)  # as some models' own tokenizers pad on the left, without a mask
    right.padding_side = "right"
    right.model_input_names = ["input_ids", "attention_mask"]
    pad = DataCollatorForSeq2Seq(right)

    def collate(rows: list[dict]) -> BatchEncoding:
        batch = pad([{name: row[name] for name in ("input_ids", "labels")} for row in rows])
        if "position_ids" in rows[0]:
            del batch["attention_mask"]
            positions = [torch.tensor(row["position_ids"]) for row in rows]
            batch["position_ids"] = pad_sequence(positions, batch_first=True)
        return batch

    return collate
