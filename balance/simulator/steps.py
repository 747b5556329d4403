"""A plan as the flat arrays that ``csrc/simulator_core.h`` runs: micro-batches, operations in order, exchanges."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hdp.balance.cost import TICK, CostModel, Costs
from hdp.balance.memory import slot_costs
from hdp.balance.plan import IntArray, Plan, PlanError
from hdp.balance.simulator.cluster import Cluster
from hdp.balance.simulator.tables import table

AUTO, RING = "auto", "ring"
"""What is to be chosen when it runs counts as a ring, as planners count it."""
GATHERS, REDUCES, FIRST = 1, 2, 4
RING_FORWARD, RING_BACKWARD, TABLES = 0, 1, 2


@dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatches:
    """All micro-batches of a plan, sorted by (rank, slot). Ticks over all layers; [2, micro-batches]: forward, backward."""

    rank: IntArray
    slot: IntArray
    linear: IntArray
    """Everything but attention and the head; backward also of layers that run again, which keep what attention gave."""
    head: IntArray
    """The head, on the last stage only."""
    local: IntArray
    """Attention of whole sequences, and what each of them costs the host."""
    tokens: IntArray
    copy: IntArray
    """[micro-batches]: copies of what is offloaded, one way."""
    setup: IntArray
    """Making the programs of whole sequences' attention, on every stage."""
    is_closing: IntArray
    """[micro-batches]: 1 for the dummy in which gradients are reduced."""


@dataclass(eq=False)
class Exchanges:
    """Shared sequences: one entry a (slot, group, schedules), packed, and pass."""

    kind: list[int] = field(default_factory=list)
    area: list[int] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)
    """Sequences that an entry stands for: their tiles are counted one by one, their messages together."""
    unit: list[NDArray[np.float64]] = field(default_factory=list)
    groups: list[IntArray] = field(default_factory=list)
    slot: list[int] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    table_numbers: dict[tuple[Any, ...], int] = field(default_factory=dict)

    def rounds(self, number: int) -> int:
        kind = self.kind[number]
        return len(self.groups[number]) if kind < TABLES else int(self.tables[kind - TABLES]["rounds"])


def needs_closing(plan: Plan) -> bool:
    """Whether some shared micro-batch is the last of its step for only some of its sharers (regime ``step``)."""
    sizes = np.diff(plan.group_offsets)
    slots = np.repeat(plan.slots, sizes)
    last = np.full(plan.world_size, -1, dtype=np.int64)
    np.maximum.at(last, plan.group_ranks[slots >= 0], slots[slots >= 0])
    ends = np.bincount(
        np.repeat(np.arange(len(sizes)), sizes), weights=last[plan.group_ranks] == slots, minlength=len(sizes)
    )
    return bool(((plan.slots >= 0) & (sizes > 1) & (ends > 0) & (ends < sizes)).any())


