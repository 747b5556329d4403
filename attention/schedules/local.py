"""Local: the whole sequence lies on one rank. No message, one tile."""

from __future__ import annotations

from hdp.attention.layout import Layout
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount, RankProgram, Step, Tile


def forward(layout: Layout, mask: Mask, heads: HeadCount, member: int) -> RankProgram:
    if layout.size != 1:
        raise ValueError(f"schedule 'local' serves groups of 1 rank, not {layout.size}: use 'ring'")
    chunks = layout.owned(member)
    return RankProgram(steps=(Step(tiles=(Tile(queries=chunks, keys=chunks, heads=(0, heads.query)),)),))


def backward(layout: Layout, mask: Mask, heads: HeadCount, member: int) -> RankProgram:
    return forward(layout, mask, heads, member)
