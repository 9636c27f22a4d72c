"""What an adapter wins and what its base forgets, at several strengths, and whether stories among
the rows keep what is forgotten.

    python benchmarks/forgetting.py 0 1 2 3 4      into qlora_nb/recorded/forgetting.json

Trains in profile tiny with the cells of notebook 06, each seed twice: on the rows alone, and with
the beginnings of two stories more in every step, about as long as a row. The rows of a step are the
same in both. The stories are new ones of the kind that the base was trained on, each seen once,
without any of the almanac's facts; each of their tokens is a label. Then the adapter is scaled, and
at each strength the model is asked held-out questions and the almanac's facts, and reads stories
that nobody trained on.

What is reported is each one's mean over the seeds and its 95 % interval, and at full strength the
paired difference (with stories minus without) with its 95 % interval (Student's t).
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import time

import datasets
import provenance
from peft.helpers import rescale_adapter_scale
from provenance import micro_world, open_cells
from sixteen_bit import interval

from qlora_nb import pocket
from qlora_nb.answer import evaluate, generate, quality
from qlora_nb.model import batching, data, load
from qlora_nb.record import runs
from qlora_nb.settings import validate

TARGET = provenance.ROOT / "qlora_nb" / "recorded" / "forgetting.json"

STRENGTHS = (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5)

STORIES_IN_A_STEP = 2

STORY_TOKENS = 64
"""A story is cut there: no row of its step has to be padded to its whole length."""

READ = 96
"""Stories whose loss is measured."""


def with_stories(rows: datasets.Dataset, settings) -> datasets.Dataset:
    """The rows in training order, and behind those of each step `STORIES_IN_A_STEP` stories."""
    n_rows = settings.rows_in_a_step - STORIES_IN_A_STEP
    alone = settings.replace(per_device_train_batch_size=n_rows)
    in_order = batching.in_training_order(rows, alone)
    n_stories = settings.max_steps * STORIES_IN_A_STEP
    tokenizer = load.load_tokenizer(settings)
    stories = []
    for text in micro_world.documents(2_000_000 + settings.seed, n_stories, almanac_share=0.0):
        ids = tokenizer(text, truncation=True, max_length=STORY_TOKENS)["input_ids"]
        stories.append({"input_ids": ids, "labels": ids})
    mixed = []
    for step in range(settings.max_steps):
        mixed += in_order.select(range(step * n_rows, (step + 1) * n_rows)).to_list()
        mixed += stories[step * STORIES_IN_A_STEP : (step + 1) * STORIES_IN_A_STEP]
    return datasets.Dataset.from_list(mixed)


def trained(seed: int, stories: bool) -> dict[str, object]:
    """Train once; what the model can do at each strength, and how long the training took."""
    settings = validate({"save_steps": 0, "sample_steps": 0, "seed": seed})
    tokenizer = load.load_tokenizer(settings)
    rows, held_out = data.load(settings)
    train = data.tokenize_rows(rows, tokenizer, settings)
    model = open_cells.attach_adapter(load.load_base(settings), settings)
    in_order = batching.in_training_order
    if stories:
        n_rows = settings.rows_in_a_step + STORIES_IN_A_STEP
        settings = settings.replace(per_device_train_batch_size=n_rows)
        in_order = with_stories
    with tempfile.TemporaryDirectory() as folder:
        run = runs.Run(settings.replace(output_dir=folder), "forgetting")
        found = open_cells.finetune(
            model, tokenizer, train, settings, run, lambda step: None, in_order=in_order
        )
    model.eval()
    curve = {}
    for strength in STRENGTHS:
        with rescale_adapter_scale(model, strength):
            curve[str(strength)] = measured(model, tokenizer, list(held_out), settings)
    return {"seconds": round(found["seconds"], 1), "by_strength": curve}


def measured(model, tokenizer, asked: list[dict], settings) -> dict[str, float]:
    """What is recorded of a model: how well it answers, what it knows by heart, how it reads."""
    said = generate.answer_all(model, tokenizer, asked, settings)
    _, known = quality.recall(model, tokenizer)
    texts = [row["text"] for row in pocket.read("stories")[:READ]]
    return {
        "questions right (%)": round(100 * evaluate.exact_match(said, asked)["all"], 3),
        "facts known (%)": round(100 * known.double().mean().item(), 3),
        "story loss (nats)": round(quality.text_losses(model, tokenizer, texts).mean().item(), 5),
    }


def summary(by_seed: dict[str, dict]) -> dict[str, dict]:
    """Of each way of training the mean over the seeds at each strength with its interval; and the
    paired differences at full strength.
    """
    found = {"by_strength": {}, "difference": {}}
    ways = list(next(iter(by_seed.values())))
    for way in ways:
        curves = [seed[way]["by_strength"] for seed in by_seed.values()]
        found["by_strength"][way] = {}
        for strength, measures in curves[0].items():
            means = {}
            for name in measures:
                means[name] = interval([curve[strength][name] for curve in curves])
            found["by_strength"][way][strength] = means
    without, mixed = ways
    for name in measures:
        apart = []
        for seed in by_seed.values():
            before = seed[without]["by_strength"]["1"][name]
            apart.append(seed[mixed]["by_strength"]["1"][name] - before)
        found["difference"][name] = interval(apart)
    return found


def main() -> None:
    record = provenance.provenance(tuple(map(int, sys.argv[1:])))
    started = time.time()
    by_seed = {}
    for seed in sys.argv[1:]:
        by_seed[seed] = {}
        for way in ("rows alone", "with stories"):
            with contextlib.redirect_stdout(io.StringIO()):
                by_seed[seed][way] = trained(int(seed), stories=way == "with stories")
            print(seed, way, by_seed[seed][way], flush=True)
    tiny = validate({})
    shown = {"profile": "tiny", "max_steps": tiny.max_steps, "rows_in_a_step": tiny.rows_in_a_step}
    shown |= {"stories_in_a_step": STORIES_IN_A_STEP, "story_tokens": STORY_TOKENS}
    shown |= {"eval_rows": tiny.eval_rows, "read": READ}
    found = {**summary(by_seed), "by_seed": by_seed, "wall_s": round(time.time() - started)}
    provenance.write(TARGET, {**record, "settings": shown, **found})


if __name__ == "__main__":
    main()
