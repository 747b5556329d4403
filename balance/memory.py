"""Capacity with and without offload: how many tokens a micro-batch may hold, and how few ranks a sequence needs.

ByteScale section 4.3 (Eq. 3). Of l layers two keep their activations on the device; of the others a fraction ``ratio``
leaves. With activations proportional to tokens a micro-batch then holds C * l / (2 + (1 - ratio)(l - 2)) tokens. A cost model
says which layers stay (``keep_first``, ``keep_last``) and how many run again in backward (``recomputed``); where a function
takes a number of layers instead, the first and the last stay and none runs again.
"""

from __future__ import annotations

from bisect import bisect_left
from fractions import Fraction
from math import ceil

import numpy as np

from hdp.balance.cost import CostModel
from hdp.balance.plan import DoesNotFit, Plan

KEPT_LAYERS = 2
RATIO_STEP = 64
"""Offload ratios are multiples of 1/64, so that they are exact in every float format."""


def kept_fraction(layers: int | CostModel, ratio: float) -> Fraction:
    """Part that stays on the device of what a micro-batch saves there without offload."""
    if isinstance(layers, int):
        kept = min(KEPT_LAYERS, layers)
        return (kept + (1 - Fraction(ratio)) * (layers - kept)) / layers
    # Whatever leaves, two layers are there: the one that runs and the one on its way.
    least = Fraction(min(KEPT_LAYERS, layers.layers))
    movable, saved = Fraction(layers.movable_layers), Fraction(layers.layers)
    if layers.recomputed and layers.activation_bytes:
        saved, movable = _saved_layers(layers), Fraction(layers.movable_bytes) / Fraction(layers.activation_bytes)
    under_way = Fraction(0)
    if layers.in_flight and ratio and movable:
        # A layer that runs again, while the one before comes back whole, has its own input beside it.
        mixed = 0 < layers.recomputed < layers.movable_layers
        more = layers.in_flight + (_again_layers(layers) if mixed else Fraction(0))
        under_way = max(more - layers.keep_last, under_way)
    return max(least, saved - Fraction(ratio) * movable + under_way) / saved


def _saved_layers(cost: CostModel) -> Fraction:
    """Activations on the device at the peak without offload, in layers that do not run again.

    A layer that runs again has all of its activations for that moment. They find the room of the last layer's, which are gone
    by then, unless the last layer itself runs again.
    """
    if not cost.recomputed or not cost.activation_bytes:
        return Fraction(cost.layers)
    again = cost.recomputed * _again_layers(cost)
    last = not cost.keep_last and cost.recomputed == cost.movable_layers
    return cost.layers - cost.recomputed + again + last


def _again_layers(cost: CostModel) -> Fraction:
    """What a layer keeps that runs again, over what one keeps that does not."""
    return Fraction(cost.recompute_bytes or cost.activation_bytes) / Fraction(cost.activation_bytes or 1.0)


def recomputed_capacity(capacity: int, cost: CostModel) -> int:
    """Tokens of a micro-batch without offload when ``cost.recomputed`` layers run again; ``capacity``: when none does."""
    return int(recomputed_room(capacity, cost))


def recomputed_room(capacity: int, cost: CostModel) -> Fraction:
    """:func:`recomputed_capacity` before it is rounded down, for what goes on counting with it: offload beside it, say."""
    return capacity * cost.layers / _saved_layers(cost)


def capacity_with(capacity: int | Fraction, layers: int | CostModel, ratio: float) -> int:
    """Tokens of a micro-batch that offloads up to ``ratio`` of what its layers may give away; ``capacity``: without offload."""
    return int(max(capacity, capacity / kept_fraction(layers, ratio)))


def ratio_for(tokens: int, capacity: int | Fraction, layers: int | CostModel) -> float | None:
    """Smallest ratio at which a micro-batch holds ``tokens``; None when even full offload is not enough."""
    if tokens <= capacity:
        return 0.0
    steps = range(1, RATIO_STEP + 1)
    step = 1 + bisect_left(steps, tokens, key=lambda step: capacity_with(capacity, layers, step / RATIO_STEP))
    return step / RATIO_STEP if step <= RATIO_STEP else None


