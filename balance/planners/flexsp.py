"""FlexSP: sequences in buckets, groups of power-of-two sizes, one mixed-integer programme a micro-batch (HiGHS).

ASPLOS'25, sections 4 and 5. The batch is blasted into M micro-batches of similar lengths and equal tokens (M from the
fewest that memory allows to a few more); within one, virtual groups are chosen and sequences, in buckets made by dynamic
programming, are assigned to them so that the slowest group is as fast as possible. Solved to a gap and within a limit of
CPU seconds, so the plan may differ between machines: plan on one rank and broadcast.
"""

from __future__ import annotations

import itertools
import time

import numpy as np

from hdp.balance.evaluate import evaluate
from hdp.balance.plan import IntArray, Plan, PlanError
from hdp.balance.planners.problem import Problem

BUCKETS = 16
MORE_MICRO_BATCHES = 2
"""Numbers of micro-batches tried beyond the fewest."""
SECONDS = 4.0
"""CPU seconds for one programme."""
TOTAL_SECONDS = 40.0
"""CPU seconds for all programmes of a batch, shared out as it goes; none gets less than half a second."""
GAP = 0.01
"""Relative gap at which HiGHS stops."""
MOST_STRETCHED = 32.0
"""Wall seconds that HiGHS gets for one CPU second, at most."""
MOST_GROUPS = 8
"""Virtual groups of one size that the programme distinguishes."""


