"""Answers: one model, its adapter switched on or off, one prompt or many, streamed or counted.

Base and tuned are the same 4-bit weights; the adapter is switched, so a comparison never holds two
models.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import TextIO

import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from qlora_nb import sources
from qlora_nb.answer import adapters
from qlora_nb.errors import KitError, refusing
from qlora_nb.model import batching, data, generation_defaults
from qlora_nb.progress import Bar
from qlora_nb.record import files


def row_of(prompt: str) -> dict[str, str]:
    """A prompt as a row: its first line is the instruction, the rest the input.

    >>> row_of("Where is Anna?\\nAnna went home.")
    {'instruction': 'Where is Anna?', 'input': 'Anna went home.'}
    """
    whole = prompt.encode("utf-16", "surrogatepass").decode(
        "utf-16", "replace"
    )  # no tokenizer takes half a character
    instruction, _, rest = whole.strip().partition("\n")
    if not instruction:
        raise KitError(
            "the prompt is empty", value=prompt, remedy="write an instruction on its first line"
        )
    return {"instruction": instruction, "input": rest.strip()}


def _config(
    model, tokenizer, max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0, **more
) -> GenerationConfig:
    """Only what is said here, greedy unless a temperature is given; ends with the tokenizer's end
    token or the model's own.

    A model's own sampling defaults are not mixed in: `models.load_base` has set them aside.
    """
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        if temperature
        else {}
    )
    ends = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": generation_defaults.end_tokens(model, tokenizer),
    }
    return GenerationConfig(max_new_tokens=max_new_tokens, **sampling, **ends, **more)


def _greedy(model, tokenizer, encoded: dict[str, torch.Tensor], max_new_tokens: int) -> list[str]:
    """What a model writes after each encoded prompt when it always takes the most probable
    token.
    """
    out = model.generate(**encoded, generation_config=_config(model, tokenizer, max_new_tokens))
    return [
        t.strip()
        for t in tokenizer.batch_decode(
            out[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True
        )
    ]


@dataclass
class Answer:
    """What a model said, what it cost, and what the sampling settings did.

    Attributes:
        n_tokens: new tokens, the end token included.
        first_token_s, seconds: from the question to the first token, to the last one.
        left: tokens that temperature and top_p left to choose from, mean over the new tokens; 1 if
            greedy.
        turned: new tokens before which the repetition penalty made another token the most probable
            one.
    """

    text: str
    n_tokens: int
    first_token_s: float
    seconds: float
    left: float = 1.0
    turned: int = 0

    @property
    def tokens_per_s(self) -> float:
        """New tokens a second, the first one included."""
        return self.n_tokens / self.seconds if self.seconds else 0.0


def stream(
    model: PeftModel, tokenizer, row: dict, settings, tuned: bool, stop: Event | None = None
) -> Iterator[Answer]:
    """Yield the growing answer token by token; the last one is complete. `stop` ends it after the
    current token.
    """
    encoded = tokenize_prompts([row], tokenizer, model, settings)
    streamer = TextIteratorStreamer(
        tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=600
    )
    ending, failure, made = stop or Event(), [], []
    shown = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    sampling = {
        name: getattr(settings, name) for name in ("temperature", "top_p", "repetition_penalty")
    }
    stopped = lambda input_ids, scores, **_: torch.full(
        (len(input_ids),), ending.is_set(), device=input_ids.device
    )

    def work():
        try:
            torch.manual_seed(settings.seed)
            with adapters.base_or_tuned(model, tuned), torch.no_grad():
                config = _config(model, tokenizer, settings.max_new_tokens, **sampling, **shown)
                criteria = StoppingCriteriaList([stopped])
                made.append(
                    model.generate(
                        **encoded,
                        generation_config=config,
                        streamer=streamer,
                        stopping_criteria=criteria,
                    )
                )
        except (
            BaseException
        ) as error:  # handed to the caller below; a silent thread would leave it waiting
            failure.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    started = time.perf_counter()
    thread.start()
    text, first = "", 0.0
    for n_pieces, piece in enumerate(streamer, start=1):
        first = first or time.perf_counter() - started
        text += piece
        yield Answer(text, n_pieces, first, time.perf_counter() - started)
    thread.join()
    if failure:
        raise failure[0]
    steps = list(zip(made[0].logits, made[0].scores, strict=True))
    left = (
        sum(scores.isfinite().sum().item() for _, scores in steps) / len(steps)
        if settings.temperature
        else 1.0
    )
    turned = sum(int(logits.argmax() != scores.argmax()) for logits, scores in steps)
    yield Answer(text.strip(), len(steps), first, time.perf_counter() - started, left, turned)


def answer(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, row: dict, settings, tuned: bool
) -> Answer:
    """The complete answer to one row."""
    *_, last = stream(model, tokenizer, row, settings, tuned)
    return last


@torch.no_grad()
def continue_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, max_new_tokens: int
) -> str:
    """What a model writes on after a plain text, greedily, without any template."""
    encoded = tokenizer(text, return_tensors="pt", return_token_type_ids=False).to(model.device)
    return _greedy(model, tokenizer, encoded, max_new_tokens)[0]


@torch.no_grad()
def next_tokens(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, row: dict, settings, k: int = 5
):
    """The `k` most probable first tokens of base and tuned model, and how far the distributions are
    apart.

    Returns:
        (base, tuned, divergence): two lists of (token text, probability) and KL(tuned ‖ base) in
        bits, over the whole vocabulary.
    """
    _, *tops, divergence = along(model, tokenizer, row, settings, "", k)[0]
    return *tops, divergence


@torch.no_grad()
def along(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, row: dict, settings, text: str, k: int = 3
) -> list[tuple]:
    """Both models' next tokens at every position of an answer, the end included.

    Returns:
        (token written there, base's `k` most probable ones, the tuned model's, KL(tuned ‖ base) in
        bits) for each position; probable tokens as (text, probability).
    """
    prompt, more = (
        tokenize_prompts([row], tokenizer, model, settings),
        {"add_special_tokens": False, "return_tensors": "pt"},
    )
    written = (
        tokenizer(text, **more)["input_ids"][:, : settings.max_new_tokens].long().to(model.device)
    )
    ids, start = torch.cat([prompt["input_ids"], written], dim=1), prompt["input_ids"].shape[1] - 1
    logs = []
    for tuned in (False, True):
        with adapters.base_or_tuned(model, tuned):
            logs.append(model(input_ids=ids).logits[0, start:].float().log_softmax(-1))
    bits = ((logs[1].exp() * (logs[1] - logs[0])).sum(-1) / math.log(2)).tolist()
    tops = []
    for log in logs:
        values, best = log.exp().topk(k)
        tops.append(
            [
                [(tokenizer.decode([i]), p) for i, p in zip(*row)]
                for row in zip(best.tolist(), values.tolist())
            ]
        )
    tokens = [*(tokenizer.decode([i]) for i in written[0].tolist()), "(end)"]
    return list(zip(tokens, *tops, bits, strict=True))


@torch.no_grad()
def _in_batches(
    model, tokenizer, rows: list[dict], settings, batch: int
) -> Iterator[dict[int, str]]:
    """Greedy answers by row number, a batch of like length at a time, padded on the left."""
    order = sorted(
        range(len(rows)), key=lambda i: len(data.prompt_of(rows[i], settings.prompt_template))
    )
    with Bar(total=len(order), unit="row", desc="answering", leave=False) as bar:
        for group in batching.groups(order, batch):
            encoded = tokenize_prompts([rows[i] for i in group], tokenizer, model, settings)
            yield dict(
                zip(group, _greedy(model, tokenizer, encoded, settings.max_new_tokens), strict=True)
            )
            bar.update(len(group))


def answer_all(
    model: PreTrainedModel, tokenizer, rows: list[dict], settings, batch: int = 48
) -> list[str]:
    """Greedy answers to many rows, in the rows' order."""
    said = {
        i: text
        for found in _in_batches(model, tokenizer, rows, settings, batch)
        for i, text in found.items()
    }
    return [said[i] for i in range(len(rows))]


