"""A plan in words and tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hdp.balance.cost import TICK, CostModel
from hdp.balance.evaluate import Evaluation
from hdp.balance.memory import kept_fraction, most_moved
from hdp.balance.plan import IntArray, Plan
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


def activation_peak(plan: Plan, cost: CostModel) -> float:
    """Bytes of activations of the fullest micro-batch, what it offloads taken off."""
    ranks, slots, held = plan.held()
    if not len(ranks):
        return 0.0
    ratios = {(rank, slot): ratio for rank, slot, ratio in plan.offload}
    at = zip(ranks.tolist(), slots.tolist(), strict=True)
    kept = [float(kept_fraction(cost.layers, ratios.get(key, 0.0))) for key in at] if ratios else 1.0
    return float((held * kept).max()) * cost.activation_bytes * cost.layers


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
