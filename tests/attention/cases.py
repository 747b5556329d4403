"""The cases over which attention is held exact: schedules, heads, masks, groups, lengths, and micro-batches that mix them."""

from __future__ import annotations

import random

from virtual import Sequence_

from hdp.attention.backends import Scoring
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount

HEAD_DIM = 8
SCORING = Scoring(HEAD_DIM**-0.5)
SCHEDULES = (
    *("ring", "ring_q", "token_ring", "direct", "all_gather", "all_gather:2", "ulysses", "ulysses:2"),
    *("ulysses_home", "ulysses_home:2"),
    *("hybrid:2", "hybrid:4", "double_ring:2", "double_ring:4"),
)
HEADS = {
    "mha": HeadCount(query=4, key=4),
    "gqa3": HeadCount(query=6, key=2),
    "gqa8": HeadCount(query=16, key=2),
    "mqa": HeadCount(query=5, key=1),
}
MASKS = {
    "causal": (Mask(), "zigzag"),
    "striped": (Mask(), "striped"),
    "bidirectional": (Mask(causal=False), "contiguous"),
    "window": (Mask(window=11), "zigzag"),
    "window_both_ways": (Mask(causal=False, window=7), "contiguous"),
}
GROUPS = (1, 2, 3, 4, 5, 8)


def serves(name: str, size: int) -> bool:
    base, _, number = name.partition(":")
    return base not in ("hybrid", "double_ring") or size % int(number) == 0


def lengths(size: int, layout: str, draw: random.Random) -> tuple[int, ...]:
    """Two lengths that nothing divides: fewer tokens than ranks, and several chunks for every rank."""
    few = draw.randrange(1, max(size, 2))
    many = draw.choice((37, 53, 61, 83))
    # A stripe holds 64 tokens: whole rounds of stripes, and one that is not.
    return few, 64 * size + many if layout == "striped" else many


def mixed(name: str, draw: random.Random, world: int, layout: str) -> list[Sequence_]:
    """One micro-batch: for each group size that the schedule serves a short and a long sequence, whole ones between them."""
    sequences = [Sequence_(length=draw.choice((1, 5, 61)), group=(draw.randrange(world),), layout=layout)]
    for size in (s for s in GROUPS if s <= world and serves(name, s)):
        for length in lengths(size, layout, draw):
            group = tuple(draw.sample(range(world), size))
            schedule = name if size > 1 else "local"
            sequences.append(Sequence_(length=length, group=group, schedule=schedule, layout=layout))
        sequences.append(Sequence_(length=draw.choice((1, 5, 24)), group=(draw.randrange(world),), layout=layout))
    return sequences
