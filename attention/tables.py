"""Tables of moves: the nominal rows of outlined moves filled in for every document of a bundle."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hdp import _tables
from hdp.attention.bundle import Bundle
from hdp.attention.lowered import FIELDS, NOTHING, Geometry, Op, Width
from hdp.attention.outlined import RESULT, Move, Outline
from hdp.attention.places import Ref

PER_KEY = ("k", "v", "dk", "dv")
WITHOUT_DIM = ("lse", "delta")


@dataclass(frozen=True, slots=True)
class Tensor:
    """A numbered tensor, as tables of moves see it."""

    chunks: tuple[int, ...]
    heads: int
    has_dim: bool
    width: Width
    borders: np.ndarray
    """Rows at which chunks of each document begin and end (``Bundle.borders``)."""
    is_lse: bool


class Tables:
    """Numbers the tensors of all outlines of a micro-batch, and expands their moves.

    ``externals``: the caller's tensors. ``first``: the number of each outline's first buffer.
    """

    def __init__(
        self,
        bundles: Sequence[Bundle],
        outlines: Sequence[Outline],
        geometry: Geometry,
        externals: tuple[str, ...],
        first: Sequence[int],
    ) -> None:
        self.bundles, self.outlines, self.geometry = bundles, outlines, geometry
        self.externals, self.first = externals, first

    def number(self, index: int, tensor: int) -> int:
        """Of a tensor of one outline, among all."""
        return tensor if tensor < len(self.externals) else self.first[index] + tensor - len(self.externals)

    def tensor(self, index: int, tensor: int) -> Tensor:
        key = index, tensor
        if key not in self._tensors:
            one, bundle = self.outlines[index], self.bundles[index]
            if tensor >= len(self.externals):
                draft = one.drafts[tensor - len(self.externals)]
                borders = bundle.borders(draft.chunks)
                found = Tensor(draft.chunks, draft.heads, draft.has_dim, draft.width, borders, tensor in one.lse)
            else:
                name, heads = self.externals[tensor], self.geometry.heads
                has_dim = name not in WITHOUT_DIM
                count = heads.key if name in PER_KEY else heads.query
                width: Width = "model" if has_dim else "sum"
                borders = self._own_borders(index)
                found = Tensor(one.owned, count, has_dim, width, borders, tensor in one.lse)
            self._tensors[key] = found
        return self._tensors[key]

    def _own_borders(self, index: int) -> np.ndarray:
        """Of the caller's tensors, in which documents of other bundles lie between."""
        if index not in self._owned:
            bundle = self.bundles[index]
            self._owned[index] = bundle.borders(self.outlines[index].owned, bundle.first_rows)
        return self._owned[index]

    @cached_property
    def _owned(self) -> dict[int, np.ndarray]:
        return {}

    @cached_property
    def _tensors(self) -> dict[tuple[int, int], Tensor]:
        return {}

    def rows(self, index: int, ref: Ref, nominal: int) -> np.ndarray:
        """The row of each document that is ``nominal`` in the nominal one."""
        key = index, ref.tensor, nominal
        if key not in self._rows:
            tensor = self.tensor(index, ref.tensor)
            self._rows[key] = self.bundles[index].at(tensor.borders, nominal)
        return self._rows[key]

    @cached_property
    def _rows(self) -> dict[tuple[int, int, int], np.ndarray]:
        return {}

    def empties(self) -> np.ndarray:
        return stack([self.fills(i, o.empties) for i, o in enumerate(self.outlines)])

    def fills(self, index: int, refs: Iterable[Ref]) -> np.ndarray:
        return self.table((index, self.emptying(index, ref)) for ref in refs)

    def emptying(self, index: int, ref: Ref) -> Move:
        return Move(Op.EMPTY if self.tensor(index, ref.tensor).is_lse else Op.ZERO, (), (ref,))

    def table(self, moves: Iterable[tuple[int, Move]], made: tuple[int, Tensor] | None = None) -> np.ndarray:
        """Rows of all documents of some moves. ``made``: the tensor that RESULT stands for as a target."""
        written = [self._written(index, move, made) for index, move in moves]
        return _tables.expand(written) if written else NOTHING

    def _written(self, index: int, move: Move, made: tuple[int, Tensor] | None) -> WrittenMove:
        row, starts = blank(move.op)
        for (column, place), ref in zip(SOURCES, move.source, strict=False):
            row[column] = self.number(index, ref.tensor)
            row[column + 2] = ref.heads[0] if ref.heads else 0
            starts[place] = self.rows(index, ref, ref.start)
        stops = self.aim(row, starts, index, move.target, made)
        return tuple(row), tuple(starts), stops

    def aim(
        self,
        row: list[int],
        starts: list[np.ndarray | None],
        index: int,
        targets: Sequence[Ref],
        made: tuple[int, Tensor] | None = None,
    ) -> np.ndarray:
        """Fills in a move's targets, and the heads of the first of them; the rows at which each document ends there."""
        for (column, place), ref in zip(TARGETS, targets, strict=False):
            if made is not None and ref.tensor == RESULT:
                row[column], tensor = made
                rows, stops = (self.bundles[index].at(tensor.borders, n) for n in (ref.start, ref.stop))
            else:
                row[column], tensor = self.number(index, ref.tensor), self.tensor(index, ref.tensor)
                rows, stops = self.rows(index, ref, ref.start), self.rows(index, ref, ref.stop)
            first, last = ref.heads or (0, tensor.heads)
            row[column + 2], starts[place] = first, rows
            if place == 1:
                row[8], row[9], ends = last - first, tensor.has_dim, stops
        return ends


SOURCES, TARGETS = ((1, 0), (10, 2)), ((4, 1), (13, 3))
"""Of each source, and of each target: the column of its number, and its place among a written move's arrays."""
WrittenMove = tuple[tuple[int, ...], tuple[np.ndarray | None, ...], np.ndarray]
"""A row of the table without rows; the first row of each document in each tensor; where they end in the target."""


def blank(op: Op) -> tuple[list[int], list[np.ndarray | None]]:
    """A move without tensors."""
    row = [0] * len(FIELDS)
    row[0] = int(op)
    row[1] = row[10] = row[13] = -1
    return row, [None] * 4


def stack(tables: Sequence[np.ndarray]) -> np.ndarray:
    tables = [t for t in tables if len(t)]
    return np.concatenate(tables) if tables else NOTHING
