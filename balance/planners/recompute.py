"""Layers that run again in backward, where a batch does not fit without. The planners themselves know nothing of it.

A sequence that all ranks together cannot hold, with all the offload that is allowed, gets a slot of its own: all ranks share
it, and as many of its layers run again as it takes. Each further layer costs one more forward (of all but attention, whose
outputs are kept, so that no message is sent twice), so these are the fewest that fit, unless copies would show for longer. The
planner plans the other sequences as if the batch ended there, and the slots of the long ones come first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from hdp.balance.clock import evaluate
from hdp.balance.cost import ring_phase
from hdp.balance.memory import (
    RATIO_STEP,
    capacity_with,
    fewest_ranks,
    hidden_ratio,
    moved_bytes,
    ratio_for,
    recomputed_capacity,
    recomputed_room,
    refuse_too_long,
)
from hdp.balance.plan import DoesNotFit, Plan
from hdp.balance.planners.problem import Problem

RECOMPUTE = ("off", "auto", "all")
SHOWS = 1024
"""Copies show that take more than one part in so many of the step, as for ``auto``."""

Make = Callable[[Problem], Plan]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A sequence in a slot of its own that all ranks share."""

    sequence: int
    layers: int
    """Layers that run again."""
    ratio: float
    """What leaves of the others, and of what these keep."""


class FittedProblem(Problem):
    """A problem whose offload ratios follow the layers that its cost model keeps and computes again."""

    def with_offload(self, made: Plan) -> Plan:
        """``made`` with the smallest ratio that lets each micro-batch fit."""
        ranks, slots, held = made.held()
        over = np.flatnonzero(held > self.capacity)
        if not len(over):
            return replace(made, offload=())
        steps = range(1, RATIO_STEP + 1)
        room = [capacity_with(self.capacity, self.cost, step / RATIO_STEP) for step in steps]
        ratios = np.minimum(np.searchsorted(room, held[over]) + 1, RATIO_STEP) / RATIO_STEP
        entries = zip(ranks[over].tolist(), slots[over].tolist(), ratios.tolist(), strict=True)
        return replace(made, offload=tuple(entries))


def check_fits(problem: Problem) -> None:
    """Raises :class:`DoesNotFit` for a sequence that is longer than all micro-batches of a slot."""
    longest = int(problem.lengths.max(initial=0))
    if longest > problem.world_size * capacity_with(problem.capacity, problem.cost, problem.offload):
        raise refuse_too_long(
            int(problem.lengths.argmax()), longest, problem.world_size, problem.capacity, problem.cost, problem.offload
        )


def everywhere(made: Plan, problem: Problem, capacity: int) -> Plan:
    """A plan of ``problem``, whose cost model recomputes, as a plan in which every slot does; ``capacity``: without."""
    slots = range(made.slot_count if problem.cost.recomputed else 0)
    return replace(
        made, capacity=capacity, recompute=tuple(slots), recompute_layers=tuple(problem.cost.recomputed for _ in slots)
    )


def where_needed(problem: Problem, make: Make, *, again: bool) -> Plan:
    """The plan of ``make``; where there is none, one with slots of all ranks for sequences longer than world x capacity.

    ``again``: layers may run again in backward, where a sequence does not fit otherwise, and where that is shorter than copies
    that show.
    """
    try:
        check_fits(problem)
        made = make(problem)
    except DoesNotFit as error:
        long = _too_long(problem, hidden=False)
        apart = long or longer_than_all(problem)
        if not apart or (long and not again):
            raise
        if long and not problem.cost.recompute_bytes:
            raise DoesNotFit(
                f"{error}; whether recomputation would help is unknown: the cost model's recompute_bytes is 0"
                " (a profile of an older version: run hdp profile again)"
            ) from error
        return spread(problem, make, apart, again=again)
    if not again or not made.offload or not problem.offload_hidden_only or not problem.cost.recompute_bytes:
        return made
    result = evaluate(made, problem.cost, problem.topology)
    if int(result.copying.max()) * SHOWS <= result.makespan or not (long := _too_long(problem, hidden=True)):
        return made
    other = spread(problem, make, long, again=again)
    return min(made, other, key=lambda each: evaluate(each, problem.cost, problem.topology).makespan)


def _too_long(problem: Problem, *, hidden: bool) -> list[int]:
    """Sequences that all ranks together do not hold, longest first; ``hidden``: at ratios whose copies hide."""
    found = []
    for i in longer_than_all(problem):
        length = int(problem.lengths[i])
        most = min(problem.offload, hidden_ratio(length, problem.cost)) if hidden else problem.offload
        if fewest_ranks(length, problem.capacity, problem.cost, most)[0] > problem.world_size:
            found.append(i)
    return found


def longer_than_all(problem: Problem) -> list[int]:
    """Sequences longer than world x capacity, longest first."""
    count = int(np.count_nonzero(problem.lengths > problem.world_size * problem.capacity))
    found: list[int] = problem.descending[:count].tolist()
    return found


