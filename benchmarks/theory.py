"""Speed of what is taught: the quantizer beside bitsandbytes' CPU one, and every widget of
notebooks 02 to 05.

    python benchmarks/theory.py             into benchmarks/results/theory.json

Both quantizers get the same 4,194,304 weights, in turn, in one process; medians and their ratio are
kept (above 1: ours is faster), and that the bytes are equal. bitsandbytes' dequantizer is compiled
C++ with vector instructions; ours is not meant to beat it. A redraw is what happens between a
control's move and the finished PNG. Two threads.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import nbformat
import provenance
import torch
from bitsandbytes import functional as bnb

from qlora_nb import cards
from qlora_nb.lessons import n02, n03, n05
from qlora_nb.memory import step_sizes
from qlora_nb.model import load
from qlora_nb.model.linear_layers import dense_weight, linear_layers
from qlora_nb.pythia import PYTHIA
from qlora_nb.settings import resolve
from qlora_nb.theory import blockwise, codebooks, lora
from qlora_nb.ui import widgets

TARGET = provenance.ROOT / "benchmarks" / "results" / "theory.json"
N_WEIGHTS, ROUNDS, REDRAWS, SEED = 2**22, 15, 24, 0
LIMIT_MS = 150
SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]


def milliseconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def alternating(pairs: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median time of each function; they take turns, so that a busy moment hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in pairs}
    for run in pairs.values():
        run()  # the first call builds tables
    for _ in range(rounds):
        for name, run in pairs.items():
            times[name].append(milliseconds(run))
    return {name: round(statistics.median(found), 2) for name, found in times.items()}


def restored_from(packed: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """The numbers in these bytes, in blocks of 64."""
    index = blockwise.unpack(packed, N_WEIGHTS)
    return blockwise.dequantize(index, absmax, code, 64)


def quantizers() -> dict:
    """NF4 and FP4 in blocks of 64, there and back."""
    x, found = torch.randn(N_WEIGHTS, generator=torch.Generator().manual_seed(SEED)), {}
    for quant_type in ("nf4", "fp4"):
        code = codebooks.code_by_name(quant_type)
        packed, absmax = blockwise.quantize_4bit(x, code, 64)
        theirs, state = bnb.quantize_4bit(x, blocksize=64, quant_type=quant_type)
        there = alternating(
            {
                "ours_ms": partial(blockwise.quantize_4bit, x, code, 64),
                "bitsandbytes_ms": partial(
                    bnb.quantize_4bit, x, blocksize=64, quant_type=quant_type
                ),
            }
        )
        back = alternating(
            {
                "ours_ms": partial(restored_from, packed, absmax, code),
                "bitsandbytes_ms": partial(bnb.dequantize_4bit, theirs, state),
            }
        )
        restored = restored_from(packed, absmax, code)
        equal = torch.equal(packed, theirs) and torch.equal(
            restored, bnb.dequantize_4bit(theirs, state).reshape(-1)
        )
        for times in (there, back):
            times["times_as_fast"] = round(times["bitsandbytes_ms"] / times["ours_ms"], 3)
        found[quant_type] = {"quantize": there, "dequantize": back, "equal_in_every_bit": equal}
    return {"n_weights": N_WEIGHTS, "blocksize": 64, "rounds": ROUNDS, **found}


def widgets_of(notebook: str, names: dict[str, object]) -> list:
    """The widgets of a notebook, made by its own cells from these names."""
    (path,) = (provenance.ROOT / "notebooks").glob(f"{notebook}_*.ipynb")
    made, names = [], names | {"widgets": widgets, "partial": partial}
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code" and "widgets.explore(" in cell.source:
            *before, last = ast.parse(cell.source).body
            exec(compile(ast.Module(before, []), notebook, "exec"), names)
            made.append(eval(compile(ast.Expression(last.value), notebook, "eval"), names))
    return made


def panels() -> dict[str, object]:
    """Every widget of notebooks 02 to 05 with the arguments it has there in profile tiny."""
    settings = resolve({})
    layers = linear_layers(load.load_base(settings, four_bit=False))
    weight = dense_weight(next(iter(layers.values())))
    update = torch.randn(weight.shape, generator=torch.Generator().manual_seed(SEED))
    a_best, b_best = lora.best_rank(update, min(update.shape))
    budget = int(settings.gpu_gib * cards.GIB)
    plain, paged = (
        step_sizes.longest_pass(settings.pythia, settings.r, budget, paged=p) for p in (False, True)
    )
    n05.paged_shares(
        (settings.r,)
    )  # notebook 05 counts every Pythia in a figure, before a reader moves anything
    names = {
        "settings": settings,
        "shown": update,
        "A_best": a_best,
        "B_best": b_best,
        "SIZES": SIZES,
    }
    names |= {
        "corner": weight[:256] / weight.std(),
        "NAMES": ["NF4", "FP4", "INT4"],
        "tokens": 2048,
    }
    usual, spike = int(0.95 * plain), plain + max(1, (paged - plain) // 2)
    steps = [
        step_sizes.step_sizes(settings.pythia, settings.r, n)
        for n in (usual, usual, usual, spike, usual, usual)
    ]
    names |= {"own": step_sizes.step_sizes(settings.pythia, settings.r, 2048), "steps": steps}
    names |= {"n02": n02, "n03": n03, "n05": n05, "cards": cards, "PYTHIA": PYTHIA}
    titles = {
        "02": ("what is left of an update", "trained numbers"),
        "03": ("number line", "error map"),
        "04": ("bits a weight",),
        "05": ("a step's memory", "a run with a spike"),
    }
    made = {n: widgets_of(n, names) for n in titles}
    return {
        f"{n} {title}": panel
        for n in titles
        for title, panel in zip(titles[n], made[n], strict=True)
    }


def moves(control, n: int) -> list:
    """`n` values of a control, each different from the one before."""
    if hasattr(control, "options"):
        values = [o[1] if isinstance(o, tuple) else o for o in control.options]
    else:
        values = [control.min + k * (control.max - control.min) / 9 for k in range(10)]
    return [
        values[i % len(values)]
        for i in range(values.index(control.value) + 1 if control.value in values else 0, n + 20)
    ]


def redraws(panel, n: int = REDRAWS) -> dict:
    """Median and slowest wall time of `n` redraws, the controls moved in turn; and the processor
    time, which a busy machine stretches less."""
    controls, times, work = panel.children[:-1], [], []
    ahead = [iter(moves(control, n)) for control in controls]
    for k in range(n + len(controls)):
        control = controls[k % len(controls)]
        value = next(v for v in ahead[k % len(controls)] if v != control.value)
        with contextlib.redirect_stdout(io.StringIO()):
            before = time.process_time()
            times.append(milliseconds(lambda: setattr(control, "value", value)))  # noqa: B023
            work.append(1e3 * (time.process_time() - before))
    times, work = (
        times[len(controls) :],
        work[len(controls) :],
    )  # the first move of each control fills caches
    return {
        "median_ms": round(statistics.median(times), 1),
        "median_cpu_ms": round(statistics.median(work), 1),
        "slowest_ms": round(max(times), 1),
        "redraws": len(times),
    }


def main() -> int:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    record = provenance.provenance((SEED,)) | {"load_before": os.getloadavg()}
    record["quantizer"] = quantizers()
    with contextlib.redirect_stdout(io.StringIO()):
        shown = panels()
    record["redraws"] = {name: redraws(panel) for name, panel in shown.items()}
    for quant_type in ("nf4", "fp4"):
        print(quant_type, record["quantizer"][quant_type])
    for name, times in record["redraws"].items():
        verdict = "" if times["median_ms"] <= LIMIT_MS else "  OVER THE LIMIT"
        print(f"{name:30} {times['median_ms']:6.1f} ms{verdict}")
    provenance.write(TARGET, record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
