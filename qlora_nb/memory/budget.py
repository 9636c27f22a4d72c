"""Will it fit? Every byte at the peak of a run, the options that lower it, what a card can hold.

`peak` adds to the static ledger what a step holds besides: activations (counted in `dry_run`,
arranged in time by `theory.paging`), the key-value cache of a generation, and what CUDA itself
takes. The same constants serve every model and setting; none is fitted to a published figure
(`tools/published_table.py` compares).

What CUDA takes besides tensors was measured on one card, an H100 (`recorded/gpu.json`,
docs/gpu.md); another has another context, and torch gives back what it holds in reserve before it
runs out of memory.
"""

from dataclasses import asdict, dataclass, replace

from qlora_nb import cards
from qlora_nb.errors import refusing
from qlora_nb.memory import dry_run, ledger, profiler
from qlora_nb.memory.plan import Plan, plan_of
from qlora_nb.model import configs
from qlora_nb.pythia import PYTHIA
from qlora_nb.theory import paging

SLACK = 0.1
"""What torch's allocator holds in reserve, as a part of the memory that comes and goes: 8 % to 10 %
with rows of 512 tokens.
"""

WORKSPACES = 2 * 32 * 2**20
"""Bytes of cuBLAS' and cuBLASLt's workspaces on Hopper; 8 MiB each on cards before it."""

CACHE = "key-value cache"
KEPT = "kept for the backward pass"
WORK = "working memory"
CUDA = "CUDA context, kernels, reserve"

CHANGING = (ledger.GRADIENTS, KEPT, WORK, CACHE)
"""The lines that come and go during a step or a generation; all others stay as they are."""


def peak(plan: Plan) -> ledger.Ledger:
    """Predicted memory at the peak of a training step, or of a generation, a line for each part.

    What is stored comes from `ledger.predict`, the activations from a dry run, CUDA's own share
    from measurements on one card. Nothing is loaded.

    Attention is counted as fused (query, key, value and output are kept, scores are not).

    Raises:
        KitError: a family of models that cannot be built or tried without memory.
    """
    what = "the memory of this model cannot be predicted"
    with refusing(what, plan.config.model_type, "choose a family in docs/models.md"):
        static = ledger.predict(plan)
        if plan.train and plan.r:
            changing = _at_the_peak_of_a_step(plan, static[ledger.GRADIENTS])
        else:
            changing = _at_the_peak_of_a_generation(plan)
    lines = {line.name: line for line in (*static.lines, *changing.lines)}
    if plan.on_gpu:
        lines[CUDA] = _taken_by_cuda(plan, changing.total_bytes)
    kind = "fine-tuning" if plan.train else "answering"
    found = tuple(line for line in lines.values() if line.bytes)
    return ledger.Ledger(f"predicted peak, {kind}", found)


def _taken_by_cuda(plan: Plan, changing_bytes: int) -> ledger.Line:
    own = cards.CONTEXT_BYTES + WORKSPACES
    source = f"{own / cards.GIB:.2f} GiB as on an H100, {SLACK:.0%} of what comes and goes"
    taken = own + int(SLACK * changing_bytes)
    if plan.train and plan.r and "paged" in plan.optim:
        bits = ledger.state_bits(plan.optim)
        taken += paging.page_waste(ledger.trained_numels(plan), bits)
        source += ", whole pages of states"
    return ledger.Line(CUDA, taken, source)


def _at_the_peak_of_a_step(plan: Plan, gradients: int) -> ledger.Ledger:
    now = dry_run.dry_run(plan)
    always = gradients if plan.accumulation > 1 else 0
    n_layers = plan.config.num_hidden_layers
    sizes = paging.StepSizes(n_layers, gradients=gradients - always, **asdict(now))
    moment = max(paging.step_timeline(sizes), key=lambda moment: moment.total)
    kept = moment.parts[KEPT]
    layers = kept // max(now.kept, 1)
    blocks = f"{layers} blocks × {now.kept:,} bytes, {plan.batch} × {plan.length} tokens"
    work = f"at the peak, in the phase {moment.phase}; dry run of one layer and the head"
    lines = (
        ledger.Line(ledger.GRADIENTS, always + moment.parts["gradients"], "as the LoRA weights"),
        ledger.Line(KEPT, kept, blocks),
        ledger.Line(WORK, moment.parts[WORK], work),
    )
    return ledger.Ledger(moment.phase, lines)


def _at_the_peak_of_a_generation(plan: Plan) -> ledger.Ledger:
    """The larger of two moments: all tokens are read at once, or the last one is written."""
    per_token = ledger.kv_cache_bytes(plan.config, plan.dtype)
    read = f"while {plan.batch} × {plan.length} tokens are read"
    written = "while the last token is written"
    moments = []
    for when, at_once, new_tokens in ((read, plan.length, 0), (written, 1, plan.new_tokens)):
        now = dry_run.dry_run(replace(plan, length=at_once))
        n_tokens = plan.batch * (plan.length + new_tokens)
        cache = f"{n_tokens:,} tokens × {per_token:,} bytes"
        work = f"{when}; dry run of one layer and the head"
        lines = (
            ledger.Line(CACHE, n_tokens * per_token, cache),
            ledger.Line(WORK, max(now.forward, now.loss), work),
        )
        moments.append(ledger.Ledger(when, lines))
    return max(moments, key=lambda moment: moment.total_bytes)


