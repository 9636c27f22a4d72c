"""pythia-12b's true shape with random weights on a CUDA card: peaks by option, speed against two
recipes, loading, answering.

    python benchmarks/gpu.py                       into qlora_nb/recorded/gpu.json, which notebooks
    06 and 07 show python benchmarks/gpu.py --shape 14m --out f   anywhere, also without a GPU: the
    same code, small

Every measurement has a process of its own, so that the next one starts with an empty card. A peak
is given three ways: allocated and reserved by torch, and the most this process held according to
the driver (NVML, CUDA's context included), sampled every 20 ms. Real weights cannot be told from
random ones by their bytes; what a random model says means nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import peers
import provenance
import torch

from qlora_nb import cards
from qlora_nb.memory import budget, ledger
from qlora_nb.memory.plan import plan_of
from qlora_nb.model import device, load
from qlora_nb.settings import validate

TARGET = provenance.ROOT / "qlora_nb" / "recorded" / "gpu.json"
LOW = {"head_4bit": True, "embedding_on_cpu": True, "optim": "paged_adamw_8bit"}
PEAKS = {  # what is trained, three steps of full-length rows
    "r 64, 512 tokens, as profile full": {},
    "r 64, 512 tokens, all logits at once": {"loss_chunk": 0},
    "r 64, 512 tokens, no double quantization": {"double_quant": False},
    "r 64, 512 tokens, 8-bit states": {"optim": "paged_adamw_8bit"},
    "r 64, 512 tokens, embedding on the CPU": {"embedding_on_cpu": True},
    "r 64, 512 tokens, 4-bit head": {"head_4bit": True},
    "r 64, 1280 tokens": {"max_length": 1280},
    "r 64, 1280 tokens, every option": {"max_length": 1280, **LOW},
    "r 16, 512 tokens, every option": {"r": 16, **LOW},
}
ANSWERS = {
    "1,024 tokens": {},
    "1,024 tokens, every option": {"head_4bit": True, "embedding_on_cpu": True},
}
SPEED = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_steps": 8,
    "r": 64,
}


class _Watch:
    """The most bytes this process held on the card that torch computes on, by NVML; 0 without
    one.
    """

    def __enter__(self):
        self.peak, self.ended = 0, threading.Event()
        self.uuid = torch.cuda.get_device_properties(0).uuid if torch.cuda.is_available() else None
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.ended.set()
        self.thread.join()

    def _sample(self):
        if self.uuid is None:
            return
        before = cards.driver_memory(self.uuid)
        if before is None:
            return
        while not self.ended.wait(0.02):
            # in a container the driver does not know our process number
            used = cards.driver_memory(self.uuid).used - before.used
            self.peak = max(self.peak, used)


def measured(watch: _Watch) -> dict[str, int]:
    """Peaks in bytes; where there is no card, what torch's profiler cannot see stays 0."""
    cuda = torch.cuda.is_available()
    return {
        "allocated": torch.cuda.max_memory_allocated() if cuda else 0,
        "reserved": torch.cuda.max_memory_reserved() if cuda else 0,
        "process": watch.peak,
    }


def settings_for(folder: str, **values):
    """Profile `full` on the random model; on a CPU in float32."""
    return validate(
        {
            "profile": "full",
            "model_id": folder,
            "prequantized": True,
            "save_steps": 0,
            "warmup_steps": 0,
            **values,
        }
    )


def tokenizer_for():
    return load.load_tokenizer(validate({}))


def peak(folder: str, values: dict) -> dict:
    """Three optimizer steps on rows of full length; predicted and measured."""
    settings = settings_for(folder, **{"max_steps": 3, "gradient_accumulation_steps": 2, **values})
    ids = [3 + i % 900 for i in range(settings.max_length)]
    rows = peers.datasets.Dataset.from_list([{"input_ids": ids, "labels": ids}] * 6)
    predicted = budget.peak(plan_of(settings))
    with _Watch() as watch:
        peers.kit(settings, rows, tokenizer_for())
        found = measured(watch)
    return {
        "predicted": predicted.total_bytes,
        "predicted_lines": {line.name: line.bytes for line in predicted.lines},
        **found,
    }


def speed(folder: str, who: str) -> dict:
    """Tokens a second, padding not counted."""
    settings = settings_for(folder, **SPEED)
    rows = peers.random_rows(400, 1000, settings.max_length)
    with _Watch() as watch:
        tokens_per_s, _ = getattr(peers, who)(settings, rows, tokenizer_for())
        return {"tokens_per_s": round(tokens_per_s, 1), **measured(watch)}


