"""Notebook 01, setup: what this machine can do, before anything is loaded.

- `profiles_here`: table of the four profiles, each with its predicted peak, and why one is refused;
- `downloads`: what would come from the hub;
- `what_fits`: table of cards, each with the largest Pythia that answers and that fine-tunes on it;
- `every_pythia`: figure of the peak of fine-tuning every Pythia, part by part, beside a card;
- `check_weight_gib`: the exercise, GiB of 4-bit weights.
"""

from matplotlib.figure import Figure

from qlora_nb import cards, machine, sources
from qlora_nb.errors import KitError
from qlora_nb.memory import budget, preflight
from qlora_nb.memory.plan import plan_of
from qlora_nb.model import configs
from qlora_nb.pythia import PYTHIA
from qlora_nb.settings import PROFILES, validate
from qlora_nb.ui import charts, checks


def profiles_here(here: machine.Machine) -> list[dict[str, str]]:
    """One row a profile: its model, the predicted peak of its fine-tuning (GiB), and whether it
    runs on this machine.
    """
    rows = []
    for name in PROFILES:
        settings = validate({"profile": name})
        needed = "known after its fetch"
        runs = "yes"
        try:
            plan = plan_of(settings, on_gpu=name in ("t4", "full"))
            needed = f"{budget.peak(plan).total_gib:.2f}"
            if not here.gpus:
                size = sources.download_bytes(settings.model_id)
                preflight.refuse_on_cpu(settings.model_id, size or 0, here)
            preflight.require_fit(settings, here)
        except KitError as error:
            reason = error.what.split(":")[0].split(", this machine")[0]
            runs = f"no: {reason}"
        rows.append(
            {
                "profile": name,
                "model": settings.model_id,
                "peak, fine-tuning (GiB)": needed,
                "runs here": runs,
            }
        )
    return rows


def downloads(settings) -> list[str]:
    """One sentence for model, data and pythia-12b each: how much would come from the hub (GB of
    10^9 bytes).
    """
    lines = []
    for what, name in (("model", settings.model_id), ("dataset", settings.dataset)):
        size = sources.download_bytes(name)
        if sources.is_here(name) or sources.in_hub_cache(name, what):
            said = "already here, nothing to download"
        elif size is None:
            said = "size known only to the hub to download"
        else:
            said = f"about {size / 1e9:.1f} GB to download"
        lines.append(f"{what} {name}: {said}")
    size = f"{2 * PYTHIA['12b'].n_parameters / 1e9:.1f} GB"
    unit = "GB of 10^9 bytes, as disks are sold"
    return [*lines, f"for comparison, EleutherAI/pythia-12b: {size} ({unit})"]


def what_fits(
    settings, sizes_gib: tuple[float, ...] = (8.0, 12.0, 16.0, 24.0, 48.0)
) -> list[dict[str, str]]:
    """One row a card: the largest Pythia that answers on it, that fine-tunes with these settings,
    and that fine-tunes with options that save memory, which are named.
    """
    rows = []
    for size_gib in sizes_gib:
        row = {"card": f"{size_gib:g} GiB"}
        ways = {
            "answering": (False, False),
            "fine-tuning": (True, False),
            "fine-tuning with options": (True, True),
        }
        for way, (train, with_options) in ways.items():
            fit = budget.largest_pythia(settings, size_gib * cards.GIB, train, with_options)
            row[way] = "none"
            if fit is not None:
                size, peak, options = fit
                row[way] = f"{size} ({peak.total_gib:.1f} GiB)"
        row["options"] = "none is enough"
        if fit is not None:
            taken = []
            for option in options:
                taken.append(", ".join(f"{name}={new}" for name, new in option.changes.items()))
            row["options"] = "; ".join(taken) if taken else "none needed"
        rows.append(row)
    return rows


def every_pythia(settings, gpu_gib: float) -> Figure:
    """Predicted peak of fine-tuning every Pythia with these settings on a card of `gpu_gib` GiB."""
    peaks = {}
    for size in PYTHIA:
        config = configs.pythia_config(size)
        peaks[size] = budget.peak(plan_of(settings, config=config, on_gpu=True))
    return charts.memory_bars(peaks, gpu_gib)


def check_weight_gib(stub, n_parameters: int, n_bits: int) -> bool:
    """Memory of `n_parameters` weights of `n_bits` each, in GiB."""
    bits = n_parameters * n_bits
    hint = "eight bits are a byte, 2^30 bytes a GiB"
    if isinstance(stub, (int, float)):
        if abs(stub - bits / 8 / 1e9) < 0.01:
            hint = "that is GB of 10^9 bytes; a GiB has 2^30"
        if abs(stub - bits / cards.GIB) < 0.1:
            hint = "that counts bytes where there are bits: 4 bit are half a byte"
    want = bits / 8 / cards.GIB
    return checks.verdict(stub, want, "GiB of weights", hint, tolerance=0.01)
