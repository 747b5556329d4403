"""How long a plan takes under a cost model, and where its ranks wait.

Three rules. Shares of one group in one micro-batch run as one packed ring: their attention and their bytes add up before
the larger of the two counts, and rounds and messages take the host once. And sharers stay together: ranks that share a
sequence in a slot, directly or through others, begin that micro-batch when the last of them is ready and end it together,
because every layer's ring couples them. Unshared micro-batches wait for nobody; in regime ``slot`` every slot ends with the
slowest rank. And copies of offloaded activations run beside computation, out during forward and back during backward: what
takes longer counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hdp.balance.cost import TICK, CostModel, Costs, ring_phase
from hdp.balance.plan import IntArray, Plan
from hdp.balance.topology import Topology


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """What the cost model says about one plan. Times in ticks; arrays indexed by rank."""

    makespan: int
    busy: IntArray
    """Ticks in which a rank computes, or sends what does not hide."""
    finish: IntArray
    """When a rank is done; the difference to ``makespan`` is waiting at the end of the step."""
    slot_ends: IntArray
    """When the last rank leaves each slot."""
    copying: IntArray
    """Ticks in which a rank has nothing left to do but copies of its offloaded activations; part of ``busy``."""
    exposed: IntArray
    """Ticks in which a rank has nothing to do but wait for a ring's hops, which do not hide; part of ``busy``."""

    @property
    def seconds(self) -> float:
        return self.makespan * TICK

    @property
    def waiting(self) -> float:
        """Share of all rank time that is spent waiting, 0 to 1."""
        total = self.makespan * len(self.busy)
        return 1.0 - float(self.busy.sum()) / total if total else 0.0

    @property
    def balance(self) -> float:
        """Busiest rank over the average rank; 1 is perfect."""
        total = int(self.busy.sum())
        return float(self.busy.max()) * len(self.busy) / total if total else 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class SlotWork:
    """One slot of a plan."""

    ranks: IntArray
    """Ranks that have a micro-batch in it."""
    ticks: IntArray
    """What each of them computes."""
    component: IntArray
    """Which of them are coupled by shared sequences: equal numbers run together."""
    copying: IntArray
    """How much of ``ticks`` is copies that do not hide."""
    exposed: IntArray
    """How much of it is hops of rings that do not hide."""


def micro_batch_ticks(plan: Plan, costs: Costs, topology: Topology) -> list[SlotWork]:
    """The micro-batches of a plan, slot by slot."""
    copies = _copies(plan, costs) if plan.offload and costs.copy else [0] * plan.slot_count
    return [
        _slot_work(plan, costs, topology, members, one_way)
        for members, one_way in zip(_by_slot(plan), copies, strict=True)
    ]


def _copies(plan: Plan, costs: Costs) -> IntArray:
    """[slots, ranks]: ticks of copying what a micro-batch offloads, one way."""
    ratios = np.zeros((plan.slot_count, plan.world_size))
    ranks, slots, values = (np.array(column) for column in zip(*plan.offload, strict=True))
    ratios[slots, ranks] = values
    ranks, slots, held = plan.held()
    copies = np.zeros((plan.slot_count, plan.world_size), dtype=np.int64)
    copies[slots, ranks] = np.rint(ratios[slots, ranks] * costs.copy * held)
    return copies


def _by_slot(plan: Plan) -> list[IntArray]:
    order = np.argsort(plan.slots, kind="stable")
    edges = np.searchsorted(plan.slots[order], np.arange(plan.slot_count + 1))
    return [order[edges[k] : edges[k + 1]] for k in range(plan.slot_count)]


