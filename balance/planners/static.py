"""The baseline: one DP x CP mesh for the whole batch, as people run it today, made as strong as it can be.

Every sequence is cut over all ranks of one CP group; a micro-batch is a pack of at most CP x capacity tokens. Three
packings: ``static-random`` (the order of a shuffled data set), ``static-ffd`` (first fit, longest first) and
``static-balanced`` (the least loaded pack, longest first). ``static`` takes the best of the last two over every CP that
divides the world and holds the longest sequence.
"""

from __future__ import annotations

import numpy as np

from hdp.balance.evaluate import evaluate
from hdp.balance.plan import IntArray, Plan
from hdp.balance.planners.problem import Problem

PACKINGS = ("random", "ffd", "balanced")
MOST_DEGREES = 4
"""CP degrees tried beyond the smallest: a larger mesh only sends more."""


def make(problem: Problem, name: str) -> Plan:
    """The best mesh of the packing in ``name``; raises nothing of its own, for the problem fits one group of all ranks."""
    packings = [name.removeprefix("static-")] if name != "static" else ["ffd", "balanced"]
    degrees = _degrees(problem)
    plans = [_mesh(problem, name, degree, packing) for degree in degrees for packing in packings]
    times = [evaluate(plan, problem.cost, problem.topology).makespan for plan in plans]
    return plans[int(np.argmin(times))]


def _degrees(problem: Problem) -> list[int]:
    """CP degrees that divide the world and hold the longest sequence, smallest first."""
    world = problem.world_size
    longest = int(problem.lengths.max(initial=1))
    smallest, _ = problem.smallest_group(longest)
    fitting = [d for d in range(1, world + 1) if world % d == 0 and d >= smallest]
    return fitting[:MOST_DEGREES]


def _mesh(problem: Problem, name: str, degree: int, packing: str) -> Plan:
    """Pack, then deal the packs to DP groups: heaviest first to the group with the least work so far."""
    meshes = problem.world_size // degree
    order = problem.descending
    work = problem.costs.work
    shares = -(-problem.lengths // degree)  # tokens of the largest shard, so that the capacity holds for every member
    largest = max(problem.capacity, int(shares.max(initial=0)))
    if packing == "random":
        order = np.random.default_rng(problem.seed).permutation(np.sort(order))
        packs = _next_fit(shares, order, largest)
    else:
        packs = _first_fit(shares, order, largest)
    if packing == "balanced":
        packs = _balanced(shares, work, order, largest, -(-max(len(packs), 1) // meshes) * meshes)
    weight = np.array([int(work[pack].sum()) for pack in packs], dtype=np.int64)
    slots = np.full(len(work), -1, dtype=np.int64)
    mesh_of = np.zeros(len(work), dtype=np.int64)
    ranked = np.arange(len(packs)) if packing == "random" else np.argsort(-weight, kind="stable")
    load = np.zeros(meshes, dtype=np.int64)
    count = np.zeros(meshes, dtype=np.int64)
    for turn, p in enumerate(ranked.tolist()):
        # In regime slot similar packs meet in one slot; in regime step work alone counts.
        mesh = turn % meshes if packing == "random" or problem.regime == "slot" else int(load.argmin())
        slots[packs[p]] = count[mesh]
        mesh_of[packs[p]] = mesh
        load[mesh] += weight[p]
        count[mesh] += 1
    groups = [tuple(range(m * degree, (m + 1) * degree)) for m in range(meshes)]
    return problem.plan([groups[m] for m in mesh_of.tolist()], slots.tolist(), planner=name)


def _next_fit(tokens: IntArray, order: IntArray, capacity: int) -> list[list[int]]:
    """Packs in the order given, a new one whenever the next sequence does not fit."""
    packs: list[list[int]] = []
    held = capacity
    for i in order.tolist():
        if held + int(tokens[i]) > capacity:
            packs.append([])
            held = 0
        packs[-1].append(i)
        held += int(tokens[i])
    return packs


def _first_fit(tokens: IntArray, order: IntArray, capacity: int) -> list[list[int]]:
    """First fit over a tree of free room: n log n for any number of sequences."""
    leaves = 1 << max(len(order) - 1, 1).bit_length()
    room = [capacity] * (2 * leaves)
    packs: list[list[int]] = []
    for i in order.tolist():
        need = int(tokens[i])
        at = 1
        while at < leaves:
            at = 2 * at if room[2 * at] >= need else 2 * at + 1
        pack = at - leaves
        if pack == len(packs):
            packs.append([])
        packs[pack].append(i)
        room[at] -= need
        while at > 1:
            at //= 2
            room[at] = max(room[2 * at], room[2 * at + 1])
    return packs


def _balanced(tokens: IntArray, work: IntArray, order: IntArray, capacity: int, count: int) -> list[list[int]]:
    """``count`` packs or a few more: each sequence goes to the pack with the least work that has room."""
    packs: list[list[int]] = [[] for _ in range(count)]
    load = np.zeros(count, dtype=np.int64)
    room = np.full(count, capacity, dtype=np.int64)
    never = np.iinfo(np.int64).max
    for i in order.tolist():
        fits = room >= tokens[i]
        if not fits.any():
            packs.append([])
            load, room = np.append(load, 0), np.append(room, capacity)
            fits = np.append(fits, True)
        p = int(np.where(fits, load, never).argmin())
        packs[p].append(i)
        load[p] += work[i]
        room[p] -= tokens[i]
    return packs
