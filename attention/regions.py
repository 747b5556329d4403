"""Regions cut into rectangles document by document: the launches of windows and stripes.

A region is all that a mask allows between the rows of some chunks and the keys of others. How many rectangles that is depends
on a document's length, so they are cut when a program is lowered, of all documents of a bundle in one call of C++
(``csrc/rectangles.cpp``). Rectangles of one shape are one call; those that lie together are one launch where the backend packs.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hdp import _rectangles
from hdp.attention.launches import before, cuts_of, launches_of
from hdp.attention.lowered import Call, Rows
from hdp.attention.mask import Shape
from hdp.attention.outlined import RESULT, Region, Sum
from hdp.attention.program import Heads
from hdp.attention.tables import Tables

SHAPES = (Shape.CAUSAL, Shape.FULL, Shape.ANTICAUSAL)
"""As ``csrc/rectangles.cpp`` numbers them: in this order a document's rectangles are computed."""
DOCUMENT, SHAPE, ROW_START, ROW_STOP, KEY_START, KEY_STOP = range(6)


class Regions:
    """Makes the launches of outlined regions. ``packs``: whether a launch takes all rectangles that lie together."""

    def __init__(self, tables: Tables, backward: bool, packs: bool) -> None:
        self.tables, self.backward, self.packs = tables, backward, packs
        self._rectangles: dict[tuple[int, tuple[int, ...], tuple[int, ...]], np.ndarray] = {}

    def rectangles(self, index: int, region: Region) -> np.ndarray:
        """[n, 6]: document, shape, rows and keys counted from the region's first."""
        key = index, region.queries, region.keys
        if key not in self._rectangles:
            bundle = self.tables.bundles[index]
            mask, sides = bundle.structure.mask, (bundle.ranges(region.queries), bundle.ranges(region.keys))
            self._rectangles[key] = _rectangles.cut(mask.causal, mask.window or 0, *sides[0], *sides[1])
        return self._rectangles[key]

    def costs(self, index: int, region: Region) -> np.ndarray:
        """Of each document, query-key pairs times heads."""
        found = self.rectangles(index, region)
        costs = np.zeros(len(self.tables.bundles[index].lengths), dtype=np.int64)
        np.add.at(costs, found[:, DOCUMENT], _areas(found) * region.heads)
        return costs

    def call(
        self,
        index: int,
        region: Region,
        documents: np.ndarray | None = None,
        heads: tuple[Heads, Heads] | None = None,
        turns: np.ndarray | None = None,
    ) -> tuple[list[Call], np.ndarray]:
        """As :meth:`hdp.attention.launches.Launches.call`: a call for each shape, in the order in which they must run."""
        found = self.rectangles(index, region)
        count = len(self.tables.bundles[index].lengths)
        chosen = np.arange(count)
        if documents is not None:
            chosen, found = np.flatnonzero(documents), found[documents[found[:, DOCUMENT]]]
        bases = [self.tables.rows(index, ref, ref.start) for ref in region.inputs]
        parts: list[_Part | None] = []
        launches = np.zeros((len(found), 3), dtype=np.int64)
        for number in range(len(SHAPES)):
            here = np.flatnonzero(found[:, SHAPE] == number)
            part = _Part(found[here], bases, turns, self.packs) if len(here) else None
            if part is not None:
                launches[here] = np.stack(part.launches, axis=1)
            parts.append(part)
        sums = [self._sum(index, region, one, heads) for one in region.sums]
        *tables, empties = _rectangles.place(found, launches, chosen, count, sums, 3 if self.backward else 2)
        calls = [
            self._call(index, region, shape, part, table, heads)
            for shape, part, table in zip(SHAPES, parts, tables, strict=True)
            if part is not None
        ]
        return calls, empties

    def _call(
        self,
        index: int,
        region: Region,
        shape: Shape,
        part: _Part,
        table: tuple[np.ndarray, np.ndarray],
        heads: tuple[Heads, Heads] | None,
    ) -> Call:
        inputs = tuple(
            Rows(
                self.tables.number(index, ref.tensor), *part.span(n), ref.heads if heads is None else heads[n in (1, 2)]
            )
            for n, ref in enumerate(region.inputs)
        )
        queries = region.heads if heads is None else heads[0][1] - heads[0][0]
        return Call(
            shape=shape,
            inputs=inputs,
            wide=self.tables.outlines[index].wide,
            costs=np.add.reduceat(_areas(part.rectangles) * queries, part.first),
            results=table[0],
            bounds=table[1],
            cuts=part.cuts() if self.packs else (),
        )

    def _sum(self, index: int, region: Region, one: Sum, heads: tuple[Heads, Heads] | None) -> _rectangles.Sum:
        component = RESULT - one.source[0].tensor
        per_key = self.backward and component > 0
        bundle, chunks = self.tables.bundles[index], region.keys if per_key else region.queries
        inside = bundle.borders(chunks, np.zeros(len(bundle.lengths), dtype=np.int64))
        begin, end = (bundle.at(inside, nominal) for nominal in (one.source[0].start, one.source[0].stop))
        targets = []
        for ref in one.target:
            some = ref if heads is None else replace(ref, heads=heads[per_key])
            tensor = self.tables.tensor(index, ref.tensor)
            first, last = some.heads or (0, tensor.heads)
            starts = self.tables.rows(index, ref, ref.start)
            empty = int(self.tables.emptying(index, ref).op)
            targets.append((self.tables.number(index, ref.tensor), first, last - first, tensor.has_dim, empty, starts))
        return per_key, one.first, not self.backward, component, begin, end, targets


class _Part:
    """Rectangles of one shape. ``bases``: the first row of each document in every input, query rows and keys as a call's."""

    def __init__(self, rectangles: np.ndarray, bases: list[np.ndarray], turns: np.ndarray | None, packs: bool) -> None:
        self.rectangles, documents = rectangles, rectangles[:, DOCUMENT]
        self.spans = []
        for number, base in enumerate(bases):
            start, stop = (KEY_START, KEY_STOP) if number in (1, 2) else (ROW_START, ROW_STOP)
            first = base[documents]
            self.spans.append((first + rectangles[:, start], first + rectangles[:, stop]))
        self.launch = launches_of(self.spans, None if turns is None else turns[documents], packs=packs)
        self.first = np.flatnonzero(np.diff(self.launch, prepend=-1))
        """The first rectangle of each launch."""
        self.last = np.append(self.first[1:], len(rectangles)) - 1
        self.rows = rectangles[:, ROW_STOP] - rectangles[:, ROW_START]
        self.keys = rectangles[:, KEY_STOP] - rectangles[:, KEY_START]

    @property
    def launches(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each rectangle its launch, and what the launch returns before it, in rows and in keys."""
        return self.launch, before(self.rows, self.launch), before(self.keys, self.launch)

    def span(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of one input, from the first of each launch to its last."""
        starts, stops = self.spans[number]
        return starts[self.first], stops[self.last]

    def cuts(self) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        return tuple(cuts_of(self.rows, self.keys, self.first, self.last))


def _areas(rectangles: np.ndarray) -> np.ndarray:
    """Query-key pairs of each."""
    rows = rectangles[:, ROW_STOP] - rectangles[:, ROW_START]
    keys = rectangles[:, KEY_STOP] - rectangles[:, KEY_START]
    return np.where(rectangles[:, SHAPE] == SHAPES.index(Shape.FULL), rows * keys, rows * (rows + 1) // 2)
