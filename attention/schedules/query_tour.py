"""Queries on tour: keys and values stay, the query chunks of every member visit the others, one hop a step.

Chunks travel against the order of members, so that the front half of a zigzag shard, which only lower members' keys
interest, stops before the ring wraps round: a quarter of the bytes is saved (TokenRing's zigzag variant).
At step ``t`` member ``m`` holds the queries of ``m + t``. Under a sliding window a chunk goes to each member whose keys
interest it the shorter way round, so some of ``m - t`` are there as well. Shared by ``ring_q`` and ``token_ring``.
"""

from __future__ import annotations

from hdp.attention.layout import Layout
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount, Kind, Tile, Transfer
from hdp.attention.schedules.sight import Hops, send, sight_of

Transfers = tuple[Transfer, ...]
WAYS = (-1, 1)


class QueryTour:
    """The tour as one member sees it; ``step`` counts how far ahead the visiting chunks' owner is."""

    def __init__(self, layout: Layout, mask: Mask, heads: HeadCount, member: int) -> None:
        self.sight, self.heads, self.member, self.size = sight_of(layout, mask), heads, member, layout.size
        self.last = self.sight.longest_way(-1, is_key=False)
        self.steps = self.last + 1 + (self.last > 0)
        """As many as the longest way has stops, and one in which its last results go home."""

    def visit(self, step: int) -> tuple[Tile, ...]:
        """What this member computes at ``step``."""
        own = self._chunks(0, -1)
        if step == 0:
            return self.sight.tiles(own, own, self._heads)
        visitors = sorted(c for way in WAYS for c in self._visitors(step, way))
        return self.sight.tiles(tuple(visitors), own, self._heads)

    def travel(self, step: int, kinds: tuple[Kind, ...]) -> tuple[Transfers, Transfers]:
        """(sends, receives) of the inputs ``kinds`` at ``step``: on to the next member, in from the one before it."""
        sends: Transfers = ()
        receives: Transfers = ()
        for way in WAYS:
            leaving = tuple(c for c in self._chunks(step, way) if self._hops(c, way)[1] > step)
            coming = self._visitors(step + 1, way)
            sends += tuple(t for kind in kinds for t in send(kind, leaving, self._heads, self._peer(way)))
            receives += tuple(t for kind in kinds for t in send(kind, coming, self._heads, self._peer(-way)))
        return sends, receives

    def straight_home(self, step: int, kind: Kind) -> tuple[Transfers, Transfers]:
        """(sends, receives) at ``step`` of the partials made at ``step - 1``, straight to their owner, on lane 1."""
        hop = step - 1
        sends: Transfers = ()
        receives: Transfers = ()
        if hop < 1:
            return (), ()
        for way in WAYS:
            made = self.sight.seeing(self._visitors(hop, way), self._chunks(0, way))
            there = self.sight.seeing(self._chunks(0, way), self.sight.chunks(self._peer(way * hop)))
            mine = tuple(c for c in there if self._hops(c, way)[1] >= hop)
            sends += send(kind, made, self._heads, self._peer(-way * hop), lane=1)
            receives += send(kind, mine, self._heads, self._peer(way * hop), lane=1)
        return sends, receives

    def along(self, step: int, kind: Kind) -> tuple[Transfers, Transfers]:
        """(sends, receives) at ``step`` of sums that follow their queries: one step behind, home from the last stop."""
        hop = step - 1
        sends: Transfers = ()
        receives: Transfers = ()
        if hop < 1:
            return (), ()
        for way in WAYS:
            onward = tuple(c for c in self._chunks(hop, way) if self._hops(c, way)[0] <= hop < self._hops(c, way)[1])
            nexts = self._chunks(hop + 1, way)
            coming = tuple(c for c in nexts if self._hops(c, way)[0] <= hop < self._hops(c, way)[1])
            ended = tuple(c for c in self._chunks(hop, way) if self._hops(c, way)[1] == hop)
            home = tuple(c for c in self._chunks(0, way) if self._hops(c, way)[1] == hop)
            sends += send(kind, onward, self._heads, self._peer(way))
            receives += send(kind, coming, self._heads, self._peer(-way))
            sends += send(kind, ended, self._heads, self._peer(-way * hop))
            receives += send(kind, home, self._heads, self._peer(way * hop))
        return sends, receives

    @property
    def _heads(self) -> tuple[int, int]:
        return 0, self.heads.query

    def _hops(self, chunk: int, way: int) -> Hops:
        """First and last stop of a chunk that travels this way."""
        return self.sight.ways(chunk, -1, is_key=False)[0 if way < 0 else 1]

    def _peer(self, offset: int) -> int:
        return (self.member + offset) % self.size

    def _chunks(self, step: int, way: int) -> tuple[int, ...]:
        """Of the member from which something that travels this way would be here at ``step``."""
        return self.sight.chunks(self._peer(-way * step))

    def _visitors(self, step: int, way: int) -> tuple[int, ...]:
        """Those of them that do travel as far as here."""
        return tuple(c for c in self._chunks(step, way) if self._hops(c, way)[1] >= step)
