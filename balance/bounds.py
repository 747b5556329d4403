"""What no plan can beat: lower bounds on the makespan, in ticks.

A bound holds for plans that offload up to the problem's ratio: copies are not charged, and tokens fill the room that it makes.
"""

from __future__ import annotations

import numpy as np

from hdp.balance.plan import IntArray
from hdp.balance.planners.problem import Problem


def fewest_ranks(problem: Problem, sequences: IntArray, ticks: int) -> tuple[IntArray, IntArray]:
    """Per sequence the fewest ranks whose share takes at most ``ticks``, and whether they span nodes.

    World + 1 where even the whole world takes longer. Shares fall with the group within a node, and across nodes.
    """
    node = problem.topology.node_size
    inside = _search(problem, sequences, ticks, 1, node, 0)
    across = _search(problem, sequences, ticks, node + 1, problem.world_size, 1)
    return np.where(inside <= node, inside, across), (inside > node).astype(np.int64)


def _search(problem: Problem, sequences: IntArray, ticks: int, low: int, high: int, across: int) -> IntArray:
    bad = np.full(len(sequences), low - 1, dtype=np.int64)
    good = np.full(len(sequences), max(high, low - 1) + 1, dtype=np.int64)
    while np.any(good - bad > 1):
        mid = np.maximum((good + bad) // 2, 1)
        fits = problem.costs.share(sequences, mid, across) <= ticks
        active = good - bad > 1
        good = np.where(active & fits, mid, good)
        bad = np.where(active & ~fits, mid, bad)
    return good


def shortest_share(problem: Problem, sequences: IntArray) -> IntArray:
    """Ticks of each sequence at its best group size: no slot that holds it is shorter."""
    node, world = problem.topology.node_size, problem.world_size
    best = problem.costs.work[sequences]
    for size, across in ((node, 0), (world, int(world > node))):
        best = np.minimum(best, problem.costs.share(sequences, size, across))
    return best


def step_bound(problem: Problem) -> int:
    """Regime ``step``: the smallest makespan that the work of all sequences and the longest of them allow.

    Within T ticks a sequence needs as many ranks as keep its share below T, and loses on each of them what its ring does
    not hide. Loss counts only while every longer sequence loses as well: a longer one that hides its ring could be packed
    with it and hide both.
    """
    order = problem.descending
    if not len(order):
        return 0
    low, high = 0, int(shortest_share(problem, order).max()) + int(problem.costs.work.sum()) + problem.costs.constant
    while high - low > 1:
        middle = (low + high) // 2
        if _could_take(problem, order, middle):
            high = middle
        else:
            low = middle
    return high


def _could_take(problem: Problem, order: IntArray, makespan: int) -> bool:
    ticks = makespan - problem.costs.constant  # every rank with work runs at least one micro-batch
    work = int(problem.costs.work.sum())
    if ticks < 0 or work > ticks * problem.world_size:
        return False
    lost, at = 0, 0
    while at < len(order):  # in blocks, for usually only a few lose
        block = order[at : at + 64]
        sizes, across = fewest_ranks(problem, block, ticks)
        if np.any(sizes > problem.world_size):
            return False
        losses = problem.costs.share(block, sizes, across) * sizes - problem.costs.work[block]
        exposed = losses > sizes * 4  # more than what rounding up to ticks explains
        stop = len(block) if exposed.all() else int(np.argmin(exposed))
        lost += int((losses - 4 * sizes)[:stop].sum())
        if work + lost > ticks * problem.world_size:
            return False
        if stop < len(block):
            # The longest of the rest decides whether the makespan is long enough at all.
            return True
        at += len(block)
    return True


def slot_bound(problem: Problem) -> int:
    """Regime ``slot``: see :mod:`hdp.balance.barrier_bound`, which needs scipy."""
    from hdp.balance.barrier_bound import slot_bound as sharper

    return sharper(problem)
