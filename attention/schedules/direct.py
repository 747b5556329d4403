"""Direct: a block of keys and values goes straight from its owner to each member that looks at it, one distance a step.

At step ``t`` member ``m`` sends to ``m + t + 1`` those of its chunks that the receiver's queries see, and computes with what
``m - t`` sent in the step before. Nothing is passed on, so nothing travels for a third party: with a causal zigzag layout
a quarter of a ring's bytes is saved, with a sliding window nearly all. In backward the partial DKV of a block goes straight
back to its owner, on lane 1.

Who receives more than the average in forward gives more back in backward: member ``m`` of ``n`` receives (n - 1 - m/2) blocks
and sends (n - 1 + m)/2. With fp32 partials and fp32 K/V every member sends 1.5 (n - 1) blocks in backward.

Two members that are not neighbours on the ring talk to each other, so this is for links on which that is no dearer.
"""

from __future__ import annotations

from hdp.attention.layout import Layout
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount, Kind, RankProgram, Step
from hdp.attention.schedules.sight import Sight, send


def forward(layout: Layout, mask: Mask, heads: HeadCount, member: int) -> RankProgram:
    part = _Direct(layout, mask, heads, member)
    return RankProgram(steps=tuple(part.step(t, backward=False) for t in range(layout.size)))


def backward(layout: Layout, mask: Mask, heads: HeadCount, member: int) -> RankProgram:
    part = _Direct(layout, mask, heads, member)
    return RankProgram(steps=tuple(part.step(t, backward=True) for t in range(layout.size + (layout.size > 1))))


class _Direct:
    def __init__(self, layout: Layout, mask: Mask, heads: HeadCount, member: int) -> None:
        self.sight, self.heads, self.member, self.size = Sight(layout, mask), heads, member, layout.size

    def step(self, distance: int, backward: bool) -> Step:
        keys = self.heads.of(Kind.KV)
        sends = send(Kind.KV, self._needed(self.member, distance + 1), keys, self._peer(distance + 1))
        source = self._peer(-distance - 1)
        receives = send(Kind.KV, self._needed(source, distance + 1), keys, source)
        if backward and distance > 1:
            # Partials of the block that was computed with in the step before.
            source = self._peer(1 - distance)
            sends += send(Kind.DKV, self._needed(source, distance - 1), keys, source, lane=1)
            receives += send(Kind.DKV, self._needed(self.member, distance - 1), keys, self._peer(distance - 1), lane=1)
        if distance >= self.size:
            return Step(sends=sends, receives=receives)
        own, block = self.sight.chunks(self.member), self.sight.chunks(self._peer(-distance))
        return Step(sends=sends, receives=receives, tiles=self.sight.tiles(own, block, (0, self.heads.query)))

    def _needed(self, owner: int, distance: int) -> tuple[int, ...]:
        """Chunks of ``owner`` that the member ``distance`` after it looks at."""
        if not 1 <= distance < self.size:
            return ()
        reader = (owner + distance) % self.size
        return self.sight.seen(self.sight.chunks(reader), self.sight.chunks(owner))

    def _peer(self, offset: int) -> int:
        return (self.member + offset) % self.size
