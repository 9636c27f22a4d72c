"""Loading a model onto a card and answering with it: entries of gpu.py's table, each called with
this process's `gpu_card.Watch`.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path

import torch
from gpu_card import Watch, synchronize
from gpu_training import settings_for

from qlora_nb import sources
from qlora_nb.memory import budget, ledger
from qlora_nb.memory.plan import plan_of
from qlora_nb.model import device, load


def load_seconds(watch: Watch, folder: str, way: str) -> dict:
    """Seconds to load: `plain` from 16-bit safetensors, `keep` from those with the 4-bit copy kept
    for the next time, `copy` from that one.
    """
    copies = list((sources.CACHE / "quantized").glob(f"{Path(folder).name}-*"))
    if way == "keep":
        for copy in copies:
            shutil.rmtree(copy)
    if way == "copy" and not copies:
        raise FileNotFoundError("no copy is kept: loading/first, and kept makes it")
    watch.start()
    started = time.perf_counter()
    model = load.load_base(settings_for(folder, prequantized=way != "plain"))
    synchronize()
    seconds = time.perf_counter() - started
    watch.stop()
    held = ledger.measure(model).total_bytes
    return {"seconds": round(seconds, 2), "held": held, **watch.peaks}


def answer(watch: Watch, folder: str, values: dict) -> dict:
    """960 tokens read, 64 written, one row: peak, time to the first token, tokens a second.

    And the share of what the card's memory bandwidth allows: each token reads the weights and, on
    average, a cache of 992 tokens.
    """
    settings = settings_for(folder, max_new_tokens=64, r=1, **values).replace(max_length=960)
    model = load.load_base(settings)
    ids = torch.arange(3, 963, device=device.compute_device())[None] % 900 + 3
    how = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 1}
    seconds = {}
    watch.start()
    with torch.no_grad():
        for n in (1, 64, 1, 64):  # the first two warm up
            started = time.perf_counter()
            model.generate(input_ids=ids, min_new_tokens=n, max_new_tokens=n, **how)
            synchronize()
            seconds[n] = time.perf_counter() - started
    watch.stop()
    without_adapter = dataclasses.replace(plan_of(settings, train=False), r=0)
    tokens_per_s = 63 / (seconds[64] - seconds[1])
    cache = 992 * ledger.kv_cache_bytes(model.config, model.dtype)
    read = ledger.read_for_a_token(model).total_bytes + cache
    limit = bandwidth() / read
    return {
        "predicted": budget.peak(without_adapter).total_bytes,
        "first_token_s": round(seconds[1], 4),
        "tokens_per_s": round(tokens_per_s, 2),
        "bytes_read_per_token": read,
        "limit_tokens_per_s": round(limit, 1),
        "share_of_limit": round(tokens_per_s / limit, 3),
        **watch.peaks,
    }


def bandwidth() -> float:
    """Bytes a second that this device really copies: read and write counted."""
    n = 2**30 if device.on_gpu() else 2**25
    source = torch.empty(n, dtype=torch.uint8, device=device.compute_device())
    target = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        synchronize()
        started = time.perf_counter()
        target.copy_(source)
        synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * source.nbytes / min(seconds)
