"""Four mistakes of a fine-tuning script, each made on purpose: what does it cost?

    python benchmarks/break_it.py 0 1 2        into qlora_nb/recorded/break_it.json

All train with the cells of notebook 06 in profile tiny: same rows, seeds and steps.

- no end token: the end token pads too, and the collator takes the loss off every such id, so that
  no answer's end is ever trained;
- loss on the prompt: its tokens are trained like those of the answer;
- query_key_value alone: PEFT's default for this architecture, at the same rank, and at the rank
  that trains as many numbers as all linear layers do.

What is reported is each one's mean over the seeds, and the paired difference to the kit's setting
with its 95 % interval (Student's t). One call measures all seeds and writes the file once, so that
its date and commit hold for every number.

A fifth mistake is recorded once, with seed 0, as a curve: as many steps over a few rows, which are
learned by heart.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import sys
import tempfile

import provenance
from provenance import open_cells
from sixteen_bit import interval

from qlora_nb.answer import evaluate, generate
from qlora_nb.model import batching, chunked_loss, data, generation_defaults, load
from qlora_nb.record import runs
from qlora_nb.settings import validate

TARGET = provenance.ROOT / "qlora_nb" / "recorded" / "break_it.json"

ONE_LAYER = {"target_modules": "query_key_value"}

SETTINGS = {
    "the kit's setting": {},
    "no end token": {},
    "loss on the prompt": {},
    "query_key_value alone": ONE_LAYER,
    "query_key_value alone, r = 32": {**ONE_LAYER, "r": 32, "lora_alpha": 64},
}
"""What is trained → the parameters that differ from profile tiny's; alpha over r is the same."""


def without_the_end(row: dict, end: int) -> dict:
    """No label where the id is the end token's: what a collator does that masks padding by id."""
    return {"labels": [chunked_loss.IGNORED if i == end else i for i in row["labels"]]}


def with_the_prompt(row: dict) -> dict:
    """Every token is a label."""
    return {"labels": row["input_ids"]}


def written(model, tokenizer, rows: list[dict], settings) -> list[tuple[str, int, bool]]:
    """Of each row the greedy answer, its number of tokens, and whether it ended by itself."""
    ends = set(generation_defaults.end_tokens(model, tokenizer))
    found = []
    for group in batching.groups(rows, 48):
        encoded = generate.tokenize_prompts(group, tokenizer, model, settings)
        ids = model.generate(
            **encoded,
            max_new_tokens=settings.max_new_tokens,
            do_sample=False,
            eos_token_id=list(ends),
            pad_token_id=tokenizer.pad_token_id,
        )
        for new in ids[:, encoded["input_ids"].shape[1] :].tolist():
            where = [place for place, i in enumerate(new) if i in ends]
            n_tokens = where[0] if where else len(new)
            said = tokenizer.decode(new[:n_tokens], skip_special_tokens=True)
            found.append((said, n_tokens, bool(where)))
    return found


def trained(name: str, seed: int) -> dict[str, float]:
    """Train one of `SETTINGS` and ask it all held-out rows."""
    settings = validate({"save_steps": 0, "sample_steps": 0, "seed": seed, **SETTINGS[name]})
    tokenizer = load.load_tokenizer(settings)
    rows, held_out = data.load(settings)
    train = data.tokenize_rows(rows, tokenizer, settings)
    if name == "no end token":
        train = train.map(without_the_end, fn_kwargs={"end": tokenizer.eos_token_id})
    elif name == "loss on the prompt":
        train = train.map(with_the_prompt)
    model = open_cells.attach_adapter(load.load_base(settings), settings)
    n_trained, _ = model.get_nb_trainable_parameters()
    with tempfile.TemporaryDirectory() as folder:
        run = runs.Run(settings.replace(output_dir=folder), "break_it")
        open_cells.finetune(model, tokenizer, train, settings, run, lambda step: None)
    model.eval()
    asked = list(held_out)
    said = written(model, tokenizer, asked, settings)
    encoded = data.tokenize_rows(held_out, tokenizer, settings)
    return {
        "trained_numbers": n_trained,
        "held_out_loss": evaluate.response_loss(model, tokenizer, encoded),
        "exact_match": evaluate.exact_match([text for text, _, _ in said], asked)["all"],
        "stops": statistics.mean(ended for _, _, ended in said),
        "answer_tokens": statistics.mean(n for _, n, _ in said),
    }


