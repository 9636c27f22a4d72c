"""Will it fit? The ledger of the worst moment of a run, the levers that lower it, and what each
card can hold.

`peak` adds to the static ledger what a step holds at its fullest (counted by `activations` on a dry
run, arranged in time by `theory.paging`), the key-value cache of a generation, and what CUDA itself
takes. The same constants serve every model and setting; none is fitted to a published figure.

`SLACK` is the part of moving memory that the allocator's whole blocks waste. Like `CONTEXT_BYTES`
it is an assumption until it is measured on a GPU.
"""

from dataclasses import dataclass, replace

from qlora_nb import cards, machine
from qlora_nb.memory import dry_run, ledger, profiler
from qlora_nb.model import configs, device
from qlora_nb.pythia import PYTHIA
from qlora_nb.theory import paging

SLACK = 0.05

CACHE, KEPT, WORK, CUDA = (
    "key-value cache",
    "kept for the backward pass",
    "working memory",
    "CUDA context, slack (assumed)",
)


@dataclass(frozen=True)
class Plan:
    """Everything that decides how much memory a run takes.

    `config` is transformers' configuration, `step` one forward pass (rows, tokens, rank, dtypes,
    levers). A generation (`step.train` False) adds `new_tokens` to each row. `accumulation` > 1
    keeps gradients over several passes.
    """

    config: object
    step: dry_run.Step
    double_quant: bool = True
    optim: str = "paged_adamw_32bit"
    accumulation: int = 1
    new_tokens: int = 0
    on_gpu: bool = True
    embedding_on_cpu: bool = False


def plan_of(settings, train: bool = True, config=None, on_gpu: bool | None = None) -> Plan:
    """The plan of a run of notebook 06 (`train`) or of answering the prompts of notebook 07.

    Args:
        settings: the resolved parameters.
        config: the model's configuration; default: looked up for `settings.model_id`.
        on_gpu: count what CUDA takes; default: whether this machine has a GPU.
    """
    on_gpu = bool(machine.this_machine().gpus) if on_gpu is None else on_gpu
    elsewhere = on_gpu and not device.on_gpu()  # planned for a card that is not here
    dtype = device.compute_dtype(
        "bfloat16" if elsewhere and settings.compute_dtype == "auto" else settings.compute_dtype
    )
    step = settings.model_dump(include={"r", "lora_dropout", "loss_chunk", "head_4bit"})
    step |= {
        "target_modules": tuple(settings.target_modules),
        "checkpointing": settings.gradient_checkpointing,
        "dtype": dtype,
    }
    plan = settings.model_dump(include={"double_quant", "optim", "embedding_on_cpu"})
    plan |= {
        "accumulation": settings.gradient_accumulation_steps,
        "new_tokens": settings.max_new_tokens,
        "on_gpu": on_gpu,
    }
    step = dry_run.Step(
        settings.per_device_train_batch_size if train else 1,
        settings.max_length,
        train=train,
        **step,
    )
    return Plan(config or configs.config_of(settings.model_id), step, **plan)


def peak(plan: Plan) -> ledger.Ledger:
    """Every byte at the fullest moment, line by line, before anything is loaded.

    Attention is counted as fused (query, key, value and output are kept, scores are not).
    """
    step, layers = plan.step, plan.config.num_hidden_layers
    parts = {"r": step.r, "target_modules": step.target_modules, "head_4bit": step.head_4bit}
    parts |= {
        "double_quant": plan.double_quant,
        "optim": plan.optim,
        "embedding_on_cpu": plan.embedding_on_cpu and plan.on_gpu,
    }
    static = ledger.predict(config=plan.config, rest_dtype=step.rest_dtype or step.dtype, **parts)
    now = dry_run.dry_run(plan.config, step)
    if step.train and step.r:
        gradients = static[ledger.GRADIENTS]
        always = gradients if plan.accumulation > 1 else 0
        sizes = paging.StepSizes(
            layers,
            0,
            always,
            gradients - always,
            0,
            0,
            now.kept,
            now.forward,
            now.backward,
            now.loss,
        )
        fullest = max(paging.step_timeline(sizes), key=lambda m: m.total)
        held, kept, work = (
            always + fullest.parts["gradients"],
            fullest.parts[KEPT],
            fullest.parts[WORK],
        )
        lines = [
            replace(line, bytes=held) if line.name == ledger.GRADIENTS else line
            for line in static.lines
        ]
        source = f"{-(-kept // max(now.kept, 1))} layers × {now.kept:,} bytes, {step.batch} × {step.length} tokens"
        lines.append(ledger.Line(KEPT, kept, source))
        when = f"fullest in the phase {fullest.phase}"
    else:
        lines = [
            line for line in static.lines if line.name not in (ledger.GRADIENTS, ledger.STATES)
        ]
        per_token, one = (
            ledger.kv_cache_bytes(plan.config, step.dtype),
            dry_run.dry_run(plan.config, replace(step, length=1)),
        )
        reading = (
            max(now.forward, now.loss),
            step.batch * step.length,
            f"while {step.batch} × {step.length} tokens are read",
        )
        writing = (
            max(one.forward, one.loss),
            step.batch * (step.length + plan.new_tokens),
            "while the last token is written",
        )
        work, n_tokens, when = max(
            reading, writing, key=lambda phase: phase[0] + phase[1] * per_token
        )
        lines.append(
            ledger.Line(CACHE, n_tokens * per_token, f"{n_tokens:,} tokens × {per_token:,} bytes")
        )
    lines.append(ledger.Line(WORK, work, f"{when}; dry run of one layer and the head"))
    if plan.on_gpu:
        moving = sum(
            line.bytes for line in lines if line.name in (ledger.GRADIENTS, KEPT, WORK, CACHE)
        )
        lines.append(
            ledger.Line(
                CUDA,
                cards.CONTEXT_BYTES + int(SLACK * moving),
                f"0.45 GiB + {SLACK:.0%} of what moves",
            )
        )
    return ledger.Ledger(
        f"predicted peak, {'fine-tuning' if step.train else 'answering'}",
        tuple(line for line in lines if line.bytes),
    )


