"""What no plan can beat: lower bounds on the makespan, in ticks.

A bound holds for plans that offload up to the problem's ratio: copies are not charged, and tokens fill the room that it makes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from hdp.balance.memory import capacity_with
from hdp.balance.plan import IntArray
from hdp.balance.planners.problem import Problem


def fewest_ranks(problem: Problem, sequences: IntArray, ticks: int) -> tuple[IntArray, IntArray]:
    """Per sequence the fewest ranks that hold it and whose share takes at most ``ticks``, and whether they span nodes.

    World + 1 where the share is longer on any number of ranks.
    """
    node, world = problem.topology.node_size, problem.world_size
    least = fewest_that_hold(problem, sequences)
    inside = _search(problem, sequences, ticks, least, node, 0)
    swift = swifter_across(problem)  # then even a few ranks may be of different nodes
    across = _search(problem, sequences, ticks, np.maximum(least, 2 if swift else node + 1), world, 1)
    stays = inside <= node
    if swift:
        spent = [
            ticks_spent(problem, sequences, np.minimum(sizes, world), np.full(len(sequences), spans))
            for spans, sizes in enumerate((inside, across))
        ]
        stays &= (across > world) | (spent[0] <= spent[1])
    return np.where(stays, inside, across), (~stays).astype(np.int64)


def swifter_across(problem: Problem) -> bool:
    """Whether nodes reach each other over better links than their own ranks do, in bandwidth or in latency."""
    topology = problem.topology
    bandwidth, latency = topology.inter.bandwidth, topology.inter.latency
    return topology.nodes > 1 and (bandwidth > topology.intra.bandwidth or latency < topology.intra.latency)


def fewest_that_hold(problem: Problem, sequences: IntArray) -> IntArray:
    """Ranks whose memory a sequence needs, at the largest offload ratio; at most all of them."""
    if problem.cost.recomputed:
        return np.ones(len(sequences), dtype=np.int64)  # what holds then is the planner's to say
    room = capacity_with(problem.capacity, problem.cost, problem.offload)
    return np.clip(-(-problem.lengths[sequences] // room), 1, problem.world_size)


def _search(problem: Problem, sequences: IntArray, ticks: int, low: IntArray, high: int, across: int) -> IntArray:
    bad = low - 1
    best = np.clip(best_size(problem, sequences, across), low, np.maximum(high, low))
    good = np.where(high < low, low, best + 1)
    while np.any(good - bad > 1):
        mid = np.maximum((good + bad) // 2, 1)
        fits = problem.costs.share(sequences, mid, across) <= ticks + _missed(problem, ticks, across)
        active = good - bad > 1
        good = np.where(active & fits, mid, good)
        bad = np.where(active & ~fits, mid, bad)
    return np.where(good > best, np.maximum(high, low - 1) + 1, good)


def best_size(problem: Problem, sequences: IntArray, across: int) -> IntArray:
    """Ranks of a node, or of the world (``across``: 1), over which each sequence's share is shortest.

    Shares fall with the group until the hops of the ring, their latency above all, outweigh what the others take over.
    """
    high = problem.world_size if across else problem.topology.node_size
    rises = np.full(len(sequences), high, dtype=np.int64)
    falls = np.zeros(len(sequences), dtype=np.int64)
    last = problem.costs.share(sequences, rises, across)
    while np.any(rises - falls > 1):
        mid = (falls + rises) // 2
        here, there = (problem.costs.share(sequences, np.maximum(n, 1), across) for n in (mid, mid + 1))
        active = rises - falls > 1
        lower = (there < here) | (last < here)  # whole ticks: two neighbours may be alike on the way down
        falls = np.where(active & lower, mid, falls)
        rises = np.where(active & ~lower, mid, rises)
    return rises


def ticks_spent(problem: Problem, sequences: IntArray, sizes: IntArray, across: IntArray) -> IntArray:
    """Ticks of all members together, without what sharing takes the host (:func:`host_ticks`) and without the latency of hops,
    which sequences packed into one ring pay once."""
    costs = replace(problem.costs.without_host(), latency=(0, 0))
    alone = 2 * problem.costs.tile
    return np.asarray(costs.share(sequences, sizes, across) * sizes, dtype=np.int64) + alone


def host_ticks(problem: Problem, sequences: IntArray, sizes: IntArray) -> IntArray:
    """What sharing takes the hosts of all members together, beyond the tiles of a whole sequence; rounds and messages left out,
    which sequences packed into one ring pay once."""
    costs = replace(problem.costs, message=0, round=0)
    passes = [costs.host(phase, 1, costs.handling[phase][sequences], sizes) for phase in (0, 1)]
    return np.asarray(np.where(sizes > 1, sizes * (passes[0] + passes[1]) - 2 * costs.tile, 0), dtype=np.int64)


def shortest_share(problem: Problem, sequences: IntArray) -> IntArray:
    """Ticks of each sequence at its best group size that holds it: no slot with it is shorter."""
    node, world = problem.topology.node_size, problem.world_size
    least = fewest_that_hold(problem, sequences)
    best = np.where(least == 1, problem.costs.work[sequences], np.iinfo(np.int64).max)
    for across, most in ((0, node), (1, world)) if world > node else ((0, node),):
        sizes = np.maximum(best_size(problem, sequences, across), least)
        share = problem.costs.share(sequences, sizes, across)
        best = np.where(sizes <= most, np.minimum(best, share - _missed(problem, share, across)), best)
    return best


def _missed(problem: Problem, ticks: Any, across: int) -> Any:
    """How much shorter than at :func:`best_size` a share of about ``ticks`` may be at a size near it, and more."""
    return ticks // 1024 if problem.costs.latency[across] or problem.costs.has_host else 0 * ticks


def step_bound(problem: Problem) -> int:
    """Regime ``step``: the smallest makespan that the work of all sequences and the longest of them allow.

    Within T ticks a sequence needs as many ranks as keep its share below T, and loses on each of them what its ring does
    not hide. Loss counts only while every longer sequence loses as well: a longer one that hides its ring could be packed
    with it and hide both. What sharing takes the host hides nowhere, and counts for all.
    """
    order = problem.descending
    if not len(order):
        return 0
    low = -(-int(problem.costs.work.sum()) // problem.world_size) + problem.costs.constant - 1  # too short by a tick
    step = 1
    while not _could_take(problem, order, low + step):  # mostly the work alone decides
        low, step = low + step, max(4 * step, low >> 10)
    high = low + step
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
    lost, at, all_lose = 0, 0, True
    while at < len(order):  # in blocks, for usually only a few lose
        block = order[at : at + 64]
        sizes, across = fewest_ranks(problem, block, ticks)
        if np.any(sizes > problem.world_size):
            return False
        if problem.costs.has_host:
            lost += int(host_ticks(problem, block, sizes).sum())
        if all_lose:
            losses = ticks_spent(problem, block, sizes, across) - problem.costs.work[block]
            exposed = losses > sizes * 4  # more than what rounding up to ticks explains
            stop = len(block) if exposed.all() else int(np.argmin(exposed))
            lost += int((losses - 4 * sizes)[:stop].sum())
            all_lose = stop == len(block)
        if work + lost > ticks * problem.world_size:
            return False
        if not all_lose and not (problem.costs.has_host and np.any(sizes > 1)):
            # The longest of the rest decides whether the makespan is long enough at all.
            return True
        at += len(block)
    return True


def slot_bound(problem: Problem) -> int:
    """Regime ``slot``: see :mod:`hdp.balance.barrier_bound`, which needs scipy."""
    from hdp.balance.barrier_bound import slot_bound as sharper

    return sharper(problem)
