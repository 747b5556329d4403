"""Heads inside a node, context across nodes (USP, LoongTrain's 2-D attention): ``hybrid:H``.

The group is cut into nodes of H neighbouring members. Inside a node heads are dealt out as in Ulysses, so a member holds
1/H of the heads for the tokens of its whole node; across nodes keys and values go round a ring among the members in the
same place of their nodes::

    node 0:  0 = 1      0 = 1   heads dealt out on fast links
             |   |
    node 1:  2 = 3      0 | 2   K/V of one half of the heads go round on slow links

A ring between nodes then moves 1/H of the bytes a member that a plain ring would, H times fewer hops. Backward finds Q
and the node's K/V kept, deals out DO only, turns the ring round, and returns DQ and DKV.
"""

from __future__ import annotations

from hdp.attention.layout import Layout
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount, Heads, Kind, RankProgram, Step, Transfer, Value
from hdp.attention.schedules.ring import Ring
from hdp.attention.schedules.sight import send, split, whole_groups


class Hybrid:
    """The schedule with ``degree`` members a node; it must divide the group."""

    def __init__(self, degree: int) -> None:
        if degree < 1:
            raise ValueError(f"hybrid:{degree}: the degree is at least 1")
        self.degree = degree

    def forward(self, layout: Layout, mask: Mask, heads: HeadCount, member: int) -> RankProgram:
        node = _Node(layout, mask, heads, member, self.degree)
        return RankProgram(
            steps=node.surround((Kind.Q, Kind.KV), node.ring.forward_steps(), (Kind.OUT,)), keep=node.kept()
        )

    def backward(self, layout: Layout, mask: Mask, heads: HeadCount, member: int) -> RankProgram:
        node = _Node(layout, mask, heads, member, self.degree)
        return RankProgram(
            steps=node.surround((Kind.DO,), node.ring.backward_steps(), (Kind.DQ, Kind.DKV)), keep=node.kept()
        )


class _Node:
    def __init__(self, layout: Layout, mask: Mask, heads: HeadCount, member: int, degree: int) -> None:
        if layout.size % degree:
            raise ValueError(
                f"schedule 'hybrid:{degree}' cannot serve a group of {layout.size} ranks: choose a divisor of it"
            )
        self.layout, self.heads, self.member, self.degree = layout, heads, member, degree
        self.shares = split(0, heads.query, degree)
        own = self._share(member)
        self.ring = Ring(layout, mask, heads, member, width=degree, queries=own)

    def surround(self, inputs: tuple[Kind, ...], ring: tuple[Step, ...], results: tuple[Kind, ...]) -> tuple[Step, ...]:
        """Deal out inside the node, the ring, return inside the node."""
        if self.degree == 1:
            return ring
        sends: tuple[list[Transfer], list[Transfer]] = [], []
        receives: tuple[list[Transfer], list[Transfer]] = [], []
        node = self.member - self.member % self.degree
        for offset in range(1, self.degree):
            to = node + (self.member + offset) % self.degree
            source = node + (self.member - offset) % self.degree
            sends[0].extend(self._deal(inputs, owner=self.member, holder=to, peer=to))
            receives[0].extend(self._deal(inputs, owner=source, holder=self.member, peer=source))
            sends[1].extend(self._return(results, owner=to, holder=self.member, peer=to))
            receives[1].extend(self._return(results, owner=self.member, holder=source, peer=source))
        first, last = (Step(sends=tuple(sends[i]), receives=tuple(receives[i])) for i in (0, 1))
        return (first, *ring, last)

    def kept(self) -> tuple[Value, ...]:
        values = []
        node = self.member - self.member % self.degree
        for source in range(node, node + self.degree) if self.degree > 1 else ():
            received = self._deal((Kind.Q, Kind.KV), owner=source, holder=self.member, peer=source)
            values += [Value(kind=t.kind, chunks=t.chunks, heads=t.heads) for t in received]
        return (*values, *self.ring.kept())

    def _share(self, member: int) -> Heads:
        return self.shares[member % self.degree]

    def _chunks(self, member: int) -> tuple[int, ...]:
        return tuple(c for c in self.layout.owned(member) if self.layout.tokens(c))

    def _deal(self, kinds: tuple[Kind, ...], owner: int, holder: int, peer: int) -> tuple[Transfer, ...]:
        queries = self._share(holder)
        if queries[0] >= queries[1]:
            return ()
        keys, chunks = self.heads.keys_for(queries), self._chunks(owner)
        return tuple(t for kind in kinds for t in send(kind, chunks, keys if kind is Kind.KV else queries, peer))

    def _return(self, kinds: tuple[Kind, ...], owner: int, holder: int, peer: int) -> tuple[Transfer, ...]:
        """Complete results in the model's dtype; gradients of a key/value head that is split are partial."""
        queries, chunks, group = self._share(holder), self._chunks(owner), self.heads.group
        if queries[0] >= queries[1]:
            return ()
        transfers: tuple[Transfer, ...] = ()
        for kind in kinds:
            if kind is not Kind.DKV:
                transfers += send(kind, chunks, queries, peer, final=True)
                continue
            for piece in whole_groups(queries, group):
                keys = self.heads.keys_for(piece)
                final = queries[0] <= keys[0] * group and keys[1] * group <= queries[1]
                transfers += send(kind, chunks, keys, peer, final=final)
        return transfers