def micro_batches(plan: Plan, cost: CostModel, costs: Costs, cluster: Cluster) -> MicroBatches:
    """Every rank's micro-batches, dummies included: each rank takes part in every slot, or at least once a step.

    ``costs``: of ``cost`` without layers that run again.
    """
    sizes = np.diff(plan.group_offsets)
    sequences = np.repeat(np.arange(len(sizes)), sizes)
    members = np.arange(len(plan.group_ranks)) - np.repeat(plan.group_offsets[:-1], sizes)
    running = plan.slots[sequences] >= 0
    sequences, members, ranks = sequences[running], members[running], plan.group_ranks[running]
    slots = max(plan.slot_count, 1)
    closing = plan.regime == "step" and cluster.sharding == "sharded" and needs_closing(plan)
    keys = ranks * (slots + 1) + plan.slots[sequences]
    everyone = np.arange(plan.world_size) * (slots + 1)
    extra = [everyone + k for k in range(slots)] if plan.regime == "slot" else []
    if closing:
        extra.append(everyone + slots)
    idle = np.setdiff1d(np.arange(plan.world_size), ranks)
    unique = np.unique(np.concatenate([keys, *extra, idle * (slots + 1)]))
    where = np.searchsorted(unique, keys)

    def total(values: NDArray[Any]) -> IntArray:
        return np.bincount(where, weights=values, minlength=len(unique)).astype(np.int64)  # exact below 2^53

    group = sizes[sequences]
    linear, head = costs.linear[sequences], _head_ticks(cost, costs)[sequences]
    whole = group == 1
    piece = round(cost.layers * cluster.host.piece_seconds / TICK)
    local = np.stack([total(np.where(whole, costs.attention[phase][sequences] + piece, 0)) for phase in (0, 1)])
    setup = np.stack([total(np.where(whole, round(cluster.host.piece_setup / TICK), 0))] * 2)
    tokens = total(costs.lengths[sequences] // group + (members < costs.lengths[sequences] % group))
    slot, models = unique % (slots + 1), slot_costs(plan, cost)
    layers = np.array([models.get(k, cost).recomputed for k in range(slots)] + [0])  # the closing slot has none
    again = np.rint(costs.lengths * layers[plan.slots] * (cost.linear / TICK)).astype(np.int64)[sequences]
    dense = _passes(total(-(-(linear - head) // group)), cost) + _passes(np.full(len(unique), costs.constant), cost)
    dense[1] += total(-(-again // group)) + np.rint(layers[slot] * (cost.constant / 3.0 / TICK)).astype(np.int64)
    return MicroBatches(
        rank=unique // (slots + 1),
        slot=slot,
        linear=dense,
        head=_passes(total(-(-head // group)), cost),
        local=local,
        tokens=tokens,
        copy=_copies(plan, cost, models, unique, slots, tokens),
        setup=setup,
        is_closing=((slot == slots) & closing).astype(np.int64),
    )


def _head_ticks(cost: CostModel, costs: Costs) -> IntArray:
    ticks = np.rint(costs.lengths * (cost.head * (1.0 + cost.backward_linear)) / TICK).astype(np.int64)
    return np.minimum(ticks, costs.linear)


def _passes(ticks: IntArray, cost: CostModel) -> IntArray:
    """Forward and backward parts of what takes 1 : backward_linear."""
    forward = np.rint(ticks / (1.0 + cost.backward_linear)).astype(np.int64)
    return np.stack([forward, ticks - forward])


def _copies(
    plan: Plan, cost: CostModel, models: dict[int, CostModel], keys: IntArray, slots: int, tokens: IntArray
) -> IntArray:
    """``models``: cost models of slots with layers that run again, of which less leaves."""
    copy = np.zeros(len(keys), dtype=np.int64)
    if not plan.offload:
        return copy
    if cost.copy_bandwidth <= 0:
        raise PlanError("the plan offloads: give the cost model's copy_bandwidth in bytes per second")
    at = np.searchsorted(keys, [rank * (slots + 1) + slot for rank, slot, _ in plan.offload])
    ratios = np.array([ratio for _, _, ratio in plan.offload])
    movable = np.array([models.get(slot, cost).movable_bytes for _, slot, _ in plan.offload])
    copy[at] = np.rint(ratios * tokens[at] * movable / cost.copy_bandwidth / TICK)
    return copy


def exchanges(plan: Plan, cost: CostModel, costs: Costs, cluster: Cluster) -> Exchanges:
    """Shared sequences of one slot, group and schedule pair run as one packed program; forward, then backward entries."""
    packed: dict[tuple[int, bytes, str, str], list[int]] = {}
    sizes = np.diff(plan.group_offsets)
    for i in np.flatnonzero((sizes > 1) & (plan.slots >= 0)).tolist():
        group = plan.group_ranks[plan.group_offsets[i] : plan.group_offsets[i + 1]]
        forward, backward = (RING if name == AUTO else name for name in plan.schedule(i))
        packed.setdefault((int(plan.slots[i]), group.tobytes(), forward, backward), []).append(i)
    made = Exchanges()
    for phase in (0, 1):
        for (slot, key, forward, backward), members in packed.items():
            group = np.frombuffer(key, dtype=np.int64)
            made.groups.append(group)
            made.slot.append(slot)
            made.area.append(int(costs.attention[phase][members].sum()))
            made.documents.append(len(members))
            is_ring = (backward if phase else forward) == RING and plan.layout == "zigzag"
            if is_ring:
                made.kind.append(RING_BACKWARD if phase else RING_FORWARD)
                made.unit.append(_ring_units(costs, members, len(group)))
            else:
                names = (forward, backward, bool(phase), len(group), plan.layout)
                made.kind.append(TABLES + _table_number(made, names, cluster))
                made.unit.append(_byte_units(cost, costs, members, cluster))
    return made


def _ring_units(costs: Costs, members: list[int], size: int) -> NDArray[np.float64]:
    """[tier, kind of bytes]: one member's block of keys and values, and of their gradients, over a link."""
    forward = costs.ring[:, 0][:, members].sum(axis=1) / size
    backward = costs.ring[:, 1][:, members].sum(axis=1) / size
    return np.stack([forward, np.maximum(backward - forward, 0.0)], axis=1)


def _byte_units(cost: CostModel, costs: Costs, members: list[int], cluster: Cluster) -> NDArray[np.float64]:
    tokens = float(costs.lengths[members].sum())
    links = (cluster.topology.intra, cluster.topology.inter)
    return np.array([[cost.layers * tokens / link.bandwidth / TICK, 0.0] for link in links])


def _table_number(made: Exchanges, names: tuple[str, str, bool, int, str], cluster: Cluster) -> int:
    if cluster.shape is None:
        raise PlanError(f"schedule {names[0]!r} sends bytes that depend on the heads: give the cluster's shape")
    if names not in made.table_numbers:
        made.table_numbers[names] = len(made.tables)
        made.tables.append(table(*names, cluster.shape, cluster.element_bytes))
    return made.table_numbers[names]


def one_forward_one_backward(slots: int, stages: int, stage: int) -> IntArray:
    """[2, slots]: the place of every slot's forward and backward in the order of one stage.

    Slots that a rank lacks are skipped: all ranks then keep one order, and sharers never wait for each other in a circle.
    """
    warm = min(stages - 1 - stage, slots)
    order = [(0, k) for k in range(warm)]
    for k in range(slots - warm):
        order += [(0, warm + k), (1, k)]
    order += [(1, k) for k in range(slots - warm, slots)]
    places = np.zeros((2, slots), dtype=np.int64)
    for place, (phase, k) in enumerate(order):
        places[phase, k] = place
    return places
