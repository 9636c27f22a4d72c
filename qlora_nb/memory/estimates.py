"""How long a step takes, and how much host memory loading takes.

Both are arithmetic over a count: floating-point operations and unpacked weights divided by rates
that are measured (or published), and twice the largest tensor. They are orders of magnitude, not
predictions to the second.
"""

import time
import timeit
from collections.abc import Callable

import torch
from bitsandbytes import functional

from qlora_nb import cards
from qlora_nb.memory.plan import Plan
from qlora_nb.model import configs, device
from qlora_nb.model.linear_layers import linear_layers

T4_OPERATIONS_PER_S = 0.25 * 65e12
"""A quarter (assumed) of what NVIDIA publishes for a T4 in float16: the basis of a time estimate
for a card that is not here.
"""


def step_flops(plan: Plan) -> float:
    """Floating-point operations of one optimizer step: 2 for each weight and token, in every pass
    the weight takes part in.

    Forward, backward to the inputs (frozen weights have no gradient of their own) and, with
    checkpointing, forward again; the head takes part in two passes. Attention's own products and
    the unpacking of weights come on top: read it as a lower bound.
    """
    operations, _ = _work(plan)
    return operations


def step_seconds(plan: Plan) -> float:
    """Seconds of one optimizer step on this device, from two rates measured right now: its
    operations take those of a matrix product, and every pass unpacks every 4-bit weight anew.
    """
    operations, n_unpacked = _work(plan)
    return operations / operations_per_s(plan.dtype) + n_unpacked / unpacked_per_s(plan.dtype)


def _work(plan: Plan) -> tuple[float, int]:
    """Operations of one step, and the 4-bit weights that it unpacks."""
    model = configs.meta_model(plan.config)
    n_linear = sum(layer.weight.numel() for layer in linear_layers(model).values())
    n_head = model.get_output_embeddings().weight.numel()
    n_tokens = plan.batch * plan.length * plan.accumulation
    passes = 3 if plan.checkpointing else 2
    operations = 2.0 * n_tokens * (passes * n_linear + 2 * n_head)
    return operations, plan.accumulation * passes * n_linear


def operations_per_s(dtype: torch.dtype = torch.float32) -> float:
    """Floating-point operations a second of products of 1,024 × 1,024 matrices on this device,
    right now: the basis of every time estimate.
    """
    n = 1024
    a = torch.ones(n, n, dtype=dtype, device=device.compute_device())
    return 2 * n**3 / _seconds(lambda: a @ a)


def unpacked_per_s(dtype: torch.dtype = torch.float32) -> float:
    """NF4 weights, with double quantization, that bitsandbytes unpacks in a second on this device,
    right now, from a matrix of 4,096 × 4,096.
    """
    n = 4096
    weight = torch.ones(n, n, dtype=dtype, device=device.compute_device())
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return n**2 / _seconds(lambda: functional.dequantize_4bit(packed, state))


def _seconds(work: Callable[[], object]) -> float:
    """Mean seconds of a call, of as many as take a fifth of a second, after a first one."""
    work()
    n_calls, seconds = timeit.Timer(work, timer=_clock).autorange()
    return seconds / n_calls


def _clock() -> float:
    """A time in seconds, read when the GPU has done what it was given."""
    if device.on_gpu():
        torch.cuda.synchronize()
    return time.perf_counter()


def host_bytes(config) -> int:
    """Host memory while a model is loaded onto a GPU: 2 GiB for Python and torch and the largest
    tensor twice, in 16 bit (assumed).
    """
    largest = max(p.numel() for p in configs.meta_model(config).parameters())
    return 2 * cards.GIB + 2 * 2 * largest
