"""Will it fit? The ledger of the worst moment of a run, the levers that lower it, and what each card can hold.

`peak` adds to the static ledger what a step holds at its fullest (counted by `activations` on a dry run, arranged in time by
`theory.paging`), the key-value cache of a generation, and what CUDA itself takes. The same constants serve every model
and setting; none is fitted to a published figure.

`SLACK` is the part of moving memory that the allocator's whole blocks waste. Like `CONTEXT_BYTES` it is an assumption until it
is measured on a GPU.
"""

import gc
import tomllib
import traceback
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.utils import benchmark
from transformers import AutoConfig

from qlora_nb.engine import activations, ledger, models
from qlora_nb.engine.cards import CONTEXT_BYTES, GIB
from qlora_nb.engine.environment import Machine, card, machine
from qlora_nb.engine.ledger import GRADIENTS, STATES, Ledger, Line
from qlora_nb.errors import KitError
from qlora_nb.theory import paging

SLACK = 0.05
T4_OPERATIONS_PER_S = 0.25 * 65e12
"""A quarter (assumed) of what NVIDIA publishes for a T4 in float16: the basis of a time estimate for a card that is not here."""
CACHE, KEPT, WORK, CUDA = "key-value cache", "kept for the backward pass", "working memory", "CUDA context, slack (assumed)"


@dataclass(frozen=True)
class Plan:
    """Everything that decides how much memory a run takes.

    `config` is transformers' configuration, `step` one forward pass (rows, tokens, rank, dtypes, levers). A generation
    (`step.train` False) adds `new_tokens` to each row. `accumulation` > 1 keeps gradients over several passes.
    """

    config: object
    step: activations.Step
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
    on_gpu = bool(machine().gpus) if on_gpu is None else on_gpu
    elsewhere = on_gpu and not models.on_gpu()  # planned for a card that is not here
    dtype = models.compute_dtype("bfloat16" if elsewhere and settings.compute_dtype == "auto" else settings.compute_dtype)
    step = settings.model_dump(include={"r", "lora_dropout", "loss_chunk", "head_4bit"})
    step |= {"target_modules": tuple(settings.target_modules), "checkpointing": settings.gradient_checkpointing, "dtype": dtype}
    plan = settings.model_dump(include={"double_quant", "optim", "embedding_on_cpu"})
    plan |= {"accumulation": settings.gradient_accumulation_steps, "new_tokens": settings.max_new_tokens, "on_gpu": on_gpu}
    step = activations.Step(settings.per_device_train_batch_size if train else 1, settings.max_length, train=train, **step)
    return Plan(config or ledger.config_of(settings.model_id), step, **plan)


