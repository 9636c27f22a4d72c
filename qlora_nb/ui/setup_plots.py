"""Notebook 01 in words and one figure: this machine, the profiles on it, every Pythia against a card."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from qlora_nb.engine import environment, profiles, shapes
from qlora_nb.engine.environment import GIB
from qlora_nb.errors import KitError
from qlora_nb.ui.style import kit_style, look, new_figure


def describe(here: environment.Machine) -> dict[str, str]:
    """The machine as a table: what it is → how much of it."""
    cards = ", ".join(
        f"{g.name}, {g.total_bytes / GIB:.1f} GiB, {'with' if g.has_bf16 else 'without'} bfloat16" for g in here.gpus
    )
    return {
        "processor": f"{here.cpu}, {here.n_cores} cores",
        "memory": f"{here.ram_bytes / GIB:.1f} GiB, {here.ram_free_bytes / GIB:.1f} GiB free",
        "disk": f"{here.disk_free_bytes / GIB:.0f} GiB free",
        "GPU": cards or "none found: profiles tiny and smollm2 run on the CPU",
        "Python": f"{here.python} on {here.system}",
    }


def profiles_here(here: environment.Machine) -> list[dict[str, str]]:
    """One row a profile: its model and data, whether it runs on this machine, and why not."""
    rows = []
    for name, defaults in profiles.PROFILES.items():
        settings = profiles.validate({"profile": name})
        shape = shapes.shape_of(settings.model_id)
        try:
            environment.refuse_size(settings, shape, here)
            verdict = "yes"
        except KitError as error:
            verdict = f"no: {error.what.split(':')[0].split(', this machine')[0]}"
        need = "" if shape is None else f"{shape.static_bytes(settings.double_quant, settings.r) / GIB:.2f}"
        rows.append({"profile": name, "model": defaults["model_id"].value, "needs at least (GiB)": need, "runs here": verdict})
    return rows


def downloads(settings) -> list[str]:
    """One sentence for model and data each: how much would come from the hub, or that nothing would."""
    lines = []
    for what, name in (("model", settings.model_id), ("dataset", settings.dataset)):
        if name in ("pocket", "smollm2") or Path(name).expanduser().exists():
            lines.append(f"{what} {name}: already here, nothing to download")
        elif environment.in_hub_cache(name, what):
            lines.append(f"{what} {name}: in the local cache")
        else:
            shape = shapes.shape_of(name) if what == "model" else None
            size = f"about {2 * shape.n_parameters / 1e9:.1f} GB" if shape else "size known only to the hub"
            lines.append(f"{what} {name}: {size} to download")
    size = 2 * shapes.PYTHIA["12b"].n_parameters / 1e9
    return [*lines, f"for comparison, EleutherAI/pythia-12b: {size:.1f} GB (GB of 10^9 bytes, as disks are sold)"]


@kit_style()
def what_fits(gpu_gib: float, r: int) -> Figure:
    """Static bytes of fine-tuning every Pythia, 4-bit with double quantization, against a card."""
    names = list(shapes.PYTHIA)
    weights = [shapes.PYTHIA[n].weight_bytes(True) / GIB for n in names]
    trained = [shapes.PYTHIA[n].static_bytes(True, r) / GIB - w for n, w in zip(names, weights, strict=True)]
    fig, ax = new_figure(figsize=(8, 4.0))
    ax.barh(names, weights, **look("NF4+DQ"), label="weights, 4 bit and 16-bit rest")
    ax.barh(names, trained, left=weights, **look("LoRA"), label=f"adapter r = {r}, gradients, 8-bit Adam")
    for i, (w, t) in enumerate(zip(weights, trained, strict=True)):
        ax.text(w + t, i, f" {w + t:.2f}", va="center", fontsize=9)
    ax.axvline(gpu_gib, color="black", linestyle="--", label=f"card of {gpu_gib:g} GiB")
    ax.axvspan(0.75 * gpu_gib, gpu_gib, color="black", alpha=0.08, label="the quarter to leave for activations")
    ax.set(xlabel="memory held all through (GiB)", ylabel="Pythia", xlim=(0, max(gpu_gib, weights[-1] + trained[-1]) * 1.12))
    fitting = [n for n, w, t in zip(names, weights, trained, strict=True) if w + t <= 0.75 * gpu_gib]
    ax.set_title(f"Largest Pythia that leaves a quarter of {gpu_gib:g} GiB free: {fitting[-1] if fitting else 'none'}")
    fig.legend(loc="outside lower center", ncols=2, fontsize=9)
    return fig
