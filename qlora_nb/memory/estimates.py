"""How long a step takes at least, and how much host memory loading takes.

Both are arithmetic over a count: floating-point operations divided by a rate that was measured (or
published), and twice the largest tensor. They are lower bounds and orders of magnitude, not
predictions to the second.
"""

import torch
from torch.utils import benchmark

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
    model = configs.meta_model(plan.config)
    n_linear = sum(layer.weight.numel() for layer in linear_layers(model).values())
    n_head = model.get_output_embeddings().weight.numel()
    n_tokens = plan.batch * plan.length * plan.accumulation
    passes = 3 if plan.checkpointing else 2
    return 2.0 * n_tokens * (passes * n_linear + 2 * n_head)


def operations_per_s(dtype: torch.dtype = torch.float32) -> float:
    """Floating-point operations a second of products of 1,024 × 1,024 matrices on this device,
    right now: the basis of every time estimate.
    """
    n = 1024
    a = torch.ones(n, n, dtype=dtype, device=device.compute_device())
    # the timer waits for a GPU to be done
    timer = benchmark.Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    return 2 * n**3 / timer.blocked_autorange().mean


def host_bytes(config) -> int:
    """Host memory while a model is loaded onto a GPU: 2 GiB for Python and torch and the largest
    tensor twice, in 16 bit (assumed).
    """
    largest = max(p.numel() for p in configs.meta_model(config).parameters())
    return 2 * cards.GIB + 2 * 2 * largest
