"""``auto``: any group size, work instead of tokens, more ranks than the fewest where that pays; the search is in C++.

Sequences are sorted longest first before anything is decided, so that the plan does not depend on the order of the batch.
The search tries targets for the makespan, from the lower bound upwards, and stops at the first that holds; its budget is
a number of targets, never a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from hdp import _planner
from hdp.balance.bounds import step_bound
from hdp.balance.evaluate import Evaluation, evaluate
from hdp.balance.memory import capacity_with, most_moved, refuse_no_room
from hdp.balance.plan import DoesNotFit, IntArray, Plan
from hdp.balance.planners import bytescale, naive, static
from hdp.balance.planners.problem import Problem
from hdp.balance.planners.recompute import longer_than_all, spread

STEP_EFFORT = 12
SLOT_EFFORT = 24
MOST_PLACES = 1 << 18
MOST_DOCUMENTS = 1024
"""Documents times ranks, and documents, up to which batches are planned in several ways."""
NEAR = 1.001
"""Makespan over the bound up to which no other way is tried, and over that of another way up to which the search's plan is
kept."""
CLOSE = 1.01
"""Where sharing takes the host something: makespan over that of the fastest plan up to which the one that shares fewest
documents is taken, for what sharing costs is known worst."""
RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Offload ratios up to which a plan is made, as parts of the ratio allowed."""


