"""Ring attention: queries stay, keys and values travel from member to member (Liu et al. 2023; ByteScale section 1.6).

Forward: at step ``t`` member ``m`` computes with the block of member ``m - t`` and passes it on to ``m + 1``. A block
that no member further along the ring looks at (sliding window) is not passed on.

Backward turns round, as in Transformer Engine: a block sets out from the last member that it reached in forward, which
kept it, so the gradients of keys and values set out at once and are home after size - 1 hops instead of size. At step ``t``
member ``m`` computes with the block of ``m + 1 + t`` and, one step later, sends that block's gradients on to ``m - 1``;
keys and values need size - 2 hops, since their owner has them.
"""

from __future__ import annotations

from hdp.attention.layout import Layout
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount, Kind, RankProgram, Step, Tile, Transfer, Value


def forward(layout: Layout, mask: Mask, heads: HeadCount, member: int) -> RankProgram:
    ring = _Ring(layout, mask, heads, member)
    steps = []
    for hop in range(layout.size):
        # This member holds the block `hop` behind it; the one before it holds the block one further back.
        sends = ring.transfer(Kind.KV, hop, hop + 1, peer=1)
        receives = ring.transfer(Kind.KV, hop + 1, hop + 1, peer=-1)
        steps.append(Step(sends=sends, receives=receives, tiles=ring.tiles(hop)))
    return RankProgram(steps=tuple(steps), keep=ring.kept())


def backward(layout: Layout, mask: Mask, heads: HeadCount, member: int) -> RankProgram:
    ring = _Ring(layout, mask, heads, member)
    steps = []
    for hop in reversed(range(layout.size)):
        sends = ring.transfer(Kind.KV, hop, hop, peer=-1) if hop > 1 else ()
        receives = ring.transfer(Kind.KV, hop - 1, hop, peer=1) if hop > 1 else ()
        sends += ring.transfer(Kind.DKV, hop + 1, hop + 1, peer=-1)
        receives += ring.transfer(Kind.DKV, hop, hop + 1, peer=1)
        steps.append(Step(sends=sends, receives=receives, tiles=ring.tiles(hop)))
    return RankProgram(steps=tuple(steps), keep=ring.kept())


class _Ring:
    """The ring as one member sees it; ``hop`` counts how far behind a block's owner is."""

    def __init__(self, layout: Layout, mask: Mask, heads: HeadCount, member: int) -> None:
        self.layout, self.mask, self.heads, self.member = layout, mask, heads, member
        self._reach: dict[int, int] = {}

    def tiles(self, hop: int) -> tuple[Tile, ...]:
        queries, keys = self._chunks(self.member), self._chunks(self._owner(hop))
        if not self._sees(self.member, self._owner(hop)):
            return ()
        return (Tile(queries=queries, keys=keys, heads=(0, self.heads.query)),)

    def transfer(self, kind: Kind, hop: int, travelled: int, peer: int) -> tuple[Transfer, ...]:
        """The block ``hop`` behind, to or from ``member + peer``, if it ever travels as far as ``travelled`` hops."""
        block = self._owner(hop)
        if travelled >= self.layout.size or travelled > self.reach(block):
            return ()
        other = (self.member + peer) % self.layout.size
        return (Transfer(kind=kind, chunks=self._chunks(block), heads=self.heads.of(kind), peer=other),)

    def kept(self) -> tuple[Value, ...]:
        """Blocks whose way in forward ends here."""
        hops = [h for h in range(1, self.layout.size) if self.reach(self._owner(h)) == h]
        heads = self.heads.of(Kind.KV)
        return tuple(Value(kind=Kind.KV, chunks=self._chunks(self._owner(h)), heads=heads) for h in hops)

    def reach(self, block: int) -> int:
        """Hops to the last member that looks at this block; 0 if only its owner does."""
        if block not in self._reach:
            size = self.layout.size
            hops = (h for h in range(size - 1, 0, -1) if self._sees((block + h) % size, block))
            self._reach[block] = next(hops, 0)
        return self._reach[block]

    def _owner(self, hop: int) -> int:
        return (self.member - hop) % self.layout.size

    def _chunks(self, member: int) -> tuple[int, ...]:
        return tuple(c for c in self.layout.owned(member) if self.layout.tokens(c))

    def _sees(self, member: int, block: int) -> bool:
        return any(
            self.mask.sees_any(queries, keys)
            for q in self._chunks(member)
            for k in self._chunks(block)
            for queries in self.layout.chunks[q]
            for keys in self.layout.chunks[k]
        )
