"""Places for buffers: which bytes of the arena each one uses, and which rows of an accumulator hold something.

[Note: arena] A buffer lives from the step in which it is received or first written to the step of its last use; a buffer
that is sent lives one step longer, because sends are only waited for at the end of the following step. Buffers whose
lives do not overlap share bytes: first fit in order of birth. What forward keeps for backward lies in a tensor of its own,
at offsets that both directions compute from the program's list of kept values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from hdp.attention.lowered import Geometry, Width
from hdp.attention.program import Heads

ALIGNMENT = 64  # bytes


@dataclass
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
    for i in sorted(range(len(drafts)), key=lambda i: drafts[i].born):
        draft, size = drafts[i], drafts[i].bytes(geometry)
        if draft.kept:
            offsets[i] = draft.kept_offset
        if draft.kept or draft.root >= 0:
            continue
        live = sorted(slot for slot in live if slot[2] >= draft.born)
        position = 0
        for start, end, _ in live:
            if start - position >= size:
                break
            position = max(position, end)
        offsets[i] = position
        live.append((position, position + size, draft.died))
        peak = max(peak, position + size)
    for i, draft in enumerate(drafts):
        if draft.root >= 0 and not draft.kept:
            offsets[i] = offsets[draft.root] + draft.root_offset
    return offsets, peak


@dataclass
class Filled:
    """Which rows and heads of an accumulator hold something already."""

    areas: list[tuple[int, int, Heads]] = field(default_factory=list)
    """(first row, last row + 1, heads), disjoint, ascending by row for calls that walk a sequence in order."""

    def missing(self, start: int, stop: int, heads: Heads) -> list[tuple[int, int, Heads]]:
        """Parts (first row, last row + 1, heads) of the rectangle that hold nothing yet."""
        overlapping = [
            f for f in self.areas if f[0] < stop and start < f[1] and f[2][0] < heads[1] and heads[0] < f[2][1]
        ]
        if not overlapping:
            return [(start, stop, heads)] if start < stop else []
        cuts = sorted({*heads, *(c for f in overlapping for c in f[2] if heads[0] < c < heads[1])})
        return [
            (a, b, (low, high))
            for low, high in pairwise(cuts)
            for a, b in _gaps(start, stop, [f[:2] for f in overlapping if f[2][0] <= low and high <= f[2][1]])
        ]

    def add(self, start: int, stop: int, heads: Heads) -> None:
        """Marks a rectangle; joined to the last one where they touch, so that a walk down a sequence stays short."""
        if self.areas:
            last = self.areas[-1]
            if last[1] == start and last[2] == heads:
                self.areas[-1] = (last[0], stop, heads)
                return
        self.areas.append((start, stop, heads))


def _gaps(start: int, stop: int, intervals: list[tuple[int, int]]) -> list[tuple[int, int]]:
    gaps, position = [], start
    for a, b in sorted(intervals):
        if a > position:
            gaps.append((position, min(a, stop)))
        position = max(position, b)
    if position < stop:
        gaps.append((position, stop))
    return gaps
