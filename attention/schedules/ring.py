"""Ring attention: queries stay, keys and values travel from member to member (Liu et al. 2023; ByteScale section 1.6).

Forward: at step ``t`` member ``m`` computes with the block of member ``m - t`` and passes it on to ``m + 1``. A chunk
that no member further along the ring looks at (the last chunk of a causal sequence) is not passed on.

Under a sliding window a chunk goes to each member that looks at it the shorter way round, ahead or back (zigzag: what
follows a back chunk belongs to the member before), where that halves what travels, and has no step that nobody needs.

Backward turns round, as in Transformer Engine: a chunk sets out from the last member that it reached in forward, which
kept it, so the gradients of keys and values set out at once and are home after size - 1 hops instead of size. At step ``t``
member ``m`` computes with the block of ``m + 1 + t`` and, one step later, sends that block's gradients on to ``m - 1``;
keys and values need size - 2 hops at most, since their owner has them, and stop at the last member that looks at them: of a
causal zigzag layout a quarter of them need not travel at all.

The same ring runs between nodes under :mod:`hdp.attention.schedules.hybrid`: a block is then what a node owns.
"""

from __future__ import annotations

from collections.abc import Callable

from hdp.attention.layout import Layout
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount, Heads, Kind, RankProgram, Step, Tile, Transfer, Value
from hdp.attention.schedules.sight import Hops, send, sight_of

WAYS = (1, -1)


def forward(layout: Layout, mask: Mask, heads: HeadCount, member: int) -> RankProgram:
    ring = Ring(layout, mask, heads, member)
    return RankProgram(steps=ring.forward_steps(), keep=ring.kept())


def backward(layout: Layout, mask: Mask, heads: HeadCount, member: int) -> RankProgram:
    ring = Ring(layout, mask, heads, member)
    return RankProgram(steps=ring.backward_steps(), keep=ring.kept())


class Ring:
    """The ring as one member sees it; ``hop`` counts how far behind a block's owner is.

    With ``width`` > 1 the places of the ring are nodes of that many members, and this member works for its node on
    query heads ``queries`` only; its peers are the members in the same place of the other nodes.
    """

    def __init__(
        self,
        layout: Layout,
        mask: Mask,
        heads: HeadCount,
        member: int,
        *,
        width: int = 1,
        queries: Heads | None = None,
    ) -> None:
        self.sight = sight_of(layout, mask, width)
        self.member, self.place, self.width = member, member // width, width
        self.queries = queries if queries is not None else (0, heads.query)
        self.keys = heads.keys_for(self.queries) if self.queries[0] < self.queries[1] else (0, 0)
        self.last = self.sight.longest_way(1, is_key=True)

    def forward_steps(self) -> tuple[Step, ...]:
        steps = []
        for hop in range(self.last + 1):
            # This member holds the block `hop` behind it; the one before it holds the block one further back.
            sends = self._both(self._onward, hop, hop + 1, peer=1)
            receives = self._both(self._onward, hop + 1, hop + 1, peer=-1)
            steps.append(Step(sends=sends, receives=receives, tiles=self._tiles(hop)))
        return tuple(steps)

    def backward_steps(self) -> tuple[Step, ...]:
        steps = []
        for hop in reversed(range(self.last + 1)):
            sends = self._both(self._inputs_back, hop, hop, peer=-1)
            receives = self._both(self._inputs_back, hop - 1, hop, peer=1)
            sends += self._both(self._sums_back, hop + 1, hop + 1, peer=-1)
            receives += self._both(self._sums_back, hop, hop + 1, peer=1)
            steps.append(Step(sends=sends, receives=receives, tiles=self._tiles(hop)))
        return tuple(steps)

    def kept(self) -> tuple[Value, ...]:
        """Chunks whose way in forward ends here."""
        values = []
        for hop in range(1, self.last + 1):
            for way in WAYS:
                chunks = tuple(c for c in self._chunks(hop, way) if self._reach(c, way)[1] == hop)
                if chunks and self.keys[0] < self.keys[1]:
                    values.append(Value(kind=Kind.KV, chunks=chunks, heads=self.keys, block=hop * way))
        return tuple(values)

    def _tiles(self, hop: int) -> tuple[Tile, ...]:
        own = self.sight.chunks(self.place)
        if hop == 0:
            return self.sight.tiles(own, own, self.queries)
        here = [c for way in WAYS for c in self._chunks(hop, way) if hop <= self._reach(c, way)[1]]
        return self.sight.tiles(own, tuple(sorted(here)), self.queries)

    def _both(
        self, way_of: Callable[..., tuple[Transfer, ...]], hop: int, start: int, peer: int
    ) -> tuple[Transfer, ...]:
        """Transfers of chunks that travel ahead, and of those that travel back."""
        return tuple(t for way in WAYS for t in way_of(hop, start, way, peer * way))

    def _onward(self, hop: int, travelled: int, way: int, peer: int) -> tuple[Transfer, ...]:
        """Chunks of the block ``hop`` behind that travel as far as ``travelled`` hops, to or from a neighbour."""
        ending = tuple(c for c in self._chunks(hop, way) if self._reach(c, way)[1] == travelled)
        onward = tuple(c for c in self._chunks(hop, way) if self._reach(c, way)[1] > travelled)
        # Apart, so that what is kept at the end of its way is a whole message.
        return self._send(Kind.KV, onward, peer) + self._send(Kind.KV, ending, peer)

    def _inputs_back(self, hop: int, start: int, way: int, peer: int) -> tuple[Transfer, ...]:
        """Chunks of the block ``hop`` behind that go from place ``start`` to ``start`` - 1 and are looked at there or later."""
        if start < 2:
            return ()
        chunks = self._chunks(hop, way)
        going = tuple(c for c in chunks if self._reach(c, way)[0] < start <= self._reach(c, way)[1])
        return self._send(Kind.KV, going, peer)

    def _sums_back(self, hop: int, start: int, way: int, peer: int) -> tuple[Transfer, ...]:
        """Gradients of the block ``hop`` behind that go from place ``start`` to ``start`` - 1."""
        chunks = tuple(c for c in self._chunks(hop, way) if self._reach(c, way)[1] >= start)
        return self._send(Kind.DKV, chunks, peer)

    def _send(self, kind: Kind, chunks: tuple[int, ...], peer: int) -> tuple[Transfer, ...]:
        return send(kind, chunks, self.keys, (self.member + peer * self.width) % self.sight.layout.size)

    def _chunks(self, hop: int, way: int) -> tuple[int, ...]:
        """Of the place ``hop`` behind, or, on the other way, ahead."""
        return self.sight.chunks((self.place - hop * way) % self.sight.places)

    def _reach(self, chunk: int, way: int) -> Hops:
        """First and last hop at which a place looks at a chunk that travels this way."""
        return self.sight.ways(chunk, 1, is_key=True)[0 if way > 0 else 1]
