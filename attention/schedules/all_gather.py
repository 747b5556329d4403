"""All-gather of keys and values (Llama 3): every member fetches all keys that its queries see, then computes at once.

Step 0 sends this member's chunks to everyone whose queries see them, and computes the member's own tile meanwhile; step 1
computes all the rest as one tile, so little is merged. In backward keys and values are gathered again rather than kept, and
partial DKV go straight back to their owners. For short rings on fast links, and for links that are separate per peer, which
it uses all at the same time.

``all_gather:S`` does so in S slices of the key/value heads: slice ``i`` + 1 arrives while slice ``i`` is computed, and
1/S of the gathered sequence is held at a time.
"""

from __future__ import annotations

from hdp.attention.layout import Layout
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount, Heads, Kind, RankProgram, Step, Tile, Transfer
from hdp.attention.schedules.sight import send, sight_of, split


class AllGather:
    """The schedule with ``slices`` slices of the key/value heads (at most one a head)."""

    def __init__(self, slices: int = 1) -> None:
        if slices < 1:
            raise ValueError(f"all_gather:{slices}: the number of slices is at least 1")
        self.slices = slices

    def forward(self, layout: Layout, mask: Mask, heads: HeadCount, member: int) -> RankProgram:
        return self._program(layout, mask, heads, member, backward=False)

    def backward(self, layout: Layout, mask: Mask, heads: HeadCount, member: int) -> RankProgram:
        return self._program(layout, mask, heads, member, backward=True)

    def _program(self, layout: Layout, mask: Mask, heads: HeadCount, member: int, backward: bool) -> RankProgram:
        part = _Gather(layout, mask, heads, member, self.slices)
        if layout.size == 1:
            return RankProgram(steps=(Step(tiles=part.tiles(0)),))
        count = len(part.slices) + 1 + backward
        return RankProgram(steps=tuple(part.step(i, backward) for i in range(count)))


class _Gather:
    def __init__(self, layout: Layout, mask: Mask, heads: HeadCount, member: int, slices: int) -> None:
        self.sight, self.heads, self.size = sight_of(layout, mask), heads, layout.size
        self.slices = split(0, heads.key, min(slices, heads.key))
        self.own = self.sight.chunks(member)
        peers = [(member + offset) % layout.size for offset in range(1, layout.size)]
        self.leaving = [(p, self.sight.seen(self.sight.chunks(p), self.own)) for p in peers]
        self.coming = [(p, self.sight.seen(self.own, self.sight.chunks(p))) for p in reversed(peers)]
        self.gathered = tuple(sorted(c for _, chunks in self.coming for c in chunks))

    def step(self, index: int, backward: bool) -> Step:
        sends = self._exchange(Kind.KV, self.leaving, index)
        receives = self._exchange(Kind.KV, self.coming, index)
        if backward:
            sends += self._exchange(Kind.DKV, self.coming, index - 2, lane=1)
            receives += self._exchange(Kind.DKV, self.leaving, index - 2, lane=1)
        return Step(sends=sends, receives=receives, tiles=self.tiles(index))

    def tiles(self, index: int) -> tuple[Tile, ...]:
        """The own tile of all heads first, then one slice of all that was gathered at each step."""
        if index == 0:
            return self.sight.tiles(self.own, self.own, (0, self.heads.query))
        if index > len(self.slices):
            return ()
        start, stop = self.slices[index - 1]
        return self.sight.tiles(self.own, self.gathered, (start * self.heads.group, stop * self.heads.group))

    def _exchange(
        self, kind: Kind, peers: list[tuple[int, tuple[int, ...]]], index: int, lane: int = 0
    ) -> tuple[Transfer, ...]:
        heads: Heads = self.slices[index] if 0 <= index < len(self.slices) else (0, 0)
        return tuple(t for peer, chunks in peers for t in send(kind, chunks, heads, peer, lane))