def peak(plan: Plan) -> Ledger:
    """Every byte at the fullest moment, line by line, before anything is loaded.

    Attention is counted as fused (query, key, value and output are kept, scores are not).
    """
    step, layers = plan.step, plan.config.num_hidden_layers
    parts = {"r": step.r, "target_modules": step.target_modules, "head_4bit": step.head_4bit}
    parts |= {"double_quant": plan.double_quant, "optim": plan.optim, "embedding_on_cpu": plan.embedding_on_cpu and plan.on_gpu}
    static = ledger.predict(config=plan.config, rest_dtype=step.rest_dtype or step.dtype, **parts)
    now = activations.dry_run(plan.config, step)
    if step.train and step.r:
        gradients = static[GRADIENTS]
        always = gradients if plan.accumulation > 1 else 0
        sizes = paging.StepSizes(layers, 0, always, gradients - always, 0, 0, now.kept, now.forward, now.backward, now.loss)
        fullest = max(paging.step_timeline(sizes), key=lambda m: m.total)
        held, kept, work = always + fullest.parts["gradients"], fullest.parts[KEPT], fullest.parts[WORK]
        lines = [replace(line, bytes=held) if line.name == GRADIENTS else line for line in static.lines]
        source = f"{-(-kept // max(now.kept, 1))} layers × {now.kept:,} bytes, {step.batch} × {step.length} tokens"
        lines.append(Line(KEPT, kept, source))
        when = f"fullest in the phase {fullest.phase}"
    else:
        lines = [line for line in static.lines if line.name not in (GRADIENTS, STATES)]
        per_token, one = ledger.kv_cache_bytes(plan.config, step.dtype), activations.dry_run(plan.config, replace(step, length=1))
        reading = max(now.forward, now.loss), step.batch * step.length, f"while {step.batch} × {step.length} tokens are read"
        writing = max(one.forward, one.loss), step.batch * (step.length + plan.new_tokens), "while the last token is written"
        work, n_tokens, when = max(reading, writing, key=lambda phase: phase[0] + phase[1] * per_token)
        lines.append(Line(CACHE, n_tokens * per_token, f"{n_tokens:,} tokens × {per_token:,} bytes"))
    lines.append(Line(WORK, work, f"{when}; dry run of one layer and the head"))
    if plan.on_gpu:
        moving = sum(line.bytes for line in lines if line.name in (GRADIENTS, KEPT, WORK, CACHE))
        lines.append(Line(CUDA, CONTEXT_BYTES + int(SLACK * moving), f"0.45 GiB + {SLACK:.0%} of what moves"))
    return Ledger(f"predicted peak, {'fine-tuning' if step.train else 'answering'}", tuple(line for line in lines if line.bytes))


def reconcile(predicted: Ledger, held: Ledger | None, moved: activations.Moved) -> list[tuple[str, int, int]]:
    """(name, predicted, measured) bytes: what stays, line by line, then what moves, then the peak.

    Args:
        predicted: `peak` for the rows and tokens that were weighed.
        held: the ledger measured then; gradients count among what moves. None (nothing was weighed) gives no rows.
        moved: what `activations.weigh` found.
    """
    if held is None:
        return []
    still = [name for name in ledger.ORDER if name != GRADIENTS and (predicted[name] or held[name])]
    rows = [(name, predicted[name], held[name]) for name in still]
    rows.append(("what moves, at its fullest", predicted.sum((GRADIENTS, KEPT, WORK, CACHE)), moved.peak_bytes))
    return [*rows, ("peak", sum(p for _, p, _ in rows), sum(m for *_, m in rows))]


@dataclass(frozen=True)
class Lever:
    """Parameters to change, and the bytes that the change takes off the peak."""

    changes: dict[str, object]
    saves: int
    costs: str

    def __repr__(self) -> str:
        what = ", ".join(f"{k}={v!r}" for k, v in self.changes.items())
        return f"{what} saves {self.saves / GIB:.2f} GiB ({self.costs})"


def levers(settings, config=None, on_gpu: bool | None = None) -> list[Lever]:
    """What would lower the training peak, each lever alone: first those that leave the result as it is, largest first."""
    config = config or ledger.config_of(settings.model_id)
    now = peak(plan_of(settings, True, config, on_gpu)).total_bytes
    rows = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    candidates = [
        ({"gradient_checkpointing": True}, "up to half as many operations again", False),
        ({"loss_chunk": 128}, "same loss, same gradient", False),
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": rows}, "same rows in a step, shorter products", False),
        ({"double_quant": True}, "RMSE grows by less than 0.001", False),
        ({"optim": "paged_adamw_8bit"}, "8-bit states", False),
        ({"embedding_on_cpu": True}, "one vector a token crosses the bus", False),
        ({"head_4bit": True}, "the head is rounded to NF4", True),
        ({"max_length": min(512, settings.max_length)}, "longer answers are cut", True),
        ({"r": min(16, settings.r)}, "a smaller adapter", True),
        ({"max_length": min(256, settings.max_length)}, "longer answers are cut", True),
    ]
    after = lambda changes: peak(plan_of(settings.model_copy(update=changes), True, config, on_gpu)).total_bytes
    found = [(changes_result, Lever(changes, now - after(changes), costs)) for changes, costs, changes_result in candidates]
    found.sort(key=lambda item: (item[0], -item[1].saves))
    return [lever for _, lever in found if lever.saves > 0.002 * now]