def by_heart(n_rows: int = 64) -> dict[str, object]:
    """The losses of the kit's setting on `n_rows` rows, each seen many times, and what held-out
    rows say of it on the way.
    """
    settings = validate({"save_steps": 0, "sample_steps": 20, "train_rows": n_rows})
    tokenizer = load.load_tokenizer(settings)
    rows, held_out = data.load(settings)
    encoded = data.tokenize_rows(held_out.select(range(96)), tokenizer, settings)
    model = load.load_base(settings)
    before = evaluate.response_loss(model, tokenizer, encoded)
    model = open_cells.attach_adapter(model, settings)
    train = data.tokenize_rows(rows, tokenizer, settings)
    with tempfile.TemporaryDirectory() as folder:
        run = runs.Run(settings.replace(output_dir=folder), "break_it")
        found = open_cells.finetune(
            model, tokenizer, train, settings, run, lambda step: None, encoded
        )
    model.eval()
    return {
        "train_rows": len(train),
        "held_out_rows": len(encoded),
        "losses": [round(loss, 4) for loss in found["losses"]],
        "before": before,
        "held_out": {str(step): round(loss, 4) for step, loss in found["held_out"].items()},
        "after": evaluate.response_loss(model, tokenizer, encoded),
    }


def summary(by_seed: dict[str, dict]) -> dict[str, dict]:
    """Of each setting and each measure the mean over the seeds, and how far it is from the kit's
    setting, seed by seed.
    """
    found = {}
    for name in SETTINGS:
        measures = {}
        for measure in ("held_out_loss", "exact_match", "stops", "answer_tokens"):
            own = [seed[name][measure] for seed in by_seed.values()]
            kit = [seed["the kit's setting"][measure] for seed in by_seed.values()]
            apart = interval([mine - theirs for mine, theirs in zip(own, kit, strict=True)])
            measures[measure] = {"mean": round(statistics.mean(own), 5), "difference": apart}
        found[name] = measures
    return found


COLUMNS = {
    "exact_match": ("exact match (%)", 100, 1),
    "stops": ("answers that stop (%)", 100, 1),
    "answer_tokens": ("tokens of an answer", 1, 1),
    "held_out_loss": ("held-out loss (nats)", 1, 3),
}
"""Measure → its column in the table, the factor to its unit, decimals."""


def table(means: dict[str, dict]) -> dict[str, dict[str, str]]:
    """Setting → column → mean, and the interval of the difference to the kit's setting, as text."""
    rows = {}
    for name, measures in means.items():
        row = {}
        for measure, (column, factor, digits) in COLUMNS.items():
            text = f"{factor * measures[measure]['mean']:.{digits}f}"
            apart = measures[measure]["difference"]
            if name != "the kit's setting" and apart["n"] > 1:
                low = factor * apart["low"]
                high = factor * apart["high"]
                text += f" ({low:+.{digits}f} to {high:+.{digits}f})"
            row[column] = text
        rows[name] = row
    return rows


def keep(by_seed: dict[str, dict], curve: dict) -> None:
    """Write what was measured, with where and how."""
    settings = validate({})
    shown = {"profile": "tiny", "max_steps": settings.max_steps, "r": settings.r}
    shown["max_new_tokens"] = settings.max_new_tokens
    record = provenance.provenance(tuple(sorted(map(int, by_seed))))
    means = summary(by_seed)
    found = {"table": table(means), "summary": means, "by_seed": by_seed, "by_heart": curve}
    provenance.write(TARGET, {**record, "settings": shown, **found})


def main() -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        curve = by_heart()
    by_seed = {}
    for seed in sys.argv[1:]:
        by_seed[seed] = {}
        for name in SETTINGS:
            with contextlib.redirect_stdout(io.StringIO()):
                found = trained(name, int(seed))
            by_seed[seed][name] = found
            print(seed, name, found, flush=True)
    keep(by_seed, curve)


if __name__ == "__main__":
    main()
