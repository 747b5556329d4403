"""Runs one step of a plan on a cluster and says where its time went."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hdp import _simulator
from hdp.balance.cost import TICK, CostModel, Costs
from hdp.balance.plan import IntArray, Plan, PlanError
from hdp.balance.simulator.cluster import Cluster
from hdp.balance.simulator.steps import (
    FIRST,
    GATHERS,
    REDUCES,
    Exchanges,
    MicroBatches,
    exchanges,
    micro_batches,
    one_forward_one_backward,
)

ROUNDS = 2_000_000
"""Rounds that one simulation aims at: layers, and the steps of long rings, are run in fewer, thicker pieces to keep to it."""
LEAST_ROUNDS = 64
"""Rounds of a long ring at least."""
EQ3_LEAVING = 2
"""Layers that may be on their way out while one computes, where a cost model does not say (``in_flight`` 0)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Simulation:
    """One step. Operations are forward or backward passes of one micro-batch on one rank of one stage."""

    ticks: int
    """The whole step, in ticks of 2^-32 s."""
    busy: IntArray
    """[stages x world] ticks in which a rank computes."""
    finish: IntArray
    """[stages x world] when a rank is done."""
    rank: IntArray
    """[operations]"""
    stage: IntArray
    slot: IntArray
    """-1: the closing micro-batch in which gradients are reduced."""
    is_backward: NDArray[np.bool_]
    begin: IntArray
    """[operations] in ticks."""
    end: IntArray
    nic_busy: IntArray
    """[NICs] ticks in which it sends messages of attention."""
    events: int
    messages: int
    """Sent by all ranks in all pieces: what goes from one rank to another in one round and lane, inputs and sums apart."""
    pieces: int
    """Pieces that the layers of a pass were run in."""
    most_rounds: int
    """Rounds of one exchange at most: the steps of longer rings were taken together."""

    @property
    def seconds(self) -> float:
        return self.ticks * TICK

    @property
    def waiting(self) -> float:
        """Share of all rank time in which nothing is computed, 0 to 1."""
        total = self.ticks * len(self.busy)
        return 1.0 - float(self.busy.sum()) / total if total else 0.0

    @property
    def busiest_seconds(self) -> float:
        """Computing time of the busiest rank."""
        return int(self.busy.max(initial=0)) * TICK

    @property
    def balance(self) -> float:
        """Busiest rank over the average rank; 1 is perfect."""
        total = int(self.busy.sum())
        return float(self.busy.max()) * len(self.busy) / total if total else 1.0


