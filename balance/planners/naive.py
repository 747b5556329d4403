"""Naive HDP (ByteScale, Alg. 1): the fewest ranks for every sequence, best-fit packs for the short ones.

Long sequences take their smallest group, short ones are packed best-fit into micro-batches of one capacity, and both are
dealt to ranks by tokens alone. Work is not looked at: this is the first step of the paper's ablation.
"""

from __future__ import annotations

import bisect
import heapq

import numpy as np

from hdp.balance.plan import IntArray, Plan
from hdp.balance.planners.problem import Problem


def best_fit(lengths: IntArray, order: IntArray, capacity: int) -> list[list[int]]:
    """Packs of at most ``capacity`` tokens: each sequence of ``order`` goes where it leaves the least room."""
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, pack), ascending
    for i in order.tolist():
        length = int(lengths[i])
        at = bisect.bisect_left(room, (length, -1))
        if at == len(room):
            packs.append([i])
            bisect.insort(room, (capacity - length, len(packs) - 1))
            continue
        free, pack = room.pop(at)
        packs[pack].append(i)
        bisect.insort(room, (free - length, pack))
    return packs


def make(problem: Problem, name: str) -> Plan:
    """Alg. 1; a unit (pack or shared sequence) goes to the ranks that are free first, in time with its sharers."""
    lengths, world = problem.lengths, problem.world_size
    order = problem.descending
    is_long = lengths[order] > problem.capacity
    groups: list[tuple[int, ...]] = [(0,)] * len(lengths)
    slots = np.full(len(lengths), -1, dtype=np.int64)
    next_slot = np.zeros(world, dtype=np.int64)  # micro-batches that each rank has so far
    for i in order[is_long].tolist():
        size, _ = problem.smallest_group(int(lengths[i]))
        start = _earliest_window(next_slot, size, problem.topology.ranks_per_node)
        window = slice(start, start + size)
        slots[i] = next_slot[window].max()
        next_slot[window] = slots[i] + 1
        groups[i] = tuple(range(start, start + size))
    free = [(int(next_slot[rank]), rank) for rank in range(world)]
    heapq.heapify(free)
    for pack in best_fit(lengths, order[~is_long], problem.capacity):
        slot, rank = heapq.heappop(free)
        for i in pack:
            groups[i], slots[i] = (rank,), slot
        heapq.heappush(free, (slot + 1, rank))
    return problem.plan(groups, slots.tolist(), planner=name)


def _earliest_window(next_slot: IntArray, size: int, node: int) -> int:
    """First of ``size`` consecutive ranks whose latest is earliest; whole nodes first, then the lowest rank."""
    latest = np.lib.stride_tricks.sliding_window_view(next_slot, size).max(axis=1)
    starts = np.flatnonzero(latest == latest.min())
    if size <= node:
        inside = starts[starts % node + size <= node]
        return int(inside[0]) if len(inside) else int(starts[0])
    aligned = starts[starts % node == 0]
    return int(aligned[0]) if len(aligned) else int(starts[0])
