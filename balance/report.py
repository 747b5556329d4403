"""A plan in words and tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hdp.balance.clock import recompute_ticks
from hdp.balance.cost import TICK, CostModel
from hdp.balance.evaluate import Evaluation
from hdp.balance.memory import activation_peak, most_moved, slot_costs
from hdp.balance.plan import IntArray, Plan
from hdp.balance.planners.recompute import SHOWS
from hdp.balance.topology import Topology

MOST_RANKS = 16
"""Ranks that the table lists; of larger worlds the busiest and the least busy."""
MOST_FEWER = 8
"""Documents listed for which offload spares ranks."""


def describe(
    plan: Plan,
    result: Evaluation,
    cost: CostModel,
    topology: Topology,
    bound: int,
    bound_kind: str,
    seconds: float,
) -> str:
    """Several lines: the batch, groups, balance, waiting, memory, and what each rank does."""
    tokens = int(plan.lengths.sum())
    counts, held = _per_rank(plan)
    kept = activation_peak(plan, cost)
    ratio = result.makespan / bound if bound else 1.0
    lines = [
        f"{len(plan.lengths)} documents, {tokens} tokens, longest {int(plan.lengths.max(initial=0))}; "
        f"{plan.world_size} ranks on {topology.nodes} nodes, capacity {plan.capacity}, regime {plan.regime}",
        f"planner {plan.planner}: {seconds * 1e3:.1f} ms; groups {_shorten(plan.describe_groups())}",
        f"step {result.seconds:.4g} s, {ratio:.4f} x the lower bound ({bound * TICK:.4g} s, {bound_kind})",
        f"balance (busiest rank / average) {result.balance:.4f}; waiting {100 * result.waiting:.2f} % of all rank time",
        f"micro-batches a rank: {int(counts.min())} to {int(counts.max())}; slots {plan.slot_count}",
        f"activations at the peak: {kept / 1e9:.2f} GB a rank, states {cost.state_bytes / 1e9:.2f} GB"
        + (f", of {cost.device_memory / 1e9:.0f} GB" if cost.device_memory else ""),
    ]
    if plan.offload:
        ratios = [ratio for _, _, ratio in plan.offload]
        lines.append(f"offload: {len(ratios)} micro-batches, ratio {min(ratios):.3f} to {max(ratios):.3f}")
        lines.append("  " + _outside(plan, result, cost))
        lines += _fewer_ranks(plan)
    if plan.recompute:
        lines += describe_recompute(plan, result, cost, topology)
    return "\n".join([*lines, "", rank_table(plan, result, counts, held)])


def _outside(plan: Plan, result: Evaluation, cost: CostModel) -> str:
    """Bytes by tier, and what the copies cost."""
    moved = most_moved(plan, cost)
    host = min(moved, cost.host_memory) if cost.host_memory else moved
    tiers = f"outside the device at the peak: {host / 1e9:.2f} GB a rank in host memory"
    if moved > host:
        tiers += f", {(moved - host) / 1e9:.2f} GB on disk"
    shows = int(result.copying.max(initial=0))
    if not cost.copy_bandwidth:
        return f"{tiers}; what the copies cost is unknown: give the cost model's copy_bandwidth"
    return f"{tiers}; copies show for {shows * TICK:.3g} s ({100 * shows / max(result.makespan, 1):.1f} % of the step)"


def describe_price(
    plan: Plan, result: Evaluation, cost: CostModel, topology: Topology, names: Sequence[int] | None = None
) -> list[str]:
    """What a batch pays to fit: copies that show, layers that run again; no lines for a plan that pays nothing."""
    shows = plan.offload and int(result.copying.max(initial=0)) * SHOWS > result.makespan
    lines = [f"offload: {_outside(plan, result, cost)}"] if shows else []
    return lines + describe_recompute(plan, result, cost, topology, names)


def describe_recompute(
    plan: Plan, result: Evaluation, cost: CostModel, topology: Topology, names: Sequence[int] | None = None
) -> list[str]:
    """Which slots recompute, how many of their layers, and what that costs; no lines for a plan that does not.

    ``names``: of the documents, where they are not those of the batch.
    """
    if not plan.recompute:
        return []
    models = slot_costs(plan, cost)
    layers = sorted(model.recomputed for model in models.values())
    ticks = recompute_ticks(plan, cost, topology)
    many = f"{layers[0]}" if layers[0] == layers[-1] else f"{layers[0]} to {layers[-1]}"
    lines = [
        f"recompute: {len(layers)} of {plan.slot_count} slots, {many} of {cost.layers} layers again in backward; adds "
        f"{ticks * TICK:.3g} s ({100 * ticks / max(result.makespan, 1):.1f} % of the step), no message"
    ]
    found = np.flatnonzero(np.isin(plan.slots, plan.recompute) & (plan.lengths > plan.world_size * plan.capacity))
    found = found[np.argsort(-plan.lengths[found], kind="stable")]
    for i in found[:MOST_FEWER].tolist():
        again = models[int(plan.slots[i])].recomputed
        name = i if names is None else names[i]
        lines.append(
            f"  document {name} of {plan.lengths[i]} tokens: more than all ranks hold as usual; {again} layers again"
        )
    return lines + ([f"  and {len(found) - MOST_FEWER} more"] if len(found) > MOST_FEWER else [])


def _fewer_ranks(plan: Plan) -> list[str]:
    """Sequences on fewer ranks than would hold them without offload, by length, and the ratio that does it."""
    sizes = np.diff(plan.group_offsets)
    plain = -(-plan.lengths // plan.capacity)
    found = np.flatnonzero((sizes < plain) & (plan.slots >= 0))
    found = found[np.argsort(-plan.lengths[found], kind="stable")]
    ratios = {(rank, slot): ratio for rank, slot, ratio in plan.offload}
    lines = []
    for i in found[:MOST_FEWER].tolist():
        ratio = max(ratios.get((rank, int(plan.slots[i])), 0.0) for rank in plan.group(i))
        lines.append(
            f"  document {i} of {plan.lengths[i]} tokens: {sizes[i]} ranks instead of {plain[i]}, ratio {ratio:.3f}"
        )
    return lines + ([f"  and {len(found) - MOST_FEWER} more"] if len(found) > MOST_FEWER else [])


def _shorten(groups: str) -> str:
    parts = groups.split(" + ")
    return groups if len(parts) <= 12 else " + ".join([*parts[:6], f"... {len(parts) - 9} sizes ...", *parts[-3:]])


def _per_rank(plan: Plan) -> tuple[IntArray, IntArray]:
    """Micro-batches and tokens of each rank."""
    ranks, _, tokens = plan.held()
    counts = np.bincount(ranks, minlength=plan.world_size)
    if plan.regime == "slot":
        counts = np.full(plan.world_size, plan.slot_count)
    return counts, np.bincount(ranks, weights=tokens, minlength=plan.world_size).astype(np.int64)


def rank_table(plan: Plan, result: Evaluation, counts: IntArray, held: IntArray) -> str:
    """One line a rank; of many ranks the busiest and the least busy."""
    order = np.argsort(-result.busy, kind="stable")
    listed = np.arange(plan.world_size)
    if plan.world_size > MOST_RANKS:
        listed = np.concatenate([order[: MOST_RANKS // 2], order[-MOST_RANKS // 2 :]])
    head = f"{'rank':>6} {'micro-batches':>13} {'tokens':>9} {'busy s':>9} {'waits s':>9}"
    lines = [head]
    for k, rank in enumerate(listed.tolist()):
        if plan.world_size > MOST_RANKS and k == MOST_RANKS // 2:
            lines.append(f"{'...':>6}")
        busy = int(result.busy[rank])
        waits = (result.makespan - busy) * TICK
        lines.append(f"{rank:>6} {int(counts[rank]):>13} {int(held[rank]):>9} {busy * TICK:>9.4g} {waits:>9.3g}")
    return "\n".join(lines)


def table(rows: Sequence[tuple[str, Plan | str, Evaluation | None, float]], bound: int, bound_kind: str) -> str:
    """Planners side by side; a planner without a plan says why."""
    lines = [
        f"lower bound {bound * TICK:.4g} s ({bound_kind})",
        f"{'planner':<16} {'step s':>9} {'/ bound':>8} {'balance':>8} {'waiting':>8} {'slots':>6} {'planned in':>11}  groups",
    ]
    for name, made, result, seconds in rows:
        if not isinstance(made, Plan) or result is None:
            lines.append(f"{name:<16} no plan: {made}")
            continue
        ratio = result.makespan / bound if bound else 1.0
        lines.append(
            f"{name:<16} {result.seconds:>9.4g} {ratio:>8.4f} {result.balance:>8.4f} {100 * result.waiting:>7.2f}% "
            f"{made.slot_count:>6} {seconds * 1e3:>8.1f} ms  {_shorten(made.describe_groups())}"
        )
    return "\n".join(lines)