def spread(problem: Problem, make: Make, sequences: list[int], *, again: bool) -> Plan:
    """``sequences`` in slots of their own, which all ranks share, the others as ``make`` plans them."""
    most = longer_than_all(problem)
    while True:
        lightest = {n: _lightest(problem, i, again) for n, i in {int(problem.lengths[i]): i for i in sequences}.items()}
        spreads = [replace(lightest[int(problem.lengths[i])], sequence=i) for i in sequences]
        lengths = problem.lengths.copy()
        lengths[sequences] = 0
        rest = replace(problem, lengths=lengths, costs=problem.cost.quantise(lengths, problem.topology))
        try:
            return _together(problem, make(rest), spreads)
        except DoesNotFit:
            # Its groups were too small for the room outside; on all ranks each has the most.
            if len(sequences) == len(most):
                raise
            sequences = most


def _lightest(problem: Problem, sequence: int, again: bool) -> Spread:
    """The layers that run again, and the ratio, with which a sequence on all ranks takes least; then the fewest layers."""
    length = int(problem.lengths[sequence])
    share = -(-length // problem.world_size)
    best: tuple[int, Spread] | None = None
    everywhere = problem.cost.recomputed  # under "all", whose capacity has them in it
    for layers in range(everywhere, problem.cost.movable_layers + 1 if again else everywhere + 1):
        cost = problem.cost.recomputing(layers)
        room = problem.capacity if everywhere else recomputed_room(problem.capacity, cost)
        ratio = ratio_for(share, room, cost)
        if ratio is None or ratio > problem.offload:
            continue
        if ratio and cost.outside_memory and moved_bytes(share, 1, cost, ratio) > cost.outside_memory:
            continue
        ticks = _ticks(replace(problem, cost=cost), length, ratio)
        if best is None or ticks < best[0]:
            best = (ticks, Spread(sequence=sequence, layers=layers, ratio=ratio))
        if not problem.offload:
            break  # nothing to weigh: more layers only take longer
    if best is None:
        raise _refuse(problem, sequence)
    return best[1]


def _refuse(problem: Problem, sequence: int) -> DoesNotFit:
    """The error for a sequence that does not even fit when all layers run again."""
    cost = problem.cost.recomputing(problem.cost.movable_layers)
    room = recomputed_capacity(problem.capacity, cost)
    error = refuse_too_long(sequence, int(problem.lengths[sequence]), problem.world_size, room, cost, problem.offload)
    held = (
        f", {cost.outside_memory:.4g} bytes of host memory and disk a rank"
        if problem.offload and cost.host_memory
        else ""
    )
    which = "all movable" if cost.is_default else f"{cost.recomputed} of {cost.layers}"
    return DoesNotFit(f"even when {which} layers run again in backward{held}: {error}")


def _ticks(problem: Problem, length: int, ratio: float) -> int:
    """What a sequence costs on all ranks, by the rules of :mod:`hdp.balance.evaluate`."""
    costs = problem.cost.quantise([length], problem.topology)
    size, across = problem.world_size, int(problem.topology.nodes > 1)
    linear = -(-int(costs.linear[0]) // size)
    forward = int(linear * costs.forward)
    copy = round(ratio * costs.copy * -(-length // size))
    total = costs.constant
    for phase, ticks in enumerate((forward, linear - forward)):
        attention = int(costs.attention[phase][0])
        if size > 1:
            attention = int(ring_phase(attention, int(costs.ring[across, phase][0]), costs.latency[across], size))
            attention += int(costs.host(phase, 1, int(costs.handling[phase][0]), size))
        else:
            attention += costs.tile
        total += max(ticks + attention, copy)
    return total


def _together(problem: Problem, made: Plan, spreads: list[Spread]) -> Plan:
    """One plan of the slots of ``spreads``, then those of ``made``."""
    world, first = problem.world_size, len(spreads)
    alone = np.zeros(len(problem.lengths), dtype=bool)
    alone[[each.sequence for each in spreads]] = True
    before = np.diff(made.group_offsets)
    sizes = np.where(alone, world, before)
    ranks = np.empty(int(sizes.sum()), dtype=np.int64)
    mine = np.repeat(alone, sizes)
    ranks[mine] = np.tile(np.arange(world), first)
    ranks[~mine] = made.group_ranks[~np.repeat(alone, before)]
    slots = np.where(made.slots >= 0, made.slots + first, made.slots)
    slots[[each.sequence for each in spreads]] = np.arange(first)
    offload = [(rank, slot + first, ratio) for rank, slot, ratio in made.offload]
    offload += [(rank, k, each.ratio) for k, each in enumerate(spreads) if each.ratio for rank in range(world)]
    again = {k: each.layers for k, each in enumerate(spreads) if each.layers}
    return replace(
        made,
        lengths=problem.lengths,
        slots=slots,
        group_offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        group_ranks=ranks,
        offload=tuple(sorted(offload)),
        recompute=tuple(again),
        recompute_layers=tuple(again.values()),
        slot_count=made.slot_count + first,
    )