def hidden_ratio(length: int, cost: CostModel) -> float:
    """Largest ratio whose copies hide behind one layer's forward of the whole sequence (sharding divides both)."""
    if cost.copy_bandwidth <= 0 or length <= 0:
        return 0.0
    layer = float(cost.attention_seconds([length])[0]) / cost.layers + cost.linear * length
    moves = cost.movable_bytes / cost.movable_layers if cost.recomputed else cost.activation_bytes
    ratio = min(1.0, layer * cost.copy_bandwidth / max(moves * length, 1e-9))
    return int(np.floor(ratio * RATIO_STEP)) / RATIO_STEP


def ranks_with(length: int, capacity: int, layers: int | CostModel, ratio: float) -> int:
    """D(s) of Eq. 3 for a given ratio: ceil([2 Act(s) + (1 - r)(l - 2) Act(s)] / [l Act(C)])."""
    return max(1, ceil(kept_fraction(layers, ratio) * length / capacity))


def least_ratio(length: int, capacity: int, layers: int | CostModel) -> Fraction:
    """Lower bound of Eq. 3: l Act(C) / ((l - 2) Act(s)), at most 1. Less would free less than one rank's worth."""
    count, movable = (
        (layers, layers - KEPT_LAYERS) if isinstance(layers, int) else (layers.layers, layers.movable_layers)
    )
    return min(Fraction(1), Fraction(count * capacity, movable * length))


def moved_bytes(length: int, ranks: int, cost: CostModel, ratio: float) -> float:
    """Bytes that each of ``ranks`` ranks has outside its device when the sequence offloads ``ratio``."""
    if cost.recomputed:
        return ratio * cost.movable_bytes * length / ranks
    return ratio * cost.movable_layers * cost.activation_bytes * length / ranks


def most_moved(made: Plan, cost: CostModel) -> float:
    """Bytes outside the device of the micro-batch of a plan that offloads most."""
    tokens = {(rank, slot): held for rank, slot, held in zip(*(a.tolist() for a in made.held()), strict=True)}
    usual, slots = cost.movable_bytes, slot_costs(made, cost)
    layers = {slot: model.movable_bytes for slot, model in slots.items()}
    return max(
        (ratio * tokens[rank, slot] * layers.get(slot, usual) for rank, slot, ratio in made.offload), default=0.0
    )


def slot_costs(made: Plan, cost: CostModel) -> dict[int, CostModel]:
    """The cost model of each slot in which a plan has layers run again."""
    return {
        slot: cost.recomputing(cost.movable_layers if layers is None else layers)
        for slot, layers in made.layers_again.items()
    }


def activation_peak(made: Plan, cost: CostModel) -> float:
    """Bytes of activations of the fullest micro-batch: what it offloads or computes again taken off, as in Eq. 3.

    A shared document keeps, beside its own tokens, the block of keys and values that its ring brought last: backward begins
    with it, which saves a hop (N - 1 instead of N). It is as large as the rank's own.
    """
    ranks, slots, held = made.held()
    if not len(ranks):
        return 0.0
    blocks = made.held(shared=True)[2] * (cost.ring_bytes / cost.activation_bytes if cost.activation_bytes else 0.0)
    ratios = {(rank, slot): ratio for rank, slot, ratio in made.offload}
    models = slot_costs(made, cost)
    kept: dict[tuple[int, float], float] = {}  # layers, by slot (one for all that run as usual) and ratio
    layers = np.empty(len(held))
    for i, (rank, slot) in enumerate(zip(ranks.tolist(), slots.tolist(), strict=True)):
        key = (slot if slot in models else -1, ratios.get((rank, slot), 0.0))
        if key not in kept:
            model = models.get(slot, cost)
            kept[key] = float(kept_fraction(model, key[1]) * _saved_layers(model))
        layers[i] = kept[key]
    return float(((held + blocks) * layers).max()) * cost.activation_bytes


