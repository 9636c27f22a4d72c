"""What fine-tuning costs on this CPU: against two recipes, lever by lever, and loading with and
without the 4-bit copy.

    python benchmarks/cpu.py [peers levers loading]     into benchmarks/results/ and
    qlora_nb/recorded/peers.json

Everything that is compared runs in one process, one after the other in every round; medians over
the rounds are reported.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import peers
import provenance
import random_weights
from host_memory import Memory

from qlora_nb import sources
from qlora_nb.answer import evaluate
from qlora_nb.memory import estimates, ledger
from qlora_nb.model import configs, data, load
from qlora_nb.settings import validate

TARGET = provenance.ROOT / "benchmarks" / "results" / "cpu.json"
PEERS = provenance.ROOT / "qlora_nb" / "recorded" / "peers.json"
ROUNDS, STEPS = 5, 20


def quietly(function, *arguments):
    """Call without the notices that a training prints."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return function(*arguments)


def median(values: list[float]) -> dict[str, object]:
    return {"median": round(statistics.median(values), 4), "all": [round(v, 4) for v in values]}


def peers_on_the_pocket_model() -> dict:
    """Tokens a second in short alternating runs, then one whole training each of the kit and the
    common recipe.
    """
    settings = validate({"max_steps": STEPS})
    tokenizer = load.load_tokenizer(settings)
    rows = data.tokenize_rows(data.load(validate({}))[0], tokenizer, settings)
    speeds = {"kit": [], "common": [], "pasted": []}
    for _ in range(ROUNDS):
        for name, found in speeds.items():
            steps = settings if name != "pasted" else settings.replace(max_steps=3)
            found.append(quietly(getattr(peers, name), steps, rows, tokenizer)[0])
            print(name, round(found[-1]), "tokens/s", flush=True)
    ratios = {
        n: median([k / o for k, o in zip(speeds["kit"], speeds[n])]) for n in ("common", "pasted")
    }
    ends = {}
    for name in ("kit", "common"):
        whole = validate({})
        started = time.perf_counter()
        _, model = quietly(getattr(peers, name), whole, rows, tokenizer)
        seconds = time.perf_counter() - started
        found = quietly(evaluate.held_out, model.eval(), tokenizer, data.load(whole)[1], whole)
        ends[name] = {
            "seconds": seconds,
            "held_out_loss": found["loss"],
            "exact_match": found["exact_match"]["all"],
        }
        print(name, ends[name], flush=True)
    return {
        "tokens_per_s": {n: median(v) for n, v in speeds.items()},
        "kit_times_as_fast_as": ratios,
        "whole_training": ends,
    }


LEVERS = {
    "all logits at once": {"loss_chunk": 0},
    "checkpointing": {"gradient_checkpointing": True},
    "no double quantization": {"double_quant": False},
    "8-bit states": {"optim": "paged_adamw_8bit"},
    "4-bit head": {"head_4bit": True},
    "packing": {"packing": True},
}


def cost_of_levers(model_id: str, values: dict, n_rows: int, steps: int) -> dict:
    """Tokens a second with one setting changed, against the same without, alternating."""
    plain = validate({"model_id": model_id, "max_steps": steps, **values})
    tokenizer = load.load_tokenizer(plain.replace(model_id="pocket"))
    rows = peers.random_rows(n_rows, len(tokenizer), plain.max_length, middle=60)
    speeds: dict[str, list[float]] = {"plain": [], **{name: [] for name in LEVERS}}
    for _ in range(3):
        for name, found in speeds.items():
            settings = plain.replace(**LEVERS.get(name, {}))
            if name == "packing":  # as many tokens in a pass, in fewer sequences
                settings = settings.model_copy(
                    update={
                        "per_device_train_batch_size": max(
                            1, values["per_device_train_batch_size"] // 3
                        )
                    }
                )
            found.append(quietly(peers.kit, settings, rows, tokenizer)[0])
        print(Path(model_id).name, {n: round(v[-1]) for n, v in speeds.items()}, flush=True)
    relative = {n: median([x / p for x, p in zip(v, speeds["plain"])]) for n, v in speeds.items()}
    return {
        "tokens_per_s": {n: median(v) for n, v in speeds.items()},
        "speed_against_plain": relative,
    }


def loading(model_id: str) -> dict:
    """Seconds to load from 16-bit safetensors and from the 4-bit copy."""
    seconds = {"plain": [], "copy": []}
    with tempfile.TemporaryDirectory() as cache:
        sources.CACHE = Path(cache)
        quietly(load.load_base, validate({"model_id": model_id, "prequantized": True}))
        for _ in range(ROUNDS):
            for name, keep in (("plain", False), ("copy", True)):
                started = time.perf_counter()
                quietly(load.load_base, validate({"model_id": model_id, "prequantized": keep}))
                seconds[name].append(time.perf_counter() - started)
    return {n: median(v) for n, v in seconds.items()} | {
        "copy_over_plain": round(
            statistics.median(c / p for c, p in zip(seconds["copy"], seconds["plain"])), 4
        )
    }


def memory_of_loading(model_id: str) -> dict[str, int]:
    """What loading takes besides the model itself, in a process of its own: the most anonymous
    memory (mapped files are the system's to give back) above what was there before and what the
    4-bit model holds.
    """
    quietly(load.load_base, validate({}))  # libraries and their own buffers
    with Memory() as before:
        pass
    with Memory() as memory:
        model = quietly(load.load_base, validate({"model_id": model_id}))
    held = ledger.measure(model).total_bytes
    config = configs.config_of(model_id)
    largest = max(p.numel() for p in configs.meta_model(config).parameters())
    return {
        "held": held,
        "besides": memory.anonymous - before.anonymous - held,
        "largest_tensor_16_bit": 2 * largest,
        "assumed": estimates.host_bytes(config),
    }


def main() -> None:
    wanted = sys.argv[1:] or ["peers", "levers", "loading"]
    results = json.loads(TARGET.read_text()) if TARGET.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        if "peers" in wanted:
            provenance.write(PEERS, provenance.provenance((0,)) | peers_on_the_pocket_model())
        if "levers" in wanted:
            wide = {
                "per_device_train_batch_size": 3,
                "max_length": 192,
                "gradient_checkpointing": False,
            }
            results["levers"] = {
                "pocket": cost_of_levers("pocket", {"per_device_train_batch_size": 12}, 600, 12),
                "410m": cost_of_levers(
                    random_weights.random_pythia("410m", Path(folder)), wide, 60, 3
                ),
                "provenance": provenance.provenance((0,)),
            }
        if "loading" in wanted:
            results["loading"] = {"provenance": provenance.provenance((0,))}
            for size in ("410m", "1.4b"):
                made = random_weights.random_pythia(size, Path(folder))
                results["loading"][size] = loading(made)
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    results["loading"][size]["memory"] = pool.apply(memory_of_loading, (made,))
                print(size, results["loading"][size], flush=True)
    if results:
        provenance.write(TARGET, results)


if __name__ == "__main__":
    main()
