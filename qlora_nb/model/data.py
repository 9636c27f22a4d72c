"""From rows to tokens: split, fill the prompt template, mask the prompt.

A row has the columns *instruction, input, output* of Stanford Alpaca, or it is a conversation. What
trains is the answer and its end token, nothing else: the prompt's labels are -100, which PyTorch's
cross entropy ignores. (An appendix of the QLoRA paper compares this with training on the
instruction too.) The end token is what teaches the model to stop. Of a conversation every answer of
the assistant trains, or its last one (`train_on`); how it is written is its chat template's affair
(`chat_templates`).

The micro-world that ships with the kit has its own held-out split; of any other data the first
`eval_rows` of a fixed shuffle are held out. Mapping is the work of `datasets`.
"""

from dataclasses import dataclass

import datasets
from transformers import PreTrainedTokenizerBase

from qlora_nb import pocket
from qlora_nb.errors import KitError
from qlora_nb.model import chat_templates, chunked_loss, configs, conversations, reading

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


@dataclass
class Split:
    """The rows to train on and those held out, as texts.

    Attributes:
        source: what they were read from, with all that was left out; None for the micro-world.
        n_duplicates: rows of the data that are there before, word for word.
        n_in_both: held-out rows that are training rows too, word for word.
    """

    train: datasets.Dataset
    held_out: datasets.Dataset
    source: reading.Rows | None
    n_duplicates: int
    n_in_both: int

    def remarks(self) -> list[str]:
        """What there is to say about them, a sentence each."""
        lines = self.source.remarks() if self.source else []
        if self.n_in_both:
            lines.append(
                f"{self.n_in_both} of {len(self.held_out)} held-out rows are training rows too, "
                "word for word: they measure memory"
            )
        return lines


def load(settings) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and held-out rows of `split`; prints what there is to say about them."""
    found = split(settings)
    for line in found.remarks():
        print(line)
    return found.train, found.held_out


def split(settings) -> Split:
    """Training and held-out rows for the resolved `dataset`, `train_rows` and `eval_rows`.

    No more training rows are taken than the run's steps will see, so that nothing is tokenized for
    nothing (packed steps may see them all).

    Raises:
        KitError: the data cannot be read, lacks a column, or has too few rows.
    """
    source = None
    as_chat = settings.prompt_template == "chat"
    if settings.dataset == "pocket":
        halves = []
        for rows in (pocket.read("train"), pocket.read("test")[: settings.eval_rows]):
            chats = [row | conversations.of_instruction(row) for row in rows] if as_chat else rows
            halves.append(datasets.Dataset.from_list(chats))
        train, held_out = halves
    else:
        source = reading.read(settings.dataset, settings.columns, as_chat=as_chat)
        _require_enough(source, settings)
        rows = source.kept.shuffle(seed=SPLIT_SEED)
        held_out = rows.take(settings.eval_rows)
        train = rows.skip(settings.eval_rows)
    n_duplicates = int(_texts(datasets.concatenate_datasets([train, held_out])).duplicated().sum())
    n_train = settings.train_rows
    if not settings.packing:
        n_train = min(n_train, settings.max_steps * settings.rows_in_a_step)
    train = train.shuffle(seed=settings.seed)
    train = train.take(min(len(train), n_train))
    n_in_both = len(_texts(held_out).merge(_texts(train).drop_duplicates()))
    return Split(train, held_out, source, n_duplicates, n_in_both)


def _texts(rows: datasets.Dataset):
    """What the rows say, as a table of pandas."""
    said = ["messages"] if "messages" in rows.column_names else list(reading.COLUMNS)
    rows = rows.select_columns(said)
    return rows.to_pandas().astype(str)


def _require_enough(source: reading.Rows, settings) -> None:
    n_rows = len(source.kept)
    if n_rows > settings.eval_rows:
        return
    remedy = "bring more rows"
    if n_rows > 1:
        remedy = f"set eval_rows to {max(1, n_rows // 5)} (-p eval_rows NUMBER) or bring more rows"
    what = (
        f"the data has {n_rows} usable rows, "
        f"too few for {settings.eval_rows} held-out rows and one to train on"
    )
    what = "; ".join([what, *source.remarks()])
    raise KitError(what, value=settings.dataset, remedy=remedy)


def prompt_of(row: dict[str, str], template: str = "alpaca") -> str:
    """The text the model is given for an instruction row.

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
    if "messages" in row:
        text = chat_templates.prompt_text(row["messages"], tokenizer)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = tokenizer(prompt_of(row, template))["input_ids"]
    while ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def tokenize_rows(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, settings
) -> datasets.Dataset:
    """Rows → `input_ids` and `labels` of equal length, and `row`, the number of the row they come
    from: prompt labels are -100, the end token is labelled.

    A row longer than `max_length` tokens loses its end, but keeps an end token if that lay in an
    answer, so that the model still learns to stop; how many rows that hits is printed. A row whose
    prompt alone is too long is left out. Rows whose text holds one of the tokenizer's special
    tokens (`<|endoftext|>` in an answer becomes the end token) are counted too.

    Raises:
        KitError: no row is left.
    """
    encoded = encode_rows(rows, tokenizer, settings)
    for line in remarks(encoded):
        print(line)
    return usable(encoded, settings)