def eq3(length: int, capacity: int, cost: CostModel) -> tuple[float, int]:
    """(ratio, ranks) of Eq. 3: the fewest ranks, then the smallest ratio that needs no more.

    Ratios are multiples of 1/64 between the lower bound and what hides behind one layer's compute, whose bytes fit the
    host memory of ``cost`` (MEMO's bound, which Eq. 3 leaves out). Where there is none: no offload, ceil(s / C) ranks.
    """
    plain = max(1, -(-length // capacity))
    if length <= capacity or not cost.movable_layers:
        return 0.0, plain
    first = ceil(least_ratio(length, capacity, cost) * RATIO_STEP)
    best = (plain, 0.0)
    for step in range(first, round(hidden_ratio(length, cost) * RATIO_STEP) + 1):
        ratio = step / RATIO_STEP
        ranks = ranks_with(length, capacity, cost, ratio)
        if not cost.outside_memory or moved_bytes(length, ranks, cost, ratio) <= cost.outside_memory:
            best = min(best, (ranks, ratio))
    return best[1], best[0]


def fewest_ranks(length: int, capacity: int, cost: CostModel, most: float) -> tuple[int, float]:
    """(ranks, ratio): the fewest ranks that hold a sequence at a ratio of at most ``most``, and the smallest ratio for them.

    The host-memory bound of :func:`eq3`, without its lower bound: a sequence of C + 1 tokens fits one rank at a ratio of 1/64,
    where Eq. 3 would move everything or take two ranks. So never more ranks than Eq. 3, for the same ``most``.
    """
    first = max(1, -(-length // capacity_with(capacity, cost, most)))

    def ratio_on(ranks: int) -> float:
        ratio = ratio_for(-(-length // ranks), capacity, cost)
        assert ratio is not None
        return ratio

    def has_room(ranks: int) -> bool:
        ratio, outside = ratio_on(ranks), cost.outside_memory
        return not ratio or not outside or moved_bytes(-(-length // ranks), 1, cost, ratio) <= outside

    # More ranks move less each, and ceil(s / C) of them nothing.
    enough = range(first, max(first, -(-length // capacity)) + 1)
    ranks = first + bisect_left(enough, True, key=has_room)
    return ranks, ratio_on(ranks)


def refuse_no_room(cost: CostModel) -> DoesNotFit:
    """The error for a batch of which more must leave than the tiers hold."""
    return DoesNotFit(
        f"{cost.outside_memory:.4g} bytes of host memory and disk a rank do not hold what the batch must offload:"
        ' raise host_memory, disk_memory or the capacity, use more ranks, or allow recomputation (recompute="auto")'
    )


def refuse_too_long(
    sequence: int, length: int, world_size: int, capacity: int, cost: CostModel, allowed: float
) -> DoesNotFit:
    """The error for a sequence that does not fit; ``allowed``: largest offload ratio."""
    share = -(-length // world_size)
    enough = ceil(share * _saved_layers(cost) / cost.layers)
    largest = capacity_with(capacity, cost, allowed)
    ratio = ratio_for(share, capacity, cost)
    fits = f"sequence {sequence} of {length} tokens does not fit {world_size} ranks x {largest} tokens"
    fits += f" = {world_size * largest}:"
    room = f"use at least {-(-length // largest)} ranks, a capacity of at least {enough}, or shorter sequences"
    if cost.is_default:  # whose layers and bytes are nobody's
        return DoesNotFit(f"{fits} {room}; which layers could give room away only the model's cost tells (cost=...)")
    layers = None if cost.recomputed else fewest_recomputed(share, capacity, cost, allowed)
    again = f"computing {layers} of {cost.layers} layers again in backward"
    if ratio is None:
        cure = "even full offload would not make it fit" + (f", but {again} would; or" if layers else ":")
    else:
        cure = f"an offload ratio of {ratio:.3f} would make it fit" + (f", so would {again}; or" if layers else "; or")
    return DoesNotFit(f"{fits} {cure} {room}")


def fewest_recomputed(tokens: int, capacity: int, cost: CostModel, allowed: float) -> int | None:
    """Fewest layers that must run again in backward so that a micro-batch holds ``tokens`` at a ratio up to ``allowed``.

    None where all of them are not enough, or where the cost model does not say what a layer keeps that runs again.
    """
    if not cost.recompute_bytes:
        return None
    for layers in range(1, cost.movable_layers + 1):
        model = cost.recomputing(layers)
        if capacity_with(recomputed_room(capacity, model), model, allowed) >= tokens:
            return layers
    return None
