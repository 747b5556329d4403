"""Ranks of unlike speed in regime ``step``: the planners' plan for ranks of equal speed, dealt anew by how fast each is.

Shared sequences stay together and go to fast ranks where nodes allow it: ranks change places within a node, nodes of one size
with each other. Whole sequences, which any rank can take, are dealt longest first to the rank that would be done first, and
fill the time that sharers wait for each other. So are two other plans: one counts what was shared at a slow rank's speed, so
that it may be shared more widely; one shares each sequence over the fewest ranks. The fastest counts, the plan as it was
included.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np

from hdp.balance.clock import evaluate
from hdp.balance.evaluate import micro_batch_ticks
from hdp.balance.plan import IntArray, Plan
from hdp.balance.planners import naive
from hdp.balance.planners.problem import Problem
from hdp.balance.topology import Topology


def by_speed(made: Plan, problem: Problem, make: Callable[[Problem], Plan]) -> Plan:
    """The fastest of a plan and what dealing it anew makes of it; ``make``: the planner that made it.

    Plans that offload or recompute stay as they are.
    """
    topology = problem.topology
    if not topology.speeds or made.regime != "step" or made.offload or made.recompute:
        return made
    plans = [made]
    fewest = replace(naive.make(problem, "naive"), planner=made.planner)
    for plan in (made, make(with_slow_sharers(made, problem)), fewest):
        if not plan.offload:
            moved = onto_fast_ranks(plan, problem)
            grouped = [regrouped(plan, problem, wider) for wider in (0, 1)]
            plans += [moved, *(dealt(each, problem) for each in (moved, plan, *grouped))]
    return min(plans, key=lambda plan: evaluate(plan, problem.cost, topology).makespan)  # of equals the first


def with_slow_sharers(made: Plan, problem: Problem) -> Problem:
    """The problem in which sequences that a plan shares cost what they do on the slowest rank."""
    slowest = np.full(len(made.lengths), int(np.argmin(problem.topology.speeds)), dtype=np.int64)
    shared = np.diff(made.group_offsets) > 1
    costs = problem.costs

    def slow(ticks: IntArray) -> IntArray:
        return np.where(shared, problem.topology.slowed(ticks, slowest), ticks)

    attention = np.stack([slow(each) for each in costs.attention])
    return replace(problem, costs=replace(costs, linear=slow(costs.linear), attention=attention))


def onto_fast_ranks(made: Plan, problem: Problem) -> Plan:
    """With ranks renamed so that those which share most are fast."""
    load = shared_load(made, problem, replace(problem.topology, speeds=()))
    names = np.array(places(load.tolist(), problem.topology), dtype=np.int64)
    ranks = names[made.group_ranks]
    offsets = made.group_offsets
    for start, stop in pairwise(offsets.tolist()):
        ranks[start:stop].sort()
    return replace(made, group_ranks=ranks)


def regrouped(made: Plan, problem: Problem, wider: int = 0) -> Plan:
    """With each shared sequence on the ranks that would be done with it first, of its node where it stays in one; on as many as
    before, or ``wider`` by so many, longest first, one a slot."""
    topology = problem.topology
    groups, slots = [made.group(sequence) for sequence in range(len(made.lengths))], made.slots.copy()
    done = np.zeros(made.world_size, dtype=np.int64)
    shared = np.flatnonzero((np.diff(made.group_offsets) > 1) & (made.slots >= 0))
    for number, sequence in enumerate(shared[np.argsort(-problem.costs.work[shared], kind="stable")].tolist()):
        group = groups[sequence]
        near = [r for r in range(made.world_size) if topology.node(r) == topology.node(group[0])]
        ranks = np.array(near if topology.is_local(group) else range(made.world_size), dtype=np.int64)
        size = min(len(group) + wider, len(ranks))
        part = np.full(len(ranks), problem.costs.work[sequence] // size, dtype=np.int64)
        ends = done[ranks] + topology.slowed(part, ranks)
        chosen = np.sort(ranks[np.argsort(ends, kind="stable")[:size]])
        done[chosen] = ends[np.isin(ranks, chosen)].max()  # they end together
        groups[sequence], slots[sequence] = tuple(chosen.tolist()), number
    offsets = np.concatenate([[0], np.cumsum([len(group) for group in groups])]).astype(np.int64)
    ranks = np.array([rank for group in groups for rank in group], dtype=np.int64)
    return replace(made, group_offsets=offsets, group_ranks=ranks, slots=slots, slot_count=-1)


def places(load: list[int], topology: Topology) -> list[int]:
    """The new name of each rank: the most loaded node, and rank of a node, takes the place of the fastest of its size."""
    speeds, per_node, world = topology.speeds, topology.ranks_per_node, topology.world_size
    nodes = [list(range(first, min(first + per_node, world))) for first in range(0, world, per_node)]
    by_size: dict[int, list[list[int]]] = defaultdict(list)
    for node in nodes:
        by_size[len(node)].append(node)
    names = [0] * world
    for alike in by_size.values():
        busy = sorted(alike, key=lambda node: (-sum(load[r] for r in node), node[0]))
        fast = sorted(alike, key=lambda node: (-sum(speeds[r] for r in node), node[0]))
        for old, new in zip(busy, fast, strict=True):
            ranked = sorted(new, key=lambda r: (-speeds[r], r))
            for rank, name in zip(sorted(old, key=lambda r: (-load[r], r)), ranked, strict=True):
                names[rank] = name
    return names


def shared_only(made: Plan) -> Plan:
    """Without its whole sequences, which then are in no slot."""
    return replace(made, slots=np.where(np.diff(made.group_offsets) > 1, made.slots, -1))


def shared_load(made: Plan, problem: Problem, topology: Topology) -> IntArray:
    """Ticks of each rank's micro-batches of shared sequences."""
    load = np.zeros(made.world_size, dtype=np.int64)
    for work in micro_batch_ticks(shared_only(made), problem.costs, topology):
        load[work.ranks] += work.ticks
    return load


