"""Notebook 01: this machine, the profiles on it, every Pythia against a card; its checker."""

from matplotlib.figure import Figure

from qlora_nb import cards, machine, sources
from qlora_nb.errors import KitError
from qlora_nb.memory import budget, preflight
from qlora_nb.memory.plan import plan_of
from qlora_nb.model import configs
from qlora_nb.pythia import PYTHIA
from qlora_nb.settings import PROFILES, validate
from qlora_nb.ui import charts
from qlora_nb.ui.checks import verdict


def check_weight_gib(stub, n_parameters: int, n_bits: int) -> bool:
    """Memory of `n_parameters` weights of `n_bits` each, in GiB."""
    hint = "eight bits are a byte, 2^30 bytes a GiB"
    if isinstance(stub, (int, float)) and abs(stub - n_parameters * n_bits / 1e9 / 8) < 0.01:
        hint = "that is GB of 10^9 bytes; a GiB has 2^30"
    if isinstance(stub, (int, float)) and abs(stub - n_parameters * n_bits / 2**30) < 0.1:
        hint = "that counts bytes where there are bits: 4 bit are half a byte"
    return verdict(stub, n_parameters * n_bits / 8 / 2**30, "GiB of weights", hint, tolerance=0.01)


def profiles_here(here: machine.Machine) -> list[dict[str, str]]:
    """One row a profile: its model, the predicted peak of its fine-tuning, whether it runs on this
    machine, and why not.
    """
    rows = []
    for name, defaults in PROFILES.items():
        settings, need, verdict = validate({"profile": name}), "known after its fetch", "yes"
        try:
            need = f"{budget.peak(plan_of(settings, on_gpu=name in ('t4', 'full'))).total_gib:.2f}"
            if not here.gpus:
                preflight.refuse_on_cpu(
                    settings.model_id, sources.download_bytes(settings.model_id) or 0, here
                )
            preflight.require_fit(settings, here)
        except KitError as error:
            verdict = f"no: {error.what.split(':')[0].split(', this machine')[0]}"
        rows.append(
            {
                "profile": name,
                "model": defaults["model_id"].value,
                "peak, fine-tuning (GiB)": need,
                "runs here": verdict,
            }
        )
    return rows


def downloads(settings) -> list[str]:
    """One sentence for model and data each: how much would come from the hub, or that nothing
    would.
    """
    lines = []
    for what, name in (("model", settings.model_id), ("dataset", settings.dataset)):
        if name in ("pocket", "smollm2") or sources.local_path(name).exists():
            lines.append(f"{what} {name}: already here, nothing to download")
        elif sources.in_hub_cache(name, what):
            lines.append(f"{what} {name}: in the local cache")
        else:
            size = sources.download_bytes(name)
            lines.append(
                f"{what} {name}: {f'about {size / 1e9:.1f} GB' if size else 'size known only to the hub'} to download"
            )
    size = 2 * PYTHIA["12b"].n_parameters / 1e9
    return [
        *lines,
        f"for comparison, EleutherAI/pythia-12b: {size:.1f} GB (GB of 10^9 bytes, as disks are sold)",
    ]


def what_fits(
    settings, sizes_gib: tuple[float, ...] = (8.0, 12.0, 16.0, 24.0, 48.0)
) -> list[dict[str, str]]:
    """One row a card: the largest Pythia that answers on it, fine-tunes with these settings, and
    with levers pulled.
    """
    rows = []
    for card in sizes_gib:
        kinds = {
            "answering": (False, False),
            "fine-tuning": (True, False),
            "fine-tuning with levers": (True, True),
        }
        found = {
            kind: budget.largest_pythia(settings, card * cards.GIB, *how)
            for kind, how in kinds.items()
        }
        row = {
            kind: f"{fit[0]} ({fit[1].total_gib:.1f} GiB)" if fit else "none"
            for kind, fit in found.items()
        }
        options = "none is enough"
        if found["fine-tuning with levers"]:
            pulled = found["fine-tuning with levers"][2]
            changes = [", ".join(f"{k}={v}" for k, v in lever.changes.items()) for lever in pulled]
            options = "; ".join(changes) or "none needed"
        rows.append({"card": f"{card:g} GiB", **row, "levers": options})
    return rows


def every_pythia(settings, gpu_gib: float) -> Figure:
    """Predicted peak of fine-tuning every Pythia with these settings, stacked by part, against a
    card.
    """
    plans = {n: plan_of(settings, True, configs.pythia_config(n), on_gpu=True) for n in PYTHIA}
    return charts.memory_bars({name: budget.peak(plan) for name, plan in plans.items()}, gpu_gib)