def simulate(plan: Plan, cost: CostModel, cluster: Cluster, *, rounds: int = ROUNDS) -> Simulation:
    """One step of ``plan``.

    ``rounds``: about how many rounds are simulated. Where there are more, neighbouring steps of long rings are taken
    together, and then layers: they are alike, so what changes is how late arrivals and collectives interleave.
    """
    if plan.world_size != cluster.topology.world_size:
        raise PlanError(f"the plan is for {plan.world_size} ranks, the cluster has {cluster.topology.world_size}")
    if cost.layers % cluster.stages:
        raise PlanError(f"{cost.layers} layers do not divide into {cluster.stages} stages: choose a divisor")
    costs = cost.recomputing(0).quantise(plan.lengths, cluster.topology)
    batches = micro_batches(plan, cost, costs, cluster)
    shared = exchanges(plan, cost, costs, cluster)
    layers = cost.layers // cluster.stages
    pieces, most = _thickness(shared, layers, 4 * len(batches.rank), rounds // cluster.stages)
    operations = _operations(plan, batches, cluster)
    arrays = {
        **_machine(costs, cluster, layers),
        "leaving": cost.in_flight - 1 if cost.in_flight else EQ3_LEAVING,
        "layers": pieces,
        "most_rounds": most,
        **_op_arrays(batches, operations, cluster),
        **_share_arrays(plan, shared, operations, cluster.stages),
    }
    arrays["flags"] = _flags(plan, operations, cluster)
    result = _simulator.run(arrays, shared.tables)
    closing = batches.is_closing[operations.batch] == 1
    return Simulation(
        ticks=int(result["finish"].max(initial=0)),
        busy=result["busy"],
        finish=result["finish"],
        rank=operations.rank,
        stage=operations.stage,
        slot=np.where(closing, -1, operations.slot),
        is_backward=operations.phase == 1,
        begin=result["begin"],
        end=result["end"],
        nic_busy=result["nic_busy"],
        events=int(result["events"]),
        messages=int(result["messages"]),
        pieces=pieces,
        most_rounds=most,
    )


def _thickness(shared: Exchanges, layers: int, others: int, rounds: int) -> tuple[int, int]:
    """Pieces of a pass, and rounds of one exchange at most, that come to about ``rounds`` rounds."""
    sizes = np.array([len(group) for group in shared.groups], dtype=np.int64)
    steps = np.array([shared.rounds(x) for x in range(len(sizes))], dtype=np.int64)
    most = int(steps.max(initial=1))
    while most > LEAST_ROUNDS and int((sizes * np.minimum(steps, most)).sum()) + others > rounds:
        most = max(most * 7 // 8, LEAST_ROUNDS)
    once = int((sizes * np.minimum(steps, most)).sum()) + others
    return min(max(rounds // max(once, 1), 1), layers), most


@dataclass(frozen=True, kw_only=True, eq=False)
class _Operations:
    """[operations], sorted by actor and by their order on it."""

    batch: IntArray
    """Number of the micro-batch."""
    phase: IntArray
    """0 forward, 1 backward."""
    stage: IntArray
    rank: IntArray
    slot: IntArray
    number: IntArray
    """[stages, 2, micro-batches]: number of each operation."""


def _operations(plan: Plan, batches: MicroBatches, cluster: Cluster) -> _Operations:
    count, stages, slots = len(batches.rank), cluster.stages, int(batches.slot.max(initial=0)) + 1
    batch = np.tile(np.arange(count), 2 * stages)
    stage = np.repeat(np.arange(stages), 2 * count)
    phase = np.tile(np.repeat([0, 1], count), stages)
    places = np.stack([one_forward_one_backward(slots, stages, p) for p in range(stages)])
    order = np.lexsort((places[stage, phase, batches.slot[batch]], batches.rank[batch], stage))
    batch, stage, phase = batch[order], stage[order], phase[order]
    number = np.empty((stages, 2, count), dtype=np.int64)
    number[stage, phase, batch] = np.arange(len(order))
    rank, slot = batches.rank[batch], batches.slot[batch]
    return _Operations(batch=batch, phase=phase, stage=stage, rank=rank, slot=slot, number=number)


def _machine(costs: Costs, cluster: Cluster, layers: int) -> dict[str, Any]:
    """Ranks, ports and collectives. Stage p lives on nodes of its own."""
    topology, stages = cluster.topology, cluster.stages
    ranks = np.arange(topology.world_size)
    node, nics = ranks // topology.ranks_per_node, cluster.nics_per_node
    nic = node * nics + ranks % topology.ranks_per_node // cluster.ranks_per_nic
    stage = np.repeat(np.arange(stages), len(ranks))
    return {
        "model_layers": layers,
        "stages": stages,
        "nics": stages * topology.nodes * nics,
        "nic_share": cluster.ranks_per_nic,
        "stage": stage,
        "node": np.tile(node, stages) + stage * topology.nodes,
        "nic": np.tile(nic, stages) + stage * topology.nodes * nics,
        "latency_within": costs.latency[0] // stages,
        "latency_across": costs.latency[1] // stages,
        "round_ticks": round(cluster.host.round_seconds * layers / TICK),
        "piece_ticks": round(cluster.host.piece_seconds * layers / TICK),
        "message_ticks": round(cluster.host.message_seconds * layers / TICK),
        "piece_setup": round(cluster.host.piece_setup / TICK),
        "message_setup": round(cluster.host.message_setup / TICK),
        **_collectives(cluster, layers),
        "blocking": int(cluster.blocking),
        "overlap": float(cluster.overlap),
        "collectives_cross": int(topology.nodes > 1),
    }


def _collectives(cluster: Cluster, layers: int) -> dict[str, int]:
    """Ticks of gathering and reducing the layers and the rest, on the wire and on the host."""
    host, root = cluster.host, cluster.root_share
    gather, reduce = cluster.gather_seconds(layers), cluster.reduce_seconds(layers)
    seconds = {
        "gather": gather * (1.0 - root),
        "root_gather": gather * root,
        "gather_host": host.gather_byte * cluster.parameter_bytes if gather else 0.0,
        "reduce": reduce * (1.0 - root),
        "root_reduce": reduce * root,
        "reduce_host": host.reduce_byte * cluster.gradient_bytes if reduce else 0.0,
        "quota_period": host.quota_period if host.quota_share < 1.0 else 0.0,
        "quota": host.quota_period * host.quota_share if host.quota_share < 1.0 else 0.0,
    }
    return {name: round(value / TICK) for name, value in seconds.items()}


def _op_arrays(batches: MicroBatches, operations: _Operations, cluster: Cluster) -> dict[str, IntArray]:
    stages, world = cluster.stages, cluster.topology.world_size
    batch, phase, stage = operations.batch, operations.phase, operations.stage
    dense = _stage_part(batches.linear[phase, batch], stage, stages)
    dense += np.where(stage == stages - 1, batches.head[phase, batch], 0) + batches.setup[phase, batch]
    neighbour = stage + np.where(phase == 0, -1, 1)
    inside = (neighbour >= 0) & (neighbour < stages)
    after = np.where(inside, operations.number[np.clip(neighbour, 0, stages - 1), phase, batch], -1)
    link = cluster.topology.inter
    sending = batches.tokens[batch] * (cluster.stage_token_bytes / link.bandwidth) + link.latency
    actor = stage * world + operations.rank
    return {
        "op_first": np.searchsorted(actor, np.arange(stages * world + 1)).astype(np.int64),
        "backward": phase.astype(np.int64),
        "dense": dense.astype(np.int64),
        "filler": _stage_part(batches.local[phase, batch], stage, stages),
        "after": after.astype(np.int64),
        "delay": np.rint(sending / TICK).astype(np.int64),
        "copy": _stage_part(batches.copy[batch], stage, stages),
    }


def _stage_part(ticks: IntArray, stage: IntArray, stages: int) -> IntArray:
    """Equal parts that add up to the whole."""
    return ticks * (stage + 1) // stages - ticks * stage // stages


def _share_arrays(plan: Plan, shared: Exchanges, operations: _Operations, stages: int) -> dict[str, Any]:
    """Which operations take part in which exchange, as which member; stages have exchanges of their own."""
    count, world = len(shared.groups), plan.world_size
    sizes = np.array([len(g) for g in shared.groups], dtype=np.int64)
    flat = np.concatenate(shared.groups) if count else np.zeros(0, dtype=np.int64)
    exchange = np.repeat(np.arange(count), sizes)
    first = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    member = np.arange(len(flat)) - np.repeat(first[:-1], sizes)
    phase = (exchange >= count // 2).astype(np.int64)
    slot = np.array(shared.slot, dtype=np.int64)[exchange]
    slots = max(plan.slot_count, 1) + 1
    forward = (operations.stage == 0) & (operations.phase == 0)
    keys = operations.rank[forward] * slots + operations.slot[forward]
    batch_of = operations.batch[forward][np.argsort(keys)]
    batch = batch_of[np.searchsorted(np.sort(keys), flat * slots + slot)]
    ops = np.concatenate([operations.number[p, phase, batch] for p in range(stages)])
    order = np.argsort(ops, kind="stable")
    area = np.array(shared.area, dtype=np.int64)
    unit = np.array(shared.unit, dtype=np.float64).reshape(count, 4)
    last = stages * int(first[-1])
    return {
        "share_first": np.searchsorted(ops[order], np.arange(len(operations.batch) + 1)).astype(np.int64),
        "share_exchange": np.concatenate([exchange + p * count for p in range(stages)])[order],
        "share_member": np.tile(member, stages)[order],
        "kind": np.tile(np.array(shared.kind, dtype=np.int64), stages),
        "area": np.tile(area // stages, stages),
        "documents": np.tile(np.array(shared.documents, dtype=np.int64), stages),
        "member_first": np.append(np.concatenate([first[:-1] + p * first[-1] for p in range(stages)]), last),
        "member_actor": np.concatenate([flat + p * world for p in range(stages)]),
        "unit": np.ascontiguousarray(np.tile(unit / stages, (stages, 1))),
    }


def _flags(plan: Plan, operations: _Operations, cluster: Cluster) -> IntArray:
    """Which operations gather and reduce, see ``Cluster.sharding``."""
    flags = np.zeros(len(operations.batch), dtype=np.int64)
    if plan.regime == "slot" and cluster.sharding == "sharded":
        flags += GATHERS
        flags[operations.phase == 1] += REDUCES
        return flags
    actor = operations.stage * plan.world_size + operations.rank
    is_last = np.append(actor[1:] != actor[:-1], True)
    is_first = np.insert(actor[1:] != actor[:-1], 0, True)
    if cluster.sharding != "none":
        flags[is_last] += REDUCES
    if cluster.sharding == "sharded":
        flags[is_first] += FIRST
    return flags