def usable(encoded: datasets.Dataset, settings) -> datasets.Dataset:
    """Of what `encode_rows` returned the rows that can train, with what training needs of them."""
    whole = encoded.filter(lambda row: not row["left_out"])
    if not len(whole):
        reasons = sorted(set(encoded["left_out"]))
        value = settings.dataset
        remedy = "look at the data"
        if _TOO_LONG in reasons:
            value = f"max_length={settings.max_length}"
            remedy = "raise max_length"
        raise KitError(f"no row is left: {'; '.join(reasons)}", value=value, remedy=remedy)
    return whole.select_columns(["input_ids", "labels", "row"])


_TOO_LONG = "the prompt is longer than max_length"


def remarks(encoded: datasets.Dataset) -> list[str]:
    """What happened to rows on their way to tokens, a sentence each."""
    facts = encoded.select_columns(["left_out", "n_lost", "special", "number"]).to_pandas()
    used = facts[facts["left_out"] == ""]
    others = facts.drop(used.index).groupby("left_out", sort=False)["number"]
    lines = reading.why_left_out(others.agg(list).to_dict(), len(facts))
    n_cut = (used["n_lost"] > 0).sum()
    if n_cut:
        lost = f"{used['n_lost'].sum()} tokens lost"
        lines.append(f"{n_cut} of {len(facts)} rows cut to max_length, {lost}")
    special = [token for token in used["special"] if token]
    if special:
        lines.append(
            f"{len(special)} of {len(used)} rows write a special token in their text, "
            f"as {special[0]!r}: it is read as that token"
        )
    return lines


def encode_rows(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, settings
) -> datasets.Dataset:
    """As `tokenize_rows`, with the rows that cannot train, and for each row `left_out` (why, or
    nothing), `n_lost` (tokens that were cut off), `special` (a special token in its text) and
    `number` (its place in the data).
    """
    n_known = configs.config_of(settings.model_id).vocab_size
    return rows.map(
        _encode_row,
        with_indices=True,
        fn_kwargs={
            "tokenizer": tokenizer,
            "settings": settings,
            "special": chat_templates.special_tokens(tokenizer),
            "n_known": n_known,
        },
        remove_columns=rows.column_names,
        desc="tokenizing",
    )


def _encode_row(
    row: dict, number: int, tokenizer, settings, special: tuple[str, ...], n_known: int
) -> dict:
    texts = [row["instruction"], row["input"], row["output"]]
    ids = []
    trains = []
    left_out = ""
    if row.get("messages"):
        texts = [message["content"] for message in row["messages"]]
        try:
            text, spans = chat_templates.text_and_spans(
                row["messages"], tokenizer, settings.train_on
            )
            ids, trains = chat_templates.encode(text, spans, tokenizer)
        except ValueError as error:
            left_out = str(error)
    else:
        prompt = prompt_ids(row, tokenizer, settings.prompt_template)
        written = tokenizer(row["output"], add_special_tokens=False)["input_ids"]
        answer = [*written, tokenizer.eos_token_id]
        ids = prompt + answer
        trains = [False] * len(prompt) + [True] * len(answer)
    last = max((place for place, train in enumerate(trains) if train), default=0)
    kept = ids[: settings.max_length]
    trains = trains[: settings.max_length]
    if len(kept) < len(ids) and trains[-1]:
        kept[-1] = ids[last]  # the token that ends an answer
    if ids and sum(trains) < 2:
        left_out = _TOO_LONG
    elif ids and max(ids) >= n_known:
        unknown = tokenizer.convert_ids_to_tokens(max(ids))
        left_out = f"its text holds {unknown!r}, which the model's embedding has no row for"
    said = "\n".join(texts)
    in_text = [token for token in special if token in said]
    return {
        "input_ids": kept,
        "labels": [i if train else chunked_loss.IGNORED for i, train in zip(kept, trains)],
        "row": number,
        "number": row.get("number", number),
        "n_lost": len(ids) - len(kept),
        "left_out": left_out,
        "special": in_text[0] if in_text else "",
    }