def dealt(made: Plan, problem: Problem) -> Plan:
    """With its whole sequences dealt anew, and all slots numbered anew."""
    sizes = np.diff(made.group_offsets)
    whole = np.flatnonzero((sizes == 1) & (made.slots >= 0))
    works, topology = problem.costs.work, problem.topology
    done = shared_load(made, problem, topology)
    mine: dict[int, list[int]] = defaultdict(list)
    ranks = np.arange(made.world_size)
    for sequence in whole[np.argsort(-works[whole], kind="stable")].tolist():
        ends = done + topology.slowed(np.full(made.world_size, works[sequence], dtype=np.int64), ranks)
        rank = int(ends.argmin())
        done[rank] = ends[rank]
        mine[rank].append(sequence)
    owners = made.group_ranks.copy()
    for rank, sequences in mine.items():
        owners[made.group_offsets[sequences]] = rank
    slots = _Slots(made, problem, mine).number()
    return replace(made, group_ranks=owners, slots=slots, slot_count=-1)


class _Slots:
    """Numbers slots: shared ones in the order that they had, whole sequences where their rank would wait, or at the end."""

    def __init__(self, made: Plan, problem: Problem, mine: dict[int, list[int]]) -> None:
        self.made, self.problem, self.mine = made, problem, mine
        self.ready = [0] * made.world_size
        self.next = [0] * made.world_size
        self.slots = np.where(made.lengths > 0, 0, made.slots)

    def number(self) -> IntArray:
        made = self.made
        sequences: dict[int, list[int]] = defaultdict(list)
        for sequence in np.flatnonzero((np.diff(made.group_offsets) > 1) & (made.slots >= 0)).tolist():
            sequences[int(made.slots[sequence])].append(sequence)
        for slot, work in enumerate(micro_batch_ticks(shared_only(made), self.problem.costs, self.problem.topology)):
            for component in np.unique(work.component).tolist():
                coupled = work.component == component
                self._share(
                    dict(zip(work.ranks[coupled].tolist(), work.ticks[coupled].tolist(), strict=True)), sequences[slot]
                )
        for rank in range(made.world_size):
            self._fill(rank, None)
        return self.slots

    def _share(self, ranks: dict[int, int], sequences: list[int]) -> None:
        """One slot of coupled ranks, and what each computes there; who has less to do takes whole sequences along."""
        start = max(self.ready[rank] for rank in ranks)
        for rank in ranks:
            self._fill(rank, start - self.ready[rank])
        number = max(self.next[rank] for rank in ranks)
        room = dict.fromkeys(ranks, self.problem.capacity)
        for sequence in sequences:
            group = self.made.group(sequence)
            if group[0] in ranks:
                self.slots[sequence] = number
                for rank in group:
                    room[rank] -= -(-int(self.made.lengths[sequence]) // len(group))
        longest = max(ranks.values())
        for rank, ticks in ranks.items():
            self._along(rank, number, longest - ticks, room[rank])
            self.ready[rank], self.next[rank] = start + longest, number + 1

    def _along(self, rank: int, slot: int, gap: int, room: int) -> None:
        """Whole sequences of a rank into a slot that it shares, as far as ticks and tokens allow."""
        later = []
        for sequence in self.mine.get(rank, []):
            length, took = int(self.made.lengths[sequence]), self._ticks(rank, int(self.problem.costs.work[sequence]))
            if length > room or took > gap:
                later.append(sequence)
                continue
            self.slots[sequence], room, gap = slot, room - length, gap - took
        self.mine[rank] = later

    def _ticks(self, rank: int, ticks: int) -> int:
        return int(self.problem.topology.slowed(np.array([ticks]), np.array([rank]))[0])

    def _fill(self, rank: int, gap: int | None) -> None:
        """Whole sequences of a rank, longest first, first fit into micro-batches, as far as ``gap`` ticks allow; None: all."""
        later: list[int] = []
        room: list[int] = []
        costs, lengths = self.problem.costs, self.made.lengths
        for sequence in self.mine.get(rank, []):
            length = int(lengths[sequence])
            at = next((i for i, free in enumerate(room) if free >= length), len(room))
            ticks = int(costs.work[sequence]) + (costs.constant if at == len(room) else 0)
            took = self._ticks(rank, ticks)
            if gap is not None and took > gap:
                later.append(sequence)
                continue
            if gap is not None:
                gap -= took
            if at == len(room):
                room.append(max(self.problem.capacity, length))
            room[at] -= length
            self.slots[sequence] = self.next[rank] + at
            self.ready[rank] += took
        self.next[rank] += len(room)
        self.mine[rank] = later