def make_fit(settings, card_bytes: float, config=None) -> tuple[object, list[Lever]] | None:
    """Pull one lever after another until fine-tuning fits a card; None if it never does.

    Returns:
        (the settings that fit, the levers pulled).
    """
    config, pulled = config or ledger.config_of(settings.model_id), []
    while peak(plan_of(settings, True, config, on_gpu=True)).total_bytes > card_bytes:
        if not (more := levers(settings, config, on_gpu=True)):
            return None
        pulled.append(more[0])
        settings = settings.model_copy(update=more[0].changes)
    return settings, pulled


def advice(settings, gpu_gib: float | None) -> str:
    """One sentence on fine-tuning: what is left of a card, or the lever to pull first and all that make it fit."""
    needed = peak(plan_of(settings, on_gpu=gpu_gib is not None)).total_bytes
    if gpu_gib is None:
        return f"Fine-tuning needs {needed / 2**20:,.0f} MiB of memory at its fullest, besides Python and torch themselves."
    left = gpu_gib * GIB - needed
    if left >= 0:
        return f"Fine-tuning fits: {needed / GIB:.2f} of {gpu_gib:g} GiB, {left / GIB:.2f} are left."
    missing, fit = f"Fine-tuning does not fit: {-left / GIB:.2f} GiB are missing", make_fit(settings, gpu_gib * GIB)
    if fit is None:
        return f"{missing}, more than all levers save. Take a smaller model."
    return f"{missing}. Pull first: {'; then '.join(map(str, fit[1]))}."


def largest_pythia(settings, card_bytes: float, train: bool, pull: bool = False) -> tuple[str, Ledger, list[Lever]] | None:
    """The largest Pythia for a card: its size, its peak, and the levers pulled (none without `pull`); None if none fits."""
    for size in reversed(ledger.shapes.PYTHIA):
        config = ledger.pythia_config(size)
        own, pulled = (make_fit(settings, card_bytes, config) if pull else None) or (settings, [])
        found = peak(plan_of(own, train, config, on_gpu=True))
        if found.total_bytes <= card_bytes:
            return size, found, pulled
    return None


def require_fit(settings, here: Machine, train: bool = True) -> None:
    """Refuse, before anything is downloaded, what cannot fit the GPU that is used; names the levers that make it fit.

    The prediction is compared with what can be had of the card: all but the driver's part and what other programs hold.
    What this process holds counts as free, so that a cell can be run again.

    Raises:
        KitError: the predicted peak of fine-tuning (`train`) or of answering is larger than that.
    """
    gpu = card(here)
    if gpu is None:
        return
    config, limit = ledger.config_of(settings.model_id), gpu.usable_bytes
    needed = peak(plan_of(settings, train, config, on_gpu=True)).total_bytes
    if needed <= limit:
        return
    fit = make_fit(settings, limit, config) if train else None
    largest = largest_pythia(settings, limit, train, pull=train)
    smaller = f'model_id="EleutherAI/pythia-{largest[0]}" fits' if largest else 'profile="tiny" runs anywhere'
    remedy = "; ".join(map(str, fit[1])) if fit else smaller
    what = f"{settings.model_id} does not fit this GPU: {'fine-tuning' if train else 'answering'} is predicted to need"
    digits = 1 if needed - limit > 0.1 * GIB else 2
    sizes = f"{needed / GIB:.{digits}f} GiB at its peak, the {gpu.name} has {gpu.total_bytes / GIB:.1f} GiB"
    if limit < gpu.total_bytes:
        sizes = f"{sizes}, {limit / GIB:.{digits}f} GiB of them to be had"
    if gpu.others_bytes > SLACK * gpu.total_bytes:
        sizes = f"{sizes}, {gpu.others_bytes / GIB:.1f} GiB of them are held by other programs"
        if needed <= limit + gpu.others_bytes:
            remedy = f"close the other programs on this GPU (nvidia-smi lists them); or {remedy}"
    raise KitError(f"{what} {sizes}", remedy=remedy)


