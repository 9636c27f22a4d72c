"""From rows to training batches: load, check, split, fill the template, mask the prompt.

A row has Alpaca's columns *instruction, input, output*. What trains is the answer and its end
token, nothing else: the prompt and the padding get the label -100, which the loss ignores. Loading,
    caching and mapping are `datasets`' work.
"""

import csv
import glob
import gzip
import json
import lzma
import math
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from random import Random

import datasets
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import BatchEncoding, PreTrainedTokenizerBase

from qlora_nb import pocket, sources
from qlora_nb.errors import KitError, refusing
from qlora_nb.model import conversations, sliced_loss

_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"

_WITHOUT_INPUT = "### Instruction:\n{instruction}\n\n### Response:\n"

_OPENING = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"

_CONTEXT = ", paired with an input that provides further context"

TEMPLATES = {
    "alpaca": (_OPENING.format(_CONTEXT) + _WITH_INPUT, _OPENING.format("") + _WITHOUT_INPUT),
    "alpaca_short": (_WITH_INPUT, _WITHOUT_INPUT),
}
"""Template → prompt with an input and without: Stanford Alpaca's own, and the same without its
opening sentences.
"""

SORTED_STEPS = 16
"""Rows are sorted by length within so many steps: enough to save most padding, few enough to keep
the order random.
"""

OPEN_PACKS = 32
"""A row is tried in so many of the newest packs before a new one is begun."""

SPLIT_SEED = 2305
"""The held-out rows are the same for every training seed."""

MOST_REASONS = 8
"""For no more reasons than this are the rows that are left out named."""

_COLUMNS = ("instruction", "input", "output")

_TEXTS = datasets.Features(dict.fromkeys(_COLUMNS, datasets.Value("string")))

_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def prompt_of(row: dict[str, str], template: str = "alpaca") -> str:
    """The text the model is given for a row.

    >>> prompt_of({"instruction": "Say hi.", "input": ""})[-27:]
    'on:\\nSay hi.\\n\\n### Response:\\n'
    """
    with_input, without = TEMPLATES[template]
    return (with_input if row.get("input") else without).format(
        instruction=row["instruction"], input=row.get("input", "")
    )


