"""Notebook 06, fine-tuning: its figures and exercises.

- `label_mask`: a row of the data as HTML, the tokens that train marked;
- `a_chat`: a conversation as the model reads it;
- `lengths`: histogram of the rows' lengths;
- `scores`: exact match by kind of question, of the baselines, the base and the tuned model;
- `check_qlora_forward`, `check_mask_labels`: the functions that the reader writes.
"""

import html
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas
import torch
from bitsandbytes.nn import LinearNF4
from IPython.display import HTML
from pandas.io.formats.style import Styler
from peft import LoraConfig, inject_adapter_in_model

from qlora_nb.model import chat_templates, conversations, data_report
from qlora_nb.model.chunked_loss import IGNORED
from qlora_nb.ui import style
from qlora_nb.ui.written import Written


def label_mask(ids: list[int], trains: list[bool], tokenizer) -> str:
    """A row as HTML, what trains both coloured and underlined; text is escaped."""
    row = data_report.pieces(ids, trains, tokenizer)
    count = f"the {sum(trains)} tokens that train, of {len(ids)}"
    return f"{data_report.shown(row)}<p>underlined and green: {count}</p>"


A_CHAT = [
    {"role": "system", "content": "Answer in few words."},
    {"role": "user", "content": "Where is the river?"},
    {"role": "assistant", "content": "Behind the park."},
    {"role": "user", "content": "我能步行去吗?"},
    {"role": "assistant", "content": "可以。"},
]
"""A conversation in two languages; its last question is whether one can walk there."""


def a_chat(tokenizer) -> HTML:
    """How a conversation reaches the model, behind a line that unfolds it."""
    messages = conversations.conversation(A_CHAT, asking=False)["messages"]
    text, spans = chat_templates.text_and_spans(messages, tokenizer, "all")
    ids, trains = chat_templates.encode(text, spans, tokenizer)
    row = data_report.shown(data_report.pieces(ids, trains, tokenizer))
    summary = "<summary>How a conversation would read: every answer trains</summary>"
    return HTML(f"<details>{summary}{row}</details>")


@style.draws
def lengths(ax, n_tokens: list[int], max_length: int) -> str:
    """Histogram of row lengths, and the length that 95 % of the rows do not exceed.

    Args:
        n_tokens: tokens of each row, prompt and answer together.
        max_length: tokens that are kept of a row.
    """
    n_bins = min(40, max(n_tokens) - min(n_tokens) + 1)
    ax.hist(n_tokens, bins=n_bins, color=style.GREY, edgecolor="white")
    longest = np.quantile(n_tokens, 0.95, method="inverted_cdf")
    label = f"95 % of rows are no longer than {longest}"
    ax.axvline(longest, color=style.BLUE, linestyle="--", label=label)
    ax.set_xlim(left=0)
    return f"Rows have {np.mean(n_tokens):.0f} tokens on average; max_length allows {max_length}"


@style.draws
def scores(ax, results: dict[str, dict[str, float]]) -> str:
    """Exact match by kind of question for up to four answerers, "all" kinds together first.

    Args:
        results: answerer → {kind: share in [0, 1]}. A kind without a share has no bar, an answerer
            without any is left out.

    Returns:
        The finding about the last answerer.
    """
    percent = {}
    for label, shares in results.items():
        if shares:
            percent[label] = {kind: 100 * share for kind, share in shares.items()}
            last = label
    kinds = dict.fromkeys(itertools.chain(*percent.values()))
    kinds = sorted(kinds, key=lambda kind: kind != "all")  # the others stay in their order
    looks = [
        style.look("other", hatch=""),
        style.look("INT4"),
        style.look("16-bit", hatch=".."),
        style.look("LoRA", hatch=""),
    ]
    style.grouped_bars(ax, kinds, percent, looks)
    ax.figure.legend(loc="outside lower center", ncols=len(percent))
    if "all" not in percent[last]:
        return f"{last}: not every kind of question was seen in training"
    return f"{last}: {percent[last]['all']:.0f} % of held-out answers exactly right"


