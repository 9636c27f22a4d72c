"""Paged optimizers: optimizer states leave the card while activations need their room.

A training step does not need all its memory at once. Weights stay; activations grow in the forward
pass and shrink in the backward pass; Adam's two states are touched only at the very end. A batch
with long rows makes a short spike of activations, and a card that is full at that moment raises an
out-of-memory error while gigabytes of state lie idle.

QLoRA (arXiv 2305.14314, section 3, "Paged Optimizers") puts those states into CUDA *unified
memory*: pages that may live on the card or in the computer's RAM. The driver evicts the least
recently used pages when ordinary memory is needed, and brings them back when they are touched (a
*page fault*) or asked for ahead (a *prefetch*). bitsandbytes does so for every state with at least
100,000 elements on a GPU, not on a CPU (`bitsandbytes/optim/optimizer.py`, `get_state_buffer`).

`simulate` is a model of that driver: whole pages, strictly least recently used, every evicted page
written back. The real driver groups pages and overlaps transfers with work: read bytes as a model
and seconds as an estimate.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

PAGE_BYTES = 2 * 2**20
"""2 MiB, the largest unit in which CUDA's driver moves managed memory on x86."""
MIN_PAGED = 100_000
"""Elements from which on bitsandbytes pages a state."""
MIN_8BIT = 4096
"""Elements from which on a state is kept in 8 bits."""
BLOCK_8BIT = 256
"""Elements of an 8-bit state that share one scale."""


def is_paged(numel: int, on_gpu: bool = True) -> bool:
    """Whether bitsandbytes' paged optimizers put a state of this many elements into pages: at least
    1e5, and not on a CPU.

    By hand: a lora_A of pythia-12b has 16 · 5120 = 81,920 elements at r = 16, 327,680 at r = 64.

    >>> is_paged(16 * 5120), is_paged(64 * 5120), is_paged(64 * 5120, on_gpu=False)
    (False, True, False)
    """
    return on_gpu and numel >= MIN_PAGED


def state_bytes(numel: int, bits: int = 32) -> int:
    """Bytes of Adam's two states for one tensor, as bitsandbytes keeps them.

    Args:
        numel: elements of the trained tensor.
        bits: 32, or 8: one byte an element and state, one float32 a block of 256 and state; tensors
            under 4,096 elements stay 32 bit.

    By hand: 2 · 4 · 4096 = 32768, and with 8 bits 2 · 4096 + 2 · 4 · 16 = 8320; 4095 are too few.

    >>> state_bytes(4096, 32), state_bytes(4096, 8), state_bytes(4095, 8)
    (32768, 8320, 32760)
    """
    if bits == 32 or numel < MIN_8BIT:
        return 2 * 4 * numel
    return 2 * numel + 2 * 4 * math.ceil(numel / BLOCK_8BIT)


def paged_bytes(numels: Sequence[int], bits: int = 32) -> tuple[int, int]:
    """(paged, not paged) bytes of Adam's states over tensors of these sizes on a GPU; 8-bit scales
    (absmax) are never paged.

    >>> paged_bytes([81_920, 327_680])
    (2621440, 655360)
    """
    total = 0
    paged = 0
    for numel in numels:
        total += state_bytes(numel, bits)
        if is_paged(numel):
            paged += 2 * numel * bits // 8
    return paged, total - paged


def page_waste(numels: Sequence[int], bits: int = 32) -> int:
    """Bytes that whole pages add to the paged states of tensors of these sizes: a state has pages
    of its own, 2 MiB each. So it was on an H100, to within a page, where most states are larger
    than one (`recorded/gpu.json`); a smaller state is taken to fill the next power of two.

    By hand: 327,680 elements in float32 are 1.25 MiB of 2, 1,310,720 are 5 MiB of 6.

    >>> page_waste([327_680, 1_310_720]) / 2**20
    3.5
    """
    waste = 0
    for numel in filter(is_paged, numels):
        size = numel * bits // 8
        unit = min(PAGE_BYTES, 2 ** math.ceil(math.log2(size)))
        waste += 2 * (-size % unit)
    return waste


@dataclass(frozen=True)
class StepSizes:
    """Sizes of one training step, all in bytes (the caller takes them from a ledger).

    `kept` is what each layer holds for the backward pass: with gradient checkpointing its input.
    `forward` and `backward` are what one layer needs while it works, `loss` what head and loss
    need. `paged` and `fixed` are the optimizer states that may and may not leave the card.
    """

    n_layers: int
    kept: int
    forward: int
    backward: int
    loss: int
    gradients: int
    weights: int = 0
    adapter: int = 0
    paged: int = 0
    fixed: int = 0


