"""Answers: one model, its adapter switched on or off, one prompt or many, streamed or counted.

transformers' `generate` writes token by token: greedily the most probable one, or, with a
temperature, one drawn from the most probable ones (nucleus sampling, arXiv 1904.09751). Base and
tuned model are the same 4-bit weights; the adapter is switched, so that a comparison never holds
two models. Many prompts go through the model together, padded on the left so that all answers begin
at the same place; prompts of like length share a batch, so that little is computed on padding.
Source: transformers, `generation/utils.py`.
"""

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event

import torch
from peft import PeftModel
from torch.nn.functional import kl_div
from transformers import (
    BatchEncoding,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from qlora_nb.answer import adapters
from qlora_nb.errors import KitError
from qlora_nb.model import (
    batching,
    characters,
    conversations,
    data,
    generation_defaults,
    probes,
)
from qlora_nb.progress import Bar


def row_of(prompt: str, template: str = "alpaca") -> dict:
    """A prompt as a row: its first line is the instruction, the rest the input; with the template
    "chat" all of it is what the user says.

    >>> row_of("Where is Anna?\\nAnna went home.")
    {'instruction': 'Where is Anna?', 'input': 'Anna went home.'}
    """
    # no tokenizer takes half a character
    whole = prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    whole = whole.strip()
    instruction, _, rest = whole.partition("\n")
    if not instruction:
        raise KitError(
            "the prompt is empty", value=prompt, remedy="write an instruction on its first line"
        )
    if template == "chat":
        return chat_row([{"role": "user", "content": whole}])
    return {"instruction": instruction, "input": rest.strip()}


def chat_row(turns: list[dict[str, str]]) -> dict:
    """A conversation to be answered, as a row."""
    found = conversations.conversation(turns, asking=True)
    return {name: found[name] for name in ("instruction", "input", "messages")}


def tokenize_prompts(
    rows: list[dict], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, settings
) -> BatchEncoding:
    """Prompts of rows as `input_ids` and `attention_mask` (rows, tokens) on the model's device,
    padded on the left.

    Raises:
        KitError: with the answer it would be longer than the model's context, or it holds a token
            that the model's embedding has no row for.
    """
    template = settings.prompt_template
    prompts = [{"input_ids": data.prompt_ids(row, tokenizer, template)} for row in rows]
    encoded = tokenizer.pad(
        prompts, return_tensors="pt", padding_side="left", return_attention_mask=True
    )
    limit = probes.positions_of(model.config)
    n_tokens = encoded["input_ids"].shape[1]
    if limit and n_tokens + settings.max_new_tokens > limit:
        raise KitError(
            f"the prompt has {n_tokens} tokens; with max_new_tokens={settings.max_new_tokens} "
            f"that is over the model's {limit}",
            remedy="shorten the prompt or lower max_new_tokens",
        )
    largest = int(encoded["input_ids"].max())
    if largest >= model.config.vocab_size:
        raise KitError(
            "the prompt holds a token that the model's embedding has no row for",
            value=tokenizer.convert_ids_to_tokens(largest),
            remedy="write it without this token, or take a model whose embedding was resized",
        )
    return encoded.to(model.device)


def askable(rows: list[dict], tokenizer, model, settings) -> tuple[list[dict], list[dict]]:
    """The rows that can be asked, and the others, each with no `answer` and why (`left_out`), which
    is said too.
    """
    found = []
    refused = []
    for n, row in enumerate(rows):
        try:
            tokenize_prompts([row], tokenizer, model, settings)
            found.append(row)
        except KitError as refusal:
            refused.append({**row, "answer": None, "left_out": str(refusal)})
            print(f"row {row.get('n', n)} is not answered: {refusal}")
    return found, refused


def _config(model, tokenizer, settings, **more) -> GenerationConfig:
    """Greedy unless more is said.

    A model's own sampling defaults are not mixed in: `load.prepared` has set them aside.
    """
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=generation_defaults.end_tokens(model, tokenizer),
        **more,
    )


def _whole(text: str) -> str:
    """An answer without blanks around it, nor a last character that `max_new_tokens` cut off."""
    return text.rstrip("\ufffd").strip()


