"""The capacity that memory allows: the most tokens of a micro-batch with which a step fits. Pure, like all of planning."""

from __future__ import annotations

from dataclasses import replace

from hdp.attention.counts import Sizes
from hdp.attention.footprint import arena_bytes
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount
from hdp.balance.footprint import AttentionShape, Footprint
from hdp.balance.foresee import Peak, foresee
from hdp.balance.held import EngineMemory, Load

MARGIN = 0.1
"""Part of a rank's memory that is left free: for fragments, and for what no model of memory knows."""
LEAST_CAPACITY = 16
PROBED = 512
"""Tokens a rank of the shared document whose buffers are counted, to be scaled."""


def find_capacity(model: Footprint, engine: EngineMemory, memory: float, most: int) -> int:
    """Tokens of a micro-batch, at most ``most``; 0: not even the smallest fits.

    ``memory``: bytes of a rank, of which the margin is left free.
    """
    room = memory * (1.0 - MARGIN)
    if at_capacity(model, engine, most).bytes <= room:
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        if at_capacity(model, engine, middle).bytes <= room:
            low = middle
        else:
            high = middle
    return rounded(low) if low >= min(LEAST_CAPACITY, most) else 0


def at_capacity(model: Footprint, engine: EngineMemory, capacity: int) -> Peak:
    """What a rank holds with two full micro-batches, each part of a document that two ranks share in a ring."""
    kinds = dict.fromkeys(shape for layer in model.layers for shape in layer.attention)
    shared = [_shared_bytes(shape) for shape in kinds] if engine.ranks > 1 else []
    full = Load(
        tokens=capacity,
        arena=round(max((arena for arena, _ in shared), default=0.0) * capacity),
        kept=tuple(round(kept * capacity) for _, kept in shared),
        reduces=engine.regime == "slot",
    )
    return foresee(model, engine, [full, replace(full, reduces=True)])


def _shared_bytes(shape: AttentionShape) -> tuple[float, float]:
    """Per token the arena and the block of keys and values that a ring keeps for its backward."""
    arena = max(
        arena_bytes(
            ("ring", "ring"),
            backward=backward,
            layout="zigzag",
            length=2 * PROBED,
            size=2,
            members=(0,),
            heads=HeadCount(query=shape.heads, key=shape.key_heads),
            sizes=Sizes(head_dim=shape.head_dim, model_bytes=shape.element, sum_bytes=max(shape.element, 4)),
            mask=Mask(causal=shape.causal, window=shape.window or None),
        )
        for backward in (False, True)
    )
    return arena / PROBED, kept_block(shape)


def kept_block(shape: AttentionShape) -> float:
    """Bytes a token of the block of keys and values that a ring keeps for its backward."""
    return 2.0 * shape.key_heads * shape.head_dim * shape.element


def rounded(capacity: int) -> int:
    """Down to a multiple of an eighth of the power of two below it, so that a little more or less memory changes nothing."""
    step = 1 << max(capacity.bit_length() - 4, 0)
    return capacity // step * step
