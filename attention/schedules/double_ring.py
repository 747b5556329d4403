"""Double ring: keys and values go round inside the node, and from node to node meanwhile (LoongTrain): ``double_ring:I``.

The group is cut into nodes of I neighbouring members. Round ``u`` has I steps; in it a node works on the blocks of the node
``u`` before it: each of its members starts with the block of the member in its own place there, and the blocks go round the
inner ring (lane 0). Over the same steps the members pass the blocks that they started with on to the next node (lane 1), an
equal part in each inner step, so a round's inner steps hide the slow transfer of the next::

    round 0               round 1             member 0, 1 = node 0; 2, 3 = node 1
    0 <-> 1   blocks 0, 1      0 <-> 1   blocks 2, 3
    2 <-> 3   blocks 2, 3      2 <-> 3   blocks 0, 1

Backward takes the same ways once more with K/V; the DKV of a block follows it round the inner ring one step behind, and
goes home from the last member of each node, in the same parts over the steps of the next round: as many crossings as K/V have.
Those of the last round have no computation left to hide behind.

Parts are chunks: the schedule asks for a layout whose chunks are cut finer (``parts``, see ``hdp.attention.refine``), and on
one that is not it sends whole chunks, as evenly as they allow.
"""

from __future__ import annotations

from math import gcd

from hdp.attention.layout import Layout
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount, Kind, RankProgram, Step, Transfer
from hdp.attention.schedules.sight import send, sight_of


class DoubleRing:
    """The schedule with ``inner`` members a node; it must divide the group."""

    def __init__(self, inner: int) -> None:
        if inner < 1:
            raise ValueError(f"double_ring:{inner}: the inner ring has at least 1 member")
        self.inner = inner

    def parts(self, layout: Layout) -> int:
        """Pieces of each chunk with which every inner step sends as much as every other."""
        return self.inner // gcd(self.inner, len(layout.owned(0)))

    def forward(self, layout: Layout, mask: Mask, heads: HeadCount, member: int) -> RankProgram:
        part = _Part(layout, mask, heads, member, self.inner)
        return RankProgram(steps=tuple(part.step(s) for s in range(part.steps)))

    def backward(self, layout: Layout, mask: Mask, heads: HeadCount, member: int) -> RankProgram:
        part = _Part(layout, mask, heads, member, self.inner)
        return RankProgram(steps=tuple(part.step_backward(s) for s in range(part.steps + (layout.size > 1))))


Transfers = tuple[Transfer, ...]


class _Part:
    """Both rings as one member sees them. A step is (round, turn): round ``u`` of the outer, turn ``v`` of the inner ring."""

    def __init__(self, layout: Layout, mask: Mask, heads: HeadCount, member: int, inner: int) -> None:
        if layout.size % inner:
            raise ValueError(
                f"schedule 'double_ring:{inner}' cannot serve a group of {layout.size} ranks: choose a divisor of it"
            )
        self.sight, self.heads, self.inner = sight_of(layout, mask), heads, inner
        self.nodes = sight_of(layout, mask, inner)  # how far across nodes a chunk is looked at
        self.node, self.place = divmod(member, inner)
        self.member, self.size = member, layout.size
        self.rounds = 1 + max(self.nodes.hops(c, 1, is_key=True)[1] for c in range(len(layout.chunks)))
        self.steps = self.rounds * inner
        self._cache: dict[tuple[int, int], tuple[int, int]] = {}
        self._shares: dict[int, dict[int, int]] = {}

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
        inputs = self.step(step) if step < self.steps else Step()
        if step == 0:
            return inputs
        round_, turn = divmod(step - 1, self.inner)  # sums were made one step ago
        keys = self.heads.of(Kind.DKV)
        sends = send(Kind.DKV, self._following(self.node, self.place, round_, turn), keys, self._at(0, 1))
        receives = send(Kind.DKV, self._following(self.node, self.place - 1, round_, turn), keys, self._at(0, -1))
        homes = self._homeward(step)
        return Step(
            sends=sends + homes[0] + inputs.sends, receives=receives + homes[1] + inputs.receives, tiles=inputs.tiles
        )

    def _homeward(self, step: int) -> tuple[Transfers, Transfers]:
        """Sums that leave the node for their owner, or were ready at this place: (sends, receives)."""
        keys = self.heads.of(Kind.DKV)
        sends: Transfers = ()
        receives: Transfers = ()
        for round_, turn, share in self._ready(step):
            home = self._block(self.node, self.place, round_, turn)
            # The block of this member is now `round_` nodes on and `turn` places on.
            node, place = (self.node + round_) % self.nodes.places, (self.place + turn) % self.inner
            holder = node * self.inner + place
            if home != self.member:
                going = self._shared(self._ending(self.node, self.place, round_, turn), share)
                sends += send(Kind.DKV, going, keys, home, lane=1)
            if holder != self.member:
                coming = self._shared(self._ending(node, place, round_, turn), share)
                receives += send(Kind.DKV, coming, keys, holder, lane=1)
        return sends, receives

    def _ready(self, step: int) -> list[tuple[int, int, int | None]]:
        """(round, turn, part) of sums that go home at ``step``; None: all parts.

        Inside the node one step after their last turn; across nodes a part in each step of the round after theirs.
        """
        round_, turn = divmod(step - 1, self.inner)
        ready: list[tuple[int, int, int | None]] = [(0, turn, None)] if round_ == 0 else []
        before, share = step // self.inner - 1, step % self.inner
        if before >= 1:
            ready += [(before, t, None if step == self.steps else share) for t in range(self.inner)]
        return ready

    def _shared(self, chunks: tuple[int, ...], share: int | None) -> tuple[int, ...]:
        """Those that cross between nodes in this turn of a round."""
        return chunks if share is None else tuple(c for c in chunks if self._turn_of(c) == share)

    def _turn_of(self, chunk: int) -> int:
        """Turn at which a chunk crosses between nodes: where its middle lies in its owner's shard."""
        owner = self.sight.layout.owners[chunk]
        if owner not in self._shares:
            layout = self.sight.layout
            turns, before, total = {}, 0, layout.shard_tokens(owner)
            for c in self.sight.chunks(owner):
                turns[c] = (2 * before + layout.tokens(c)) * self.inner // (2 * total)
                before += layout.tokens(c)
            self._shares[owner] = turns
        return self._shares[owner][chunk]

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
        chunks = self._shared(self.sight.chunks(self._block(node, self.place, round_, 0)), turn)
        return tuple(c for c in chunks if self.nodes.hops(c, 1, is_key=True)[1] > round_)
