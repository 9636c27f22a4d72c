"""Refusals before a download: what this machine cannot run, judged by the resolved model, data and
hardware.

A notebook that runs out of memory after half an hour of downloading has wasted that time. So each
one asks first: can the hub be reached for what is missing, does the model fit a CPU, is the
predicted peak (`budget.peak`) within what the card can give. torch is loaded only where a card has
to be compared.
"""

import os
from dataclasses import replace
from importlib.util import find_spec

from qlora_nb import cards, machine, processes, sources
from qlora_nb.errors import KitError

CPU_LIMIT_PARAMETERS = 1_500_000_000
"""Above this a step on a CPU takes minutes (about 6 flop × parameters × tokens at some 100
Gflop/s).
"""

MIN_FREE_BYTES = cards.GIB // 2
"""Less free memory than this is not enough for Python, torch and the smallest model."""

MIN_ADDRESS_BYTES = 5 * cards.GIB // 4
"""So many addresses the libraries take: the pocket model answers within 1.4 GiB (`ulimit -v`)."""


def refuse_what_cannot_run(settings, together: bool = False) -> None:
    """Raise `KitError` if the resolved model or data cannot be run or reached here; says what would
    fit.

    The judgement is about the *resolved* model and hardware: profile "full" with a small local
    model is fine anywhere. `together`: this process may be one of several (`train.run`).
    """
    if not together:
        refuse_many_processes()
    resumed = sources.local_path(settings.resume)
    if settings.resume not in ("no", "latest") and not (resumed / "checkpoints").is_dir():
        raise KitError(
            "resume is no run folder with checkpoints/",
            value=str(resumed.absolute()),
            allowed="no, latest, or the folder of an unfinished run",
        )
    if settings.tensorboard and not find_spec("tensorboard"):
        raise KitError(
            "the package tensorboard is not installed",
            remedy="pip install tensorboard, or tensorboard=False",
        )
    here = machine.this_machine()
    size = sources.download_bytes(settings.model_id)
    is_slow = not here.gpus and settings.allow_slow and _is_large(size or 0)
    if not here.gpus and not is_slow:
        refuse_on_cpu(settings.model_id, size or 0, here)
    require_model_and_data(settings)
    if is_slow:
        tell_how_slow(settings, here)
    if here.gpus and size:
        require_fit(settings, here, train=False)


def require_model_and_data(settings) -> None:
    """Raise `KitError` if the resolved model or data is not to be had, or cannot be loaded."""
    require_address_space()
    require_model(settings)
    sources.require_reachable("dataset", settings.dataset, sources.DATASETS)


def require_model(settings) -> None:
    """Raise `KitError` if the model is neither here nor to be had from the hub."""
    models = "pocket, smollm2, a hub name like EleutherAI/pythia-410m, or a folder"
    sources.require_reachable("model", settings.model_id, models)


def require_address_space() -> None:
    """Raise `KitError` where the system lets a process have too few addresses (`ulimit -v`, a
    batch system's limit): libraries would fail to load, each in words of its own.
    """
    if not find_spec("resource"):  # Windows has no such limit
        return
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < MIN_ADDRESS_BYTES:
        raise KitError(
            f"a process may have {limit / cards.GIB:.1f} GiB of memory (address space) here, "
            f"torch and the smallest model take {MIN_ADDRESS_BYTES / cards.GIB:.2f} GiB",
            remedy="raise the limit (ulimit -v unlimited, or the batch system's)",
        )


SIZES = (
    "WORLD_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",
)
"""Where torchrun and accelerate, Open MPI, MPICH, MVAPICH, srun say how many processes they
started.
"""

RANKS = (
    "RANK",
    "LOCAL_RANK",
    "OMPI_COMM_WORLD_RANK",
    "PMI_RANK",
    "PMIX_RANK",
    "MV2_COMM_WORLD_RANK",
    "SLURM_PROCID",
)
"""Where they say which of them this one is, from 0."""


def refuse_many_processes() -> None:
    """Raise `KitError` if a launcher started this program several times at once: each would train a
    run of its own.

    One that was started alone loses LOCAL_RANK, by which accelerate would set up a process group
    and wait for others.

    A job of Slurm may hold many tasks (SLURM_NTASKS) and run one process in its shell or batch
    script: what counts is the step that `srun` starts.
    """
    sizes = list(SIZES)
    if "SLURM_STEP_ID" in os.environ and "SLURM_STEP_NUM_TASKS" not in os.environ:
        sizes.append("SLURM_NTASKS")
    alone = dict.fromkeys(sizes, 1)
    alone.update(dict.fromkeys(RANKS, 0))
    signs = []
    for name, value in alone.items():
        given = os.environ.get(name, "").strip()
        if given.isdecimal() and int(given) > value:
            signs.append(f"{name}={given}")
    if processes.count() > 1:
        signs.append(f"a process group of {processes.count()}")
    if signs:
        raise KitError(
            "this is one of several processes started together: each would train a run of its own",
            value=", ".join(signs),
            remedy="start it once, without torchrun, accelerate launch, mpirun or srun -n; "
            "several processes train one run with `qlora-nb train --processes N`",
        )
    os.environ.pop("LOCAL_RANK", None)


