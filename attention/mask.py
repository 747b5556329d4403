"""Which keys a query sees, and how a piece of that mask is cut into rectangles that a plain kernel can compute.

Kernels know three shapes: FULL (every key), CAUSAL (a square, row i sees columns <= i) and ANTICAUSAL (a square, row i
sees columns >= i: the other edge of a sliding window). :func:`decompose` cuts the mask between two lists of token ranges
into such rectangles::

    causal, zigzag, own shard        a key shard of a lower rank     sliding window of one document
        k0 k1                             k0 k1                          k ->
    q0  \\ .                           q0  #  .                       q  \\ . . .
    q1  #  \\                          q1  #  .                          # \\ . .
    = one CAUSAL square               = one FULL rectangle               / # \\ .      ( / = ANTICAUSAL)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

from hdp.attention.layout import Range, Ranges


class Shape(Enum):
    """What of a rectangle is computed."""

    FULL = "full"
    CAUSAL = "causal"
    ANTICAUSAL = "anticausal"


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Attention mask inside one sequence; other sequences are never seen."""

    causal: bool = True
    window: int | None = None
    """Tokens that a query sees, its own included: key k is seen if q - window < k (and, bidirectional, k < q + window)."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"sliding window is {self.window}: it holds at least the query's own token; None for no window"
            )

    def visible(self, query: int) -> Range:
        """Keys [start, stop) that ``query`` sees in an unbounded sequence (start may be negative)."""
        reach = self.window if self.window is not None else 1 << 60
        return query - reach + 1, query + 1 if self.causal else query + reach

    def sees_any(self, queries: Range, keys: Range) -> bool:
        """Whether some query of one range sees some key of the other."""
        if queries[0] >= queries[1] or keys[0] >= keys[1]:
            return False
        return self.visible(queries[0])[0] < keys[1] and keys[0] < self.visible(queries[1] - 1)[1]

    def sees_all(self, queries: Range, keys: Range) -> bool:
        """Whether every query of one range sees every key of the other."""
        return self.visible(queries[1] - 1)[0] <= keys[0] and keys[1] <= self.visible(queries[0])[1]

    def area(self, queries: Range, keys: Range) -> int:
        """Number of (query, key) pairs that count; constant time."""
        rows, columns = queries[1] - queries[0], keys[1] - keys[0]
        if rows <= 0 or columns <= 0:
            return 0
        reach = self.window
        if self.causal:
            older = 0 if reach is None else _pairs_behind(queries, keys, reach)
            return _pairs_behind(queries, keys, 0) - older
        if reach is None:
            return rows * columns
        return _pairs_behind(queries, keys, 1 - reach) - _pairs_behind(queries, keys, reach)

    def area_of(self, queries: Ranges, keys: Ranges) -> int:
        """:meth:`area` between two ascending lists of ranges; linear in the ranges that the mask's edges cross."""
        if not queries or not keys:
            return 0
        q, k = (queries[0][0], queries[-1][1]), (keys[0][0], keys[-1][1])
        if not self.sees_any(q, k):
            return 0
        if self.sees_all(q, k):
            return sum(b - a for a, b in queries) * sum(b - a for a, b in keys)
        if len(queries) == 1 and len(keys) == 1:
            return self.area(q, k)
        if len(queries) >= len(keys):
            middle = len(queries) // 2
            return self.area_of(queries[:middle], keys) + self.area_of(queries[middle:], keys)
        middle = len(keys) // 2
        return self.area_of(queries, keys[:middle]) + self.area_of(queries, keys[middle:])