@dataclass(frozen=True)
class Moment:
    """Memory at one moment of a step: the phase and the bytes of each part."""

    phase: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All parts together (bytes)."""
        return sum(self.parts.values())


def step_timeline(sizes: StepSizes) -> list[Moment]:
    """Memory through one step: a moment a layer forward, one for the loss, a moment a layer
    backward, one for the optimizer.

    Example: two layers, kept 1, forward 2, backward 5, loss 3, gradients 4, all else 0. Forward 1 +
    2, 2 + 2; loss 2 + 3; backward, the last layer first, 2 + 5 + 0 and 1 + 5 + 2 (the layer's own
    gradients are in its 5); optimizer 4.

    >>> [m.total for m in step_timeline(StepSizes(2, 1, 2, 5, 3, gradients=4))]
    [3, 4, 5, 7, 8, 4]
    """
    n = sizes.n_layers

    def moment(phase: str, layers: int, work: int, gradients: int) -> Moment:
        parts = {
            "frozen weights": sizes.weights,
            "LoRA weights": sizes.adapter,
            "states, paged": sizes.paged,
            "states, not paged": sizes.fixed,
            "gradients": gradients,
            "kept for the backward pass": layers * sizes.kept,
            "working memory": work,
        }
        return Moment(phase, parts)

    moments = []
    for i in range(n):
        moments.append(moment("forward", i + 1, sizes.forward, 0))
    moments.append(moment("loss", n, sizes.loss, 0))
    for i in range(n):
        moments.append(moment("backward", n - i, sizes.backward, sizes.gradients * i // n))
    moments.append(moment("optimizer", 0, 0, sizes.gradients))
    return moments


@dataclass
class StepRecord:
    """What one simulated step did: whether it survived, faults (a touched page was not on the card)
    and bytes each way. A step that does not fit moves nothing.
    """

    survived: bool
    faults: int = 0
    bytes_in: int = 0
    bytes_out: int = 0

    def seconds(self, gb_per_s: float) -> float:
        """Transfer time both ways over a bus of so many 10^9 bytes a second, nothing overlapped."""
        return (self.bytes_in + self.bytes_out) / (gb_per_s * 1e9)


def simulate(
    steps: Sequence[StepSizes],
    budget_bytes: int,
    paging: bool = True,
    prefetch: bool = False,
) -> list[StepRecord]:
    """Run steps on a card, in pages of 2 MiB; stop at the first one that does not fit.

    Args:
        steps: the sizes of each step; a spike is a step with larger activations.
        budget_bytes: memory of the card.
        paging: False keeps every optimizer state on the card.
        prefetch: ask for each page just before the optimizer touches it (bitsandbytes does so
            tensor by tensor), so that no touch is a fault.

    Returns:
        A record a step; the last has `survived` False if the card was too small.
    """
    on_card = OrderedDict()  # pages, least recently used first
    in_ram = set()
    records = []
    for sizes in steps:
        if paging:
            record = _step_with_pages(sizes, budget_bytes, prefetch, on_card, in_ram)
        else:
            peak = max(moment.total for moment in step_timeline(sizes))
            record = StepRecord(survived=peak <= budget_bytes)
        records.append(record)
        if not record.survived:
            break
    return records


def _step_with_pages(
    sizes: StepSizes,
    budget_bytes: int,
    prefetch: bool,
    on_card: OrderedDict[int, None],
    in_ram: set[int],
) -> StepRecord:
    """One step on a card: ordinary memory sends pages away where it needs their room, then the
    optimizer touches all pages one after another.

    Args:
        on_card, in_ram: where the pages are; changed. A page in neither has nothing to copy yet.
    """
    room = []  # for how many pages, at every moment
    for moment in step_timeline(sizes):
        ordinary = math.ceil((moment.total - sizes.paged) / PAGE_BYTES)
        room.append(budget_bytes // PAGE_BYTES - ordinary)
    n_pages = math.ceil(sizes.paged / PAGE_BYTES)
    if min(room) < 0 or (n_pages and room[-1] == 0):
        return StepRecord(survived=False)
    record = StepRecord(survived=True)

    def send_one_away() -> None:
        page, _ = on_card.popitem(last=False)
        in_ram.add(page)
        record.bytes_out += PAGE_BYTES

    while len(on_card) > min(room):
        send_one_away()
    for page in range(n_pages):
        if page not in on_card:
            if not prefetch:
                record.faults += 1
            if len(on_card) == room[-1]:
                send_one_away()
            if page in in_ram:
                in_ram.remove(page)
                record.bytes_in += PAGE_BYTES
        on_card[page] = None
        on_card.move_to_end(page)
    return record
