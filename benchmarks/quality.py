"""What a datatype does to a model: loss unquantized and in five 4-bit datatypes, over the same
texts.

    python benchmarks/quality.py            pocket and smollm2, into
    qlora_nb/recorded/quality_smollm2.json python benchmarks/quality.py --rows alpaca_data.json.xz
    also on real answers; losses alone are written

    python benchmarks/quality.py --bits --rows alpaca_data.json.xz   smollm2, on 64 answers, in
    NormalFloats of 8, 4, 3 and 2 bits, into qlora_nb/recorded/bits_smollm2.json

Every linear weight inside the blocks is replaced by what is left of it after quantizing (blocks of
64), so any difference is the datatype's. FP4 is bitsandbytes' table, E2M1 the textbook's, where the
smallest magnitude is 1/12 and not 1/192.
pocket: 720 facts it knows by heart, three samples. smollm2: the kit's little stories, eight a
    sample, three samples a seed.
Real answers: nine samples. Notebook 03 shows the file.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import provenance
import torch

from qlora_nb.answer import quality
from qlora_nb.model import data, load
from qlora_nb.model.linear_layers import linear_layers
from qlora_nb.settings import resolve
from qlora_nb.theory import blockwise, codebooks, double_quant

TARGET = provenance.ROOT / "qlora_nb" / "recorded" / "quality_smollm2.json"
BITS_TARGET = TARGET.with_name("bits_smollm2.json")
SEEDS = (0, 1, 2)
E2M1 = torch.tensor([-6.0, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6
WAYS = {
    "unquantized": lambda weight: weight,
    "NF4+DQ": double_quant.round_trip,
    **{
        name: partial(blockwise.round_trip, code=codebooks.code_by_name(name))
        for name in ("NF4", "FP4", "INT4")
    },
    "E2M1": partial(blockwise.round_trip, code=E2M1),
}
BITS = {"unquantized": lambda weight: weight} | {
    f"{n} bit": partial(blockwise.round_trip, code=codebooks.normal_float(n)) for n in (8, 4, 3, 2)
}


def over_seeds(
    name: str, model, tokenizer, pocket: bool, seeds: tuple[int, ...]
) -> quality.Quality:
    """`quality.measure` with every seed; all samples in one record."""
    found = [quality.assess(name, model, tokenizer, pocket, seed) for seed in seeds]
    return quality.Quality(
        name, sum((q.losses for q in found), ()), sum((q.recall for q in found), ())
    )


def over_rows(name: str, model, tokenizer, texts: list[str], n_samples: int = 9) -> quality.Quality:
    """Loss a token over texts that the caller brings, in equal samples."""
    losses = quality.text_losses(model, tokenizer, texts)
    return quality.Quality(
        name, tuple(losses[i::n_samples].mean().item() for i in range(n_samples))
    )


def compare(model, measure, ways=WAYS) -> list[dict]:
    """One record for each set of weights; `measure(name)` is called with the weights in place."""
    records = []
    for name, change in ways.items():
        with quality.replaced_weights(model, change):
            found = measure(name)
        records.append(asdict(found))
        print(f"  {name:11} {found.loss:.4f} ± {statistics.stdev(found.losses):.4f}", flush=True)
    return records


def record_bits(rows: Path, target: Path, n_texts: int = 64) -> None:
    """SmolLM2's loss on answers of people, its linear weights in 8, 4, 3 and 2 bits."""
    started = time.time()
    settings = resolve({"profile": "smollm2", "dataset": str(rows), "eval_rows": 270})
    model, tokenizer = load.load_base(settings, four_bit=False), load.load_tokenizer(settings)
    texts = [row["output"] for row in data.load(settings)[1] if len(row["output"]) > 40][:n_texts]
    measure = partial(over_rows, model=model, tokenizer=tokenizer, texts=texts, n_samples=8)
    found = {
        "on": f"{len(texts)} answers of Alpaca",
        "n_weights": sum(m.weight.numel() for m in linear_layers(model).values()),
        "qualities": compare(model, measure, BITS),
    }
    record = provenance.provenance() | {"blocksize": 64, "models": {"smollm2, real answers": found}}
    provenance.write(target, record | {"wall_s": round(time.time() - started, 1)})


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", choices=["pocket", "smollm2"], action="append", help="this model alone"
    )
    parser.add_argument(
        "--rows",
        type=Path,
        help="a file of rows with Alpaca's columns; 270 held-out answers are read as text",
    )
    parser.add_argument("--bits", action="store_true", help="8, 4, 3 and 2 bits, with --rows")
    parser.add_argument("--target", type=Path)
    options = parser.parse_args()
    if options.bits:
        record_bits(options.rows, options.target or BITS_TARGET)
        return 0
    record, started = provenance.provenance(SEEDS) | {"blocksize": 64, "models": {}}, time.time()
    for model_id in options.only or ["pocket", "smollm2"]:
        print(model_id, flush=True)
        settings = resolve({"profile": "tiny" if model_id == "pocket" else model_id})
        model, tokenizer = load.load_base(settings, four_bit=False), load.load_tokenizer(settings)
        pocket = model_id == "pocket"
        seeds = SEEDS[:1] if pocket else SEEDS  # the facts are the same for every seed
        records = compare(model, lambda name: over_seeds(name, model, tokenizer, pocket, seeds))  # noqa: B023
        record["models"][model_id] = {
            "on": "facts known by heart" if pocket else "the kit's stories",
            "qualities": records,
        }
        if options.rows and not pocket:
            rows = data.load(settings.replace(dataset=str(options.rows), eval_rows=270))[1]
            texts = [row["output"] for row in rows if len(row["output"]) > 40]
            records = compare(model, lambda name: over_rows(name, model, tokenizer, texts))  # noqa: B023
            record["models"][f"{model_id}, real answers"] = {
                "on": f"{len(texts)} answers of Alpaca",
                "qualities": records,
            }
    provenance.write(options.target or TARGET, record | {"wall_s": round(time.time() - started, 1)})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
