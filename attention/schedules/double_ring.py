"""Double ring: keys and values go round inside the node, and from node to node meanwhile (LoongTrain): ``double_ring:I``.

The group is cut into nodes of I neighbouring members. Round ``u`` has I steps; in it a node works on the blocks of the node
``u`` before it: each of its members starts with the block of the member in its own place there, and the blocks go round the
inner ring (lane 0). Over the same steps the members pass the blocks that they started with on to the next node (lane 1), a
chunk at a time, so a round's inner steps hide the slow transfer of the next::

    round 0               round 1             member 0, 1 = node 0; 2, 3 = node 1
    0 <-> 1   blocks 0, 1      0 <-> 1   blocks 2, 3
    2 <-> 3   blocks 2, 3      2 <-> 3   blocks 0, 1

Backward takes the same ways once more with K/V; the DKV of a block follows it round the inner ring one step behind, and
goes home from the last member of each node: as many crossings as K/V have.
"""

from __future__ import annotations

from hdp.attention.layout import Layout
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount, Kind, RankProgram, Step, Transfer
from hdp.attention.schedules.sight import Sight, send


class DoubleRing:
    """The schedule with ``inner`` members a node; it must divide the group."""

    def __init__(self, inner: int) -> None:
        if inner < 1:
            raise ValueError(f"double_ring:{inner}: the inner ring has at least 1 member")
        self.inner = inner

    def forward(self, layout: Layout, mask: Mask, heads: HeadCount, member: int) -> RankProgram:
        part = _Part(layout, mask, heads, member, self.inner)
        return RankProgram(steps=tuple(part.step(s) for s in range(layout.size)))

    def backward(self, layout: Layout, mask: Mask, heads: HeadCount, member: int) -> RankProgram:
        part = _Part(layout, mask, heads, member, self.inner)
        return RankProgram(steps=tuple(part.step_backward(s) for s in range(layout.size + (layout.size > 1))))


Transfers = tuple[Transfer, ...]


class _Part:
    """Both rings as one member sees them. A step is (round, turn): round ``u`` of the outer, turn ``v`` of the inner ring."""

    def __init__(self, layout: Layout, mask: Mask, heads: HeadCount, member: int, inner: int) -> None:
        if layout.size % inner:
            raise ValueError(
                f"schedule 'double_ring:{inner}' cannot serve a group of {layout.size} ranks: choose a divisor of it"
            )
        self.sight, self.heads, self.inner = Sight(layout, mask), heads, inner
        self.nodes = Sight(layout, mask, inner)  # how far across nodes a chunk is looked at
        self.node, self.place = divmod(member, inner)
        self.member, self.size = member, layout.size
        self._cache: dict[tuple[int, int], tuple[int, int]] = {}

    def step(self, step: int) -> Step:
        round_, turn = divmod(step, self.inner)
        keys = self.heads.of(Kind.KV)
        sends = send(Kind.KV, self._onward(self.node, self.place, round_, turn), keys, self._at(0, 1))
        receives = send(Kind.KV, self._onward(self.node, self.place - 1, round_, turn), keys, self._at(0, -1))
        sends += send(Kind.KV, self._across(self.node, round_, turn), keys, self._at(1, 0), lane=1)
        receives += send(Kind.KV, self._across(self.node - 1, round_, turn), keys, self._at(-1, 0), lane=1)
        block = self.sight.chunks(self._block(self.node, self.place, round_, turn))
        own = self.sight.chunks(self.member)
        return Step(sends=sends, receives=receives, tiles=self.sight.tiles(own, block, (0, self.heads.query)))

    def step_backward(self, step: int) -> Step:
        inputs = self.step(step) if step < self.size else Step()
        if step == 0:
            return inputs
        round_, turn = divmod(step - 1, self.inner)  # sums were made one step ago
        keys = self.heads.of(Kind.DKV)
        sends = send(Kind.DKV, self._following(self.node, self.place, round_, turn), keys, self._at(0, 1))
        receives = send(Kind.DKV, self._following(self.node, self.place - 1, round_, turn), keys, self._at(0, -1))
        home = self._block(self.node, self.place, round_, turn)
        if home != self.member:
            sends += send(Kind.DKV, self._ending(self.node, self.place, round_, turn), keys, home, lane=1)
        # The block of this member is now `round_` nodes on and `turn` places on.
        node, place = (self.node + round_) % self.nodes.places, (self.place + turn) % self.inner
        holder = node * self.inner + place
        if holder != self.member:
            receives += send(Kind.DKV, self._ending(node, place, round_, turn), keys, holder, lane=1)
        return Step(sends=sends + inputs.sends, receives=receives + inputs.receives, tiles=inputs.tiles)

    def _at(self, nodes: int, places: int) -> int:
        """The member so many nodes and places on."""
        return (self.node + nodes) % self.nodes.places * self.inner + (self.place + places) % self.inner

    def _block(self, node: int, place: int, round_: int, turn: int) -> int:
        """Owner of what the member at (node, place) computes with."""
        return (node - round_) % self.nodes.places * self.inner + (place - turn) % self.inner

    def _turns(self, chunk: int, node: int, start: int, round_: int) -> tuple[int, int]:
        """First and last turn at which a member of ``node``, the owner apart, looks at a chunk; (-1, -1): none.

        ``start`` is the place at which the chunk begins the round.
        """
        key = chunk, node
        if key not in self._cache:
            seen = [
                turn
                for turn in range(int(round_ == 0), self.inner)
                if self.sight.seeing(self.sight.chunks(node * self.inner + (start + turn) % self.inner), (chunk,))
            ]
            self._cache[key] = (seen[0], seen[-1]) if seen else (-1, -1)
        return self._cache[key]

    def _select(self, node: int, place: int, round_: int, turn: int) -> list[tuple[int, int, int]]:
        """(chunk, first turn, last turn) of what the member at (node, place) holds."""
        node %= self.nodes.places
        block = self._block(node, place, round_, turn)
        start = (place - turn) % self.inner
        return [(c, *self._turns(c, node, start, round_)) for c in self.sight.chunks(block)]

    def _onward(self, node: int, place: int, round_: int, turn: int) -> tuple[int, ...]:
        """Chunks that go on to the next place of the node."""
        return tuple(c for c, _, last in self._select(node, place, round_, turn) if last > turn)

    def _following(self, node: int, place: int, round_: int, turn: int) -> tuple[int, ...]:
        """Chunks whose sum goes on to the next place of the node."""
        return tuple(c for c, first, last in self._select(node, place, round_, turn) if first <= turn < last)

    def _ending(self, node: int, place: int, round_: int, turn: int) -> tuple[int, ...]:
        """Chunks whose sum is ready to leave the node."""
        return tuple(c for c, _, last in self._select(node, place, round_, turn) if last == turn)

    def _across(self, node: int, round_: int, turn: int) -> tuple[int, ...]:
        """Chunks that the member in this place of ``node`` passes on to the next node in this turn."""
        chunks = self.sight.chunks(self._block(node, self.place, round_, 0))
        return tuple(
            c
            for i, c in enumerate(chunks)
            if i * self.inner // len(chunks) == turn and self.nodes.hops(c, 1, is_key=True)[1] > round_
        )