class Budget:
    """CPU seconds of this thread: a planner that has to share its core finds the same plans, only later."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.monotonic(), time.thread_time()

    def left(self) -> float:
        """Seconds left of all programmes; negative when they are used up."""
        return TOTAL_SECONDS - (time.thread_time() - self._cpu)

    def wall(self, seconds: float) -> float:
        """``seconds`` as HiGHS counts them, on the wall, at the share of a core that this thread has had so far."""
        wall, cpu = time.monotonic() - self._wall, time.thread_time() - self._cpu
        return seconds * min(max(wall / cpu, 1.0), MOST_STRETCHED) if cpu > 0.05 else seconds


def make(problem: Problem, name: str) -> Plan:
    """The best of a few numbers of micro-batches; raises PlanError where none is found in time."""
    plans = candidates(problem, name)
    times = [evaluate(made, problem.cost, problem.topology).makespan for made in plans]
    return plans[int(np.argmin(times))]


def candidates(problem: Problem, name: str) -> list[Plan]:
    """A plan for each number of micro-batches tried, the same for both regimes; at least one, or PlanError."""
    tokens = int(problem.lengths.sum())
    fewest = max(1, -(-tokens // (problem.world_size * problem.capacity)))
    plans: list[Plan] = []
    budget = Budget()
    for count in range(fewest, fewest + MORE_MICRO_BATCHES + 1):
        if plans and budget.left() < 0:
            break
        made = _blast(problem, name, count, budget)
        if made is not None:
            plans.append(made)
    if not plans:
        raise PlanError(
            f"flexsp found no plan of {fewest} to {fewest + MORE_MICRO_BATCHES} micro-batches in {TOTAL_SECONDS} s: "
            "use planner auto"
        )
    return plans


def _blast(problem: Problem, name: str, count: int, budget: Budget) -> Plan | None:
    """Micro-batches of similar lengths and equal tokens, each solved by itself."""
    order = problem.descending
    slot_of = np.full(len(problem.lengths), -1, dtype=np.int64)
    groups: list[tuple[int, ...]] = [(0,)] * len(problem.lengths)
    if len(order):
        before = np.cumsum(problem.lengths[order]) - problem.lengths[order]
        chunk = before * count // int(problem.lengths.sum())
        waiting = [order[chunk == k] for k in np.unique(chunk).tolist()[::-1]]
        slot = 0
        while waiting:
            chosen = waiting.pop()
            if budget.left() < -TOTAL_SECONDS / 2:
                return None
            seconds = min(max(budget.left() / (len(waiting) + 1), 0.5), SECONDS)
            solved = _solve(problem, chosen, budget.wall(seconds))
            if solved is None and len(chosen) == 1:
                return None
            if solved is None:  # equal tokens may still need more ranks than there are: halve the micro-batch
                waiting += [chosen[len(chosen) // 2 :], chosen[: len(chosen) // 2]]
                continue
            for i, ranks in solved.items():
                groups[i], slot_of[i] = ranks, slot
            slot += 1
    return problem.plan(groups, slot_of.tolist(), planner=name)


def _buckets(lengths: IntArray) -> list[IntArray]:
    """At most 16 runs of ``lengths`` (ascending), each standing for its longest, with the least tokens added.

    err[k][q] = min_j err[j][q-1] + sum over i in j..k of (s_k - s_i): FlexSP section 4.2. Long batches are first thinned to
    512 distinct lengths.
    """
    distinct, counts = np.unique(lengths, return_counts=True)
    step = max(1, len(distinct) // 512)
    ends = np.unique(np.append(np.arange(step - 1, len(distinct), step), len(distinct) - 1))
    total = np.concatenate([[0], np.cumsum(counts)])
    weight = np.concatenate([[0], np.cumsum(counts * distinct)])
    points = np.concatenate([[0], ends + 1])
    size = len(points) - 1
    # cost[j, k]: tokens added when points j..k become one bucket
    cost = distinct[points[1:] - 1][None, :] * (total[points[1:]][None, :] - total[points[:-1]][:, None])
    cost = cost - (weight[points[1:]][None, :] - weight[points[:-1]][:, None])
    cost = np.where(np.arange(size)[:, None] <= np.arange(size)[None, :], cost.astype(np.float64), np.inf)
    best, parents = cost[0], []
    for _ in range(min(BUCKETS, size) - 1):
        candidates = np.vstack([np.full((1, size), np.inf), best[:-1, None] + cost[1:]])
        parents.append(candidates.argmin(axis=0))
        best = np.minimum(candidates.min(axis=0), np.inf)
    edges, k = [size], size - 1
    for parent in reversed(parents):
        edges.append(int(parent[k]))
        k = edges[-1] - 1
    cuts = [int(total[points[e]]) for e in sorted({0, *edges})]
    return [np.arange(a, b) for a, b in itertools.pairwise(cuts)]


def _solve(problem: Problem, chosen: IntArray, seconds: float) -> dict[int, tuple[int, ...]] | None:
    """One micro-batch: sequence to ranks, in ``seconds`` of wall time; None when the programme finds nothing in time."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import lil_array
    except ImportError as error:
        raise PlanError("planner flexsp needs scipy: pip install 'hdp[flexsp]'") from error
    lengths = problem.lengths[chosen][::-1]
    sequences = chosen[::-1]
    buckets = _buckets(lengths)
    sizes = _virtual_groups(problem, int(lengths.sum()), int(lengths[-1]))
    groups, count = len(sizes), len(buckets)
    longest = np.array([sequences[bucket[-1]] for bucket in buckets])
    across = (sizes > problem.topology.node_size).astype(np.int64)
    # Variables: amounts[g, q] of bucket q on each of the like groups g, copies[g] in use, and the makespan.
    variables = groups * count + groups + 1
    scale = float(problem.costs.work[chosen].sum()) / problem.world_size + 1.0
    rows = lil_array((count + 3 * groups + 1, variables))
    low = np.full(count + 3 * groups + 1, -np.inf)
    high = np.zeros(count + 3 * groups + 1)
    for q, bucket in enumerate(buckets):
        rows[q, np.arange(groups) * count + q] = 1.0
        low[q] = high[q] = len(bucket)
    for g in range(groups):
        amounts = g * count + np.arange(count)
        share = problem.costs.share(longest, sizes[g], across[g]) / scale
        rows[count + 3 * g, amounts] = share
        rows[count + 3 * g, variables - 1] = -1.0
        rows[count + 3 * g + 1, amounts] = -(-problem.lengths[longest] // sizes[g])
        rows[count + 3 * g + 1, groups * count + g] = -float(problem.capacity)
        rows[count + 3 * g + 2, amounts] = 1.0
        rows[count + 3 * g + 2, groups * count + g] = -float(len(chosen))
    rows[count + 3 * groups, groups * count + np.arange(groups)] = sizes.astype(np.float64)
    high[-1] = problem.world_size
    objective = np.zeros(variables)
    objective[-1] = 1.0
    limits = np.concatenate([np.full(groups * count, float(len(chosen))), np.ones(groups), [np.inf]])
    result = milp(
        objective,
        constraints=LinearConstraint(rows.tocsr(), low, high),
        integrality=np.append(np.ones(variables - 1), 0),
        bounds=Bounds(np.zeros(variables), limits),
        options={"time_limit": seconds, "mip_rel_gap": GAP},
    )
    if result.x is None:
        return None
    amounts = np.rint(result.x[: groups * count]).astype(np.int64).reshape(groups, count)
    return _place(sequences, buckets, sizes, amounts)


def _virtual_groups(problem: Problem, tokens: int, longest: int) -> IntArray:
    """Sizes of the virtual groups, largest first: as many of each power of two as the world has."""
    sizes = []
    size = 1 << (problem.world_size.bit_length() - 1)
    while size:
        sizes += [size] * min(MOST_GROUPS * max(1, 8 // size), problem.world_size // size)
        size //= 2
    if problem.world_size & (problem.world_size - 1):
        sizes.insert(0, problem.world_size)  # a sequence may need every rank
    return np.array(sizes, dtype=np.int64)


def _place(
    sequences: IntArray, buckets: list[IntArray], sizes: IntArray, amounts: IntArray
) -> dict[int, tuple[int, ...]]:
    """Groups in use on consecutive ranks, the largest first; the sequences of each bucket dealt in order."""
    placed: dict[int, tuple[int, ...]] = {}
    taken = [0] * len(buckets)
    start = 0
    for g, size in enumerate(sizes.tolist()):
        if not amounts[g].any():
            continue
        ranks = tuple(range(start, start + size))
        start += size
        for q in np.flatnonzero(amounts[g]).tolist():
            for i in buckets[q][taken[q] : taken[q] + int(amounts[g, q])].tolist():
                placed[int(sequences[i])] = ranks
            taken[q] += int(amounts[g, q])
    return placed
