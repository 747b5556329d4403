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

``ulysses_home:S`` leaves at home what needs no message: pairs of tokens of one member are computed there, for all heads,
while the first slice is on its way and while the last results return. Holders compute the rest::

    step   0                  1             2             3
           Q, K, V slice 0    slice 1       OUT slice 0   OUT slice 1
           home, some heads   slice 0       slice 1       home, other heads

Chunks that no other member's tokens meet stay as well (causal, zigzag: one half of member 0's). The price: results
return as partial sums, in fp32.
"""

from __future__ import annotations

from hdp.attention.layout import Layout
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount, Heads, Kind, RankProgram, Step, Tile, Transfer, Value
from hdp.attention.schedules.sight import send, sight_of, split, whole_groups


class Ulysses:
    """The schedule with ``slices`` slices a member."""

    name = "ulysses"

    def __init__(self, slices: int = 1) -> None:
        if slices < 1:
            raise ValueError(f"{self.name}:{slices}: the number of slices is at least 1")
        self.slices = slices

    def forward(self, layout: Layout, mask: Mask, heads: HeadCount, member: int) -> RankProgram:
        part = self._part(layout, mask, heads, member)
        return RankProgram(steps=part.steps((Kind.Q, Kind.KV), (Kind.OUT,)), keep=part.kept())

    def backward(self, layout: Layout, mask: Mask, heads: HeadCount, member: int) -> RankProgram:
        part = self._part(layout, mask, heads, member)
        return RankProgram(steps=part.steps((Kind.DO,), (Kind.DQ, Kind.DKV)), keep=part.kept())

    def _part(self, layout: Layout, mask: Mask, heads: HeadCount, member: int) -> _Part:
        return _Part(layout, mask, heads, member, self.slices)


class UlyssesHome(Ulysses):
    """The variant that computes pairs of one member's tokens at that member."""

    name = "ulysses_home"

    def _part(self, layout: Layout, mask: Mask, heads: HeadCount, member: int) -> _Part:
        return _HomePart(layout, mask, heads, member, self.slices)


class _Part:
    is_final = True
    """Whether a holder's results are complete where it has all heads that add to them."""

    def __init__(self, layout: Layout, mask: Mask, heads: HeadCount, member: int, slices: int) -> None:
        self.sight, self.heads, self.member, self.size = sight_of(layout, mask), heads, member, layout.size
        # Slices that no member needs are left out; all members agree on how many there are.
        self.slices = 1 if layout.size == 1 else min(slices, -(-heads.query // layout.size))
        self.shares = split(0, heads.query, layout.size)

    def steps(self, inputs: tuple[Kind, ...], results: tuple[Kind, ...]) -> tuple[Step, ...]:
        if self.size == 1:
            return (Step(tiles=self._tiles(0)),)
        steps = []
        home = self._home_tiles(inputs, results)
        for step in range(self.slices + 2):
            sends: tuple[Transfer, ...] = ()
            receives: tuple[Transfer, ...] = ()
            for offset in range(1, self.size):
                to, source = (self.member + offset) % self.size, (self.member - offset) % self.size
                sends += self._deal(step, inputs, owner=self.member, holder=to, peer=to)
                sends += self._return(step - 2, results, owner=to, holder=self.member, peer=to)
                receives += self._deal(step, inputs, owner=source, holder=self.member, peer=source)
                receives += self._return(step - 2, results, owner=self.member, holder=source, peer=source)
            steps.append(Step(sends=sends, receives=receives, tiles=self._tiles(step - 1) + home.get(step, ())))
        return tuple(steps)

    def kept(self) -> tuple[Value, ...]:
        values = []
        for slice_ in range(self.slices if self.size > 1 else 0):
            for source in range(
                self.size
            ):  # this member's own tokens too: a tile reads them in one piece with the others'
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
        return tuple(
            t
            for kind in kinds
            for t in send(kind, self._chunks(owner, kind), keys if kind is Kind.KV else queries, peer)
        )

    def _return(self, slice_: int, kinds: tuple[Kind, ...], owner: int, holder: int, peer: int) -> tuple[Transfer, ...]:
        """Results of ``owner``'s tokens from ``holder``'s slice; a DKV that a later slice adds to waits for it."""
        queries = self._queries(holder, slice_)
        if queries[0] >= queries[1]:
            return ()
        group = self.heads.group
        transfers: tuple[Transfer, ...] = ()
        for kind in kinds:
            chunks = self._chunks(owner, kind)
            if kind is not Kind.DKV:
                transfers += send(kind, chunks, queries, peer, final=self.is_final)
                continue
            share = self.shares[holder]
            for piece in whole_groups(queries, group):
                keys = self.heads.keys_for(piece)
                if keys[1] * group > queries[1] and share[1] > queries[1]:
                    continue
                whole = share[0] <= keys[0] * group and keys[1] * group <= share[1]
                transfers += send(kind, chunks, keys, peer, final=self.is_final and whole)
        return transfers

    def _chunks(self, owner: int, kind: Kind) -> tuple[int, ...]:
        """Chunks of ``owner`` that travel."""
        return self.sight.chunks(owner)

    def _home_tiles(self, inputs: tuple[Kind, ...], results: tuple[Kind, ...]) -> dict[int, tuple[Tile, ...]]:
        """Tiles on this member's own tokens, by step."""
        return {}

    def _tiles(self, slice_: int) -> tuple[Tile, ...]:
        chunks = tuple(sorted(c for m in range(self.size) for c in self.sight.chunks(m)))
        queries = self._queries(self.member, slice_)
        if not chunks or queries[0] >= queries[1]:
            return ()
        return (Tile(queries=chunks, keys=chunks, heads=queries),)


class _HomePart(_Part):
    is_final = False

    def _chunks(self, owner: int, kind: Kind) -> tuple[int, ...]:
        """Those that meet tokens of other members."""
        return self.sight.meeting(owner, is_key=kind.is_per_key)

    def _home_tiles(self, inputs: tuple[Kind, ...], results: tuple[Kind, ...]) -> dict[int, tuple[Tile, ...]]:
        """In the first and the last step, heads in proportion to the bytes on their way meanwhile."""
        own, (units, unit) = self.sight.chunks(self.member), self._units()
        coming, going = (self._weight(kinds) for kinds in (inputs, results))
        cut = unit * ((2 * units * coming + coming + going) // (2 * (coming + going)))
        return {
            0: self.sight.tiles(own, own, (0, cut)),
            self.slices + 1: self.sight.tiles(own, own, (cut, self.heads.query)),
        }

    def _units(self) -> tuple[int, int]:
        """Into how many parts of how many query heads heads can be cut without cutting a key/value head in two."""
        return (self.heads.key, self.heads.group) if self.heads.key > 1 else (self.heads.query, 1)

    def _weight(self, kinds: tuple[Kind, ...]) -> int:
        """Elements per token, in elements of K."""
        return sum(2 if kind.is_per_key else self.heads.group for kind in kinds)

    def _tiles(self, slice_: int) -> tuple[Tile, ...]:
        queries = self._queries(self.member, slice_)
        if self.size == 1:
            return super()._tiles(slice_)
        tiles: tuple[Tile, ...] = ()
        for owner in range(self.size):
            keys = sorted(c for m in range(self.size) if m != owner for c in self._chunks(m, Kind.KV))
            tiles += self.sight.tiles(self._chunks(owner, Kind.Q), tuple(keys), queries)
        return tiles
