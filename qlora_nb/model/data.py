"""From rows to tokens: split, fill the prompt template, mask the prompt.

A row has the columns *instruction, input, output* of Stanford Alpaca. What trains is the answer
and its end token, nothing else: the prompt's labels are -100, which PyTorch's cross entropy
ignores. (An appendix of the QLoRA paper compares this with training on the instruction too.) The
end token is what teaches the model to stop.

The micro-world that ships with the kit has its own held-out split; of any other data the first
`eval_rows` of a fixed shuffle are held out. Caching and mapping are the work of `datasets`.
"""

import datasets
from transformers import PreTrainedTokenizerBase

from qlora_nb import pocket
from qlora_nb.errors import KitError
from qlora_nb.model import chunked_loss, reading

_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"

_WITHOUT_INPUT = "### Instruction:\n{instruction}\n\n### Response:\n"

TEMPLATES = {
    "alpaca": (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n" + _WITH_INPUT,
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n" + _WITHOUT_INPUT,
    ),
    "alpaca_short": (_WITH_INPUT, _WITHOUT_INPUT),
}
"""Template → prompt with an input and without: Stanford Alpaca's own, and the same without its
opening sentences.
"""

SPLIT_SEED = 2305
"""The held-out rows are the same for every training seed."""


def load(settings) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and held-out rows for the resolved `dataset`, `train_rows` and `eval_rows`.

    No more training rows are taken than the run's steps will see, so that nothing is tokenized for
    nothing (packed steps may see them all).

    Raises:
        KitError: the data cannot be read, lacks a column, or has too few rows.
    """
    if settings.dataset == "pocket":
        train = datasets.Dataset.from_list(pocket.read("train"))
        held_out = datasets.Dataset.from_list(pocket.read("test")[: settings.eval_rows])
    else:
        rows = reading.read(settings.dataset, settings.columns)
        _require_enough(len(rows), settings)
        rows = rows.shuffle(seed=SPLIT_SEED)
        held_out = rows.take(settings.eval_rows)
        train = rows.skip(settings.eval_rows)
    n_train = settings.train_rows
    if not settings.packing:
        n_train = min(n_train, settings.max_steps * settings.rows_in_a_step)
    train = train.shuffle(seed=settings.seed)
    train = train.take(min(len(train), n_train))
    _say_overlap(train, held_out)
    return train, held_out


def _require_enough(n_rows: int, settings) -> None:
    if n_rows > settings.eval_rows:
        return
    remedy = "bring more rows"
    if n_rows > 1:
        remedy = f"set eval_rows to {max(1, n_rows // 5)} or bring more rows"
    raise KitError(
        f"the data has {n_rows} usable rows, "
        f"too few for {settings.eval_rows} held-out rows and one to train on",
        value=settings.dataset,
        remedy=remedy,
    )


def _say_overlap(train: datasets.Dataset, held_out: datasets.Dataset) -> None:
    trained = train.to_pandas().drop_duplicates()
    n_same = len(held_out.to_pandas().merge(trained))
    if n_same:
        print(
            f"{n_same} of {len(held_out)} held-out rows are training rows too, word for word: "
            "they measure memory"
        )


def prompt_of(row: dict[str, str], template: str = "alpaca") -> str:
    """The text the model is given for a row.

    >>> prompt_of({"instruction": "Say hi.", "input": ""})[-27:]
    'on:\\nSay hi.\\n\\n### Response:\\n'
    """
    with_input, without_input = TEMPLATES[template]
    if row.get("input"):
        return with_input.format(instruction=row["instruction"], input=row["input"])
    return without_input.format(instruction=row["instruction"])


def prompt_ids(row: dict[str, str], tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    """Token ids of a row's prompt. Some tokenizers put the end token behind every text: not behind
    a text that is to be continued.
    """
    ids = tokenizer(prompt_of(row, template))["input_ids"]
    while ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def tokenize_rows(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, settings
) -> datasets.Dataset:
    """Rows → `input_ids` and `labels` of equal length, and `row`, the number of the row they come
    from: prompt labels are -100, the end token is labelled.

    A row longer than `max_length` tokens loses the end of its answer but keeps its end token, so
    that the model still learns to stop; how many rows that hits is printed. A row whose prompt
    alone is too long is left out. Rows whose text holds one of the tokenizer's special tokens
    (`<|endoftext|>` in an answer becomes the end token) are counted too.

    Raises:
        KitError: no row is left.
    """
    max_length = settings.max_length
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.discard(tokenizer.unk_token_id)  # any unknown character becomes this one
    encoded = rows.map(
        _encode_row,
        with_indices=True,
        fn_kwargs={
            "tokenizer": tokenizer,
            "max_length": max_length,
            "template": settings.prompt_template,
            "special": special,
        },
        remove_columns=rows.column_names,
        desc="tokenizing",
    )
    whole = encoded.filter(lambda row: not row["too_long"])
    n_cut = sum(whole["cut"])
    n_out = len(encoded) - len(whole)
    if n_cut or n_out:
        print(
            f"{n_cut} of {len(encoded)} answers cut to max_length={max_length} tokens, "
            f"{n_out} rows left out (prompt too long)"
        )
    found = [token for token in whole["special"] if token]
    if found:
        print(
            f"{len(found)} of {len(whole)} rows write a special token in their text, "
            f"as {found[0]!r}: it is read as that token"
        )
    if not len(whole):
        raise KitError(
            "no row is left: every prompt is longer than max_length",
            value=max_length,
            remedy="raise max_length",
        )
    return whole.select_columns(["input_ids", "labels", "row"])


def _encode_row(
    row: dict[str, str], number: int, tokenizer, max_length: int, template: str, special: set[int]
) -> dict[str, object]:
    prompt = prompt_ids(row, tokenizer, template)
    written = tokenizer(row["output"], add_special_tokens=False)["input_ids"]
    # without what some tokenizers put before every text
    asked = tokenizer(prompt_of(row, template), add_special_tokens=False)["input_ids"]
    in_text = [i for i in asked + written if i in special]
    end = [tokenizer.eos_token_id]
    room = max_length - len(prompt)
    answer = written + end
    is_cut = len(answer) > room
    if is_cut:
        answer = written[: max(room - 1, 0)] + end
    return {
        "input_ids": prompt + answer,
        "labels": [chunked_loss.IGNORED] * len(prompt) + answer,
        "row": number,
        "cut": is_cut,
        "too_long": room < 2,
        "special": tokenizer.convert_ids_to_tokens(in_text[0]) if in_text else "",
    }
