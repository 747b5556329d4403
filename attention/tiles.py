"""Turns the tiles of a program into kernel calls: rectangles of the mask on rows and heads of numbered tensors."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from hdp.attention.layout import Layout, Ranges
from hdp.attention.lowered import Call, Copy, Ref
from hdp.attention.mask import Mask, Rectangle, decompose
from hdp.attention.places import Place, Places
from hdp.attention.program import Heads, Kind, Tile

FORWARD_KINDS = ((Kind.Q, Kind.OUT), (Kind.KV,))  # what a tile touches of its queries, of its keys
BACKWARD_KINDS = ((Kind.Q, Kind.DO, Kind.DQ), (Kind.KV, Kind.DKV))


@dataclass(frozen=True)
class Setting:
    """One sequence, as tiles see it."""

    task: int
    sequence: int
    member: int
    layout: Layout
    mask: Mask


class TileLowering:
    """Lowers tiles one by one; ``fills`` and ``casts`` collect what must be done before the calls of a step."""

    def __init__(self, places: Places, backward: bool) -> None:
        self.places, self.backward = places, backward
        self.fills: list[Ref] = []
        self.casts: list[Copy] = []
        self._wide: dict[tuple[int, ...], tuple[int, ...]] = {}

    def begin_step(self) -> None:
        self.fills, self.casts, self._wide = [], [], {}

    def calls(self, setting: Setting, tile: Tile) -> list[Call]:
        """The tile's kernel calls; room is made for accumulators of tokens that live elsewhere."""
        geometry, calls = self.places.geometry, []
        self._provide(setting, tile)
        for heads in self._pieces(setting, tile):
            key_heads = geometry.heads.keys_for(heads)
            query_runs = self._runs(setting, tile.queries, heads, is_query=True)
            key_runs = self._runs(setting, tile.keys, key_heads, is_query=False)
            for queries, keys in itertools.product(query_runs, key_runs):
                for rectangle in decompose(setting.mask, queries.ranges, keys.ranges):
                    calls.append(self._call(rectangle, queries, keys, heads, key_heads))
        return calls

    def _provide(self, setting: Setting, tile: Tile) -> None:
        key_heads = self.places.geometry.heads.keys_for(tile.heads)
        kinds = self._kinds()
        for chunks, heads, used in ((tile.queries, tile.heads, kinds[0]), (tile.keys, key_heads, kinds[1])):
            for kind in (k for k in used if k.is_accumulator):
                absent: dict[Heads, list[tuple[int, int]]] = {}
                for chunk in self._as_they_lie(setting, used[0], chunks, heads):
                    for gap in self.places.gaps(setting.task, kind, chunk, heads):
                        absent.setdefault(gap, []).append((chunk, setting.layout.tokens(chunk)))
                for gap, some in absent.items():
                    place = self.places.new(kind, sum(tokens for _, tokens in some), gap)
                    self.places.spread(setting.task, kind, some, place)

    def _as_they_lie(self, setting: Setting, kind: Kind, chunks: tuple[int, ...], heads: Heads) -> list[int]:
        """Chunks in the order of their inputs, so that sums lie like them and a call can span several chunks."""

        def place(chunk: int) -> tuple[int, int]:
            pieces = self.places.pieces(setting.task, kind, chunk, heads)
            return (pieces[0].tensors[0], pieces[0].row) if pieces else (-1, 0)

        return sorted(chunks, key=place)

    def _kinds(self) -> tuple[tuple[Kind, ...], tuple[Kind, ...]]:
        return BACKWARD_KINDS if self.backward else FORWARD_KINDS

    def _pieces(self, setting: Setting, tile: Tile) -> list[Heads]:
        """The tile's query heads, cut so that each piece reads whole groups or lies inside one, and nothing it touches
        lies in two places."""
        group, (start, stop) = self.places.geometry.heads.group, tile.heads
        key_heads = self.places.geometry.heads.keys_for(tile.heads)
        cuts = {start, stop, -(-start // group) * group, stop // group * group}
        kinds = self._kinds()
        for chunks, heads, used, factor in (
            (tile.queries, tile.heads, kinds[0], 1),
            (tile.keys, key_heads, kinds[1], group),
        ):
            for kind, chunk in itertools.product(used, chunks):
                for place in self.places.pieces(setting.task, kind, chunk, heads):
                    cuts |= {place.heads[0] * factor, place.heads[1] * factor}
        return list(itertools.pairwise(sorted(c for c in cuts if start <= c <= stop)))

    def _runs(self, setting: Setting, chunks: tuple[int, ...], heads: Heads, is_query: bool) -> list[_Run]:
        """Groups of chunks that lie one after the other in every tensor that a call touches, whatever lies between them in
        the sequence: a zigzag's two chunks of one member came in one message."""
        kinds = self._kinds()[0 if is_query else 1]
        runs: list[_Run] = []
        ends: dict[tuple[tuple[int, ...], ...], _Run] = {}  # by the row behind it in every tensor
        for chunk in chunks:
            ranges = tuple(r for r in setting.layout.chunks[chunk] if r[0] < r[1])
            if not ranges:
                continue
            places = tuple(self._need(setting, kind, chunk, heads) for kind in kinds)
            run = ends.pop(tuple((*p.tensors, p.row, p.base) for p in places), None)
            if run is None or run.ranges[-1][1] > ranges[0][0]:  # stripes of several members interleave
                run = _Run(kinds, places, ranges)
                runs.append(run)
            else:
                run.extend(ranges)
            ends[tuple((*p.tensors, p.row + p.rows, p.base) for p in places)] = run
        return runs

    def _need(self, setting: Setting, kind: Kind, chunk: int, heads: Heads) -> Place:
        pieces = self.places.pieces(setting.task, kind, chunk, heads)
        if len(pieces) != 1 or pieces[0].heads != heads:
            raise missing(setting.sequence, self.places.step, setting.member, kind, chunk, heads)
        return self._widened(pieces[0]) if pieces[0].is_wire else pieces[0]

    def _widened(self, place: Place) -> Place:
        """A copy in the model's dtype of all that lies in the place's tensors, for this step."""
        if place.tensors not in self._wide:
            twins = []
            for tensor in place.tensors:
                self.places.touch(tensor)
                draft = self.places.drafts[tensor - len(self.places.externals)]
                twin = self.places.buffer(draft.rows, draft.heads, draft.has_dim, "model")
                self.casts.append((Ref(tensor, 0, draft.rows), Ref(twin, 0, draft.rows)))
                twins.append(twin)
            self._wide[place.tensors] = tuple(twins)
        return replace(place, tensors=self._wide[place.tensors], is_wire=False)

    def _call(self, r: Rectangle, queries: _Run, keys: _Run, heads: Heads, key_heads: Heads) -> Call:
        rows, columns = (r.row_start, r.row_stop), (r.key_start, r.key_stop)
        cost = r.area * (heads[1] - heads[0])

        def of(run: _Run, kind: Kind, component: int, span: tuple[int, int], h: Heads) -> Ref:
            place = run.place(kind)
            return self.places.ref(place, component, place.row + span[0], place.row + span[1], h)

        def claim(run: _Run, kind: Kind, span: tuple[int, int], h: Heads) -> bool:
            place = run.place(kind)
            return self.places.claim(place, place.row + span[0], place.row + span[1], h, self.fills)

        inputs = [of(queries, Kind.Q, 0, rows, heads), *(of(keys, Kind.KV, c, columns, key_heads) for c in (0, 1))]
        if not self.backward:
            first = claim(queries, Kind.OUT, rows, heads)
            sums = tuple(of(queries, Kind.OUT, c, rows, heads) for c in (0, 1))
            return Call(shape=r.shape, inputs=tuple(inputs), sums=sums, first=(first,), cost=cost)
        inputs += [of(queries, Kind.DO, c, rows, heads) for c in (0, 1)]
        own = queries.place(Kind.DO)
        has_out = own.tensors[0] == self.places.external("do")
        if has_out:
            inputs.append(replace(inputs[-1], tensor=self.places.external("out")))
        else:
            inputs.append(of(queries, Kind.DO, 2, rows, heads))
        firsts = (claim(queries, Kind.DQ, rows, heads), claim(keys, Kind.DKV, columns, key_heads))
        sums = (of(queries, Kind.DQ, 0, rows, heads), *(of(keys, Kind.DKV, c, columns, key_heads) for c in (0, 1)))
        return Call(shape=r.shape, inputs=tuple(inputs), sums=sums, first=firsts, has_out=has_out, cost=cost)


class _Run:
    """Chunks that lie together: the place of the first in each kind's tensors, and all their token ranges, ascending."""

    def __init__(self, kinds: tuple[Kind, ...], places: tuple[Place, ...], ranges: Ranges) -> None:
        self.kinds, self.first, self.ranges = kinds, places, ranges

    def extend(self, ranges: Ranges) -> None:
        if self.ranges[-1][1] == ranges[0][0]:
            joined = (self.ranges[-1][0], ranges[0][1])
            self.ranges = (*self.ranges[:-1], joined, *ranges[1:])
        else:
            self.ranges = (*self.ranges, *ranges)

    def place(self, kind: Kind) -> Place:
        return self.first[self.kinds.index(kind)]


def missing(sequence: int, step: int, member: int, kind: Kind, chunk: int, heads: Heads) -> ValueError:
    """What the checker finds first in any program that it has seen."""
    return ValueError(
        f"sequence {sequence}, step {step}: member {member} has no {kind.name} of chunk {chunk},"
        f" heads {heads[0]}..{heads[1] - 1}; the checker would have refused this program"
    )
