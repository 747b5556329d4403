"""Tables of moves: the nominal rows of outlined moves filled in for every document of a bundle."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

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
    bases: np.ndarray | None
    """First row of each document; None: as they lie one after the other."""
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
                found = Tensor(draft.chunks, draft.heads, draft.has_dim, draft.width, None, tensor in one.lse)
            else:
                name, heads = self.externals[tensor], self.geometry.heads
                has_dim = name not in WITHOUT_DIM
                count = heads.key if name in PER_KEY else heads.query
                width: Width = "model" if has_dim else "sum"
                found = Tensor(one.owned, count, has_dim, width, bundle.first_rows, tensor in one.lse)
            self._tensors[key] = found
        return self._tensors[key]

    @cached_property
    def _tensors(self) -> dict[tuple[int, int], Tensor]:
        return {}

    def rows(self, index: int, ref: Ref, nominal: int) -> np.ndarray:
        """The row of each document that is ``nominal`` in the nominal one."""
        tensor = self.tensor(index, ref.tensor)
        return self.bundles[index].rows(tensor.chunks, nominal, tensor.bases)

    def empties(self) -> np.ndarray:
        return stack([self.fills(i, o.empties) for i, o in enumerate(self.outlines)])

    def fills(self, index: int, refs: Iterable[Ref]) -> np.ndarray:
        return self.table((index, Move(self.nothing(index, ref), (), (ref,))) for ref in refs)

    def nothing(self, index: int, ref: Ref) -> Op:
        return Op.EMPTY if self.tensor(index, ref.tensor).is_lse else Op.ZERO

    def table(self, moves: Iterable[tuple[int, Move]], made: tuple[int, Tensor] | None = None) -> np.ndarray:
        """Rows of all documents of some moves. ``made``: the tensor that RESULT stands for as a target."""
        return stack([self._expanded(index, move, made) for index, move in moves])

    def _expanded(self, index: int, move: Move, made: tuple[int, Tensor] | None) -> np.ndarray:
        table = np.zeros((len(self.bundles[index].lengths), len(FIELDS)), dtype=np.int64)
        table[:, 0] = move.op
        table[:, 10] = table[:, 13] = -1
        for columns, refs in (((1, 10), move.source), ((4, 13), move.target)):
            for at, ref in zip(columns, refs, strict=False):
                self.place(table, at, index, ref, made if ref.tensor == RESULT else None)
        return coalesced(table[table[:, 7] > 0])

    def place(self, table: np.ndarray, at: int, index: int, ref: Ref, made: tuple[int, Tensor] | None = None) -> None:
        """Fills in a tensor of each document's move, from column ``at``, and the rows and heads that it decides."""
        number, tensor = made or (self.number(index, ref.tensor), self.tensor(index, ref.tensor))
        bundle = self.bundles[index]
        starts = bundle.rows(tensor.chunks, ref.start, tensor.bases)
        heads = ref.heads or (0, tensor.heads)
        table[:, at], table[:, at + 1], table[:, at + 2] = number, starts, heads[0]
        if at in (1, 4):
            table[:, 7] = bundle.rows(tensor.chunks, ref.stop, tensor.bases) - starts
            table[:, 8], table[:, 9] = heads[1] - heads[0], tensor.has_dim


def stack(tables: Sequence[np.ndarray]) -> np.ndarray:
    tables = [t for t in tables if len(t)]
    return np.concatenate(tables) if tables else NOTHING


_CONSTANT = [0, 1, 3, 4, 6, 8, 9, 10, 12, 13, 15]
_ROWS = [2, 5, 11, 14]


def _follows(table: np.ndarray) -> np.ndarray:
    """Whether each move but the first goes on where the one before it ends, in all its tensors."""
    joins = (table[1:, _CONSTANT] == table[:-1, _CONSTANT]).all(axis=1)
    return joins & (table[1:, _ROWS] - table[:-1, _ROWS] == _steps(table)).all(axis=1)


def _steps(table: np.ndarray) -> np.ndarray:
    """By how much each row field grows from one move to the next: by its rows, or not at all where there is no tensor."""
    has = np.stack([table[:-1, 1] >= 0, table[:-1, 4] >= 0, table[:-1, 10] >= 0, table[:-1, 13] >= 0], axis=1)
    return np.where(has, table[:-1, 7:8], 0)


def coalesced(table: np.ndarray) -> np.ndarray:
    """The same moves; those that go on where the one before ends are one."""
    if len(table) < 2:
        return table
    first = np.flatnonzero(np.concatenate([[True], ~_follows(table)]))
    if len(first) == len(table):
        return table
    joined = table[first].copy()
    joined[:, 7] = np.add.reduceat(table[:, 7], first)
    return joined


def coalesced_results(table: np.ndarray, launch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """:func:`coalesced`, with the launch of each move that is left."""
    if len(table) < 2:
        return table, launch
    first = np.flatnonzero(np.concatenate([[True], ~_follows(table)]))
    joined = table[first].copy()
    joined[:, 7] = np.add.reduceat(table[:, 7], first)
    return joined, launch[first]
