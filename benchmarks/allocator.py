"""What torch's allocator would reserve for a step of QLoRA, beside the bytes of its tensors.

    python benchmarks/allocator.py      into benchmarks/results/allocator.json

On a card torch gives no tensor its own memory: it takes *segments* from CUDA, cuts *blocks* out of
them and keeps what is freed for later. `Allocator` follows `c10/cuda/CUDACachingAllocator.cpp` of
torch 2.x with its default settings. Every tensor that a step of a whole model makes and frees, in
order, comes from a run on torch's *meta* device; so `budget.SLACK` can be compared with a
simulation. It is a simulation, not a measurement on a card: what kernels allocate inside
themselves, one CUDA stream more and memory left over from loading are missing.
"""

from __future__ import annotations

import bisect
import warnings
import weakref
from dataclasses import dataclass, field

import provenance
import torch

from qlora_nb.memory import budget, dry_run, ledger
from qlora_nb.memory.live_bytes import LiveBytes
from qlora_nb.memory.plan import Plan, plan_of
from qlora_nb.model import chunked_loss, configs
from qlora_nb.settings import validate

TARGET = provenance.ROOT / "benchmarks" / "results" / "allocator.json"

UNIT = 512
"""Sizes are rounded up to this (`kMinBlockSize`)."""
MIB = 2**20
SMALL = MIB
"""Up to this a tensor goes into the pool of small blocks (`kSmallSize`)."""
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
"""What is taken from CUDA for a large tensor of less than `OWN_SEGMENT` (`kLargeBuffer`)."""
OWN_SEGMENT = 10 * MIB
"""From here on a tensor gets a segment of its own size, rounded up to 2 MiB (`kMinLargeAlloc`)."""


@dataclass(eq=False)
class Block:
    """A piece of a segment, `size` bytes, with its neighbours in the same segment."""

    size: int
    number: int
    small: bool
    before: Block | None = None
    after: Block | None = None
    free: bool = False