def reconcile(
    predicted: ledger.Ledger, held: ledger.Ledger | None, moved: profiler.PeakMemory
) -> list[tuple[str, int, int]]:
    """(name, predicted, measured) bytes: what stays, line by line, then what moves, then the peak.

    Args:
        predicted: `peak` for the rows and tokens that were weighed.
        held: the ledger measured then; gradients count among what moves. None (nothing was weighed)
            gives no rows.
        moved: what `activations.weigh` found.
    """
    if held is None:
        return []
    still = [
        name
        for name in ledger.ORDER
        if name != ledger.GRADIENTS and (predicted[name] or held[name])
    ]
    rows = [(name, predicted[name], held[name]) for name in still]
    rows.append(
        (
            "what moves, at its fullest",
            predicted.sum((ledger.GRADIENTS, KEPT, WORK, CACHE)),
            moved.peak_bytes,
        )
    )
    return [*rows, ("peak", sum(p for _, p, _ in rows), sum(m for *_, m in rows))]


@dataclass(frozen=True)
class Option:
    """Parameters to change, and the bytes that the change takes off the peak."""

    changes: dict[str, object]
    saves: int
    costs: str

    def __repr__(self) -> str:
        what = ", ".join(f"{k}={v!r}" for k, v in self.changes.items())
        return f"{what} saves {self.saves / cards.GIB:.2f} GiB ({self.costs})"


def options(settings, config=None, on_gpu: bool | None = None) -> list[Option]:
    """What would lower the training peak, each lever alone: first those that leave the result as it
    is, largest first.
    """
    config = config or configs.config_of(settings.model_id)
    now = peak(plan_of(settings, True, config, on_gpu)).total_bytes
    rows = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    candidates = [
        ({"gradient_checkpointing": True}, "up to half as many operations again", False),
        ({"loss_chunk": 128}, "same loss, same gradient", False),
        (
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": rows},
            "same rows in a step, shorter products",
            False,
        ),
        ({"double_quant": True}, "RMSE grows by less than 0.001", False),
        ({"optim": "paged_adamw_8bit"}, "8-bit states", False),
        ({"embedding_on_cpu": True}, "one vector a token crosses the bus", False),
        ({"head_4bit": True}, "the head is rounded to NF4", True),
        ({"max_length": min(512, settings.max_length)}, "longer answers are cut", True),
        ({"r": min(16, settings.r)}, "a smaller adapter", True),
        ({"max_length": min(256, settings.max_length)}, "longer answers are cut", True),
    ]
    after = lambda changes: (
        peak(plan_of(settings.replace(**changes), True, config, on_gpu)).total_bytes
    )
    found = [
        (changes_result, Option(changes, now - after(changes), costs))
        for changes, costs, changes_result in candidates
    ]
    found.sort(key=lambda item: (item[0], -item[1].saves))
    return [lever for _, lever in found if lever.saves > 0.002 * now]


def make_fit(settings, card_bytes: float, config=None) -> tuple[object, list[Option]] | None:
    """Pull one lever after another until fine-tuning fits a card; None if it never does.

    Returns:
        (the settings that fit, the levers pulled).
    """
    config, pulled = config or configs.config_of(settings.model_id), []
    while peak(plan_of(settings, True, config, on_gpu=True)).total_bytes > card_bytes:
        if not (more := options(settings, config, on_gpu=True)):
            return None
        pulled.append(more[0])
        settings = settings.replace(**more[0].changes)
    return settings, pulled


def advice(settings, gpu_gib: float | None) -> str:
    """One sentence on fine-tuning: what is left of a card, or the lever to pull first and all that
    make it fit.
    """
    needed = peak(plan_of(settings, on_gpu=gpu_gib is not None)).total_bytes
    if gpu_gib is None:
        return f"Fine-tuning needs {needed / 2**20:,.0f} MiB of memory at its fullest, besides Python and torch themselves."
    left = gpu_gib * cards.GIB - needed
    if left >= 0:
        return f"Fine-tuning fits: {needed / cards.GIB:.2f} of {gpu_gib:g} GiB, {left / cards.GIB:.2f} are left."
    missing, fit = (
        f"Fine-tuning does not fit: {-left / cards.GIB:.2f} GiB are missing",
        make_fit(settings, gpu_gib * cards.GIB),
    )
    if fit is None:
        return f"{missing}, more than all levers save. Take a smaller model."
    return f"{missing}. Pull first: {'; then '.join(map(str, fit[1]))}."


def largest_pythia(
    settings, card_bytes: float, train: bool, pull: bool = False
) -> tuple[str, ledger.Ledger, list[Option]] | None:
    """The largest Pythia for a card: its size, its peak, and the levers pulled (none without
    `pull`); None if none fits.
    """
    for size in reversed(PYTHIA):
        config = configs.pythia_config(size)
        own, pulled = (make_fit(settings, card_bytes, config) if pull else None) or (settings, [])
        found = peak(plan_of(own, train, config, on_gpu=True))
        if found.total_bytes <= card_bytes:
            return size, found, pulled
    return None