def _pairs_behind(queries: Range, keys: Range, distance: int) -> int:
    """Pairs whose key lies at least ``distance`` tokens before the query."""
    columns = keys[1] - keys[0]

    def up_to(row: int) -> int:  # sum over t < row of t + 1, clamped to 0 .. columns
        inside = min(max(row, 0), columns)
        return inside * (inside + 1) // 2 + columns * (max(row, 0) - inside)

    return up_to(queries[1] - distance - keys[0]) - up_to(queries[0] - distance - keys[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class Rectangle:
    """Rows [row_start, row_stop) of the packed queries times rows [key_start, key_stop) of the packed keys."""

    row_start: int
    row_stop: int
    key_start: int
    key_stop: int
    shape: Shape = Shape.FULL

    @property
    def area(self) -> int:
        rows, keys = self.row_stop - self.row_start, self.key_stop - self.key_start
        return rows * keys if self.shape is Shape.FULL else rows * (rows + 1) // 2


@dataclass(frozen=True, slots=True)
class _Run:
    """Token ranges packed one after the other, beginning at packed row ``row``."""

    row: int
    ranges: Ranges

    @property
    def tokens(self) -> int:
        return sum(stop - start for start, stop in self.ranges)

    @property
    def span(self) -> Range:
        return self.ranges[0][0], self.ranges[-1][1]

    def split(self) -> tuple[_Run, _Run]:
        middle = len(self.ranges) // 2
        front = _Run(self.row, self.ranges[:middle])
        return front, _Run(self.row + front.tokens, self.ranges[middle:])


def decompose(mask: Mask, queries: Ranges, keys: Ranges) -> tuple[Rectangle, ...]:
    """The mask between two ascending lists of token ranges, each packed densely from row 0, as disjoint rectangles."""
    for ranges in (queries, keys):
        if any(a[1] > b[0] for a, b in pairwise(ranges)):
            raise ValueError(f"token ranges {ranges} do not ascend")
    query_run = _Run(0, tuple(r for r in queries if r[0] < r[1]))
    key_run = _Run(0, tuple(r for r in keys if r[0] < r[1]))
    if not query_run.ranges or not key_run.ranges:
        return ()
    return _coalesce(list(_cut_runs(mask, query_run, key_run)))


def _cut_runs(mask: Mask, q: _Run, k: _Run) -> Iterator[Rectangle]:
    if not mask.sees_any(q.span, k.span):
        return
    if mask.sees_all(q.span, k.span):
        yield Rectangle(row_start=q.row, row_stop=q.row + q.tokens, key_start=k.row, key_stop=k.row + k.tokens)
    elif mask.causal and mask.window is None and q.ranges == k.ranges:
        # The same positions in the same order: causal in packed rows as well.
        shape = Shape.CAUSAL
        yield Rectangle(
            row_start=q.row, row_stop=q.row + q.tokens, key_start=k.row, key_stop=k.row + k.tokens, shape=shape
        )
    elif len(q.ranges) == 1 and len(k.ranges) == 1:
        for r in _cut_ranges(mask, q.ranges[0], k.ranges[0]):
            dq, dk = q.row - q.ranges[0][0], k.row - k.ranges[0][0]
            yield Rectangle(
                row_start=r.row_start + dq,
                row_stop=r.row_stop + dq,
                key_start=r.key_start + dk,
                key_stop=r.key_stop + dk,
                shape=r.shape,
            )
    elif len(q.ranges) > len(k.ranges):
        for half in q.split():
            yield from _cut_runs(mask, half, k)
    else:
        for half in k.split():
            yield from _cut_runs(mask, q, half)


def _cut_ranges(mask: Mask, q: Range, k: Range) -> Iterator[Rectangle]:
    """Two contiguous ranges; rectangles in token positions."""
    reach = mask.window if mask.window is not None else max(q[1] - k[0], 1)
    block = min(reach, q[1] - q[0])
    for start in range(q[0], q[1], block):
        yield from _cut_band(mask, (start, min(start + block, q[1])), k, reach)


def _cut_band(mask: Mask, q: Range, k: Range, reach: int) -> Iterator[Rectangle]:
    """At most ``reach`` rows: one ANTICAUSAL edge, a FULL middle, one CAUSAL edge (or none when bidirectional)."""
    start, stop = q
    rows = stop - start
    lower = start - reach + 1  # first key of the first row
    edge = min(rows, reach - 1)  # columns from there on that not all rows see, or, of fewer rows than reach, one more
    yield from _clip_square(Shape.ANTICAUSAL, start, lower, edge, k)
    if mask.causal:
        yield from _clip_full(q, (lower + edge, start), k)
        yield from _clip_square(Shape.CAUSAL, start, start, rows, k)
    else:
        yield from _clip_full(q, (lower + edge, start + reach - 1), k)
        yield from _clip_square(Shape.CAUSAL, start, start + reach - 1, rows, k)


def _clip_full(q: Range, keys: Range, k: Range) -> Iterator[Rectangle]:
    start, stop = max(keys[0], k[0]), min(keys[1], k[1])
    if start < stop and q[0] < q[1]:
        yield Rectangle(row_start=q[0], row_stop=q[1], key_start=start, key_stop=stop)


def _clip_square(shape: Shape, row: int, key: int, size: int, k: Range) -> Iterator[Rectangle]:
    """The triangle of a square at (row, key), clipped to keys ``k``: a smaller square and a full rectangle."""
    low, high = max(k[0] - key, 0), max(key + size - k[1], 0)  # columns cut away at either side
    rest = size - low - high
    if rest <= 0:
        return
    if shape is Shape.CAUSAL:  # rows before the first column see nothing, rows after the last see all
        yield from _clip_full((row + size - high, row + size), (key + low, key + size - high), k)
    else:
        yield from _clip_full((row, row + low), (key + low, key + size - high), k)
    yield Rectangle(
        row_start=row + low, row_stop=row + low + rest, key_start=key + low, key_stop=key + low + rest, shape=shape
    )


def _coalesce(rectangles: list[Rectangle]) -> tuple[Rectangle, ...]:
    """Joins FULL rectangles that touch along a whole side, so that a kernel is called less often."""
    merged = True
    while merged:
        merged = False
        for by_rows in (True, False):
            done: list[Rectangle] = []
            for r in sorted(rectangles, key=lambda r: _side(r, by_rows)):
                last = done[-1] if done else None
                if last is not None and _touch(last, r, by_rows):
                    done[-1] = _join(last, r)
                    merged = True
                else:
                    done.append(r)
            rectangles = done
    return tuple(sorted(rectangles, key=lambda r: (r.row_start, r.key_start)))


def _side(r: Rectangle, by_rows: bool) -> tuple[bool, int, int, int]:
    other = r.shape is not Shape.FULL
    if by_rows:
        return other, r.key_start, r.key_stop, r.row_start
    return other, r.row_start, r.row_stop, r.key_start


def _touch(a: Rectangle, b: Rectangle, by_rows: bool) -> bool:
    if a.shape is not Shape.FULL or b.shape is not Shape.FULL:
        return False
    if by_rows:
        return (a.key_start, a.key_stop) == (b.key_start, b.key_stop) and a.row_stop == b.row_start
    return (a.row_start, a.row_stop) == (b.row_start, b.row_stop) and a.key_stop == b.key_start


def _join(a: Rectangle, b: Rectangle) -> Rectangle:
    return Rectangle(
        row_start=min(a.row_start, b.row_start),
        row_stop=max(a.row_stop, b.row_stop),
        key_start=min(a.key_start, b.key_start),
        key_stop=max(a.key_stop, b.key_stop),
    )
