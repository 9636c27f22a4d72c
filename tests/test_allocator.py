"""The simulated allocator of `benchmarks/allocator.py`, on sequences worked out by hand from the
rules of torch's `CUDACachingAllocator.cpp`.
"""

import json
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from allocator import MIB, TARGET, Allocating, Allocator

from qlora_nb.memory import budget


@pytest.mark.parametrize(
    ("n_bytes", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (11 * MIB, 12 * MIB, 12 * MIB),  # what is left is no more than 1 MiB: it is not cut off
        (10 * MIB + 512, 10 * MIB + 512, 12 * MIB),
    ],
)
def test_a_tensor_alone(n_bytes, allocated, reserved):
    allocator = Allocator()
    allocator.allocate(n_bytes)
    assert (allocator.allocated, allocator.reserved) == (allocated, reserved)


def test_a_rest_that_is_too_small_to_cut_is_lost():
    allocator = Allocator()
    allocator.allocate(19 * MIB // 2)
    allocator.allocate(19 * MIB // 2)
    assert (allocator.allocated, allocator.reserved) == (20 * MIB, 20 * MIB)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0)])
def test_free_neighbours_become_one_block(order):
    allocator = Allocator()
    blocks = [allocator.allocate(6 * MIB) for _ in range(3)]
    for i in order:
        allocator.release(blocks[i])
    allocator.allocate(6 * MIB)
    allocator.allocate(9 * MIB)  # more than any of the three
    assert (allocator.allocated, allocator.reserved) == (15 * MIB, 20 * MIB)


def test_the_smallest_block_that_fits_is_taken_and_holes_cost_a_segment():
    allocator = Allocator()
    first = allocator.allocate(9 * MIB)
    allocator.allocate(4 * MIB)
    allocator.release(first)  # free are 9 MiB and, behind the second tensor, 7 MiB
    allocator.allocate(6 * MIB)
    allocator.allocate(8 * MIB)
    assert allocator.reserved == 20 * MIB
    allocator.allocate(5 * MIB)
    assert allocator.reserved == 40 * MIB


def test_tensors_of_a_run_are_given_blocks_while_they_live():
    allocator = Allocator()
    with Allocating(torch.nn.Module(), allocator, all_true=True) as count:
        a = torch.zeros(3 * MIB, device="meta", dtype=torch.uint8)
        b = a + 1
        del a
        c = b + 1
    assert allocator.allocated == count.live == b.nbytes + c.nbytes
    assert allocator.peak_allocated == count.peak == 6 * MIB
    assert allocator.reserved == 20 * MIB


def test_the_record_is_of_the_slack_in_use():
    record = json.loads(TARGET.read_text(encoding="utf-8"))
    assert record["clean"]
    assert record["summary"]["budget.SLACK"] == budget.SLACK
    for run in record["runs"]:
        assert run["live"] <= run["blocks"] <= run["segments"]
        assert run["slack"] == pytest.approx(run["segments"] / run["live"] - 1, abs=1e-4)