def terms(problem: Problem, order: IntArray, room: int) -> IntArray:
    """What the search reads: int64 [11, sequences of ``order``], see ``csrc/planner.cpp``; ``room``: tokens of a share."""
    costs = problem.costs
    rows = np.empty((11, len(order)), dtype=np.int64)
    lengths = rows[0]
    for row, of_all in zip(
        (0, *range(2, 11)),
        (costs.lengths, costs.linear, *costs.attention, *costs.ring.reshape(4, -1), *costs.handling),
        strict=True,
    ):
        np.take(of_all, order, out=rows[row], mode="clip")  # mode: without a copy
    rows[1] = -(-lengths // room)
    if costs.constant and problem.regime == "step":
        # Ranks that run freely pay a micro-batch's constant by the tokens that fill it; in regime slot all pay it at once.
        rows[2] += costs.constant * lengths // problem.capacity
    return rows


def make(problem: Problem, name: str) -> Plan:
    """The best plan of the search; of a small batch that ends far from the bound, the best of the other planners' as well.

    The search of regime ``step`` places documents one by one. Where many must be shared, one ring for all of a slot may hide
    more; where micro-batches cost something by themselves, plans that are made slot by slot can have fewer of them; and of
    two or three documents, fewer ranks than the last ones left over may be the better group. The search knows no copies either:
    where what is offloaded shows, long documents apart from the others may be better, so that only theirs leave.
    """
    made = _over_ratios(problem, name)
    small = _is_small(problem)
    long = longer_than_all(problem)
    if not (small or long):
        return made
    shows, shortest = _rank(problem, made)
    spares, must = problem.costs.has_host, int(np.count_nonzero(problem.lengths > problem.capacity))
    if not shows and shortest <= step_bound(problem) * NEAR and not (spares and _shared(made) > must):
        return made
    plans = [made, *_others(problem, name, long, small)]
    ranked = [(*_rank(problem, each), number) for number, each in enumerate(plans)]
    shows, shortest, _ = min(ranked)
    limit = shortest * (CLOSE if spares else NEAR)
    close = [(makespan, number) for shown, makespan, number in ranked if shown == shows and makespan <= limit]
    return plans[min(close, key=lambda each: (_shared(plans[each[1]]) if spares else each[1] > 0, *each))[1]]


def _shared(made: Plan) -> int:
    """Documents on more than one rank."""
    return int(np.count_nonzero(np.diff(made.group_offsets) > 1))


def _is_small(problem: Problem) -> bool:
    documents = len(problem.lengths)
    return documents <= MOST_DOCUMENTS and documents * problem.world_size <= MOST_PLACES


def _rank(problem: Problem, made: Plan) -> tuple[bool, int]:
    """Whether copies show though only those that hide are allowed (such plans come last), and the makespan."""
    result = evaluate(made, problem.cost, problem.topology)
    return problem.offload_hidden_only and _shows(result), result.makespan


def _others(problem: Problem, name: str, long: list[int], small: bool) -> Iterator[Plan]:
    """Plans made otherwise; ``long``: documents that are longer than all micro-batches of a slot without offload."""
    if long:
        yield from _within_tiers(problem, lambda: spread(problem, partial(_over_ratios, name=name), long, again=False))
    if not small:
        return
    plain = replace(problem, offload=0.0)
    for each in [problem] * (problem.offload > 0) + [plain] * (not long):
        for other, module in (("static", static), ("naive", naive), ("bytescale", bytescale)):
            for made in _within_tiers(problem, partial(module.make, each, other)):
                yield replace(made, planner=name)
    if problem.regime == "step" and not long:
        yield replace(_over_ratios(replace(plain, regime="slot"), name), regime="step")


def _within_tiers(problem: Problem, make: Callable[[], Plan]) -> list[Plan]:
    """The plan of ``make``, if there is one and what it offloads has room."""
    try:
        made = make()
    except DoesNotFit:
        return []
    outside = problem.cost.outside_memory
    return [] if made.offload and outside and most_moved(made, problem.cost) > outside else [made]


def _over_ratios(problem: Problem, name: str) -> Plan:
    """The best plan within the budget of targets, over ratios up to which activations may be offloaded.

    A ratio decides how many tokens a share of a long sequence may hold, and in regime ``slot`` a micro-batch: fewer ranks a
    sequence, fewer slots. Plans whose copies show are taken when they are faster all the same, or, if only copies that hide
    are allowed, when no other plan fits.
    """
    longest = int(problem.lengths.max(initial=0))
    ratios = _ratios(problem, longest)
    if ratios == [0.0]:
        return search(problem, name, problem.capacity)  # nothing leaves the device, nothing to compare
    plans: list[tuple[tuple[bool, int, float], Plan]] = []
    for ratio in ratios:
        room = capacity_with(problem.capacity, problem.cost, ratio)
        made = search(problem, name, room)
        if problem.cost.outside_memory and most_moved(made, problem.cost) > problem.cost.outside_memory:
            continue
        result = evaluate(made, problem.cost, problem.topology)
        shows = problem.offload_hidden_only and _shows(result)
        plans.append(((shows, result.makespan, ratio), made))
    if not plans:
        raise refuse_no_room(problem.cost)
    return min(plans, key=lambda entry: entry[0])[1]


def _ratios(problem: Problem, longest: int) -> list[float]:
    """Ratios worth a plan: 0 where everything fits without, and each that makes more room for something."""
    fits = longest <= problem.world_size * problem.capacity
    gains = problem.regime == "slot" or longest > problem.capacity
    if problem.offload == 0 or (fits and not gains):
        return [0.0]
    ratios = sorted({part * problem.offload for part in RATIOS})
    cost = problem.cost
    return [r for r in ratios if longest <= problem.world_size * capacity_with(problem.capacity, cost, r)]


def _shows(result: Evaluation) -> bool:
    """Whether copies take more than 1/1024 of the step on some rank."""
    return int(result.copying.max(initial=0)) * 1024 > result.makespan


def search(problem: Problem, name: str, room: int) -> Plan:
    """The best plan whose shares hold at most ``room`` tokens."""
    order = problem.descending
    slots, offsets, ranks, _ = solve(problem, order, room)
    return in_batch_order(problem, name, order, slots, offsets, ranks)


def solve(problem: Problem, order: IntArray, room: int) -> tuple[IntArray, IntArray, IntArray, int]:
    """Slot of each sequence of ``order``, offsets of groups, their ranks, and the makespan in ticks; in C++."""
    topology = problem.topology
    slot = problem.regime == "slot"
    return _planner.solve(
        terms(problem, order, room),
        topology.world_size,
        topology.ranks_per_node,
        room if slot else problem.capacity,
        *problem.costs.latency,
        (problem.costs.tile, problem.costs.message, problem.costs.round),
        problem.costs.constant,
        problem.regime,
        SLOT_EFFORT if slot else STEP_EFFORT,
    )


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
