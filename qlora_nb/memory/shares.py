"""Several processes: what of a step each takes, what it holds, what it sends.

Under DDP every process holds the whole model, and the sums of the gradients once more: they are
made in *buckets* (`torch/nn/parallel/distributed.py`). Under `fully_shard` (FSDP2) it holds a share
of every parameter, gradient and state. bitsandbytes' scales and tables are no parameters and stay
whole. What computes is gathered: embedding and head for the whole pass, of the blocks the one that
computes and the next.
"""

from qlora_nb.errors import KitError
from qlora_nb.memory import budget, ledger
from qlora_nb.memory.plan import Plan, plan_of

BUCKETS = "gradients, summed over processes"
GATHERED = "gathered to compute"

CUT = (ledger.CODES, ledger.LINEARS, ledger.EMBEDDINGS, ledger.SMALL, ledger.LORA)
"""Lines of parameters; `fully_shard` cuts their gradients and states too."""


def of_a_step(settings, n: int) -> tuple[int, int]:
    """Rows in a pass and passes in a step of each of `n` processes, so that a step holds the same
    rows however many there are: they share the passes, or else the rows of each.

    Raises:
        KitError: neither can be divided.
    """
    rows = settings.per_device_train_batch_size
    passes = settings.gradient_accumulation_steps
    if passes % n == 0:
        return rows, passes // n
    if rows % n == 0:
        return rows // n, passes
    raise KitError(
        f"{n} processes cannot share a step of {passes} passes of {rows} rows",
        remedy=f"let {n} divide gradient_accumulation_steps, or per_device_train_batch_size",
    )


def require_shardable(settings) -> None:
    """Refuse options that were not tried where each process holds a share, or are known to fail.

    Raises:
        KitError: names the parameter.
    """
    wanted = {"optim": "adamw_torch", "head_4bit": False, "embedding_on_cpu": False}
    for name, value in wanted.items():
        given = getattr(settings, name)
        if given != value:
            raise KitError(
                f"{name}: not supported where every process holds a share",
                value=given,
                remedy=f"-p {name} {value}, or --shard none",
            )


def planned(
    settings, n: int, shard: str, config, on_gpu: bool | None
) -> tuple[Plan, ledger.Ledger, int]:
    """The plan of one of `n` processes, its peak, and the bytes that it sends in a step.

    Raises:
        KitError: see `of_a_step` and `require_shardable`.
    """
    if shard != "none":
        require_shardable(settings)
    rows, passes = of_a_step(settings, n)
    own = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": passes}
    plan = plan_of(settings.replace(**own), True, config, on_gpu)
    peak = budget.peak(plan)
    if n == 1:
        return plan, peak, 0
    return plan, of_each(peak, plan, n, shard), sent(peak, n, shard, passes)


def of_each(whole: ledger.Ledger, plan: Plan, n: int, shard: str) -> ledger.Ledger:
    """The ledger of each of `n` processes.

    Args:
        whole: that of one process, for its rows and passes.
        plan: what it was predicted from.
        shard: none or fsdp.
    """
    if shard == "none":
        summed = ledger.Line(BUCKETS, whole[ledger.GRADIENTS], "as the gradients")
        title = f"{whole.title}, each of {n} processes"
        return ledger.Ledger(title, (*whole.lines, summed))
    lines = []
    for line in whole.lines:
        n_bytes = line.bytes
        source = line.source
        if line.name in (*CUT, ledger.GRADIENTS):
            n_bytes = -(-line.bytes // n)
            source = f"a share of 1/{n}: {line.source}"
        elif line.name == ledger.STATES:
            counters = 4 * len(ledger.trained_numels(plan))  # adamw_torch's, one a tensor
            n_bytes = (line.bytes - counters) // n + counters
            source = f"a share of 1/{n}: {line.source}"
        lines.append(ledger.Line(line.name, n_bytes, source))
    in_blocks = whole.sum((ledger.CODES, ledger.SMALL, ledger.LORA))
    gathered = whole[ledger.EMBEDDINGS] + 2 * in_blocks // plan.config.num_hidden_layers
    lines.append(ledger.Line(GATHERED, gathered, "embedding and head, two blocks"))
    return ledger.Ledger(f"{whole.title}, each of {n} processes, sharded", tuple(lines))


def sent(whole: ledger.Ledger, n: int, shard: str, passes: int = 1) -> int:
    """Bytes that each of `n` processes sends in a step, by the ring algorithms of NCCL and gloo.

    DDP adds up the gradients once a step: 2 (n − 1)/n of them. FSDP gathers every parameter in the
    forward and in the backward pass and scatters the gradients' sums, in each pass: (n − 1)/n of
    each.

    >>> lora = ledger.Line(ledger.LORA, 400, "")
    >>> grad = ledger.Line(ledger.GRADIENTS, 400, "")
    >>> whole = ledger.Ledger("", (ledger.Line(ledger.CODES, 1000, ""), lora, grad))
    >>> sent(whole, 2, "none"), sent(whole, 2, "fsdp")
    (400, 1600)
    """
    gradients = whole[ledger.LORA]  # float32 each, whether or not they are there at the peak
    if shard == "none":
        return 2 * (n - 1) * gradients // n
    return passes * (n - 1) * (2 * whole.sum(CUT) + gradients) // n