def let_go(error: BaseException) -> None:
    """Free what an error keeps alive: its traceback holds the activations of the step that failed, in frames and in closures.

    A notebook keeps its last error, so the memory would stay taken until the next one. The error loses its traceback.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
    gc.collect()
    torch.cuda.empty_cache()


def out_of_memory(error: BaseException, settings, model, optimizer) -> KitError:
    """What an out-of-memory error becomes: the ledger of that moment and the next lever to pull. Gradients are freed."""
    held = ledger.measure(model, optimizer)
    model.zero_grad(set_to_none=True)
    parts = ", ".join(f"{line.name} {line.bytes / GIB:.2f}" for line in sorted(held.lines, key=lambda x: -x.bytes)[:4])
    more = []
    with suppress(Exception):  # a family whose activations cannot be counted: no lever is named
        more = levers(settings, model.config)
    asked = str(error).split("GPU ")[0].splitlines()[0].strip().rstrip(".")[:120]
    what = f"memory ran out ({asked}); held at that moment {held.total_gib:.2f} GiB: {parts}"
    return KitError(what, remedy=str(more[0]) if more else "choose a smaller model, or close other programs")


def step_flops(plan: Plan) -> float:
    """Floating-point operations of one optimizer step: 2 for each weight and token, in every pass the weight takes part in.

    Forward, backward to the inputs (frozen weights have no gradient of their own) and, with checkpointing, forward again; the
    head takes part in two passes. Attention's own products and the unpacking of weights come on top: read it as a lower bound.
    """
    model = ledger.meta_model(plan.config)
    linear = sum(m.weight.numel() for m in models.linear_layers(model).values())
    tokens = plan.step.batch * plan.step.length * plan.accumulation
    return 2.0 * tokens * (linear * (3 if plan.step.checkpointing else 2) + 2 * model.get_output_embeddings().weight.numel())


def operations_per_s(dtype: torch.dtype = torch.float32, n: int = 1024, least_s: float = 0.2) -> float:
    """Floating-point operations a second of large products on this device, right now: the basis of every time estimate."""
    a = torch.ones(n, n, dtype=dtype, device=models.device())
    timer = benchmark.Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())  # waits for a GPU to be done
    return 2 * n**3 / timer.blocked_autorange(min_run_time=least_s).mean


def host_bytes(config) -> int:
    """Host memory while a model is loaded onto a GPU: 2 GiB for Python and torch and the largest tensor twice (assumed)."""
    return 2 * GIB + 4 * max(p.numel() for p in ledger.meta_model(config).parameters())


def published_figures() -> list[dict[str, object]]:
    """Every figure of `published.toml`, entered as a configuration and predicted with the same constants.

    Returns:
        Rows with figure, published and predicted (both in 10^9 bytes), remark (why they differ) and source.
    """
    rows = []
    for name, row in tomllib.loads((Path(__file__).parent / "published.toml").read_text(encoding="utf-8")).items():
        shape = row["config"]
        config = ledger.pythia_config(shape["pythia"]) if "pythia" in shape else AutoConfig.for_model(**shape)
        if row["moment"] == "peak":
            step = {name: getattr(torch, value) if "dtype" in name else value for name, value in row["step"].items()}
            predicted = peak(Plan(config, activations.Step(**step), **row.get("plan", {}))).total_bytes
        else:  # all weights, alone or with everything that full fine-tuning keeps for each of them
            predicted = row["bytes_per_parameter"] * sum(p.numel() for p in ledger.meta_model(config).parameters())
        figures = {"figure": name, "published": row["published_gb"], "predicted": predicted / 1e9}
        rows.append(figures | {"remark": row["why"], "source": row["source"]})
    return rows