def read_rows(name: str, columns: dict[str, str]) -> list[dict[str, str]]:
    """Rows with instruction and input: from a text file, a prompt a line, or from any data file (an
    answer is not needed).
    """
    path = sources.local_path(name)
    if not os.path.isfile(path):
        raise KitError("there is no such file of prompts", value=name, remedy="check the path")
    if not name.endswith(".txt"):
        return data.questions(name, columns)
    with refusing(
        "the file of prompts cannot be read or is not in UTF-8", name, "save it as UTF-8"
    ):
        rows = [
            row_of(line)
            for line in Path(path).read_text(encoding="utf-8-sig").splitlines()
            if line.strip()
        ]
    if not rows:
        raise KitError(
            "the file of prompts is empty", value=name, remedy="write a prompt on each line"
        )
    return rows


def answer_file(
    model,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    target: Path,
    settings,
    batch: int = 16,
) -> int:
    """Answer rows into a file of JSON lines (n, by, instruction, input, answer), batch by batch;
    called again, it goes on.

    `by` is a hash of whatever decides the answers: the model's name, how it is rounded and asked,
    the adapter's numbers.

    Returns:
        How many rows were answered now.

    Raises:
        KitError: the file holds answers to other rows or by another model, or is no file of answers
            at all; another process writes into it, or it was removed or changed in the meantime.
    """
    with files.writing(target, "name a file in a folder that you may write to"):
        target = target.resolve()  # a link stays a link
        if target.exists() and not target.is_file():
            raise KitError(
                "this is no file, and is left alone",
                value=str(target),
                remedy="name a file for the answers",
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = files.sole_writer(target)
    with lock:
        before, by = _answers_in(target), _author(model, settings)
        asked = [
            {"n": n, "by": by, "instruction": row["instruction"], "input": row["input"]}
            for n, row in enumerate(rows)
        ]
        if any(
            n not in range(len(asked)) or record | asked[n] != record
            for n, record in before.items()
        ):
            remedy = "name another file, or remove it"
            raise KitError(
                "this file holds answers to other rows or by another model",
                value=target.name,
                remedy=remedy,
            )
        files.write_atomically(
            target, "".join(json.dumps(record) + "\n" for record in before.values())
        )
        left = [row for row in asked if row["n"] not in before]
        with target.open("a", encoding="utf-8") as file:
            for found in _in_batches(model, tokenizer, left, settings, batch):
                _require_unchanged(target, file)
                file.writelines(
                    json.dumps(left[i] | {"answer": text}) + "\n" for i, text in found.items()
                )
                file.flush()
            _require_unchanged(target, file)
    return len(left)


def _require_unchanged(target: Path, file: TextIO) -> None:
    """Refuse to go on with a file that somebody removed, replaced or wrote to: its answers would be
    lost or mixed.
    """
    opened = os.fstat(file.fileno())
    there = target.stat() if target.exists() else None
    if there is None or not os.path.samestat(there, opened) or opened.st_size != file.tell():
        what = (
            "the file of answers was removed or changed by somebody else while it was being written"
        )
        raise KitError(
            what, value=target.name, remedy="call it again: what is missing is answered then"
        )


def _answers_in(target: Path) -> dict[int, dict]:
    """The records of a file of answers by row; a last line that a killed call has cut short is left
    out.
    """
    with refusing(
        "this is no file of answers, and is left alone", target.name, "name another file"
    ):
        *lines, cut = target.read_text(encoding="utf-8").split("\n") if target.exists() else [""]
        if not '{"n": '.startswith(cut[:6]):
            raise ValueError("its last line is not one")
        return {record["n"]: record for record in map(json.loads, lines)}


def _author(model, settings) -> str:
    how = {
        "model_id",
        "quant_type",
        "double_quant",
        "head_4bit",
        "compute_dtype",
        "prompt_template",
        "max_new_tokens",
    }
    found = hashlib.sha256(settings.model_dump_json(include=how).encode())
    for tensor in (
        get_peft_model_state_dict(model, save_embedding_layers=False).values()
        if isinstance(model, PeftModel)
        else ()
    ):
        found.update(tensor.cpu().float().numpy().tobytes())
    return found.hexdigest()[:12]


def tokenize_prompts(rows: list[dict], tokenizer, model, settings) -> dict[str, torch.Tensor]:
    """Prompts of rows as `input_ids` and `attention_mask` (rows, tokens) on the model's device,
    padded on the left.

    Raises:
        KitError: with the answer it would be longer than the model's context.
    """
    prompts = [
        {"input_ids": data.prompt_ids(row, tokenizer, settings.prompt_template)} for row in rows
    ]
    encoded = tokenizer.pad(
        prompts, return_tensors="pt", padding_side="left", return_attention_mask=True
    )
    limit = getattr(model.config, "max_position_embeddings", None)
    n = encoded["input_ids"].shape[1]
    if limit and n + settings.max_new_tokens > limit:
        what = f"the prompt has {n} tokens; with max_new_tokens={settings.max_new_tokens} that is over the model's {limit}"
        raise KitError(what, remedy="shorten the prompt or lower max_new_tokens")
    return {k: v.to(model.device) for k, v in encoded.items()}
