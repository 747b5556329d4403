"""Cuts the chunks of a layout finer: where a window ends, and into equal pieces.

Schedules send and compute by chunks. Under a sliding window only the ends of a shard see, or are seen by, another member's
tokens: with chunks cut there, a schedule that sends a chunk only to who looks at it sends what the window needs and no more::

    chunk of one member      |<- window - 1 ->|   nobody else's business   |<- window - 1 ->|
    causal                     sees what lies                                is seen by what
                               before                                        lies behind

Owners, and the order of tokens in a shard, stay as they are; only what is called a chunk changes. Chunks that lie together
are one kernel call all the same.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

from hdp.attention.layout import Layout, Range, Ranges
from hdp.attention.mask import Mask


def refine(layout: Layout, mask: Mask, parts: int = 1) -> Layout:
    """``layout`` with chunks cut where the window of ``mask`` begins or ends, and each into ``parts`` equal pieces first.

    Chunks of several ranges (``striped``) stay whole: their pieces would not lie in the order of the shard.
    """
    if layout.size == 1 or any(len(ranges) != 1 for ranges in layout.chunks):
        return layout
    return _refine(layout, mask, parts)


@lru_cache(maxsize=1024)
def _refine(layout: Layout, mask: Mask, parts: int) -> Layout:
    cuts = _window_edges(layout, mask)
    chunks: list[Ranges] = []
    owners: list[int] = []
    for (piece,), owner in zip(layout.chunks, layout.owners, strict=True):
        pieces = _pieces(piece, cuts, parts)
        chunks += [(p,) for p in pieces]
        owners += [owner] * len(pieces)
    return replace(layout, chunks=tuple(chunks), owners=tuple(owners))


def _window_edges(layout: Layout, mask: Mask) -> list[int]:
    """Tokens at which begins, or ends, what can be seen across a border between two members."""
    if mask.window is None:
        return []
    filled = [(r[0], owner) for r, owner in zip(layout.chunks, layout.owners, strict=True) if r[0][0] < r[0][1]]
    borders = [b[0] for (_, one), (b, other) in pairwise(filled) if one != other]
    return sorted({border + way * (mask.window - 1) for border in borders for way in (-1, 1)})


def _pieces(piece: Range, cuts: list[int], parts: int) -> list[Range]:
    start, stop = piece
    inside = {c for c in cuts if start < c < stop}
    inside |= {start + (stop - start) * i // parts for i in range(1, parts)} - {start, stop}
    ends = [start, *sorted(inside), stop]
    return list(pairwise(ends))
