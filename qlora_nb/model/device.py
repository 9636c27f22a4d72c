"""Which device computes, and in which datatype.

bfloat16 has the range of float32 and is what the QLoRA paper computes in; GPUs before Ampere have
float16 alone. On a CPU float32 is no waste: without AVX512-BF16 units bfloat16 was measured 12
times slower there.
"""

import torch

from qlora_nb import cards, machine, processes
from qlora_nb.errors import KitError


def on_gpu() -> bool:
    """Whether the kit computes on a card: torch sees one, and it and bitsandbytes have code for
    it.
    """
    return torch.cuda.is_available() and not cards.why_unusable(torch)


def compute_device() -> torch.device:
    """torch's first CUDA device if the kit computes on it, else the CPU; of several processes the
    card of this one.

    Raises:
        KitError: this process was forked from one that uses the GPU.
    """
    if getattr(torch.cuda, "_is_in_bad_fork", bool)():
        raise KitError(
            "this process was forked from one that uses the GPU, and cannot use it",
            remedy="start processes with torchrun, or with the method spawn",
        )
    if not on_gpu():
        return torch.device("cpu")
    return torch.device("cuda", processes.card())


def compute_dtype(choice: str = "auto") -> torch.dtype:
    """The dtype of the arithmetic. `auto` is bfloat16 where the GPU has it, float16 on older GPUs,
    float32 on a CPU; bfloat16 asked for on a GPU that lacks it becomes float16, with a notice.
    """
    best = torch.float32
    if on_gpu():
        card = machine.card()
        best = torch.bfloat16 if card.has_bf16 else torch.float16
    if choice == "bfloat16" and best == torch.float16:
        print(f"{card.name} has no bfloat16: computing in float16 instead")
        choice = "auto"
    return best if choice == "auto" else getattr(torch, choice)