def refuse_on_cpu(model_id: str, bytes_16_bit: int, here: machine.Machine) -> None:
    """Raise `KitError` if a model is too large for a machine without a GPU (4-bit weights: a
    quarter of 16-bit ones).
    """
    need = bytes_16_bit // 4
    if _is_large(bytes_16_bit):
        gpu = "no NVIDIA GPU"
        if here.gpu_problem:
            gpu = f"no GPU that can be used ({here.gpu_problem})"
        what = (
            f"{model_id} needs a GPU: {bytes_16_bit / 2e9:.1f} billion parameters, "
            f"more than {need / cards.GIB:.1f} GiB in 4 bit for the weights alone; "
            f"this machine has {gpu}, "
            f"{here.n_cores} CPU cores and {here.ram_bytes / cards.GIB:.1f} GiB of memory"
        )
        remedy = (
            'profile="tiny" (in the kit) or profile="smollm2" runs here; every cell is the same'
        )
        if here.gpu_remedy:
            remedy = f"{here.gpu_remedy}; {remedy}"
        remedy += "; allow_slow=True continues, and says how slow it is"
        raise KitError(what, remedy=remedy)
    _require_memory(model_id, max(need, MIN_FREE_BYTES), here)


def _is_large(bytes_16_bit: int) -> bool:
    return bytes_16_bit > 2 * CPU_LIMIT_PARAMETERS


def _require_memory(model_id: str, n_bytes: int, here: machine.Machine) -> None:
    """Raise `KitError` if less memory is free than this."""
    if n_bytes > here.ram_free_bytes:
        free = f"{here.ram_free_bytes / cards.GIB:.1f} GiB are free"
        what = f"{model_id} does not fit this machine's memory: {free}"
        raise KitError(what, remedy='close other kernels, or use profile="tiny"')


def tell_how_slow(settings, here: machine.Machine) -> None:
    """Print what a large model takes without a GPU: minutes a step and hours of the run, by the
    rates of this machine right now, and memory.

    Raises:
        KitError: less memory is free than loading or training takes.
    """
    from qlora_nb.memory import budget, estimates, ledger
    from qlora_nb.memory.plan import plan_of

    plan = plan_of(settings, on_gpu=False)
    loading = ledger.predict(replace(plan, r=0)).total_bytes + estimates.host_bytes(plan.config)
    training = budget.peak(plan).total_bytes + 2 * cards.GIB  # Python and torch (assumed)
    seconds = estimates.step_seconds(plan)
    print(
        f"{settings.model_id} without a GPU, by this machine's rates now: about "
        f"{seconds / 60:.1f} minutes a step of {settings.rows_in_a_step} rows of "
        f"{settings.max_length} tokens, {seconds * settings.max_steps / 3600:.1f} hours for "
        f"{settings.max_steps} steps; memory: {loading / cards.GIB:.1f} GiB for the first load, "
        f"{training / cards.GIB:.1f} GiB for training"
    )
    _require_memory(settings.model_id, max(loading, training), here)


def require_fit(
    settings, here: machine.Machine, train: bool = True, n: int = 1, shard: str = "none"
) -> None:
    """Refuse, before anything is downloaded, what cannot fit the GPU that is used; names the
    options that make it fit. Of `n` processes that train together each has a card of its own; where
    it keeps a share (`shard`), it holds the whole base before.

    The prediction is compared with what can be had of the card: all but the driver's part and what
    other programs hold. What this process holds counts as free, so that a cell can be run again.

    Raises:
        KitError: the predicted peak of fine-tuning (`train`) or of answering is larger than that,
            or `max_length` more than the positions of a model that is to be trained.
    """
    if train:
        from qlora_nb.model import configs, probes

        shapes = configs.meta_model(configs.config_of(settings.model_id))
        probes.require_positions(shapes, settings.max_length)
    gpu = machine.card(here)
    if gpu is None:
        return
    from qlora_nb.memory.plan import plan_of  # loads torch: not before it is needed

    plan = plan_of(settings, train, on_gpu=True)
    limit = gpu.usable_bytes
    needed = _needed_by_each(settings, plan, n, shard)
    if needed <= limit:
        return
    remedy = "take more processes, fewer rows in a pass or a smaller model: qlora-nb plan"
    if n == 1:
        remedy = _what_fits(settings, plan, limit)
    kind = "fine-tuning" if train else "answering"
    what = (
        f"{settings.model_id} does not fit this GPU: {kind} is predicted to need "
        f"{needed / cards.GIB:.2f} GiB at its peak, "
        f"the {gpu.name} has {gpu.total_bytes / cards.GIB:.1f} GiB"
    )
    if limit < gpu.total_bytes:
        what += f", {limit / cards.GIB:.2f} GiB of them to be had"
    if gpu.others_bytes > 0.05 * gpu.total_bytes:
        what += f", {gpu.others_bytes / cards.GIB:.1f} GiB of them are held by other programs"
        if needed <= limit + gpu.others_bytes:
            remedy = f"close the other programs on this GPU (nvidia-smi lists them); or {remedy}"
    raise KitError(what, remedy=remedy)


def _needed_by_each(settings, plan, n: int, shard: str) -> int:
    """Bytes at the peak of each of `n` processes."""
    from qlora_nb.memory import budget, ledger, shares

    if n == 1:
        return budget.peak(plan).total_bytes
    _, peak, _ = shares.planned(settings, n, shard, plan.config, on_gpu=True)
    base = ledger.predict(replace(plan, r=0)).total_bytes
    return max(peak.total_bytes, base + cards.CONTEXT_BYTES)


def _what_fits(settings, plan, limit: int) -> str:
    """The options that make a plan fit a card of so many bytes, or a model that does."""
    from qlora_nb.memory import budget

    fit = budget.make_fit(settings, limit, plan.config) if plan.train else None
    if fit:
        return "; ".join(map(str, fit[1]))
    largest = budget.largest_pythia(settings, limit, plan.train, with_options=plan.train)
    if largest:
        return f'model_id="EleutherAI/pythia-{largest[0]}" fits'
    return 'profile="tiny" runs anywhere'