def in_batches(
    model: PreTrainedModel, tokenizer, rows: list[dict], settings, batch: int
) -> Iterator[dict[int, str]]:
    """Greedy answers by row number, a batch of prompts of like length at a time.

    PEFT puts the tokens of a trained prompt before the padding, where they would be farther away
    from the text than in training: such an adapter gets a row at a time.
    """
    if adapters.adds_tokens(model):
        batch = 1
    lengths = [len(data.prompt_ids(row, tokenizer, settings.prompt_template)) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: lengths[i])
    config = _config(model, tokenizer, settings)
    for group in Bar(batching.groups(order, batch), unit="batch", desc="answering", leave=False):
        encoded = tokenize_prompts([rows[i] for i in group], tokenizer, model, settings)
        written = model.generate(**encoded, generation_config=config)
        new = written[:, encoded["input_ids"].shape[1] :]
        said = tokenizer.batch_decode(new, skip_special_tokens=True)
        yield {i: _whole(text) for i, text in zip(group, said, strict=True)}


def answer_all(
    model: PreTrainedModel, tokenizer, rows: list[dict], settings, batch: int = 48
) -> list[str]:
    """Greedy answers to many rows, in the rows' order."""
    said: dict[int, str] = {}
    for answered in in_batches(model, tokenizer, rows, settings, batch):
        said.update(answered)
    return [said[i] for i in range(len(rows))]


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

    `generate` works in a thread of its own and hands each token to the streamer, which is read
    here. An error in that thread is raised here.
    """
    encoded = tokenize_prompts([row], tokenizer, model, settings)
    sampling = {}
    if settings.temperature:
        sampling = {
            "do_sample": True,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": 0,
        }
    config = _config(
        model,
        tokenizer,
        settings,
        repetition_penalty=settings.repetition_penalty,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
        **sampling,
    )
    streamer = TextIteratorStreamer(
        tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=600
    )

    def stopped(input_ids, scores, **_):
        asked = stop is not None and stop.is_set()
        return torch.full((len(input_ids),), asked, device=input_ids.device)

    def work():
        try:
            torch.manual_seed(settings.seed)
            with adapters.base_or_tuned(model, tuned):
                return model.generate(
                    **encoded,
                    generation_config=config,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([stopped]),
                )
        finally:
            streamer.end()  # a silent thread would leave the reader waiting

    started = time.perf_counter()
    working = ThreadPoolExecutor(max_workers=1).submit(work)
    text = ""
    first_token_s = 0.0
    for n_pieces, piece in enumerate(streamer, start=1):
        seconds = time.perf_counter() - started
        if n_pieces == 1:
            first_token_s = seconds
        text += piece
        yield Answer(text, n_pieces, first_token_s, seconds)
    found = working.result()
    n_tokens = len(found.scores)
    whole = Answer(_whole(text), n_tokens, first_token_s, time.perf_counter() - started)
    if settings.temperature:
        n_left = [scores.isfinite().sum().item() for scores in found.scores]
        whole.left = sum(n_left) / n_tokens
    for logits, scores in zip(found.logits, found.scores, strict=True):
        whole.turned += int(logits.argmax() != scores.argmax())
    yield whole


def answer(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, row: dict, settings, tuned: bool
) -> Answer:
    """The complete answer to one row."""
    *_, last = stream(model, tokenizer, row, settings, tuned)
    return last


@torch.no_grad()
def next_tokens_along(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, row: dict, settings, text: str, k: int = 3
) -> list[tuple]:
    """Both models' next tokens at every position of an answer, the end included.

    Returns:
        (token written there, base's `k` most probable ones, the tuned model's, KL(tuned ‖ base) in
        bits) for each position; probable tokens as (text, probability). The text of a token that
        ends no character is its bytes, see `characters`.
    """
    prompt = tokenize_prompts([row], tokenizer, model, settings)["input_ids"]
    written = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    written = written[:, : settings.max_new_tokens].long().to(model.device)
    all_ids = torch.cat([prompt, written], dim=1)
    n_predicted = written.shape[1] + 1  # the last token of the prompt predicts the first of them
    found = []
    for is_tuned in (False, True):
        with adapters.base_or_tuned(model, is_tuned):
            logits = model(input_ids=all_ids).logits[0, -n_predicted:]
        found.append(logits.float().log_softmax(-1))
    base, tuned = found
    divergence = kl_div(base, tuned, reduction="none", log_target=True).sum(-1) / math.log(2)

    ids = written[0].tolist()

    def most_probable(log_probabilities: torch.Tensor, place: int) -> list[tuple[str, float]]:
        values, best = log_probabilities.exp().topk(k)
        texts = [characters.last([*ids[:place], i], tokenizer)[0] for i in best.tolist()]
        return list(zip(texts, values.tolist()))

    tokens = [characters.last(ids[:end], tokenizer)[0] for end in range(1, n_predicted)]
    steps = []
    for place, token in enumerate([*tokens, "(end)"]):
        tops = most_probable(base[place], place), most_probable(tuned[place], place)
        steps.append((token, *tops, divergence[place].item()))
    return steps
