"""Places for buffers: which bytes of the arena each one uses, and which rows of an accumulator hold something.

[Note: arena] A buffer lives from the step in which it is received or first written to the step of its last use; a buffer
that is sent lives one step longer, because sends are only waited for at the end of the following step. Buffers whose
lives do not overlap share bytes: first fit in order of birth. What forward keeps for backward lies in a tensor of its own.
"""

from __future__ import annotations

import sys
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import groupby, pairwise

from hdp.attention.program import Heads

ALIGNMENT = 64  # bytes


def pack_arena(lives: Sequence[tuple[int, int, int]]) -> tuple[list[int], int]:
    """Bytes at which each buffer (first step, last step, bytes) begins, and the arena's size. See [Note: arena]."""
    offsets = [0] * len(lives)
    peak = 0
    live: list[tuple[int, int, int]] = []  # offset, end, died
    order = sorted(range(len(lives)), key=lambda i: lives[i][0])
    for born, group in groupby(order, key=lambda i: lives[i][0]):
        live = sorted(slot for slot in live if slot[2] >= born)
        holes = _holes(live)
        for i in group:
            size = -(-lives[i][2] // ALIGNMENT) * ALIGNMENT
            if size == 0:
                continue
            at = next(h for h, (start, stop) in enumerate(holes) if stop - start >= size)
            start, stop = holes[at]
            holes[at : at + 1] = [(start + size, stop)] if stop - start > size else []
            offsets[i] = start
            live.append((start, start + size, lives[i][1]))
            peak = max(peak, start + size)
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
