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

`UnifiedMemory` is a model of that driver: whole pages, strictly least recently used, every evicted
page written back. The real driver groups pages and overlaps transfers with work: read bytes as a
model and seconds as an estimate.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_nb.errors import KitError

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

    Raises:
        KitError: other bits.

    By hand: 2 · 4 · 4096 = 32768, and with 8 bits 2 · 4096 + 2 · 4 · 16 = 8320; 4095 are too few.

    >>> state_bytes(4096, 32), state_bytes(4096, 8), state_bytes(4095, 8)
    (32768, 8320, 32760)
    """
    if bits not in {8, 32}:
        raise KitError("optimizer states have another width", value=bits, allowed="8, 32")
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


class UnifiedMemory:
    """A card with room for `budget_pages` pages, shared by ordinary memory and managed pages.

    Counts `faults` (a touched page was not on the card), `pages_in` (copied from RAM to the card)
    and `pages_out` (evicted to RAM). A page touched for the first time has nothing to copy.

    By hand: three pages of room; touch 0, 1, 2 (three faults), reserve two pages: 0 and 1 go out.
    Touch 0: a fault, 0 comes in, 2 goes out.

    >>> memory = UnifiedMemory(3)
    >>> for page in (0, 1, 2): memory.touch(page)
    >>> memory.reserve(2); memory.touch(0)
    >>> memory.faults, memory.pages_in, memory.pages_out, list(memory.resident)
    (4, 1, 3, [0])
    """

    def __init__(self, budget_pages: int):
        self.budget_pages = budget_pages
        self.reserved = 0
        self.resident: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self.known: set[int] = set()
        self.faults = 0
        self.pages_in = 0
        self.pages_out = 0

    def reserve(self, pages: int) -> None:
        """Set ordinary memory to this many pages; managed pages make room.

        Raises:
            MemoryError: ordinary memory alone is larger than the card.
        """
        if pages > self.budget_pages:
            raise MemoryError(f"{pages} pages of ordinary memory on a card of {self.budget_pages}")
        self.reserved = pages
        self._make_room(0)

    def touch(self, page: int) -> None:
        """Use a page; if it is not on the card the kernel waits for it."""
        if page not in self.resident:
            self.faults += 1
        self.prefetch(page)

    def prefetch(self, page: int) -> None:
        """Bring a page in ahead of its use, so that the use is no fault.

        Raises:
            MemoryError: ordinary memory leaves no room for a single page.
        """
        if page not in self.resident:
            self._make_room(1)
            if page in self.known:
                self.pages_in += 1
            self.known.add(page)
            self.resident[page] = None
        self.resident.move_to_end(page)

    def _make_room(self, pages: int) -> None:
        while len(self.resident) + self.reserved + pages > self.budget_pages:
            if not self.resident:
                raise MemoryError("no room for one page")
            self.resident.popitem(last=False)
            self.pages_out += 1


@dataclass(frozen=True)
class StepSizes:
    """Sizes of one training step, all in bytes (the caller takes them from a ledger).

    `kept` is what each layer holds for the backward pass: with gradient checkpointing its input.
    `forward` and `backward` are what one layer needs while it works, `loss` what head and loss
    need. `paged` and `fixed` are the optimizer states that may and may not leave the card.
    """

    n_layers: int
    weights: int
    adapter: int
    gradients: int
    paged: int
    fixed: int
    kept: int
    forward: int
    backward: int
    loss: int


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

    >>> [m.total for m in step_timeline(StepSizes(2, 0, 0, 4, 0, 0, 1, 2, 5, 3))]
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


@dataclass(frozen=True)
class StepRecord:
    """What one simulated step did: whether it survived, faults and bytes each way."""

    survived: bool
    faults: int = 0
    bytes_in: int = 0
    bytes_out: int = 0

    def seconds(self, gb_per_s: float) -> float:
        """Transfer time both ways over a bus of so many 10^9 bytes a second, nothing overlapped.

        Raises:
            KitError: a bandwidth of zero or less.
        """
        if gb_per_s <= 0:
            raise KitError(
                "the bandwidth is not positive", value=gb_per_s, allowed="more than 0 GB/s"
            )
        return (self.bytes_in + self.bytes_out) / (gb_per_s * 1e9)


def simulate(
    steps: Sequence[StepSizes],
    budget_bytes: int,
    paging: bool = True,
    prefetch: bool = False,
    page_bytes: int = PAGE_BYTES,
) -> list[StepRecord]:
    """Run steps on a card; stop at the first one that does not fit.

    Args:
        steps: the sizes of each step; a spike is a step with larger activations.
        budget_bytes: memory of the card.
        paging: False keeps every optimizer state on the card.
        prefetch: ask for each page just before the optimizer touches it (bitsandbytes does so
            tensor by tensor).
        page_bytes: page size.

    Returns:
        A record a step; the last has `survived` False if the card was too small.

    Raises:
        KitError: a page size or budget that is not positive.
    """
    if page_bytes < 1 or budget_bytes < 1:
        raise KitError(
            "page size and budget must be positive",
            value=(page_bytes, budget_bytes),
            allowed="1 or more bytes",
        )
    memory = UnifiedMemory(budget_bytes // page_bytes)
    records = []
    for sizes in steps:
        totals = [moment.total for moment in step_timeline(sizes)]
        memory.faults = 0
        memory.pages_in = 0
        memory.pages_out = 0
        survived = True
        if paging:
            try:
                for total in totals:
                    memory.reserve(math.ceil((total - sizes.paged) / page_bytes))
                for page in range(math.ceil(sizes.paged / page_bytes)):
                    if prefetch:
                        memory.prefetch(page)
                    memory.touch(page)
            except MemoryError:
                survived = False
        else:
            survived = max(totals) <= budget_bytes
        record = StepRecord(
            survived=survived,
            faults=memory.faults,
            bytes_in=memory.pages_in * page_bytes,
            bytes_out=memory.pages_out * page_bytes,
        )
        records.append(record)
        if not survived:
            break
    return records
