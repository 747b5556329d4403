"""Shared sequences in every place of a step, on real ranks: each of these arrangements has hung once (see ``fsdp.py``)."""

from __future__ import annotations

import itertools

import pytest
from test_exactness import check, one_step
from tiny import make_documents

from hdp.balance import Plan

PLACES = [(count, place) for count in (1, 2, 3) for place in range(count)]
"""(micro-batches of a rank, which of them is the shared one)"""


def shared_at(first: tuple[int, int], second: tuple[int, int]) -> Plan:
    """Two ranks that share one sequence, with micro-batches of their own before and after it."""
    groups, slots = [(0, 1)], [10]
    for rank, (count, place) in enumerate((first, second)):
        for i in range(count):
            if i != place:
                groups.append((rank,))
                slots.append(10 + i - place)
    lengths = [41, *range(12, 12 + len(groups) - 1)]
    return Plan.from_groups(lengths, groups, slots, world_size=2, capacity=100, regime="step", planner="by hand")


@pytest.mark.parametrize(("first", "second"), itertools.product(PLACES, PLACES), ids=str)
def test_one_sequence_shared_by_two_ranks(ranks, exactness, first, second):
    plan = shared_at(first, second)
    case = f"world 2, shared at {first[1] + 1} of {first[0]} and {second[1] + 1} of {second[0]}"
    check(ranks, 2, "gqa", make_documents(plan.lengths.tolist()), plan, exactness, case)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_three_ranks_share_pairwise(ranks, exactness, order):
    """Every order of three pairs and a single: each rank's first and last micro-batches are shared with different ranks."""
    groups = [(0, 1), (1, 2), (2, 0), (1,)]
    plan = Plan.from_groups(
        [30, 31, 32, 9], groups, order, world_size=3, capacity=100, regime="step", planner="by hand"
    )
    case = f"world 3, pairs and a single in slots {order}"
    check(ranks, 3, "gqa", make_documents(plan.lengths.tolist()), plan, exactness, case)


def steps(world, documents, plans) -> list[float]:
    return [one_step(world, "gqa", documents, plan, 100, {})[0] for plan in plans]


def test_arrangements_follow_each_other_without_a_stale_order(ranks):
    """FSDP keeps an order of prefetching from step to step; steps of different shapes must not be misled by it."""
    documents = make_documents([20, 30, 40, 17])
    shapes = [
        ([(0, 1), (1,), (1,), (0,)], [0, 1, 2, 3]),
        ([(0, 1), (0, 1), (1, 0), (0, 1)], [0, 1, 2, 3]),
        ([(1,), (1,), (1,), (1,)], [0, 1, 2, 3]),
        ([(0,), (1,), (0, 1), (0,)], [0, 0, 1, 2]),
        ([(0, 1)] * 4, [0] * 4),
    ]
    plans = [
        Plan.from_groups([20, 30, 40, 17], *shape, world_size=2, capacity=200, regime="step", planner="by hand")
        for shape in [*shapes, *reversed(shapes)]
    ]
    first, second = ranks(2).run(steps, documents, plans)
    assert first == second and max(first) - min(first) < 1e-5 * first[0]