def reconcile(
    predicted: ledger.Ledger, held: ledger.Ledger | None, moved: profiler.PeakMemory
) -> list[tuple[str, int, int]]:
    """(name, predicted, measured) bytes: what stays, line by line, then the rest, then the peak.

    Args:
        predicted: `peak` for the rows and tokens that were measured.
        held: the ledger measured then; gradients are compared among the rest. None (nothing was
            measured) gives no rows.
        moved: what `profiler.measure_peak` found.
    """
    if held is None:
        return []
    rows = []
    for name in ledger.ORDER:
        if name != ledger.GRADIENTS and (predicted[name] or held[name]):
            rows.append((name, predicted[name], held[name]))
    rows.append(("gradients, activations, cache", predicted.sum(CHANGING), moved.peak_bytes))
    all_predicted = sum(row[1] for row in rows)
    all_measured = sum(row[2] for row in rows)
    return [*rows, ("peak", all_predicted, all_measured)]


@dataclass(frozen=True)
class Option:
    """Parameters to change, and the bytes that the change takes off the peak."""

    changes: dict
    saves: int
    costs: str

    def __repr__(self) -> str:
        what = ", ".join(f"{name}={value!r}" for name, value in self.changes.items())
        return f"{what} saves {self.saves / cards.GIB:.2f} GiB ({self.costs})"


def options(settings, config=None, on_gpu: bool | None = None) -> list[Option]:
    """What would lower the training peak, each option alone: first those that leave the result as
    it is, largest first.
    """
    plan = plan_of(settings, config=config, on_gpu=on_gpu)
    one_row = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": settings.rows_in_a_step,
    }
    same_result = [
        ({"gradient_checkpointing": True}, "up to half as many operations again"),
        ({"loss_chunk": 128}, "same loss, same gradient"),
        (one_row, "same rows in a step, shorter products"),
        ({"double_quant": True}, "RMSE grows by less than 0.001"),
        ({"optim": "paged_adamw_8bit"}, "8-bit states"),
        ({"embedding_on_cpu": True}, "one vector a token crosses the bus"),
    ]
    other_result = [
        ({"head_4bit": True}, "the head is rounded to NF4"),
        ({"max_length": min(512, settings.max_length)}, "longer answers are cut"),
        ({"r": min(16, settings.r)}, "a smaller adapter"),
        ({"max_length": min(256, settings.max_length)}, "longer answers are cut"),
    ]

    now = peak(plan).total_bytes
    found = []
    for candidates in (same_result, other_result):
        worth_it = []
        for changes, costs in candidates:
            changed = plan_of(settings.replace(**changes), config=plan.config, on_gpu=plan.on_gpu)
            saves = now - peak(changed).total_bytes
            if saves > 0.002 * now:
                worth_it.append(Option(changes, saves, costs))
        found += sorted(worth_it, key=lambda option: -option.saves)
    return found


def make_fit(settings, card_bytes: float, config=None) -> tuple[object, list[Option]] | None:
    """Take one option after another until fine-tuning fits a card; None if it never does.

    Returns:
        (the settings that fit, the options taken).
    """
    if config is None:
        config = configs.config_of(settings.model_id)
    taken = []
    while peak(plan_of(settings, config=config, on_gpu=True)).total_bytes > card_bytes:
        more = options(settings, config, on_gpu=True)
        if not more:
            return None
        taken.append(more[0])
        settings = settings.replace(**more[0].changes)
    return settings, taken


def advice(settings, gpu_gib: float | None) -> str:
    """One sentence on fine-tuning: what is left of a card, or the option to take first and all that
    make it fit.
    """
    needed = peak(plan_of(settings, on_gpu=gpu_gib is not None)).total_bytes
    if gpu_gib is None:
        return (
            f"Fine-tuning needs {needed / 2**20:,.0f} MiB of memory at its peak, "
            "besides Python and torch themselves."
        )
    left_gib = gpu_gib - needed / cards.GIB
    if left_gib >= 0:
        used = f"{needed / cards.GIB:.2f} of {gpu_gib:g} GiB"
        return f"Fine-tuning fits: {used}, {left_gib:.2f} are left."
    missing = f"Fine-tuning does not fit: {-left_gib:.2f} GiB are missing"
    fit = make_fit(settings, gpu_gib * cards.GIB)
    if fit is None:
        return f"{missing}, more than all options save. Take a smaller model."
    return f"{missing}. Change first: {'; then '.join(map(str, fit[1]))}."


def largest_pythia(
    settings, card_bytes: float, train: bool, with_options: bool = False
) -> tuple[str, ledger.Ledger, list[Option]] | None:
    """The largest Pythia for a card: its size, its peak, and the options taken (none without
    `with_options`); None if none fits.
    """
    for size in reversed(PYTHIA):
        config = configs.pythia_config(size)
        fit = make_fit(settings, card_bytes, config) if with_options else None
        chosen, taken = fit or (settings, [])
        found = peak(plan_of(chosen, train, config, on_gpu=True))
        if found.total_bytes <= card_bytes:
            return size, found, taken
    return None
