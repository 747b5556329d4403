"""Regions cut into rectangles document by document: the launches of windows and stripes.

A region is all that a mask allows between the rows of some chunks and the keys of others. How many rectangles that is depends
on a document's length, so they are cut when a program is lowered, of all documents of a bundle in one call of C++
(``csrc/rectangles.cpp``). Rectangles of one shape are one call; those that lie together are one launch where the backend packs.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hdp import _rectangles
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
        bundle = self.tables.bundles[index]
        count = len(bundle.lengths)
        *shapes, empties = _rectangles.place(
            self.rectangles(index, region),
            np.ones(count, dtype=bool) if documents is None else documents,
            np.array([self.tables.rows(index, ref, ref.start) for ref in region.inputs]),
            np.zeros(count, dtype=np.int64) if turns is None else turns,
            self.packs,
            [self._sum(index, region, one, heads) for one in region.sums],
            3 if self.backward else 2,
        )
        some = [ref.heads if heads is None else heads[n in (1, 2)] for n, ref in enumerate(region.inputs)]
        numbers = [self.tables.number(index, ref.tensor) for ref in region.inputs]
        queries = region.heads if heads is None else heads[0][1] - heads[0][0]
        calls = []
        for shape, made in zip(SHAPES, shapes, strict=True):
            if made is None:
                continue
            spans, pairs, results, bounds, cuts = made
            calls.append(
                Call(
                    shape=shape,
                    inputs=tuple(map(Rows, numbers, spans[::2], spans[1::2], some)),
                    wide=self.tables.outlines[index].wide,
                    costs=pairs * queries,
                    results=results,
                    bounds=bounds,
                    cuts=tuple(cuts),
                )
            )
        return calls, empties

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
            number = self.tables.number(index, ref.tensor)
            targets.append((number, first, last - first, int(tensor.has_dim), empty, starts))
        return per_key, one.first, not self.backward, component, begin, end, targets


def _areas(rectangles: np.ndarray) -> np.ndarray:
    """Query-key pairs of each."""
    rows = rectangles[:, ROW_STOP] - rectangles[:, ROW_START]
    keys = rectangles[:, KEY_STOP] - rectangles[:, KEY_START]
    return np.where(rectangles[:, SHAPE] == SHAPES.index(Shape.FULL), rows * keys, rows * (rows + 1) // 2)