def prompt_ids(row: dict[str, str], tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    """Token ids of a row's prompt. Some tokenizers put the end token behind every text: not behind
    a text that is to go on.
    """
    text = prompt_of(row, template)
    ids = tokenizer(text)["input_ids"]
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    while len(ids) > len(own) and ids[-1] == tokenizer.eos_token_id != own[-1]:
        ids = ids[:-1]
    return ids


def load(settings) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and held-out rows for the resolved `dataset`, `train_rows` and `eval_rows`.

    No more training rows are taken than the run's steps will see, so that nothing is tokenized for
    nothing (packed steps may see them all). The micro-world has its own held-out split; of any
    other data the first `eval_rows` of a fixed shuffle are held out.

    Raises:
        KitError: the data cannot be read, lacks a column, or has too few rows.
    """
    rows_in_a_step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    n_train = (
        settings.train_rows
        if settings.packing
        else min(settings.train_rows, settings.max_steps * rows_in_a_step)
    )
    if settings.dataset == "pocket":
        train, held_out = (
            datasets.Dataset.from_list(pocket.read(split)) for split in ("train", "test")
        )
    else:
        rows = _clean(_read(settings.dataset), settings.dataset, settings.columns)
        if len(rows) < settings.eval_rows + 1:
            what = f"the data has {len(rows)} usable rows, too few for {settings.eval_rows} held-out rows and one to train on"
            remedy = (
                f"set eval_rows to {max(1, len(rows) // 5)} or bring more rows"
                if len(rows) > 1
                else "bring more rows"
            )
            raise KitError(what, value=settings.dataset, remedy=remedy)
        rows = rows.shuffle(seed=SPLIT_SEED)
        train, held_out = rows.skip(settings.eval_rows), rows.take(settings.eval_rows)
    train = train.shuffle(seed=settings.seed)
    train, held_out = (
        train.take(min(len(train), n_train)),
        held_out.take(min(len(held_out), settings.eval_rows)),
    )
    trained = set(_whole_rows(train))
    if n_same := sum(row in trained for row in _whole_rows(held_out)):
        print(
            f"{n_same} of {len(held_out)} held-out rows are training rows too, word for word: they measure memory"
        )
    return train, held_out


def _whole_rows(rows: datasets.Dataset) -> Iterator[tuple[str, ...]]:
    for part in rows.iter(batch_size=1000):
        yield from zip(*(part[column] for column in _COLUMNS), strict=True)


def _read(name: str) -> datasets.Dataset:
    path = sources.local_path(name)
    suffix = (
        Path(path.stem).suffix if path.suffix in {".xz", ".gz", ".zst"} else path.suffix
    ).lower()
    if path.exists() and not path.is_dir() and (suffix not in _READERS or not path.is_file()):
        allowed = f"a file that ends in {', '.join(_READERS)}"
        raise KitError(
            "unknown kind of data file",
            value=path.name,
            allowed=allowed,
            remedy="convert it to one of these",
        )
    with _reading(path.name):
        if not path.is_file():
            return datasets.load_dataset(str(path) if path.is_dir() else name, split="train")
        options = _look_at(path, suffix)
        rows = datasets.load_dataset(
            _READERS[suffix], data_files=glob.escape(str(path)), split="train", **options
        )
        rows.data.validate(full=True)  # a damaged Parquet file can hold texts that are none
        return rows


def _reading(name: str):
    remedy = "check that it is whole and in UTF-8; JSON is a list of rows or one row a line"
    return refusing("the data cannot be read", name, remedy)


def _look_at(path: Path, suffix: str) -> dict[str, object]:
    """Name the first line of a JSON or CSV file that is no row; returns the options for its reader.

    The readers name no line, shift the fields of a row that has one too many, and one dies of a
    file that says `null`.
    """
    if suffix == ".parquet" or path.suffix == ".zst":
        return {}
    with {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)(
        path, "rt", encoding="utf-8-sig", newline=""
    ) as file:
        if suffix == ".csv":
            separator = max(",;\t", key=file.readline().count)
            file.seek(0)
            csv.field_size_limit(2**31 - 1)
            names, lines = [], csv.reader(file, delimiter=separator)
            for row in filter(None, lines):
                names = names or row
                if len(row) != len(names):
                    raise ValueError(
                        f"line {lines.line_num} has {len(row)} fields, the first line {len(names)}"
                    )
            texts = datasets.Features(
                dict.fromkeys(names, datasets.Value("string"))
            )  # "NA", "" and "007" are texts
            return {"sep": separator, "keep_default_na": False, "features": texts}
        whole = file.read(4096).lstrip().startswith("[")
        file.seek(0)
        for n, text in enumerate([file.read()] if whole else file):
            try:
                found = json.loads(text) if text.strip() else {}
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"line {n + error.lineno}: {error.msg} at character {error.colno}"
                ) from None
            for i, row in enumerate(found if whole else [found], start=n):
                if not isinstance(row, dict):
                    raise ValueError(f"row {i} has no named columns: {row!r:.60}")
    return {}


def _named(rows: datasets.Dataset, columns: dict[str, str]) -> datasets.Dataset:
    """Call the data's own columns what the kit calls them."""
    if unknown := sorted(set(columns.values()) - set(rows.column_names)):
        allowed = ", ".join(rows.column_names)
        raise KitError(
            "columns names what the data does not have", value=", ".join(unknown), allowed=allowed
        )
    if len(set(columns.values())) < len(columns):
        raise KitError(
            "columns names one column of the data twice",
            value=columns,
            allowed="another one for each",
        )
    taken = rows.remove_columns(
        [c for c in columns if c in rows.column_names and c not in columns.values()]
    )
    return taken.rename_columns({own: column for column, own in columns.items() if own != column})


def _clean(
    rows: datasets.Dataset, name: str, columns: dict[str, str], asking: bool = False
) -> datasets.Dataset:
    """Keep the three columns, always as text; leave out rows without an instruction or an answer
    and say which and why.

    Args:
        rows: as read, with columns of any name and type.
        name: the file or data set, for messages.
        columns: the kit's column → the data's own name for it.
        asking: the rows are to be asked, so they need no answer; `output` is empty.
    """
    rows = _named(rows, columns)
    unused = sorted(set(rows.column_names) - set(_COLUMNS))
    talks = None
    if "instruction" not in rows.column_names:
        with _reading(name):  # turns of any type
            talks = conversations.exchanges(rows, asking)
            rows = talks or rows
    used = ("instruction", "input") if asking else _COLUMNS
    needed = [column for column in used if column != "input"]
    if missing := [column for column in needed if column not in rows.column_names]:
        what, there = (
            f"the data has no column {' and '.join(missing)}",
            ", ".join(rows.column_names),
        )
        allowed = "instruction, output, input if there is one; or a conversation (messages, OASST, Guanaco)"
        raise KitError(
            what,
            value=there,
            allowed=allowed,
            remedy="name them, as columns=instruction=question,output=answer",
        )
    taken = rows.select_columns([column for column in used if column in rows.column_names])
    how = {"batched": True, "with_indices": True, "fn_kwargs": {"name": name}, "features": _TEXTS}
    with _reading(name):
        texts = taken.map(_as_text, **how)
    reasons = talks["left_out"][:] if talks else [""] * len(texts)
    numbers = talks["row"][:] if talks else range(len(texts))
    left_out: dict[str, list[int]] = {}
    kept = []
    for i, row in enumerate(tqdm(texts, desc="checking", unit="row")):
        if reasons[i] or not all(row[column].strip() for column in needed):
            left_out.setdefault(reasons[i], []).append(numbers[i])
        else:
            kept.append(i)
    _say_left_out(left_out, len(texts), " or no ".join(needed).replace("output", "answer"))
    if talks and not kept and not asking:
        what = f"the conversations cannot be read as questions and answers: {next(iter(left_out))}"
        allowed = f"turns with a role ({', '.join(map('/'.join, conversations.ROLES.values()))}) and a text"
        raise KitError(what, value=Path(name).name, allowed=allowed, remedy="look at its first row")
    if talks:
        conversations.say_what_is_taken(talks.select(kept), asking)
    elif unused:
        print(
            f"columns that are not used: {', '.join(map(repr, unused[:5]))}{' …' if len(unused) > 5 else ''}"
        )
    return texts.select(kept) if left_out else texts


def _as_text(columns: dict[str, list], numbers: list[int], name: str) -> dict[str, list[str]]:
    """The three columns of some rows; what is not there (a column, a null, the NaN that pandas
    writes for it) is empty text.

    Raises:
        KitError: a value is anything else.
    """
    texts = {column: [""] * len(numbers) for column in _COLUMNS}
    for column, values in columns.items():
        for i, value in enumerate(values):
            if isinstance(value, str):
                texts[column][i] = value
            elif value is not None and not (isinstance(value, float) and math.isnan(value)):
                what, remedy = (
                    f"column {column} is not text in row {numbers[i]}",
                    f"look at {Path(name).name}",
                )
                raise KitError(what, value=value, allowed="text", remedy=remedy)
    return texts


def _say_left_out(left_out: dict[str, list[int]], n_rows: int, lacking: str) -> None:
    """One line for each reason: how many rows, which ones."""
    for n, (why, numbers) in enumerate(left_out.items()):
        if n == MOST_REASONS:
            n_others = sum(map(len, list(left_out.values())[n:]))
            print(f"{n_others} more rows are left out for {len(left_out) - n} other reasons")
            break
        named = ", ".join(map(str, numbers[:5])) + (" …" if len(numbers) > 5 else "")
        reason = f" ({why})" if why else ""
        print(
            f"{len(numbers)} of {n_rows} rows have no {lacking}{reason} and are left out: rows {named}"
        )


def questions(name: str, columns: dict[str, str]) -> list[dict[str, str]]:
    """Instructions and inputs of a file whose rows need no answer.

    Raises:
        KitError: the file cannot be read, or no row of it can be asked.
    """
    asked = {column: own for column, own in columns.items() if column != "output"}
    rows = _clean(_read(name), name, asked, asking=True)
    if not len(rows):
        allowed = "an instruction or a prompt in a row, or a conversation in which a user speaks"
        raise KitError(
            "no row of this file can be asked",
            value=Path(name).name,
            allowed=allowed,
            remedy="look at its rows",
        )
    return [{"instruction": row["instruction"], "input": row["input"]} for row in rows]


def tokenize_rows(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, settings
) -> datasets.Dataset:
    """Rows → `input_ids` and `labels` of equal length: prompt labels are -100, the end token is
    labelled.

    A row longer than `max_length` tokens loses the end of its answer but keeps its end token, so
    that the model still learns to stop; how many rows that hits is printed. A row whose prompt
    alone is too long is left out. Rows whose text holds one of the tokenizer's special tokens
    (`<|endoftext|>` in an answer becomes the end token) are counted too.
    """
    max_length = settings.max_length
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(
        tokenizer.all_special_ids
    )
    special.discard(tokenizer.unk_token_id)  # any unknown character becomes this one
    arguments = {
        "tokenizer": tokenizer,
        "max_length": max_length,
        "template": settings.prompt_template,
        "special": special,
    }
    encoded = rows.map(
        _encode_row, fn_kwargs=arguments, remove_columns=rows.column_names, desc="tokenizing"
    )
    whole = encoded.filter(lambda row: not row["too_long"])
    n_cut, n_out = sum(whole["cut"]), len(encoded) - len(whole)
    if n_cut or n_out:
        print(
            f"{n_cut} of {len(encoded)} answers cut to max_length={max_length} tokens, {n_out} rows left out (prompt too long)"
        )
    found = [token for token in whole["special"] if token]
    if found:
        print(
            f"{len(found)} of {len(whole)} rows write a special token in their text, as {found[0]!r}: it is read as that token"
        )
    if not len(whole):
        raise KitError(
            "no row is left: every prompt is longer than max_length",
            value=max_length,
            remedy="raise max_length",
        )
    return whole.select_columns(["input_ids", "labels"])


def _encode_row(
    row: dict[str, str], tokenizer, max_length: int, template: str, special: set[int]
) -> dict[str, object]:
    prompt = prompt_ids(row, tokenizer, template)
    written = tokenizer(row["output"], add_special_tokens=False)["input_ids"]
    start = 0
    while start < len(prompt) and prompt[start] in special:
        start += 1  # what some tokenizers put before every text
    in_text = [i for i in prompt[start:] + written if i in special]
    answer = [*written, tokenizer.eos_token_id]
    room = max_length - len(prompt)
    if cut := len(answer) > room:
        answer = [*answer[: max(room - 1, 0)], tokenizer.eos_token_id]
    return {
        "input_ids": prompt + answer,
        "labels": [sliced_loss.IGNORED] * len(prompt) + answer,
        "cut": cut,
        "too_long": room < 2,
        "special": tokenizer.convert_ids_to_tokens(in_text[0]) if in_text else "",
    }


def in_training_order(rows: datasets.Dataset, settings) -> datasets.Dataset:
    """The rows of every step of a run, one after another: drawn without repetition, again and
    again, like lengths together.

    A batch is padded to its longest row, and padding costs as much as text. So the shuffled rows
    are sorted by length, but only within `SORTED_STEPS` steps at a time, and the steps are shuffled
    again: a long row still meets different company in every pass over the data. Everything follows
        from the seed, which is what lets a stopped run go on exactly.
    """
    per_step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    n_tokens, random = [len(ids) for ids in rows["input_ids"]], Random(settings.seed)
    order: list[int] = []
    while len(order) < settings.max_steps * per_step:
        drawn = random.sample(range(len(rows)), len(rows))
        for group in groups(drawn, SORTED_STEPS * per_step):
            steps = groups(sorted(group, key=lambda i: n_tokens[i]), per_step)
            order += chain.from_iterable(random.sample(steps, len(steps)))
    return rows.select(order[: settings.max_steps * per_step])


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
        n = len(row["input_ids"])
        room = (p for p in packs[-OPEN_PACKS:] if len(p["input_ids"]) + n <= max_length)
        if (into := next(room, None)) is None:
            packs.append(into := {"input_ids": [], "labels": [], "position_ids": []})
        into["input_ids"] += row["input_ids"]
        into["labels"] += [
            sliced_loss.IGNORED,
            *row["labels"][1:],
        ]  # no row predicts the next one's first token
        into["position_ids"] += range(n)
    return datasets.Dataset.from_list(packs)


def collator(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict]], BatchEncoding]:
    """Pads a batch on the right to its longest row; padding is masked and its labels are -100.

    Packed sequences get no mask (see `pack`): padding stands behind all text, where nothing that
    trains can see it.
    """
    fill = {
        "input_ids": tokenizer.pad_token_id,
        "labels": sliced_loss.IGNORED,
        "position_ids": 0,
        "attention_mask": 0,
    }

    def collate(rows: list[dict]) -> BatchEncoding:
        whole = [
            row if "position_ids" in row else row | {"attention_mask": [1] * len(row["input_ids"])}
            for row in rows
        ]
        tensors = {
            name: [torch.tensor(row[name]) for row in whole] for name in whole[0] if name in fill
        }
        return BatchEncoding(
            {
                key: pad_sequence(ids, batch_first=True, padding_value=fill[key])
                for key, ids in tensors.items()
            }
        )

    return collate
