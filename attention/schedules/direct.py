"""Direct: a block of keys and values goes straight from its owner to each member that looks at it, one distance a step.

At step ``t`` member ``m`` sends to ``m + t + 1`` those of its chunks that the receiver's queries see, and computes with what
``m - t`` sent in the step before. Nothing is passed on, so nothing travels for a third party: with a causal zigzag layout
a quarter of a ring's bytes is saved, with a sliding window nearly all, and distances at which nobody looks at anybody have
no step. In backward the partial DKV of a block goes straight
back to its owner, on lane 1.

Who receives more than the average in forward gives more back in backward: member ``m`` of ``n`` receives (n - 1 - m/2) blocks
and sends (n - 1 + m)/2. With fp32 partials and fp32 K/V every member sends 1.5 (n - 1) blocks in backward.

Two members that are not neighbours on the ring talk to each other, so this is for links on which that is no dearer.
"""

from __future__ import annotations

from hdp.attention.layout import Layout
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount, Kind, RankProgram, Step, Transfer
from hdp.attention.schedules.sight import send, sight_of


def forward(layout: Layout, mask: Mask, heads: HeadCount, member: int) -> RankProgram:
    part = _Direct(layout, mask, heads, member)
    return RankProgram(steps=tuple(part.step(i, backward=False) for i in range(len(part.distances))))


def backward(layout: Layout, mask: Mask, heads: HeadCount, member: int) -> RankProgram:
    part = _Direct(layout, mask, heads, member)
    count = len(part.distances)
    return RankProgram(steps=tuple(part.step(i, backward=True) for i in range(count + (count > 1))))


class _Direct:
    def __init__(self, layout: Layout, mask: Mask, heads: HeadCount, member: int) -> None:
        self.sight, self.heads, self.member, self.size = sight_of(layout, mask), heads, member, layout.size
        self.distances = [0, *self.sight.distances]

    def step(self, index: int, backward: bool) -> Step:
        following = self._distance(index + 1)
        sends, receives = self._exchange(Kind.KV, following)
        if backward:
            # Partials of the block that was computed with in the step before.
            mine, theirs = self._exchange(Kind.DKV, self._distance(index - 1), lane=1)
            sends, receives = sends + theirs, receives + mine
        if index >= len(self.distances):
            return Step(sends=sends, receives=receives)
        own, block = self.sight.chunks(self.member), self.sight.chunks(self._peer(-self.distances[index]))
        return Step(sends=sends, receives=receives, tiles=self.sight.tiles(own, block, (0, self.heads.query)))

    def _distance(self, index: int) -> int:
        """0: there is no such step."""
        return self.distances[index] if 0 <= index < len(self.distances) else 0

    def _exchange(self, kind: Kind, distance: int, lane: int = 0) -> tuple[tuple[Transfer, ...], tuple[Transfer, ...]]:
        """What of this member's block concerns the member ``distance`` ahead, and of the block as far behind this member."""
        if not distance:
            return (), ()
        heads, reader, source = self.heads.of(kind), self._peer(distance), self._peer(-distance)
        return (
            send(kind, self._needed(self.member, reader), heads, reader, lane),
            send(kind, self._needed(source, self.member), heads, source, lane),
        )

    def _needed(self, owner: int, reader: int) -> tuple[int, ...]:
        """Chunks of ``owner`` that ``reader`` looks at."""
        return self.sight.seen(self.sight.chunks(reader), self.sight.chunks(owner))

    def _peer(self, offset: int) -> int:
        return (self.member + offset) % self.size