def load_seconds(folder: str, keep: bool) -> dict:
    """Seconds to load, from 16-bit safetensors or from the 4-bit copy."""
    started = time.perf_counter()
    with _Watch() as watch:
        model = load.load_base(settings_for(folder, prequantized=keep))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return {
            "seconds": round(time.perf_counter() - started, 2),
            "held": ledger.measure(model).total_bytes,
            **measured(watch),
        }


def answer(folder: str, values: dict) -> dict:
    """960 tokens read, 64 written, one row: peak, time to the first token, tokens a second.

    And the share of what the card's memory bandwidth allows: each token reads the weights and, on
    average, a cache of 992 tokens.
    """
    settings = settings_for(folder, **{"max_length": 960, "max_new_tokens": 64, "r": 1, **values})
    with _Watch() as watch:
        model = load.load_base(settings)
        ids = torch.arange(3, 963, device=device.compute_device())[None] % 900 + 3
        how = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 1}
        seconds = {}
        with torch.no_grad():
            for n in (1, 64, 1, 64):  # the first two warm up
                started = time.perf_counter()
                model.generate(input_ids=ids, min_new_tokens=n, max_new_tokens=n, **how)
                seconds[n] = time.perf_counter() - started
        found = measured(watch)
    plan = plan_of(settings, train=False)
    without_adapter = dataclasses.replace(plan, r=0)
    tokens_per_s = 63 / (seconds[64] - seconds[1])
    read = ledger.read_for_a_token(model).total_bytes + 992 * ledger.kv_cache_bytes(
        model.config, model.dtype
    )
    limit = bandwidth() / read
    return {
        "predicted": budget.peak(without_adapter).total_bytes,
        "first_token_s": round(seconds[1], 4),
        "tokens_per_s": round(tokens_per_s, 2),
        "bytes_read_per_token": read,
        "limit_tokens_per_s": round(limit, 1),
        "share_of_limit": round(tokens_per_s / limit, 3),
        **found,
    }


def bandwidth(n: int = 2**28) -> float:
    """Bytes a second that this device really copies: read and write counted."""
    source = torch.empty(
        n if torch.cuda.is_available() else n // 8,
        dtype=torch.uint8,
        device=device.compute_device(),
    )
    target, seconds = torch.empty_like(source), []
    for _ in range(5):
        started = time.perf_counter()
        target.copy_(source)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * source.nbytes / min(seconds)


def apart(kind: str, *arguments) -> dict:
    """Run one measurement in a process of its own."""
    command = [sys.executable, __file__, "--one", json.dumps([kind, *arguments])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {
            "error": done.stderr.strip().splitlines()[-1][:300]
            if done.stderr
            else f"exit {done.returncode}"
        }
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="12b", help="Pythia size")
    parser.add_argument(
        "--folder", default=tempfile.gettempdir(), help="where the random model goes"
    )
    parser.add_argument("--out", default=str(TARGET))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        kind, *arguments = json.loads(given.one)
        print(
            json.dumps(
                {"peak": peak, "speed": speed, "load": load_seconds, "answer": answer}[kind](
                    *arguments
                )
            )
        )
        return
    if not torch.cuda.is_available() and given.shape == parser.get_default("shape"):
        raise SystemExit("no CUDA device here: try --shape 14m --out FILE")
    os.environ["QLORA_NB_CACHE"] = str(Path(given.folder) / "qlora-nb-cache")
    results: dict[str, object] = {
        **provenance.provenance((0,)),
        "shape": given.shape,
        "weights": "random, of the true shape",
    }
    folder = peers.random_pythia(given.shape, Path(given.folder))

    def note(part: str, name: str, found: dict) -> None:
        results.setdefault(part, {})[name] = found
        print(part, name, found, flush=True)
        provenance.write(Path(given.out), results)

    note("loading", "plain", apart("load", folder, False))
    note("loading", "first, and kept", apart("load", folder, True))
    note("loading", "from the copy", apart("load", folder, True))
    for name, values in PEAKS.items():
        note("peaks", name, apart("peak", folder, values))
    for name, values in ANSWERS.items():
        note("answers", name, apart("answer", folder, values))
    rounds = [
        {who: apart("speed", folder, who) for who in ("kit", "common", "pasted")}
        for _ in range(given.rounds)
    ]
    note("speed", "rounds", rounds)
    whole = [found for found in rounds if all("error" not in one for one in found.values())]
    for who in ("common", "pasted"):
        ratios = [found["kit"]["tokens_per_s"] / found[who]["tokens_per_s"] for found in whole]
        note(
            "speed",
            f"kit over {who}",
            {"median": round(statistics.median(ratios), 3) if ratios else None},
        )


if __name__ == "__main__":
    main()
