"""When each rank runs what: a picture (matplotlib) and a trace (Perfetto, chrome://tracing)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hdp.balance.clock import passage, slot_works
from hdp.balance.cost import TICK, CostModel
from hdp.balance.plan import IntArray, Plan, PlanError
from hdp.balance.topology import Topology

MOST_ROWS = 256
"""Ranks in a picture; of larger worlds evenly many are left out."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Timeline:
    """One entry a micro-batch that is not empty, slots ascending."""

    rank: IntArray
    slot: IntArray
    start: IntArray
    """Ticks."""
    busy: IntArray
    """Ticks of its own work; sharers then wait for each other."""
    shared: Any
    """Whether it shares a sequence."""
    makespan: int


def timeline(plan: Plan, cost: CostModel, topology: Topology) -> Timeline:
    """The micro-batches of a plan in time, by the rules of :mod:`hdp.balance.evaluate`."""
    parts: list[tuple[IntArray, ...]] = []
    sizes = np.diff(plan.group_offsets)
    makespan = 0
    for k, (slot, begin, end) in enumerate(passage(plan, slot_works(plan, cost, topology))):
        sharing = np.zeros(plan.world_size, dtype=bool)
        for i in np.flatnonzero((plan.slots == k) & (sizes > 1)).tolist():
            sharing[plan.group_ranks[plan.group_offsets[i] : plan.group_offsets[i + 1]]] = True
        parts.append((slot.ranks, np.full(len(slot.ranks), k), begin, slot.ticks, sharing[slot.ranks]))
        makespan = max(makespan, int(end.max(initial=0)))
    columns = [np.concatenate(c) for c in zip(*parts, strict=True)] if parts else [np.zeros(0, dtype=np.int64)] * 5
    rank, slots, begin, busy, shared = columns
    return Timeline(rank=rank, slot=slots, start=begin, busy=busy, shared=shared, makespan=makespan)


def write_trace(plan: Plan, cost: CostModel, topology: Topology, path: Path) -> None:
    """Trace events: a process a node, a thread a rank, a span a micro-batch, in microseconds."""
    line = timeline(plan, cost, topology)
    shards: dict[tuple[int, int], list[str]] = {}
    for rank in np.unique(line.rank).tolist():
        for mb in plan.micro_batches(rank):
            shards[rank, mb.slot] = [
                f"{s.sequence} ({s.tokens} of {s.length}, {len(s.group)} ranks)" for s in mb.shards
            ]
    events: list[dict[str, Any]] = []
    for node in range(topology.nodes):
        events.append({"ph": "M", "name": "process_name", "pid": node, "args": {"name": f"node {node}"}})
    for rank, slot, start, busy, shared in zip(
        line.rank.tolist(),
        line.slot.tolist(),
        line.start.tolist(),
        line.busy.tolist(),
        line.shared.tolist(),
        strict=True,
    ):
        events.append(
            {
                "ph": "X",
                "name": f"slot {slot}" + (" shared" if shared else ""),
                "cat": "shared" if shared else "local",
                "pid": topology.node(rank),
                "tid": rank,
                "ts": start * TICK * 1e6,
                "dur": busy * TICK * 1e6,
                "args": {"sequences": shards[rank, slot]},
            }
        )
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")


def draw(plan: Plan, cost: CostModel, topology: Topology, path: Path, *, kind: str | None = None) -> None:
    """One row a rank: shared micro-batches dark, local ones light, waiting blank. Without ``kind`` the suffix decides."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlanError("pictures need matplotlib: pip install 'hdp[plot]'") from error
    line = timeline(plan, cost, topology)
    step = -(-plan.world_size // MOST_ROWS)
    shown = line.rank % step == 0
    rows = -(-plan.world_size // step)
    figure = Figure(figsize=(10, min(12, 1.8 + 0.16 * rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    edge = 0.4 if rows <= 64 else 0.0
    for shared, color, label in ((True, "#1f4e79", "shared"), (False, "#8fbf7f", "whole documents")):
        chosen = shown & (line.shared == shared)
        axes.barh(
            line.rank[chosen] // step,
            line.busy[chosen] * TICK,
            left=line.start[chosen] * TICK,
            height=0.86 if rows <= 64 else 1.0,
            color=color,
            edgecolor="white",
            linewidth=edge,
        )
        axes.bar(0, 0, color=color, label=label)
    axes.axvline(line.makespan * TICK, color="#b03030", linewidth=1, label="end of step")
    axes.set_xlim(0, line.makespan * TICK * 1.02 or 1)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_xlabel("predicted seconds")
    axes.set_ylabel("rank" if step == 1 else f"every {step}th rank")
    axes.set_title(f"{plan.planner}, {plan.world_size} ranks, regime {plan.regime}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12 if rows > 8 else -0.3), ncols=3, frameon=False)
    figure.savefig(path, dpi=150, format=kind)
