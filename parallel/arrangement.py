"""The order of a step's work in regime ``step``, and the proof that it cannot hang.

In regime ``step`` parameters are gathered once, ranks run different numbers of micro-batches, and gradients are reduced in
each rank's last one. A micro-batch that shares a sequence exchanges with other ranks in every layer; a reduction meets all
ranks in every layer. If rank 0's last micro-batch is shared with rank 1, for which it is not the last, rank 0 waits in a
reduction for rank 1, which waits in attention for rank 0. :func:`arrange` finds where gradients can be reduced,
:func:`check_arrangement` walks all ranks' meetings and refuses an order in which some never take place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hdp.balance.plan import MicroBatch, Plan


class ArrangementError(ValueError):
    """An order of work in which ranks would wait for each other in a circle."""


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """How ``step`` regime ends."""

    closing: bool
    """Every rank runs one more, tiny local micro-batch without labels, in which gradients are reduced."""


def arrange(plan: Plan) -> Arrangement:
    """Where the gradients of ``plan`` can be reduced: in each rank's last micro-batch, or in a closing one."""
    ranks, slots = plan.group_ranks, np.repeat(plan.slots, np.diff(plan.group_offsets))
    last = np.full(plan.world_size, -1, dtype=np.int64)
    np.maximum.at(last, ranks[slots >= 0], slots[slots >= 0])
    is_last = last[ranks] == slots
    sequences = np.repeat(np.arange(len(plan.lengths)), np.diff(plan.group_offsets))
    ends = np.bincount(sequences, weights=is_last, minlength=len(plan.lengths))
    sizes = np.diff(plan.group_offsets)
    mixed = (plan.slots >= 0) & (sizes > 1) & (ends > 0) & (ends < sizes)
    return Arrangement(closing=bool(mixed.any()))


@dataclass(frozen=True, kw_only=True)
class Work:
    """One micro-batch of one rank as the checker sees it."""

    micro_batch: MicroBatch | None
    """None: a dummy that shares nothing."""
    reduces: bool
    """Gradients are reduced, layer by layer, in its backward."""
    gathers: bool = False
    """Parameters are gathered, layer by layer, in its forward (they were not gathered before the step)."""
    is_last: bool = False
    """It is the last of its step on this rank."""


def works(plan: Plan, rank: int, arrangement: Arrangement) -> list[Work]:
    """What ``rank`` runs in one step, in order. A rank without a micro-batch runs a dummy, so that it takes part.

    Regime ``slot``: every slot gathers and reduces by itself, so any order that all ranks keep is free of circles.
    """
    if plan.regime == "slot":
        last = plan.slot_count - 1
        return [
            Work(micro_batch=mb, reduces=True, gathers=True, is_last=mb.slot == last) for mb in plan.micro_batches(rank)
        ]
    micro_batches: list[MicroBatch | None] = list(plan.micro_batches(rank))
    if arrangement.closing or not micro_batches:
        micro_batches.append(None)
    last = len(micro_batches) - 1
    return [Work(micro_batch=mb, reduces=i == last, is_last=i == last) for i, mb in enumerate(micro_batches)]


Meeting = tuple[str, tuple[int, ...]]  # what it is, and the ranks that must be there

LAYERS = 2
"""Layers that the checker walks: enough to see what is interleaved with what."""


def check_arrangement(works_of: Mapping[int, Sequence[Work]]) -> None:
    """Raises :class:`ArrangementError` if some rank would wait for ever. ``works_of`` maps every rank to its work."""
    world = tuple(sorted(works_of))
    programs = {rank: [m for work in works_of[rank] for m in _meetings(work, world)] for rank in world}
    position = dict.fromkeys(world, 0)
    progress = True
    while progress:
        progress = False
        for rank in world:
            while position[rank] < len(programs[rank]):
                meeting = programs[rank][position[rank]]
                if any(_head(programs, position, peer) != meeting for peer in meeting[1]):
                    break
                for peer in meeting[1]:
                    position[peer] += 1
                progress = True
    stuck = {rank: programs[rank][position[rank]][0] for rank in world if position[rank] < len(programs[rank])}
    if stuck:
        text = "; ".join(f"rank {rank} in {what}" for rank, what in list(stuck.items())[:8])
        raise ArrangementError(f"this order of work would hang: {text}")


def _head(programs: Mapping[int, list[Meeting]], position: Mapping[int, int], rank: int) -> Meeting | None:
    at = position.get(rank, 0)
    return programs[rank][at] if rank in programs and at < len(programs[rank]) else None


def _meetings(work: Work, world: tuple[int, ...]) -> list[Meeting]:
    shared: list[Meeting] = []
    if work.micro_batch is not None:
        slot = work.micro_batch.slot
        shared = [(f"attention of sequence {s.sequence}, slot {slot}", tuple(sorted(s.group))) for s in _shared(work)]
    meetings: list[Meeting] = []
    for layer in range(LAYERS):
        if work.gathers:
            meetings.append((f"all-gather of layer {layer}", world))
        meetings += [(f"{what}, forward of layer {layer}", group) for what, group in shared]
    for layer in reversed(range(LAYERS)):
        meetings += [(f"{what}, backward of layer {layer}", group) for what, group in shared]
        if work.reduces:
            meetings.append((f"reduce-scatter of layer {layer}", world))
    return meetings


def _shared(work: Work) -> list:
    assert work.micro_batch is not None
    return [shard for shard in work.micro_batch.shards if len(shard.group) > 1]
