"""Ulysses: every member gets some heads of the whole sequence, computes, and gives the results back (2309.14509).

::

    member 0   tokens 0.., all heads          heads 0..1, all tokens          tokens 0.., all heads
    member 1   tokens 1.., all heads   --->   heads 2..3, all tokens   --->   tokens 1.., all heads

Query heads are dealt out evenly: a member gets floor or ceil(heads / size) of them, so no head count is refused. With
more members than key/value heads a key/value head goes to each member that holds some of its query heads, and their
partial DKV are added at the owner; results of whole heads are complete and travel in the model's dtype. Members beyond
the number of query heads compute nothing.

Backward finds the Q, K and V that forward received, so only DO goes out and DQ, DKV come back.

``ulysses:S`` cuts each member's heads into S slices: while one slice is computed the next arrives and the results of the
last return. One slice has no overlap at all: three steps, computation in the middle one.
"""

from __future__ import annotations

from hdp.attention.layout import Layout
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount, Heads, Kind, RankProgram, Step, Tile, Transfer, Value
from hdp.attention.schedules.sight import Sight, send, split, whole_groups


class Ulysses:
    """The schedule with ``slices`` slices a member."""

    def __init__(self, slices: int = 1) -> None:
        if slices < 1:
            raise ValueError(f"ulysses:{slices}: the number of slices is at least 1")
        self.slices = slices

    def forward(self, layout: Layout, mask: Mask, heads: HeadCount, member: int) -> RankProgram:
        part = _Part(layout, mask, heads, member, self.slices)
        return RankProgram(steps=part.steps((Kind.Q, Kind.KV), (Kind.OUT,)), keep=part.kept())

    def backward(self, layout: Layout, mask: Mask, heads: HeadCount, member: int) -> RankProgram:
        part = _Part(layout, mask, heads, member, self.slices)
        return RankProgram(steps=part.steps((Kind.DO,), (Kind.DQ, Kind.DKV)), keep=part.kept())


class _Part:
    def __init__(self, layout: Layout, mask: Mask, heads: HeadCount, member: int, slices: int) -> None:
        self.sight, self.heads, self.member, self.size = Sight(layout, mask), heads, member, layout.size
        # Slices that no member needs are left out; all members agree on how many there are.
        self.slices = 1 if layout.size == 1 else min(slices, -(-heads.query // layout.size))
        self.shares = split(0, heads.query, layout.size)

    def steps(self, inputs: tuple[Kind, ...], results: tuple[Kind, ...]) -> tuple[Step, ...]:
        if self.size == 1:
            return (Step(tiles=self._tiles(0)),)
        steps = []
        for step in range(self.slices + 2):
            sends: tuple[Transfer, ...] = ()
            receives: tuple[Transfer, ...] = ()
            for offset in range(1, self.size):
                to, source = (self.member + offset) % self.size, (self.member - offset) % self.size
                sends += self._deal(step, inputs, owner=self.member, holder=to, peer=to)
                sends += self._return(step - 2, results, owner=to, holder=self.member, peer=to)
                receives += self._deal(step, inputs, owner=source, holder=self.member, peer=source)
                receives += self._return(step - 2, results, owner=self.member, holder=source, peer=source)
            steps.append(Step(sends=sends, receives=receives, tiles=self._tiles(step - 1)))
        return tuple(steps)

    def kept(self) -> tuple[Value, ...]:
        values = []
        for slice_ in range(self.slices if self.size > 1 else 0):
            for offset in range(1, self.size):
                source = (self.member - offset) % self.size
                received = self._deal(slice_, (Kind.Q, Kind.KV), owner=source, holder=self.member, peer=source)
                values += [Value(kind=t.kind, chunks=t.chunks, heads=t.heads) for t in received]
        return tuple(values)

    def _queries(self, holder: int, slice_: int) -> Heads:
        if not 0 <= slice_ < self.slices:
            return 0, 0
        return split(*self.shares[holder], self.slices)[slice_]

    def _deal(self, slice_: int, kinds: tuple[Kind, ...], owner: int, holder: int, peer: int) -> tuple[Transfer, ...]:
        """Inputs of ``owner``'s tokens for ``holder``'s slice; a key/value head that an earlier slice got is left out."""
        queries = self._queries(holder, slice_)
        if queries[0] >= queries[1]:
            return ()
        keys = self.heads.keys_for(queries)
        before = self.shares[holder][0], queries[0]
        if before[0] < before[1]:
            keys = (max(keys[0], self.heads.keys_for(before)[1]), keys[1])
        chunks = self.sight.chunks(owner)
        return tuple(t for kind in kinds for t in send(kind, chunks, keys if kind is Kind.KV else queries, peer))

    def _return(self, slice_: int, kinds: tuple[Kind, ...], owner: int, holder: int, peer: int) -> tuple[Transfer, ...]:
        """Results of ``owner``'s tokens from ``holder``'s slice; a DKV that a later slice adds to waits for it."""
        queries = self._queries(holder, slice_)
        if queries[0] >= queries[1]:
            return ()
        chunks, group = self.sight.chunks(owner), self.heads.group
        transfers: tuple[Transfer, ...] = ()
        for kind in kinds:
            if kind is not Kind.DKV:
                transfers += send(kind, chunks, queries, peer, final=True)
                continue
            share = self.shares[holder]
            for piece in whole_groups(queries, group):
                keys = self.heads.keys_for(piece)
                if keys[1] * group > queries[1] and share[1] > queries[1]:
                    continue
                final = share[0] <= keys[0] * group and keys[1] * group <= share[1]
                transfers += send(kind, chunks, keys, peer, final=final)
        return transfers

    def _tiles(self, slice_: int) -> tuple[Tile, ...]:
        chunks = tuple(sorted(c for m in range(self.size) for c in self.sight.chunks(m)))
        queries = self._queries(self.member, slice_)
        if not chunks or queries[0] >= queries[1]:
            return ()
        return (Tile(queries=chunks, keys=chunks, heads=queries),)
