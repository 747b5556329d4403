"""Capacity with and without offload: how many tokens a micro-batch may hold, and how few ranks a sequence needs.

ByteScale section 4.3 (Eq. 3). Of l layers two keep their activations on the device; of the others a fraction ``ratio``
leaves. With activations proportional to tokens a micro-batch then holds C * l / (2 + (1 - ratio)(l - 2)) tokens.
"""

from __future__ import annotations

from fractions import Fraction
from math import ceil

import numpy as np

from hdp.balance.cost import CostModel
from hdp.balance.plan import Plan, PlanError

KEPT_LAYERS = 2
RATIO_STEP = 64
"""Offload ratios are multiples of 1/64, so that they are exact in every float format."""


def kept_fraction(layers: int, ratio: float) -> Fraction:
    """Part of a micro-batch's activations that stays on the device."""
    kept = min(KEPT_LAYERS, layers)
    return (kept + (1 - Fraction(ratio)) * (layers - kept)) / layers


def capacity_with(capacity: int, layers: int, ratio: float) -> int:
    """Tokens of a micro-batch that offloads ``ratio`` of what its layers may give away."""
    return int(capacity / kept_fraction(layers, ratio))


def ratio_for(tokens: int, capacity: int, layers: int) -> float | None:
    """Smallest ratio at which a micro-batch holds ``tokens``; None when even full offload is not enough."""
    if tokens <= capacity:
        return 0.0
    for step in range(1, RATIO_STEP + 1):
        if capacity_with(capacity, layers, step / RATIO_STEP) >= tokens:
            return step / RATIO_STEP
    return None


def hidden_ratio(length: int, cost: CostModel) -> float:
    """Largest ratio whose copies hide behind one layer's forward of the whole sequence (sharding divides both)."""
    if cost.copy_bandwidth <= 0 or length <= 0:
        return 0.0
    layer = float(cost.attention_seconds([length])[0]) / cost.layers + cost.linear * length
    ratio = min(1.0, layer * cost.copy_bandwidth / max(cost.activation_bytes * length, 1e-9))
    return int(np.floor(ratio * RATIO_STEP)) / RATIO_STEP


def ranks_with(length: int, capacity: int, layers: int, ratio: float) -> int:
    """D(s) of Eq. 3 for a given ratio: ceil([2 Act(s) + (1 - r)(l - 2) Act(s)] / [l Act(C)])."""
    return max(1, ceil(kept_fraction(layers, ratio) * length / capacity))


def least_ratio(length: int, capacity: int, layers: int) -> Fraction:
    """Lower bound of Eq. 3: l Act(C) / ((l - 2) Act(s)), at most 1. Less would free less than one rank's worth."""
    return min(Fraction(1), Fraction(layers * capacity, (layers - KEPT_LAYERS) * length))


def moved_bytes(length: int, ranks: int, cost: CostModel, ratio: float) -> float:
    """Bytes that each of ``ranks`` ranks has outside its device when the sequence offloads ``ratio``."""
    return ratio * max(cost.layers - KEPT_LAYERS, 0) * cost.activation_bytes * length / ranks


def most_moved(made: Plan, cost: CostModel) -> float:
    """Bytes outside the device of the micro-batch of a plan that offloads most."""
    tokens = {(rank, slot): held for rank, slot, held in zip(*(a.tolist() for a in made.held()), strict=True)}
    layers = max(cost.layers - KEPT_LAYERS, 0) * cost.activation_bytes
    return max((ratio * tokens[rank, slot] * layers for rank, slot, ratio in made.offload), default=0.0)


def eq3(length: int, capacity: int, cost: CostModel) -> tuple[float, int]:
    """(ratio, ranks) of Eq. 3: the fewest ranks, then the smallest ratio that needs no more.

    Ratios are multiples of 1/64 between the lower bound and what hides behind one layer's compute, whose bytes fit the
    host memory of ``cost`` (MEMO's bound, which Eq. 3 leaves out). Where there is none: no offload, ceil(s / C) ranks.
    """
    plain = max(1, -(-length // capacity))
    layers = cost.layers
    if length <= capacity or layers <= KEPT_LAYERS:
        return 0.0, plain
    first = ceil(least_ratio(length, capacity, layers) * RATIO_STEP)
    best = (plain, 0.0)
    for step in range(first, round(hidden_ratio(length, cost) * RATIO_STEP) + 1):
        ratio = step / RATIO_STEP
        ranks = ranks_with(length, capacity, layers, ratio)
        if not cost.outside_memory or moved_bytes(length, ranks, cost, ratio) <= cost.outside_memory:
            best = min(best, (ranks, ratio))
    return best[1], best[0]


def fewest_ranks(length: int, capacity: int, cost: CostModel, most: float) -> tuple[int, float]:
    """(ranks, ratio): the fewest ranks that hold a sequence at a ratio of at most ``most``, and the smallest ratio for them.

    The host-memory bound of :func:`eq3`, without its lower bound: a sequence of C + 1 tokens fits one rank at a ratio of 1/64,
    where Eq. 3 would move everything or take two ranks. So never more ranks than Eq. 3, for the same ``most``.
    """
    ranks = max(1, -(-length // capacity_with(capacity, cost.layers, most)))
    while True:
        share = -(-length // ranks)
        ratio = ratio_for(share, capacity, cost.layers)
        assert ratio is not None
        if not ratio or not cost.outside_memory or moved_bytes(share, 1, cost, ratio) <= cost.outside_memory:
            return ranks, ratio
        ranks += 1


def refuse_no_room(cost: CostModel) -> PlanError:
    """The error for a batch of which more must leave than the tiers hold."""
    return PlanError(
        f"{cost.outside_memory:.4g} bytes of host memory and disk a rank do not hold what the batch must offload:"
        " raise host_memory, disk_memory or the capacity, or use more ranks"
    )


def refuse_too_long(sequence: int, length: int, world_size: int, capacity: int, layers: int, largest: int) -> PlanError:
    """The error for a sequence that does not fit; ``largest``: tokens a micro-batch may hold with what is allowed."""
    share = -(-length // world_size)
    ratio = ratio_for(share, capacity, layers)
    cure = (
        f"an offload ratio of {ratio:.3f} would make it fit"
        if ratio is not None
        else "even full offload would not make it fit"
    )
    return PlanError(
        f"sequence {sequence} of {length} tokens does not fit {world_size} ranks x {largest} tokens = "
        f"{world_size * largest}: {cure}; otherwise use at least {-(-length // largest)} ranks, a capacity of at least "
        f"{share}, or shorter sequences"
    )
