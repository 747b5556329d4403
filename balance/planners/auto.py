"""``auto``: any group size, work instead of tokens, more ranks than the fewest where that pays; the search is in C++.

Sequences are sorted longest first before anything is decided, so that the plan does not depend on the order of the batch.
The search tries targets for the makespan, from the lower bound upwards, and stops at the first that holds; its budget is
a number of targets, never a time.
"""

from __future__ import annotations

import numpy as np

from hdp import _planner
from hdp.balance.memory import capacity_with
from hdp.balance.plan import IntArray, Plan
from hdp.balance.planners.problem import Problem

STEP_EFFORT = 12
SLOT_EFFORT = 24


def terms(problem: Problem, order: IntArray) -> IntArray:
    """What the search reads: int64 [9, sequences of ``order``], see ``csrc/planner.cpp``."""
    costs = problem.costs
    lengths = costs.lengths[order]
    # Ranks that run freely pay a micro-batch's constant by the tokens that fill it; in regime slot all pay it at once.
    constant = costs.constant if problem.regime == "step" else 0
    linear = costs.linear[order] + constant * lengths // problem.capacity
    rows = [lengths, smallest_groups(problem, lengths), linear, *costs.attention[:, order]]
    rows += [costs.ring[0, 0][order], costs.ring[0, 1][order], costs.ring[1, 0][order], costs.ring[1, 1][order]]
    return np.ascontiguousarray(np.stack(rows), dtype=np.int64)


def smallest_groups(problem: Problem, lengths: IntArray) -> IntArray:
    """Fewest ranks of each sequence: without offload, unless only offload makes it fit the cluster."""
    smallest = -(-lengths // problem.capacity)
    if problem.offload == 0:
        return smallest
    largest = capacity_with(problem.capacity, problem.cost.layers, problem.offload)
    return np.where(smallest <= problem.world_size, smallest, -(-lengths // largest))


def make(problem: Problem, name: str) -> Plan:
    """The best plan within the budget of targets."""
    order = problem.descending
    topology = problem.topology
    effort = STEP_EFFORT if problem.regime == "step" else SLOT_EFFORT
    slots, offsets, ranks, _ = _planner.solve(
        terms(problem, order),
        topology.world_size,
        topology.ranks_per_node,
        problem.capacity,
        *problem.costs.latency,
        problem.costs.constant,
        problem.regime,
        effort,
    )
    return in_batch_order(problem, name, order, slots, offsets, ranks)


def in_batch_order(
    problem: Problem, name: str, order: IntArray, slots: IntArray, offsets: IntArray, ranks: IntArray
) -> Plan:
    """The plan of the whole batch from groups of its sequences in ``order``; the others hold no tokens."""
    count = len(problem.lengths)
    sizes = np.ones(count, dtype=np.int64)
    sizes[order] = np.diff(offsets)
    all_offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    all_slots = np.full(count, -1, dtype=np.int64)
    all_slots[order] = slots
    all_ranks = np.zeros(int(all_offsets[-1]), dtype=np.int64)
    position = np.arange(len(ranks)) - np.repeat(offsets[:-1], np.diff(offsets))
    all_ranks[np.repeat(all_offsets[:-1][order], np.diff(offsets)) + position] = ranks
    made = Plan(
        lengths=problem.lengths,
        world_size=problem.world_size,
        capacity=problem.capacity,
        regime=problem.regime,
        planner=name,
        slots=all_slots,
        group_offsets=all_offsets,
        group_ranks=all_ranks,
    )
    return problem.with_offload(made) if problem.offload > 0 else made
