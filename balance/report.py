"""A plan in words and tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hdp.balance.cost import TICK, CostModel
from hdp.balance.evaluate import Evaluation
from hdp.balance.memory import kept_fraction
from hdp.balance.plan import IntArray, Plan
from hdp.balance.topology import Topology

MOST_RANKS = 16
"""Ranks that the table lists; of larger worlds the busiest and the least busy."""


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
    return "\n".join([*lines, "", rank_table(plan, result, counts, held)])


def _shorten(groups: str) -> str:
    parts = groups.split(" + ")
    return groups if len(parts) <= 12 else " + ".join([*parts[:6], f"... {len(parts) - 9} sizes ...", *parts[-3:]])


def _per_rank(plan: Plan) -> tuple[IntArray, IntArray]:
    """Micro-batches and tokens of each rank."""
    ranks, slots, tokens = _shares(plan)
    keys = np.unique(ranks * max(plan.slot_count, 1) + slots)
    counts = np.bincount(keys // max(plan.slot_count, 1), minlength=plan.world_size)
    if plan.regime == "slot":
        counts = np.full(plan.world_size, plan.slot_count)
    return counts, np.bincount(ranks, weights=tokens, minlength=plan.world_size).astype(np.int64)


def _shares(plan: Plan) -> tuple[IntArray, IntArray, IntArray]:
    """Rank, slot and tokens of every share that runs."""
    sizes = np.diff(plan.group_offsets)
    sequences = np.repeat(np.arange(len(sizes)), sizes)
    members = np.arange(len(plan.group_ranks)) - np.repeat(plan.group_offsets[:-1], sizes)
    lengths = plan.lengths[sequences]
    tokens = lengths // sizes[sequences] + (members < lengths % sizes[sequences])
    running = plan.slots[sequences] >= 0
    return plan.group_ranks[running], plan.slots[sequences][running], tokens[running]


def activation_peak(plan: Plan, cost: CostModel) -> float:
    """Bytes of activations of the fullest micro-batch, what it offloads taken off."""
    ranks, slots, tokens = _shares(plan)
    if not len(ranks):
        return 0.0
    width = max(plan.slot_count, 1)
    keys, inverse = np.unique(ranks * width + slots, return_inverse=True)
    held = np.bincount(inverse, weights=tokens)
    ratios = {rank * width + slot: ratio for rank, slot, ratio in plan.offload}
    kept = [float(kept_fraction(cost.layers, ratios.get(int(key), 0.0))) for key in keys] if ratios else 1.0
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
