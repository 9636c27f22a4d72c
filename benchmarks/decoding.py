"""Fast decoding against plain `generate`: tokens a second, bytes, and where the time of one token goes.

    python benchmarks/decoding.py                       into notebooks/recorded/decoding.json, which notebook 07 shows
    python benchmarks/decoding.py --only pocket --rounds 2 --out f

Both ways are timed one after the other in every round, in one process, greedy, with the same prompt and as many tokens;
medians over the rounds are reported. Set OMP_NUM_THREADS to choose the threads of the plain way.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import provenance
import torch
from torch.profiler import ProfilerActivity, profile

from qlora_nb.engine import decoding, generation, ledger, models, training
from qlora_nb.engine.profiles import validate

TARGET = provenance.ROOT / "notebooks" / "recorded" / "decoding.json"
PARTS = {"unpacking codes": "bitsandbytes::dequantize_4bit", "unpacking scales": "bitsandbytes::dequantize_blockwise"}


def loaded(name: str):
    """Settings, tokenizer and the model in NF4 + double quantization with its adapter (SmolLM2: one that was not trained)."""
    settings = validate({"profile": "tiny" if name == "pocket" else name, "adapter": "pocket"})
    base = models.load_base(settings)
    if name == "pocket":
        return settings, models.load_tokenizer(settings), generation.load_adapter(base, generation.ADAPTER_DIR)
    return settings, models.load_tokenizer(settings), training.attach_adapter(base, settings).eval()


def decode(world, tuned: bool, fast: bool, n: int) -> tuple[torch.Tensor, float]:
    """The tokens written after the first prompt, exactly `n`, and the seconds that took."""
    settings, tokenizer, model = world
    encoded = generation.encode([generation.row_of(settings.prompts[0])], tokenizer, model, settings)
    started = time.perf_counter()
    config = generation._config(tokenizer, n, min_new_tokens=n)
    with generation.base_or_tuned(model, tuned), torch.no_grad(), decoding.fast(model) if fast else nullcontext():
        out = model.generate(**encoded, generation_config=config)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return out, time.perf_counter() - started


def compare(world, tuned: bool, n: int, rounds: int) -> dict:
    """Medians of both ways and of their ratio in each round."""
    tokens, seconds = {}, {"plain": [], "fast": []}
    for done in range(rounds + 1):
        for way, found in seconds.items():
            tokens[way], took = decode(world, tuned, way == "fast", n)
            if done:  # the first round warms up
                found.append(took)
    ratios = [plain / fast for plain, fast in zip(seconds["plain"], seconds["fast"], strict=True)]
    speeds = {f"{way}_tokens_per_s": round(n / statistics.median(found), 2) for way, found in seconds.items()}
    ratio = {"times_as_fast": round(statistics.median(ratios), 3), "all_ratios": [round(r, 3) for r in ratios]}
    return speeds | ratio | {"same_tokens": torch.equal(tokens["plain"], tokens["fast"])}


def shares(world, tuned: bool, n: int) -> dict[str, float]:
    """Share of the time of plain `generate` by part, from torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        decode(world, tuned, False, n)
    events = {event.key: event for event in profiler.key_averages()}
    total = sum(event.self_cpu_time_total for event in events.values())
    found = {part: events[key].cpu_time_total / total for part, key in PARTS.items() if key in events}
    products = [events[key].self_cpu_time_total for key in ("aten::mm", "aten::addmm") if key in events]
    found["products"] = sum(products) / total
    return {part: round(share, 3) for part, share in (found | {"all else": 1 - sum(found.values())}).items()}


def added_bytes(model) -> int:
    """What fast decoding holds besides the model: unpacked scales and the buffer."""
    states = [module.weight.quant_state for module in models.linear_layers(model).values()]
    buffer = int(min(decoding.SLICE_BYTES, decoding.SLICE_SHARE * model.get_memory_footprint()))
    return sum(4 * state.absmax.numel() for state in states if state.nested) + buffer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=["pocket", "smollm2"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--out", type=Path, default=TARGET)
    given = parser.parse_args()
    record = provenance.provenance((0,)) | {"tokens": given.tokens, "models": {}}
    for name in given.only:
        world = loaded(name)
        held = ledger.measure(world[2]).total_bytes
        found = {who: compare(world, who == "tuned", given.tokens, given.rounds) for who in ("base", "tuned")}
        found |= {"shares_of_plain": shares(world, False, given.tokens), "bytes": held, "added_bytes": added_bytes(world[2])}
        predicted = ledger.predict(world[0], r=world[2].peft_config["default"].r)
        still = predicted.total_bytes - predicted.sum((ledger.GRADIENTS, ledger.STATES))
        record["models"][name] = found | {"held_over_predicted": round((held + found["added_bytes"]) / still, 3)}
        print(name, record["models"][name], flush=True)
    provenance.write(given.out, record)


if __name__ == "__main__":
    main()
