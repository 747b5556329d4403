"""A plan in time, with the layers that run again in backward: what its slots cost, and when its ranks begin and end them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hdp.balance.cost import CostModel
from hdp.balance.evaluate import Evaluation, SlotWork, micro_batch_ticks
from hdp.balance.evaluate import evaluate as evaluate_without
from hdp.balance.memory import slot_costs
from hdp.balance.plan import IntArray, Plan
from hdp.balance.topology import Topology


def slot_works(plan: Plan, cost: CostModel, topology: Topology) -> list[SlotWork]:
    """The micro-batches of a plan, slot by slot; those of slots that recompute under the cost of doing so."""
    works = micro_batch_ticks(plan, cost.quantise(plan.lengths, topology), topology)
    models = slot_costs(plan, cost)
    for model in set(models.values()):
        again = micro_batch_ticks(plan, model.quantise(plan.lengths, topology), topology)
        for slot in (slot for slot, of_slot in models.items() if of_slot == model and slot < len(works)):
            works[slot] = again[slot]
    return works


def passage(plan: Plan, works: list[SlotWork]) -> Iterator[tuple[SlotWork, IntArray, IntArray]]:
    """Each slot with the ticks at which its ranks begin and end it: sharers together, in regime ``slot`` all ranks."""
    clock = np.zeros(plan.world_size, dtype=np.int64)
    for slot in works:
        start = np.zeros(plan.world_size, dtype=np.int64)
        longest = np.zeros(plan.world_size, dtype=np.int64)
        np.maximum.at(start, slot.component, clock[slot.ranks])
        np.maximum.at(longest, slot.component, slot.ticks)
        begin = start[slot.component]
        end = begin + longest[slot.component]
        clock[slot.ranks] = end
        if plan.regime == "slot":
            clock[:] = clock.max()
        yield slot, begin, end


def evaluate(plan: Plan, cost: CostModel, topology: Topology) -> Evaluation:
    """Makespan, busy and finishing times of ``plan`` under ``cost``, what it recomputes included.

    Rules: :mod:`hdp.balance.evaluate`, whose function of the same name leaves recomputation out.
    """
    if not plan.recompute:
        return evaluate_without(plan, cost, topology)
    busy, finish, copying, exposed = (np.zeros(plan.world_size, dtype=np.int64) for _ in range(4))
    slot_ends = np.zeros(plan.slot_count, dtype=np.int64)
    for k, (slot, _, end) in enumerate(passage(plan, slot_works(plan, cost, topology))):
        busy[slot.ranks] += slot.ticks
        copying[slot.ranks] += slot.copying
        exposed[slot.ranks] += slot.exposed
        finish[slot.ranks] = end
        if plan.regime == "slot":
            finish[:] = finish.max()
        slot_ends[k] = end.max(initial=0)
    return Evaluation(
        makespan=int(finish.max()), busy=busy, finish=finish, slot_ends=slot_ends, copying=copying, exposed=exposed
    )


def recompute_ticks(plan: Plan, cost: CostModel, topology: Topology) -> int:
    """By how much the layers that run again lengthen the step, in ticks."""
    return evaluate(plan, cost, topology).makespan - evaluate_without(plan, cost, topology).makespan
