"""Kernel calls of a bundle, document by document: what each launch reads, and where what it returns goes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from hdp import _tables
from hdp.attention.lowered import NOTHING, Call, Op, Rows
from hdp.attention.mask import Shape
from hdp.attention.outlined import RESULT, KernelCall
from hdp.attention.places import Ref
from hdp.attention.tables import SOURCES, Tables, blank, stack


class Launches:
    """Makes the launches of outlined calls. ``packs``: whether a launch takes all documents that lie together."""

    def __init__(self, tables: Tables, backward: bool, packs: bool) -> None:
        self.tables, self.backward, self.packs = tables, backward, packs

    def call(
        self,
        index: int,
        call: KernelCall,
        documents: np.ndarray | None = None,
        heads: tuple[tuple[int, int], tuple[int, int]] | None = None,
        turns: np.ndarray | None = None,
    ) -> tuple[list[Call], np.ndarray]:
        """A call's launches, and what empties the sums of documents that it has no keys, or no queries, for.

        Args:
            documents: those that are computed; None: all. heads: query heads and key heads that are; None: all of the call.
            turns: launches are not shared by documents of different turns.
        """
        one = self.tables.outlines[index]
        spans = [
            (self.tables.rows(index, ref, ref.start), self.tables.rows(index, ref, ref.stop)) for ref in call.inputs
        ]
        (starts, stops), (key_starts, key_stops) = spans[0], spans[1]
        rows, keys = stops - starts, key_stops - key_starts
        is_there = (rows > 0) & (keys > 0)
        empty = self._emptied(index, call, ~is_there) if documents is None else NOTHING
        if documents is not None:
            is_there &= documents
        here = np.flatnonzero(is_there)
        if not len(here):
            return [], empty
        launch = self._launches([(a[here], b[here]) for a, b in spans], None if turns is None else turns[here])
        first = np.flatnonzero(np.diff(launch, prepend=-1))
        last = np.append(first[1:], len(here)) - 1
        tensors = [self.tables.number(index, ref.tensor) for ref in call.inputs]
        chosen = [ref.heads if heads is None else heads[n in (1, 2)] for n, ref in enumerate(call.inputs)]
        inputs = tuple(
            Rows(tensor, a[here][first], b[here][last], some)
            for tensor, (a, b), some in zip(tensors, spans, chosen, strict=True)
        )
        count = call.heads if heads is None else heads[0][1] - heads[0][0]
        costs = _area(call.shape, rows[here], keys[here]) * count
        results = self._results(index, call, here, launch, rows[here], keys[here], heads)
        made = Call(
            shape=call.shape,
            inputs=inputs,
            wide=one.wide,
            costs=np.add.reduceat(costs, first),
            results=results[0],
            bounds=results[1],
            cuts=tuple(self._cuts(rows[here], keys[here], first, last)) if self.packs else (),
        )
        return [made], empty

    def _launches(self, spans: Sequence[tuple[np.ndarray, np.ndarray]], turns: np.ndarray | None) -> np.ndarray:
        """The launch of each document: where the backend packs, all that lie together in every input share one."""
        count = len(spans[0][0])
        if not self.packs:
            return np.arange(count)
        joins = np.ones(count - 1, dtype=bool)
        for starts, stops in spans:
            joins &= starts[1:] == stops[:-1]
        if turns is not None:
            joins &= turns[1:] == turns[:-1]
        return np.concatenate([[0], np.cumsum(~joins)])

    @staticmethod
    def _cuts(
        rows: np.ndarray, keys: np.ndarray, first: np.ndarray, last: np.ndarray
    ) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        for a, b in zip(first, last, strict=True):
            yield tuple(np.concatenate([[0], np.cumsum(n[a : b + 1])]).astype(np.int32) for n in (rows, keys))  # type: ignore[misc]

    def _emptied(self, index: int, call: KernelCall, missing: np.ndarray) -> np.ndarray:
        """Sums that the call would have been the first to write."""
        if not missing.any():
            return NOTHING
        refs = [ref for move in call.results if move.op is Op.COPY for ref in move.target]
        tables = []
        for ref in refs:
            row, starts = blank(self.tables.emptying(index, ref).op)
            stops = self.tables.aim(row, starts, index, (ref,))
            (begins,) = (s for s in starts if s is not None)
            tables.append(_tables.expand([(tuple(row), (None, begins[missing]), stops[missing])]))
        return stack(tables)

    def _results(
        self,
        index: int,
        call: KernelCall,
        here: np.ndarray,
        launch: np.ndarray,
        rows: np.ndarray,
        keys: np.ndarray,
        heads: tuple[tuple[int, int], tuple[int, int]] | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Moves of what the launches return, by launch, and where each launch's begin."""
        written = []
        before = _before(rows, launch), _before(keys, launch)
        for move in call.results:
            row, starts = blank(move.op)
            targets: Sequence[Ref] = move.target
            if heads is not None:
                some = heads[self.backward and move.source[0].tensor < RESULT]
                targets = [replace(ref, heads=some) for ref in targets]
            stops = self.tables.aim(row, starts, index, targets)[here]
            chosen = [None if s is None else s[here] for s in starts]
            for (column, place), ref in zip(SOURCES, move.source, strict=False):
                component = RESULT - ref.tensor
                per_key = self.backward and component > 0
                of = call.inputs[1] if per_key else call.inputs[0]
                begin = self.tables.rows(index, of, of.start + ref.start) - self.tables.rows(index, of, of.start)
                row[column] = component  # that of launch 0; counted from the program's last tensor at the end
                chosen[place] = begin[here] + before[per_key]
            written.append((tuple(row), tuple(chosen), stops))
        return _tables.expand_results(written, launch, 3 if self.backward else 2)

    def costs(self, index: int, call: KernelCall) -> np.ndarray:
        """Of each document, query-key pairs times heads."""
        rows, keys = (
            self.tables.rows(index, ref, ref.stop) - self.tables.rows(index, ref, ref.start) for ref in call.inputs[:2]
        )
        return _area(call.shape, rows, keys) * call.heads


def _area(shape: Shape, rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
    return rows * keys if shape is Shape.FULL else rows * (rows + 1) // 2


def _before(counts: np.ndarray, launch: np.ndarray) -> np.ndarray:
    """Rows of the same launch before each document."""
    begins = np.cumsum(counts) - counts
    first = np.searchsorted(launch, launch)
    return begins - begins[first]
