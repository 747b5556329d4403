"""Queries on tour: keys and values stay, the query chunks of every member visit the others, one hop a step.

Chunks travel against the order of members, so that the front half of a zigzag shard, which only lower members' keys
interest, stops before the ring wraps round: a quarter of the bytes is saved (TokenRing's zigzag variant).
At step ``t`` member ``m`` holds the queries of ``m + t``. Shared by ``ring_q`` and ``token_ring``.
"""

from __future__ import annotations

from hdp.attention.layout import Layout
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount, Kind, Tile, Transfer
from hdp.attention.schedules.sight import Hops, Sight, send


class QueryTour:
    """The tour as one member sees it; ``step`` counts how far ahead the visiting chunks' owner is."""

    def __init__(self, layout: Layout, mask: Mask, heads: HeadCount, member: int) -> None:
        self.sight, self.heads, self.member, self.size = Sight(layout, mask), heads, member, layout.size

    def visit(self, step: int) -> tuple[Tile, ...]:
        """What this member computes at ``step``."""
        if step >= self.size:
            return ()
        return self.sight.tiles(self._chunks(step), self._chunks(0), (0, self.heads.query))

    def travel(self, step: int, kinds: tuple[Kind, ...]) -> tuple[tuple[Transfer, ...], tuple[Transfer, ...]]:
        """(sends, receives) of the inputs ``kinds`` at ``step``: on to the next member, in from the one before it."""
        if step + 1 >= self.size:
            return (), ()
        leaving = tuple(c for c in self._chunks(step) if self.hops(c)[1] > step)
        coming = tuple(c for c in self._chunks(step + 1) if self.hops(c)[1] > step)
        sends = tuple(t for kind in kinds for t in send(kind, leaving, self._heads, self.peer(-1)))
        receives = tuple(t for kind in kinds for t in send(kind, coming, self._heads, self.peer(1)))
        return sends, receives

    def straight_home(self, step: int, kind: Kind) -> tuple[tuple[Transfer, ...], tuple[Transfer, ...]]:
        """(sends, receives) at ``step`` of the partials made at ``step - 1``, straight to their owner, on lane 1."""
        hop = step - 1
        if not 1 <= hop < self.size:
            return (), ()
        made = self.sight.seeing(self._chunks(hop), self._chunks(0))
        mine = self.sight.seeing(self._chunks(0), self._chunks(-hop))
        return (
            send(kind, made, self._heads, self.peer(hop), lane=1),
            send(kind, mine, self._heads, self.peer(-hop), lane=1),
        )

    def along(self, step: int, kind: Kind) -> tuple[tuple[Transfer, ...], tuple[Transfer, ...]]:
        """(sends, receives) at ``step`` of sums that follow their queries: one step behind, home from the last stop."""
        hop = step - 1
        if hop < 1:
            return (), ()
        sends: tuple[Transfer, ...] = ()
        receives: tuple[Transfer, ...] = ()
        if hop + 1 < self.size:
            onward = tuple(c for c in self._chunks(hop) if self._first(c) <= hop < self.hops(c)[1])
            coming = tuple(c for c in self._chunks(hop + 1) if self._first(c) <= hop < self.hops(c)[1])
            sends += send(kind, onward, self._heads, self.peer(-1))
            receives += send(kind, coming, self._heads, self.peer(1))
        if hop < self.size:
            ended = tuple(c for c in self._chunks(hop) if self.hops(c)[1] == hop)
            home = tuple(c for c in self._chunks(0) if self.hops(c)[1] == hop)
            sends += send(kind, ended, self._heads, self.peer(hop))
            receives += send(kind, home, self._heads, self.peer(-hop))
        return sends, receives

    def hops(self, chunk: int) -> Hops:
        return self.sight.hops(chunk, -1, is_key=False)

    def peer(self, offset: int) -> int:
        return (self.member + offset) % self.size

    @property
    def _heads(self) -> tuple[int, int]:
        return 0, self.heads.query

    def _first(self, chunk: int) -> int:
        return self.hops(chunk)[0]

    def _chunks(self, offset: int) -> tuple[int, ...]:
        return self.sight.chunks(self.peer(offset))
