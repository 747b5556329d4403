"""Places for buffers: which bytes of the arena each one uses, and which rows of an accumulator hold something.

[Note: arena] A buffer lives from the step in which it is received or first written to the step of its last use; a buffer
that is sent lives one step longer, because sends are only waited for at the end of the following step. Buffers whose
lives do not overlap share bytes: first fit in order of birth. What forward keeps for backward lies in a tensor of its own,
at offsets that both directions compute from the program's list of kept values.
"""

from __future__ import annotations

import sys
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import groupby, pairwise

from hdp.attention.lowered import Geometry, Width
from hdp.attention.program import Heads

ALIGNMENT = 64  # bytes


@dataclass(slots=True)
class Draft:
    """A buffer whose place in the arena is not decided yet."""

    rows: int
    heads: int
    has_dim: bool
    width: Width
    born: int
    """Step of its first use."""
    died: int
    """Step of its last use."""
    kept_offset: int = -1
    """Bytes from the start of the kept tensor; -1: lies in the arena."""
    root: int = -1
    """The buffer (its number among drafts) whose bytes it is a part of; -1: has bytes of its own."""
    root_offset: int = 0
    """Bytes from the start of its root."""

    @property
    def kept(self) -> bool:
        return self.kept_offset >= 0

    def row_bytes(self, geometry: Geometry) -> int:
        return self.heads * (geometry.head_dim if self.has_dim else 1) * geometry.bytes_of(self.width)

    def bytes(self, geometry: Geometry) -> int:
        return buffer_bytes(geometry, self.rows, self.heads, self.has_dim, self.width)


def buffer_bytes(geometry: Geometry, rows: int, heads: int, has_dim: bool, width: Width) -> int:
    """Bytes of a buffer, up to the next multiple of ``ALIGNMENT``."""
    size = rows * heads * (geometry.head_dim if has_dim else 1) * geometry.bytes_of(width)
    return -(-size // ALIGNMENT) * ALIGNMENT


def pack_arena(drafts: list[Draft], geometry: Geometry) -> tuple[list[int], int]:
    """Bytes at which each buffer begins, and the arena's size. See [Note: arena]."""
    offsets = [0] * len(drafts)
    peak = 0
    live: list[tuple[int, int, int]] = []  # offset, end, died
    roots = [i for i, draft in enumerate(drafts) if draft.root < 0 and not draft.kept]
    for born, group in groupby(sorted(roots, key=lambda i: drafts[i].born), key=lambda i: drafts[i].born):
        live = sorted(slot for slot in live if slot[2] >= born)
        holes = _holes(live)
        for i in group:
            size = drafts[i].bytes(geometry)
            if size == 0:
                continue
            at = next(h for h, (start, stop) in enumerate(holes) if stop - start >= size)
            start, stop = holes[at]
            holes[at : at + 1] = [(start + size, stop)] if stop - start > size else []
            offsets[i] = start
            live.append((start, start + size, drafts[i].died))
            peak = max(peak, start + size)
    for i, draft in enumerate(drafts):
        if draft.kept:
            offsets[i] = draft.kept_offset
        elif draft.root >= 0:
            offsets[i] = offsets[draft.root] + draft.root_offset
    return offsets, peak


def _holes(live: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """Free bytes between slots in ascending order, and behind them without end."""
    holes, position = [], 0
    for start, stop, _ in live:
        if start > position:
            holes.append((position, start))
        position = max(position, stop)
    return [*holes, (position, sys.maxsize)]


class Filled:
    """Which rows and heads of an accumulator hold something already."""

    def __init__(self) -> None:
        self._areas: dict[Heads, tuple[list[int], list[int]]] = {}
        """By heads the first rows and the rows behind the last of intervals that do not touch, ascending."""

    def missing(self, start: int, stop: int, heads: Heads) -> list[tuple[int, int, Heads]]:
        """Parts (first row, last row + 1, heads) of the rectangle that hold nothing yet."""
        overlapping = []
        for some, (starts, stops) in self._areas.items():
            if some[0] < heads[1] and heads[0] < some[1]:
                first, last = bisect_right(stops, start), bisect_left(starts, stop)
                overlapping += [(starts[i], stops[i], some) for i in range(first, last)]
        if not overlapping:
            return [(start, stop, heads)] if start < stop else []
        cuts = sorted({*heads, *(c for f in overlapping for c in f[2] if heads[0] < c < heads[1])})
        return [
            (a, b, (low, high))
            for low, high in pairwise(cuts)
            for a, b in _gaps(start, stop, [f[:2] for f in overlapping if f[2][0] <= low and high <= f[2][1]])
        ]

    def add(self, start: int, stop: int, heads: Heads) -> None:
        """Marks a rectangle, joined to those of the same heads that it meets."""
        if start == stop:
            return
        starts, stops = self._areas.setdefault(heads, ([], []))
        first, last = bisect_left(stops, start), bisect_right(starts, stop)
        if first < last:
            start, stop = min(start, starts[first]), max(stop, stops[last - 1])
        starts[first:last], stops[first:last] = [start], [stop]


def _gaps(start: int, stop: int, intervals: list[tuple[int, int]]) -> list[tuple[int, int]]:
    gaps, position = [], start
    for a, b in sorted(intervals):
        if a > position:
            gaps.append((position, min(a, stop)))
        position = max(position, b)
    if position < stop:
        gaps.append((position, stop))
    return gaps