@dataclass
class Allocator:
    """Segments and blocks: `reserved` bytes are taken from CUDA, `allocated` are in blocks in use.

    >>> allocator = Allocator()
    >>> block = allocator.allocate(3 * 2**20)
    >>> allocator.release(block)
    >>> allocator.allocated, allocator.reserved // 2**20
    (0, 20)
    """

    reserved: int = 0
    allocated: int = 0
    peak_allocated: int = 0
    n_blocks: int = 0
    free_blocks: dict[bool, list] = field(default_factory=lambda: {True: [], False: []})

    def allocate(self, n_bytes: int) -> Block:
        """A block of at least so many bytes: the smallest free one that is large enough, or one
        from a new segment; what is left of it is cut off.
        """
        size = max(UNIT, -(-n_bytes // UNIT) * UNIT)
        small = size <= SMALL
        block = self._best_fit(size, small)
        if block is None:
            block = self._new_segment(size, small)
        rest = block.size - size
        if rest >= UNIT if small else rest > SMALL:
            self._cut(block, size)
        block.free = False
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def release(self, block: Block) -> None:
        """Give a block back; free neighbours become one block. The segment stays reserved."""
        self.allocated -= block.size
        before = block.before
        if before is not None and before.free:
            self._forget(before)
            block.size += before.size
            block.before = before.before
            if block.before is not None:
                block.before.after = block
        after = block.after
        if after is not None and after.free:
            self._forget(after)
            block.size += after.size
            block.after = after.after
            if block.after is not None:
                block.after.before = block
        self._keep(block)

    def _best_fit(self, size: int, small: bool) -> Block | None:
        free = self.free_blocks[small]
        place = bisect.bisect_left(free, size, key=lambda block: block.size)
        if place == len(free):
            return None
        return free.pop(place)

    def _new_segment(self, size: int, small: bool) -> Block:
        if small:
            segment = SMALL_SEGMENT
        elif size < OWN_SEGMENT:
            segment = LARGE_SEGMENT
        else:
            segment = -(-size // SMALL_SEGMENT) * SMALL_SEGMENT
        self.reserved += segment
        return self._block(segment, small)

    def _block(self, size: int, small: bool) -> Block:
        self.n_blocks += 1
        return Block(size, self.n_blocks, small)

    def _cut(self, block: Block, size: int) -> None:
        rest = self._block(block.size - size, block.small)
        rest.before = block
        rest.after = block.after
        if rest.after is not None:
            rest.after.before = rest
        block.after = rest
        block.size = size
        self._keep(rest)

    def _keep(self, block: Block) -> None:
        block.free = True
        bisect.insort(self.free_blocks[block.small], block, key=lambda b: (b.size, b.number))

    def _forget(self, block: Block) -> None:
        self.free_blocks[block.small].remove(block)


class Allocating(LiveBytes):
    """Gives every tensor made inside a block of an allocator, and takes it back with the tensor."""

    def __init__(self, model: torch.nn.Module, allocator: Allocator, all_true: bool):
        super().__init__(model, all_true=all_true)
        self.allocator = allocator
        self.blocks = {}

    def _count(self, storage: torch.UntypedStorage) -> None:
        super()._count(storage)
        key = storage._cdata
        block = self.allocator.allocate(storage.nbytes())

        def release(_):
            del self.blocks[key]
            self.allocator.release(block)

        self.blocks[key] = (block, weakref.ref(storage, release))


def step(base: torch.nn.Module, plan: Plan, length: int) -> None:
    """Forward, loss and backward of one batch of `length` tokens a row, as `dry_run` does it."""
    ids = torch.zeros(plan.batch, length, dtype=torch.long, device="meta")
    mask = torch.ones_like(ids)
    if plan.loss_chunk:
        hidden = base.base_model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
        tokens = hidden.flatten(0, 1)
        head = base.get_output_embeddings()
        loss = chunked_loss.summed_cross_entropy(tokens, ids.flatten(), head, plan.loss_chunk)
    else:
        loss = base(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss
    loss.backward()


def simulate(plan: Plan, lengths: list[int]) -> dict[str, float]:
    """Steps of these lengths, one after another, on an empty card that holds the weights.

    Returns:
        Bytes: of the tensors at their peak (`live`), in blocks and in segments, all without the
        weights; and what segments have more, as a share of `live`.
    """
    allocator = Allocator()
    stored = ledger.predict(plan)
    stays = stored.total_bytes - stored[ledger.GRADIENTS]
    for _ in range(stays // (64 * MIB)):  # how weights are cut does not matter here
        allocator.allocate(64 * MIB)
    before = allocator.reserved
    model = dry_run._model_on_meta(plan.config.num_hidden_layers, plan)
    base = model.get_base_model()
    model.train().zero_grad()
    with (
        Allocating(model, allocator, all_true=plan.batch == 1) as count,
        dry_run.as_on_its_device(plan),
    ):
        for length in lengths:
            step(base, plan, length)
            model.zero_grad()
    reserved = allocator.reserved - before
    return {
        "lengths": lengths,
        "rows": plan.batch,
        "live": count.peak,
        "blocks": allocator.peak_allocated - before,
        "segments": reserved,
        "slack": round(reserved / count.peak - 1, 4),
    }


def main() -> None:
    warnings.simplefilter("ignore")
    rows = []
    for pythia in ("1.4b", "12b"):
        config = configs.pythia_config(pythia)
        for changes in ({}, {"loss_chunk": 0}, {"per_device_train_batch_size": 4}):
            settings = validate({"profile": "full", **changes})
            plan = plan_of(settings, config=config, on_gpu=True)
            for lengths in ([512] * 3, [512, 207, 391, 64, 300, 512, 130, 443]):
                row = {"pythia": pythia, **changes, **simulate(plan, lengths)}
                print(row, flush=True)
                rows.append(row)
    slacks = [row["slack"] for row in rows]
    summary = {"budget.SLACK": budget.SLACK, "smallest": min(slacks), "largest": max(slacks)}
    provenance.write(
        TARGET, {**provenance.provenance((0,)), "summary": summary, "unit": "bytes", "runs": rows}
    )


if __name__ == "__main__":
    main()
