"""Turns the tiles of a program into kernel calls: rectangles of the mask on nominal rows, and where their results go.

Where a window or stripes make rectangles depend on the length, a tile becomes regions, which are cut for each document when the
program is lowered (``hdp.attention.regions``).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from hdp.attention.gathering import INPUTS, Gathering
from hdp.attention.layout import Layout, Range, Ranges
from hdp.attention.lowered import Geometry
from hdp.attention.mask import Mask, Rectangle, decompose
from hdp.attention.outlined import RESULT, KernelCall, Region, Sum, added, join, join_sums
from hdp.attention.places import Place, Places, Ref, Root
from hdp.attention.program import Heads, Kind, Tile
from hdp.attention.schedules.sight import sight_of

SUMS = {False: ((Kind.OUT,), ()), True: ((Kind.DQ,), (Kind.DKV,))}
"""By direction what a tile adds to for its queries, and for its keys."""


class Tiles:
    """Outlines tiles one by one; ``fills`` collects rows of sums that must be emptied before the calls of a step."""

    def __init__(
        self, layout: Layout, mask: Mask, geometry: Geometry, places: Places, gathering: Gathering, backward: bool
    ) -> None:
        self.layout, self.mask, self.geometry = layout, mask, geometry
        self.places, self.gathering, self.backward = places, gathering, backward
        self.by_document = mask.window is not None or not gathering.is_plain
        """Whether tiles are cut into rectangles document by document."""
        self.sight = sight_of(layout, mask)
        self.fills: list[Ref] = []

    def calls(self, tile: Tile) -> list[KernelCall | Region]:
        """The tile's kernel calls; room is made for accumulators of tokens that live elsewhere."""
        self._provide(tile)
        calls: list[KernelCall | Region] = []
        query_kinds, key_kinds = INPUTS[self.backward]
        for heads in self._head_pieces(tile):
            key_heads = self.geometry.heads.keys_for(heads)
            query_runs = self._runs(query_kinds, tile.queries, heads)
            key_runs = self._runs(key_kinds, tile.keys, key_heads)
            for queries, keys in itertools.product(query_runs, key_runs):
                if self.by_document:
                    if self.sight.seeing(queries.chunks, keys.chunks):
                        calls.append(self._region(queries, keys, heads, key_heads))
                    continue
                for rectangle in decompose(self.mask, queries.ranges, keys.ranges):
                    calls.append(self._call(rectangle, queries, keys, heads, key_heads))
        return calls

    def _head_pieces(self, tile: Tile) -> list[Heads]:
        """The tile's query heads, cut so that each piece reads whole groups or lies inside one, and nothing it touches
        lies in two places."""
        group, (start, stop) = self.geometry.heads.group, tile.heads
        key_heads = self.geometry.heads.keys_for(tile.heads)
        cuts = {start, stop, -(-start // group) * group, stop // group * group}
        sides = zip((tile.queries, tile.keys), (tile.heads, key_heads), (1, group), INPUTS[self.backward], strict=True)
        for (chunks, heads, factor, inputs), sums in zip(sides, SUMS[self.backward], strict=True):
            for kind, chunk in itertools.product((*inputs, *sums), chunks):
                for place in self.places.pieces(kind, chunk, heads):
                    cuts |= {place.heads[0] * factor, place.heads[1] * factor}
        return list(itertools.pairwise(sorted(c for c in cuts if start <= c <= stop)))

    def _provide(self, tile: Tile) -> None:
        """Room for sums for other members' tokens: those of one owner lie together, since they go home together."""
        key_heads = self.geometry.heads.keys_for(tile.heads)
        for kinds, chunks, heads in zip(
            SUMS[self.backward], (tile.queries, tile.keys), (tile.heads, key_heads), strict=True
        ):
            for kind in kinds:
                absent: dict[tuple[int, Heads], list[int]] = {}
                for chunk in self.places.in_order(chunks):
                    for gap in self.places.gaps(kind, chunk, heads):
                        absent.setdefault((self.layout.owners[chunk], gap), []).append(chunk)
                for (owner, gap), some in absent.items():
                    root: Root = ("sum", self.places.step, owner)
                    tensors = self.places.room(kind, tuple(some), gap, root)
                    places = self.places.spread(tensors, some, gap, gap[0], gap[1] - gap[0])
                    for chunk, place in zip(some, places, strict=True):
                        self.places.hold(kind, chunk, place)

    def _runs(self, kinds: Sequence[Kind], chunks: Iterable[int], heads: Heads) -> list[_Run]:
        """Groups of chunks that lie one after the other in every tensor that a call reads, whatever lies between them in
        the sequence."""
        runs: list[_Run] = []
        ends: dict[tuple[tuple[int, ...], ...], _Run] = {}  # by the row behind it in every tensor
        chunks = self.places.in_order(chunks)
        lying: dict[Kind, list[Place]] = {}
        for kind in kinds:
            found = self.gathering.lying(kind, chunks, heads)
            if found is None:
                raise self.places.missing(kind, chunks[0], heads)
            lying[kind] = found
        for number, chunk in enumerate(chunks):
            ranges = tuple(r for r in self.layout.chunks[chunk] if r[0] < r[1])
            if not ranges:
                continue
            places = [lying[kind][number] for kind in kinds]
            run = ends.pop(tuple((*p.tensors, p.row, p.base) for p in places), None)
            if run is None or run.ranges[-1][1] > ranges[0][0]:  # stripes of several members interleave
                run = _Run(tuple(places), ranges, [chunk])
                runs.append(run)
            else:
                run.extend(ranges, chunk)
            ends[tuple((*p.tensors, p.row + p.rows, p.base) for p in places)] = run
        return runs

    def _call(self, r: Rectangle, queries: _Run, keys: _Run, heads: Heads, key_heads: Heads) -> KernelCall:
        spans = (r.row_start, r.row_stop), (r.key_start, r.key_stop)
        sums = self._sums(queries, keys, spans, heads, key_heads)
        results = [m for s in sums for m in added(s.source, s.target, s.first, is_partial=not self.backward)]
        inputs = self._inputs(queries, keys, spans, heads, key_heads)
        return KernelCall(r.shape, inputs, heads[1] - heads[0], tuple(join(results)))

    def _region(self, queries: _Run, keys: _Run, heads: Heads, key_heads: Heads) -> Region:
        spans = (0, queries.tokens), (0, keys.tokens)
        return Region(
            queries=tuple(queries.chunks),
            keys=tuple(keys.chunks),
            inputs=self._inputs(queries, keys, spans, heads, key_heads),
            heads=heads[1] - heads[0],
            sums=tuple(join_sums(self._sums(queries, keys, spans, heads, key_heads))),
        )

    def _inputs(
        self, queries: _Run, keys: _Run, spans: tuple[Range, Range], heads: Heads, key_heads: Heads
    ) -> tuple[Ref, ...]:
        def of(run: _Run, number: int, component: int, span: Range, some: Heads) -> Ref:
            place = run.places[number]
            return self.places.ref(place, component, place.row + span[0], place.row + span[1], some)

        inputs = [of(queries, 0, 0, spans[0], heads), *(of(keys, 0, c, spans[1], key_heads) for c in (0, 1))]
        if self.backward:
            inputs += [of(queries, 1, c, spans[0], heads) for c in (0, 1, 2)]
        return tuple(inputs)

    def _sums(self, queries: _Run, keys: _Run, spans: tuple[Range, Range], heads: Heads, key_heads: Heads) -> list[Sum]:
        """What a call returns for the rows and keys ``spans`` of two runs goes to where each chunk's sum lies."""
        if not self.backward:
            return self._sums_of(queries, spans[0], heads, Kind.OUT, 0)
        return self._sums_of(queries, spans[0], heads, Kind.DQ, 0) + self._sums_of(
            keys, spans[1], key_heads, Kind.DKV, 1
        )

    def _sums_of(self, run: _Run, span: Range, heads: Heads, kind: Kind, first_result: int) -> list[Sum]:
        sums: list[Sum] = []
        begin = 0
        for chunk in run.chunks:
            end = begin + self.layout.tokens(chunk)
            low, high = max(begin, span[0]), min(end, span[1])
            if low < high:
                (place,) = self.places.whole(kind, chunk, heads)
                start, stop = place.row + low - begin, place.row + high - begin
                first = self.places.claim(place, start, stop, heads, self.fills)
                parts = range(len(place.tensors))
                sources = tuple(Ref(RESULT - first_result - c, low - span[0], high - span[0]) for c in parts)
                targets = tuple(self.places.ref(place, c, start, stop, heads) for c in parts)
                sums.append(Sum(sources, targets, first))
            begin = end
        return sums


class _Run:
    """Chunks that lie together: the place of the first for each kind, and all their nominal token ranges, ascending."""

    def __init__(self, places: tuple[Place, ...], ranges: Ranges, chunks: list[int]) -> None:
        self.places, self.ranges, self.chunks = places, ranges, chunks

    @property
    def tokens(self) -> int:
        return sum(stop - start for start, stop in self.ranges)

    def extend(self, ranges: Ranges, chunk: int) -> None:
        self.chunks.append(chunk)
        if self.ranges[-1][1] == ranges[0][0]:
            joined = (self.ranges[-1][0], ranges[0][1])
            self.ranges = (*self.ranges[:-1], joined, *ranges[1:])
        else:
            self.ranges = (*self.ranges, *ranges)
