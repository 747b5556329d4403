"""ByteScale's balanced HDP (Alg. 2): buckets of equal work, dealt to the ranks that are behind.

``bytescale`` balances as for data parallelism alone: sequences come from the first bucket, so that ranks run similar
lengths at the same time. ``bytescale-pp`` takes them from all buckets in turn, so that consecutive micro-batches of a
pipeline are alike. Read literally the first pass has no rank that is behind (all times are 0); here a pass in which all
ranks are within delta of each other serves all of them, which seeds the loop and restarts it.

What the paper leaves open: a sequence of D ranks (Eq. 3) takes the D least loaded of the ranks that are behind, and of
all ranks if those are fewer; short sequences are packed into micro-batches of one capacity first (as in Alg. 1), and a
pack is dealt like a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hdp.balance.plan import IntArray, Plan
from hdp.balance.planners.naive import best_fit
from hdp.balance.planners.problem import Problem

DELTA = 1 / 64
"""A rank is behind when it lacks more than this part of the average time."""
BUCKETS = 16


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What is dealt in one piece: a long sequence, or a pack of short ones."""

    sequences: tuple[int, ...]
    size: int
    """Ranks that share it."""
    ticks: int
    """On each of them."""


def make(problem: Problem, name: str) -> Plan:
    """Alg. 2 with DP-balance, or PP-balance for ``bytescale-pp``."""
    units = _units(problem)
    buckets = _buckets(units)
    dealt = _deal(problem, units, buckets, from_all=name.endswith("-pp"))
    if problem.regime == "slot":
        slots = _similar_in_one_slot(problem, units, dealt)
    else:
        slots = _in_turn(problem, dealt)
    groups: list[tuple[int, ...]] = [(0,)] * len(problem.lengths)
    slot_of = np.full(len(problem.lengths), -1, dtype=np.int64)
    for (u, ranks), slot in zip(dealt, slots, strict=True):
        for i in units[u].sequences:
            groups[i], slot_of[i] = ranks, slot
    return problem.plan(groups, slot_of.tolist(), planner=name)


def _units(problem: Problem) -> list[Unit]:
    """Long sequences on their smallest groups and packs of the others, the longest first."""
    order = problem.descending
    is_long = problem.lengths[order] > problem.capacity
    units = []
    for i in order[is_long].tolist():
        size, _ = problem.smallest_group(int(problem.lengths[i]))
        across = int(size > problem.topology.node_size)
        units.append(Unit(sequences=(i,), size=size, ticks=int(problem.costs.share(i, size, across))))
    for pack in best_fit(problem.lengths, order[~is_long], problem.capacity):
        units.append(Unit(sequences=tuple(pack), size=1, ticks=int(problem.costs.work[pack].sum())))
    return sorted(units, key=lambda unit: -unit.ticks * unit.size)


def _buckets(units: list[Unit]) -> list[list[int]]:
    """Consecutive units whose total work is about equal."""
    target = sum(unit.ticks * unit.size for unit in units) / BUCKETS
    buckets: list[list[int]] = []
    held = target
    for u, unit in enumerate(units):
        if held >= target:
            buckets.append([])
            held = 0
        buckets[-1].append(u)
        held += unit.ticks * unit.size
    return [bucket[::-1] for bucket in buckets]  # taken from the end


def _deal(
    problem: Problem, units: list[Unit], buckets: list[list[int]], from_all: bool
) -> list[tuple[int, tuple[int, ...]]]:
    """(unit, ranks) in the order dealt."""
    world = problem.world_size
    times = np.zeros(world, dtype=np.int64)
    average = sum(unit.ticks * unit.size for unit in units) / world
    dealt: list[tuple[int, tuple[int, ...]]] = []
    turn = 0
    while buckets:
        behind = np.flatnonzero(times.max() - times > DELTA * average)
        if not len(behind):
            behind = np.arange(world)
        behind = behind[np.argsort(times[behind], kind="stable")]
        while len(behind) and buckets:
            bucket = buckets[turn % len(buckets)] if from_all else buckets[0]
            turn += 1
            unit = units[u := bucket.pop()]
            ranks = behind[: unit.size]
            if len(ranks) < unit.size:
                ranks = np.argsort(times, kind="stable")[: unit.size]
            times[ranks] = times[ranks].max() + unit.ticks
            dealt.append((u, tuple(sorted(ranks.tolist()))))
            behind = behind[~np.isin(behind, ranks)]
            buckets = [b for b in buckets if b]
    return dealt


def _in_turn(problem: Problem, dealt: list[tuple[int, tuple[int, ...]]]) -> list[int]:
    """Each unit in the first slot that all its ranks have free after what they were dealt before."""
    free: IntArray = np.zeros(problem.world_size, dtype=np.int64)
    slots = []
    for _, ranks in dealt:
        chosen = list(ranks)
        slots.append(int(free[chosen].max()))
        free[chosen] = slots[-1] + 1
    return slots


def _similar_in_one_slot(problem: Problem, units: list[Unit], dealt: list[tuple[int, tuple[int, ...]]]) -> list[int]:
    """Regime ``slot``: the same ranks, but each rank's units by falling duration, so that slots hold similar ones."""
    order = sorted(range(len(dealt)), key=lambda k: (-units[dealt[k][0]].ticks, k))
    slots = [0] * len(dealt)
    for k, slot in zip(order, _in_turn(problem, [dealt[k] for k in order]), strict=True):
        slots[k] = slot
    return slots
