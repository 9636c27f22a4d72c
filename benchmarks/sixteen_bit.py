"""The paper's claim tested: is an adapter on a 4-bit base as good as one on the unrounded base?
Same rows, seeds and steps.

    python benchmarks/sixteen_bit.py pocket 0 1 2 3 4             into
    qlora_nb/recorded/sixteen_bit_pocket.json QLORA_NB_DATASET=alpaca.json python
    benchmarks/sixteen_bit.py smollm2 0 1 2

The unrounded base is float32 here, the upper bound of any 16-bit one. What is reported is the
paired difference (4-bit minus unrounded) over the seeds with its 95 % interval (Student's t). Run
it again with other seeds and they are added.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import statistics
import sys
import tempfile

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import provenance
from provenance import open_cells

from qlora_nb.answer import evaluate
from qlora_nb.model import data, load
from qlora_nb.record import runs
from qlora_nb.settings import validate
from qlora_nb.theory import intervals


def trained(settings, four_bit: bool) -> dict[str, float]:
    """Held-out loss and exact match (where there is one) after a whole training."""
    tokenizer, base = load.load_tokenizer(settings), load.load_base(settings, four_bit=four_bit)
    rows, held_out = data.load(settings)
    model = open_cells.attach_adapter(base, settings)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run = runs.Run(settings.replace(output_dir=folder), "sixteen_bit")
        open_cells.finetune(
            model,
            tokenizer,
            data.tokenize_rows(rows, tokenizer, settings),
            settings,
            run,
            lambda step: None,
        )
        found = evaluate.held_out(model, tokenizer, held_out, settings)
    return {
        "loss": found["loss"],
        **({"exact_match": found["exact_match"]["all"]} if found["exact_match"] else {}),
    }


def interval(differences: list[float]) -> dict[str, object]:
    """Mean of the paired differences and its 95 % interval."""
    n, mean = len(differences), statistics.mean(differences)
    if n == 1:
        return {"n": n, "mean": round(mean, 5), "low": None, "high": None}
    half = intervals.half_width(differences)
    return {
        "n": n,
        "mean": round(mean, 5),
        "low": round(mean - half, 5),
        "high": round(mean + half, 5),
    }


def main() -> None:
    profile = {"pocket": "tiny"}.get(sys.argv[1], sys.argv[1])
    target = provenance.ROOT / "qlora_nb" / "recorded" / f"sixteen_bit_{sys.argv[1]}.json"
    known = json.loads(target.read_text())["by_seed"] if target.is_file() else {}
    given = {"profile": profile, "save_steps": 0}
    if profile != "tiny" and os.environ.get("QLORA_NB_DATASET"):
        given |= {"dataset": os.environ["QLORA_NB_DATASET"], "eval_rows": 48}
    for seed in map(int, sys.argv[2:] or "01234"):
        settings = validate({**given, "seed": seed})
        known[str(seed)] = {
            name: trained(settings, four_bit)
            for name, four_bit in (("4-bit", True), ("unrounded", False))
        }
        print(seed, known[str(seed)], flush=True)
        pairs = list(known.values())
        paired = {
            k: interval([p["4-bit"][k] - p["unrounded"][k] for p in pairs])
            for k in pairs[0]["4-bit"]
        }
        shown = {
            k: settings.model_dump()[k]
            for k in ("model_id", "max_steps", "r", "learning_rate", "eval_rows")
        }
        shown["data"] = "Alpaca" if "dataset" in given else "pocket"
        record = provenance.provenance(tuple(sorted(map(int, known))))
        provenance.write(
            target, {**record, "settings": shown, "difference": paired, "by_seed": known}
        )


if __name__ == "__main__":
    main()