def _slot_work(plan: Plan, costs: Costs, topology: Topology, sequences: IntArray, one_way: IntArray | int) -> SlotWork:
    passes = np.zeros((2, plan.world_size), dtype=np.int64)  # forward, backward
    exposed = np.zeros(plan.world_size, dtype=np.int64)
    present = np.zeros(plan.world_size, dtype=bool)
    sizes = np.diff(plan.group_offsets)[sequences]
    whole = sequences[sizes == 1]
    ranks = plan.group_ranks[plan.group_offsets[whole]]
    forward = (costs.linear[whole] * costs.forward).astype(np.int64)
    for phase, linear in enumerate((forward, costs.linear[whole] - forward)):
        np.add.at(passes[phase], ranks, topology.slowed(costs.attention[phase][whole] + linear + costs.tile, ranks))
    present[ranks] = True
    rings: dict[bytes, list[int]] = {}  # packed: by group
    for i in sequences[sizes > 1].tolist():
        group = plan.group_ranks[plan.group_offsets[i] : plan.group_offsets[i + 1]]
        rings.setdefault(group.tobytes(), []).append(i)
    for key, members in rings.items():
        group = np.frombuffer(key, dtype=np.int64)
        ticks, shown = _packed_ring(costs, topology, members, group)
        passes[:, group] += ticks
        exposed[group] += shown
        present[group] = True
    copying = np.maximum(one_way - passes, 0).sum(axis=0)
    component = _components(plan.world_size, [np.frombuffer(key, dtype=np.int64) for key in rings])
    active = np.flatnonzero(present)
    constant = topology.slowed(np.full(plan.world_size, costs.constant, dtype=np.int64), np.arange(plan.world_size))
    ticks = passes.sum(axis=0) + copying + constant
    return SlotWork(
        ranks=active,
        ticks=ticks[active],
        component=component[active],
        copying=copying[active],
        exposed=exposed[active],
    )


def _packed_ring(costs: Costs, topology: Topology, sequences: list[int], group: IntArray) -> tuple[IntArray, IntArray]:
    """[2, members] Ticks of forward and backward, and [members] how many of them show hops.

    A slow member computes for longer; its messages take what others' do.
    """
    nodes = group // topology.ranks_per_node
    across = int(nodes.min() != nodes.max())
    size = len(group)
    linear = -(-int(costs.linear[sequences].sum()) // size)
    forward = int(linear * costs.forward)
    passes, exposed = np.empty((2, size), dtype=np.int64), np.zeros(size, dtype=np.int64)
    for phase, each in enumerate((forward, linear - forward)):
        whole = np.full(size, int(costs.attention[phase][sequences].sum()), dtype=np.int64)
        ring = int(costs.ring[across, phase][sequences].sum())
        host = costs.host(phase, len(sequences), int(costs.handling[phase][sequences].sum()), size)
        passes[phase] = topology.slowed(np.full(size, each + host, dtype=np.int64), group)
        whole = topology.slowed(whole, group)
        ticks = ring_phase(whole, ring, costs.latency[across], size)
        passes[phase] += ticks
        exposed += ticks - -(-whole // size)
    return passes, exposed


def _components(world_size: int, groups: list[IntArray]) -> IntArray:
    """Per rank the smallest rank that it is coupled to through ``groups``."""
    label = np.arange(world_size)
    if not groups:
        return label
    flat = np.concatenate(groups)
    sizes = np.array([len(group) for group in groups])
    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    while True:
        before = label.copy()
        np.minimum.at(label, flat, np.repeat(np.minimum.reduceat(label[flat], offsets), sizes))
        label = label[label]
        if np.array_equal(before, label):
            return label


def evaluate(plan: Plan, cost: CostModel, topology: Topology) -> Evaluation:
    """Makespan, busy and finishing times of ``plan`` under ``cost``."""
    costs = cost.quantise(plan.lengths, topology)
    busy = np.zeros(plan.world_size, dtype=np.int64)
    clock = np.zeros(plan.world_size, dtype=np.int64)
    slot_ends = np.zeros(plan.slot_count, dtype=np.int64)
    copying = np.zeros(plan.world_size, dtype=np.int64)
    exposed = np.zeros(plan.world_size, dtype=np.int64)
    for k, slot in enumerate(micro_batch_ticks(plan, costs, topology)):
        busy[slot.ranks] += slot.ticks
        copying[slot.ranks] += slot.copying
        exposed[slot.ranks] += slot.exposed
        start = np.zeros(plan.world_size, dtype=np.int64)
        longest = np.zeros(plan.world_size, dtype=np.int64)
        np.maximum.at(start, slot.component, clock[slot.ranks])
        np.maximum.at(longest, slot.component, slot.ticks)
        clock[slot.ranks] = (start + longest)[slot.component]
        if plan.regime == "slot":
            clock[:] = clock.max()
        slot_ends[k] = clock[slot.ranks].max(initial=0)
    return Evaluation(
        makespan=int(clock.max()), busy=busy, finish=clock, slot_ends=slot_ends, copying=copying, exposed=exposed
    )