def adapted(weight: torch.Tensor, r: int, bias: bool) -> torch.nn.Module:
    """A linear layer as notebook 06 has it: bitsandbytes packs W (out, in), PEFT adds A and B. They
    are random, as is the bias if there is one.
    """
    frozen = LinearNF4(*weight.T.shape, bias, compute_dtype=torch.float32)
    frozen.load_state_dict({"weight": weight}, strict=False)  # the bias stays
    model = torch.nn.Sequential(frozen.to("cpu"))
    model.is_loaded_in_4bit = True  # as transformers says it to PEFT
    lora = LoraConfig(r=r, lora_alpha=3 * r, target_modules=["0"], init_lora_weights=False)
    return inject_adapter_in_model(lora, model)[0]


def _forward_inputs() -> list[tuple]:
    """The small layer has a bias, as Pythia's; the large one has none, as Llama's."""
    small = torch.ones(1, 64), adapted(torch.randn(2, 64) / 8, r=1, bias=True)
    large = torch.randn(2, 5, 256), adapted(torch.randn(768, 256) / 16, r=8, bias=False)
    return [small, large]


def _forward_and_backward(function: Callable, x: torch.Tensor, layer: torch.nn.Module):
    """Output, and the gradients of x, A and B."""
    y = function(x.requires_grad_(), layer)
    if y is None:
        return None
    y.sum().backward()
    matrices = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    return y, *(tensor.grad for tensor in (x, *matrices))


check_qlora_forward = Written(
    "qlora_forward",
    lambda x, layer: layer(x),
    _forward_inputs,
    "PEFT on bitsandbytes: output, and gradients of x, A and B",
    "results are y and the gradients of x, A and B; y is x·Wᵀ + bias, if any, + alpha/r · x·Aᵀ·Bᵀ",
    call=_forward_and_backward,
)


def _masked(prompt_ids: list[int], answer_ids: list[int], eos: int) -> tuple[list[int], list[int]]:
    """By a mask over all ids."""
    ids = torch.tensor([*prompt_ids, *answer_ids, eos])
    in_prompt = torch.arange(len(ids)) < len(prompt_ids)
    return ids.tolist(), ids.masked_fill(in_prompt, IGNORED).tolist()


def _without_end(prompt_ids: list[int], answer_ids: list[int], eos: int):
    ids, labels = _masked(prompt_ids, answer_ids, eos)
    return ids, [*labels[:-1], IGNORED]


def _shifted(prompt_ids: list[int], answer_ids: list[int], eos: int):
    ids, labels = _masked(prompt_ids, answer_ids, eos)
    return ids, [*labels[1:], IGNORED]


check_mask_labels = Written(
    "mask_labels",
    _masked,
    lambda: [([11, 12, 13, 14, 15], [21, 22], 0), ([5], [], 2), (list(range(90)), [7, 7, 9], 1)],
    "a mask over all ids",
    "ids: prompt, answer, end token; labels: the same, -100 on the prompt alone",
    {
        "the end token must train too, or the model never learns to stop": _without_end,
        "do not move the labels by one: transformers does that inside the model": _shifted,
    },
)


def answers(prompts: list[str], **said: list[str]) -> Styler:
    """A table of prompts and what was said to them, one column for each keyword; text is
    escaped.
    """
    table = pandas.DataFrame({"prompt": prompts, **said})
    look = {"text-align": "left", "white-space": "pre-wrap", "vertical-align": "top"}
    return table.style.format(escape="html").hide(axis="index").set_properties(**look)


def folded(path: Path) -> HTML:
    """A program's text behind a line that unfolds it."""
    text = html.escape(path.read_text(encoding="utf-8"))
    return HTML(f"<details><summary>{html.escape(path.name)}</summary><pre>{text}</pre></details>")
