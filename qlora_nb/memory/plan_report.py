"""What `qlora-nb plan` says of a run: every byte of its peak, its download and time, and what would
lower the peak.
"""

import json

from qlora_nb import cards, sources
from qlora_nb.memory import budget, estimates, ledger, preflight, shares
from qlora_nb.memory.plan import Plan, plan_of
from qlora_nb.model import configs, linear_layers, probes


def show(settings, gpu_gib: float | None, processes: int, shard: str, as_json: bool) -> bool:
    """Print the plan of a run.

    Args:
        settings: the resolved parameters.
        gpu_gib: memory of each card (GiB); None is this machine.
        processes: that share each step.
        shard: none or fsdp.
        as_json: the lines of the peak alone.

    Returns:
        Whether fine-tuning fits the card; True without one.

    Raises:
        KitError: a model that is not here, or that cannot be trained or planned.
    """
    if not configs.pythia_size(settings.model_id):  # a Pythia's shape is known without the hub
        preflight.require_model(settings)
    config = configs.config_of(settings.model_id)
    on_gpu = True if gpu_gib is not None else None  # None: as on this machine
    shapes = configs.meta_model(config)
    linear_layers.require_four_bit(shapes)
    probes.require_positions(shapes, settings.max_length)
    step, training, sent = shares.planned(settings, processes, shard, config, on_gpu)
    if as_json:
        lines = {line.name: line.bytes for line in training.lines}
        found = {"processes": processes, "shard": shard, "peak": lines, "sent_in_a_step": sent}
        print(json.dumps({**found, "total_bytes": training.total_bytes}))
    elif processes > 1:
        _show_each(training, sent, gpu_gib)
    else:
        answering = budget.peak(plan_of(settings, False, config, on_gpu))
        print(f"{training}\n\n{answering}\n")
        _show_costs(settings, config, step, gpu_gib)
        print(budget.advice(settings, gpu_gib))
        for option in budget.options(settings, config, on_gpu):
            print(f"  option: {option}")
        if gpu_gib is not None:
            fit = budget.make_fit(settings, gpu_gib * cards.GIB, config)
            if fit:
                settings = fit[0]
        print(settings.papermill_line())
    return gpu_gib is None or training.total_gib <= gpu_gib


def _show_each(training: ledger.Ledger, sent: int, gpu_gib: float | None) -> None:
    """The peak of each of several processes, and what it sends in a step."""
    print(f"{training}\n\neach sends {sent / 2**30:,.2f} GiB in a step")
    if gpu_gib is None:
        return
    left_gib = gpu_gib - training.total_gib
    if left_gib >= 0:
        print(f"Fine-tuning fits: {left_gib:.2f} of {gpu_gib:g} GiB are left on each card.")
    else:
        print(f"Fine-tuning does not fit: {-left_gib:.2f} GiB are missing on each card.")


def _show_costs(settings, config, step: Plan, gpu_gib: float | None) -> None:
    """Bytes to download and to load, and hours."""
    n_bytes = sources.download_bytes(settings.model_id)
    size = f"{n_bytes / 1e9:.1f} GB" if n_bytes else "nothing, or known only to the hub"
    print(f"download and disk: {size}")
    host_gib = estimates.host_bytes(config) / 2**30
    print(f"host memory while loading onto a GPU: {host_gib:.1f} GiB (assumed)")
    if gpu_gib is None:
        seconds = estimates.step_seconds(step)
        how = "about {:.2g} h here: operations and unpacking by this device's measured rates"
    else:
        seconds = estimates.step_flops(step) / estimates.T4_OPERATIONS_PER_S
        how = "at least {:.2g} h on a T4: operations over a quarter (assumed) of its rate"
    hours = settings.max_steps * seconds / 3600
    print(f"time: {settings.max_steps} steps take {how.format(hours)}")
