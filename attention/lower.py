"""Lowers one rank's part of a micro-batch to a flat list of operations on numbered tensors.

A micro-batch holds shards of several sequences, each with a program of its own (``hdp.attention.program``). Step ``i`` of
all of them together is round ``i`` of the micro-batch. What comes out names no sequence, chunk or member any more: kernel
calls on row ranges of tensors, messages, merges, and one arena in which every received or travelling buffer has its
place. It is made once per micro-batch and layer geometry, in time linear in the programs' steps, and reused by all layers.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hdp.attention.arena import Draft, Filled, buffer_bytes, pack_arena
from hdp.attention.layout import Layout, Ranges
from hdp.attention.lowered import COMPONENTS, Buffer, Call, Geometry, Lowered, Merge, Packet, Ref, Round
from hdp.attention.mask import Mask, Rectangle, decompose
from hdp.attention.program import Heads, Kind, RankProgram, Tile, Transfer, Value


@dataclass(frozen=True, kw_only=True)
class Task:
    """One sequence of the micro-batch, as this rank sees it."""

    sequence: int
    layout: Layout
    group: tuple[int, ...]
    """Ranks of the world, by member."""
    member: int
    row: int
    """First row of this rank's shard among the packed rows of its micro-batch."""
    program: RankProgram
    mask: Mask


FORWARD_TENSORS = ("q", "k", "v", "out", "lse")
BACKWARD_TENSORS = ("q", "k", "v", "do", "out", "lse", "delta", "dq", "dk", "dv")


def lower(tasks: Sequence[Task], geometry: Geometry, backward: bool) -> Lowered:
    """This rank's flat program; ``tasks`` in the same order on every rank (ascending sequence)."""
    return _Lowering(tasks, geometry, backward).run()


@dataclass
class _Place:
    """Where some chunks' values of one kind lie: one tensor per component, the same rows in each."""

    tensors: tuple[int, ...]
    row: int
    rows: int
    heads: Heads
    """Heads that the tensors hold."""


class _Lowering:
    def __init__(self, tasks: Sequence[Task], geometry: Geometry, backward: bool) -> None:
        self.tasks, self.geometry, self.backward = tasks, geometry, backward
        self.externals = BACKWARD_TENSORS if backward else FORWARD_TENSORS
        self.drafts: list[Draft] = []
        self.places: dict[tuple[int, Kind, int], list[_Place]] = defaultdict(list)  # task, kind, chunk
        self.sums: dict[int, Filled] = defaultdict(Filled)  # tensor of the first component
        self.finals: list[tuple[Ref, Ref]] = []
        self.rounds: list[Round] = []
        self.step = 0
        self.kept_offsets, self.kept_bytes = self._plan_kept()

    def _plan_kept(self) -> tuple[dict[tuple[int, int], int], int]:
        """Where each kept value (task, number) begins in the kept tensor: the same in both directions."""
        offsets, end = {}, 0
        for index, task in enumerate(self.tasks):
            for number, value in enumerate(task.program.keep):
                offsets[index, number] = end
                rows = sum(map(task.layout.tokens, value.chunks))
                for _, has_dim, is_sum in COMPONENTS[value.kind]:
                    end += buffer_bytes(self.geometry, rows, value.heads[1] - value.heads[0], has_dim, is_sum)
        return offsets, end

    def run(self) -> Lowered:
        for index, task in enumerate(self.tasks):
            self._place_own(index, task)
        count = max((len(t.program.steps) for t in self.tasks), default=0)
        fillers: list[Call] = []
        drafts = []
        for step in range(count):
            self.step = step
            drafts.append(self._lower_round(step, fillers))
        self._finish(count)
        self.rounds = _spread(drafts, fillers)
        return self._assemble()

    # ------------------------------------------------------------ places

    def _external(self, name: str) -> int:
        return self.externals.index(name)

    def _new(self, kind: Kind, rows: int, heads: Heads, kept_offset: int = -1, final: bool = False) -> _Place:
        tensors = []
        for _, has_dim, is_sum in COMPONENTS[kind]:
            is_sum = is_sum and not (final and has_dim)
            draft = Draft(rows, heads[1] - heads[0], has_dim, is_sum, self.step, self.step, kept_offset)
            kept_offset += draft.bytes(self.geometry) if draft.kept else 0
            tensors.append(self._add(draft))
        return _Place(tuple(tensors), 0, rows, heads)

    def _add(self, draft: Draft) -> int:
        self.drafts.append(draft)
        return len(self.externals) + len(self.drafts) - 1

    def _touch(self, tensor: int, extra: int = 0) -> None:
        index = tensor - len(self.externals)
        if index >= 0:
            self.drafts[index].died = max(self.drafts[index].died, self.step + extra)

    def _place_own(self, index: int, task: Task) -> None:
        geometry, layout = self.geometry, task.layout
        kinds = (Kind.Q, Kind.KV, Kind.DO, Kind.DQ, Kind.DKV) if self.backward else (Kind.Q, Kind.KV, Kind.OUT)
        own = layout.owned(task.member)
        rows = sum(map(layout.tokens, own))
        for kind in kinds:
            heads = geometry.heads.of(kind)
            tensors = tuple(self._external(name) for name, _, _ in COMPONENTS[kind])
            row = task.row
            if kind.is_accumulator and not geometry.sums_are_outputs and not _is_one_call(task):
                tensors, row = self._accumulate_apart(kind, task, tensors, rows, heads), 0
            for chunk in own:
                self.places[index, kind, chunk].append(_Place(tensors, row, layout.tokens(chunk), heads))
                row += layout.tokens(chunk)
        if self.backward:
            self._place_kept(index, task)

    def _accumulate_apart(
        self, kind: Kind, task: Task, outputs: tuple[int, ...], rows: int, heads: Heads
    ) -> tuple[int, ...]:
        """fp32 accumulators in the arena for outputs of a narrower dtype; cast into the outputs at the end."""
        place = self._new(kind, rows, heads)
        for accumulator, output in zip(place.tensors, outputs, strict=True):
            self.finals.append((Ref(accumulator, 0, rows), Ref(output, task.row, task.row + rows)))
        return place.tensors

    def _place_kept(self, index: int, task: Task) -> None:
        for number, value in enumerate(task.program.keep):
            rows = sum(map(task.layout.tokens, value.chunks))
            place = self._new(value.kind, rows, value.heads, kept_offset=self.kept_offsets[index, number])
            self._spread_over_chunks(index, value.kind, value.chunks, place)

    def _spread_over_chunks(self, index: int, kind: Kind, chunks: Iterable[int], place: _Place) -> None:
        row = place.row
        for chunk in chunks:
            tokens = self.tasks[index].layout.tokens(chunk)
            self.places[index, kind, chunk].append(_Place(place.tensors, row, tokens, place.heads))
            row += tokens

    def _find(self, index: int, kind: Kind, chunk: int, heads: Heads) -> _Place | None:
        for place in self.places[index, kind, chunk]:
            if place.heads[0] <= heads[0] and heads[1] <= place.heads[1]:
                return place
        return None

    def _need(self, index: int, kind: Kind, chunk: int, heads: Heads) -> _Place:
        place = self._find(index, kind, chunk, heads)
        if place is None:
            task = self.tasks[index]
            raise ValueError(
                f"sequence {task.sequence}, step {self.step}: member {task.member} has no {kind.name} of chunk {chunk},"
                f" heads {heads[0]}..{heads[1] - 1}; the checker would have refused this program"
            )
        return place

    def _ref(self, place: _Place, component: int, start: int, stop: int, heads: Heads, extra: int = 0) -> Ref:
        tensor = place.tensors[component]
        self._touch(tensor, extra)
        relative = (heads[0] - place.heads[0], heads[1] - place.heads[0])
        whole = relative == (0, place.heads[1] - place.heads[0])
        return Ref(tensor, start, stop, None if whole else relative)

    # ------------------------------------------------------------ one round

    def _lower_round(self, step: int, fillers: list[Call]) -> Round:
        sends: list[Packet] = []
        receives: list[Packet] = []
        merges: list[Merge] = []
        calls: list[Call] = []
        fills: list[Ref] = []
        arrivals: list[tuple[int, Transfer, _Place]] = []
        active = [(i, t, t.program.steps[step]) for i, t in enumerate(self.tasks) if step < len(t.program.steps)]
        for index, _, part in active:
            for transfer in part.sends:
                sends += self._send(index, transfer, fills)
        for index, _, part in active:
            for transfer in part.receives:
                place = self._receive(index, transfer, receives)
                arrivals.append((index, transfer, place))
        for index, task, part in active:
            out = fillers if task.layout.size == 1 else calls
            for tile in part.tiles:
                out += self._tile(index, task, tile, fills)
        for index, transfer, place in arrivals:
            self._arrive(index, transfer, place, merges, fills)
        return Round(
            sends=tuple(sends),
            receives=tuple(receives),
            calls=tuple(calls),
            fillers=(),
            merges=tuple(merges),
            fills=tuple(fills),
        )

    def _send(self, index: int, transfer: Transfer, fills: list[Ref]) -> list[Packet]:
        task, kind, heads = self.tasks[index], transfer.kind, transfer.heads
        places = [self._need(index, kind, chunk, heads) for chunk in transfer.chunks]
        if kind.is_accumulator:  # rows that no tile has reached travel as zeros
            for place in places:
                self._claim(place, place.row, place.row + place.rows, heads, fills, fill_all=True)
        packets = []
        for component, (name, has_dim, is_sum) in enumerate(COMPONENTS[kind]):
            pieces = [self._ref(p, component, p.row, p.row + p.rows, heads, extra=1) for p in places if p.rows]
            casts = transfer.final and is_sum and has_dim and not self.geometry.sums_are_outputs
            pieces = _join(pieces)
            pack: tuple[Ref, ...] = ()
            if len(pieces) > 1 or pieces[0].heads is not None or casts:
                pack = tuple(pieces)
                pieces = [self._staging(pack, component, transfer)]
            packets.append(self._packet(task, transfer, pieces[0], name, pack))
        if kind.is_accumulator:
            for chunk in transfer.chunks:
                self._give_away(index, kind, chunk, heads)
        return packets

    def _staging(self, pack: tuple[Ref, ...], component: int, transfer: Transfer) -> Ref:
        rows = sum(piece.stop - piece.start for piece in pack)
        _, has_dim, is_sum = COMPONENTS[transfer.kind][component]
        is_sum = is_sum and not (transfer.final and has_dim)
        heads = transfer.heads[1] - transfer.heads[0]
        return Ref(self._add(Draft(rows, heads, has_dim, is_sum, self.step, self.step + 1)), 0, rows)

    def _give_away(self, index: int, kind: Kind, chunk: int, heads: Heads) -> None:
        """An accumulator that was sent is empty again; one that has no home here is forgotten."""
        place = self._need(index, kind, chunk, heads)
        task = self.tasks[index]
        if task.layout.owners[chunk] == task.member:
            raise ValueError(
                f"sequence {task.sequence}: member {task.member} sends away its own {kind.name} of chunk {chunk}"
            )
        self.places[index, kind, chunk].remove(place)

    def _packet(self, task: Task, transfer: Transfer, ref: Ref, name: str, pack: tuple[Ref, ...] = ()) -> Packet:
        peer = task.group[transfer.peer]
        return Packet(ref=ref, peer=peer, lane=transfer.lane, sequence=task.sequence, what=name, pack=pack)

    def _receive(self, index: int, transfer: Transfer, receives: list[Packet]) -> _Place:
        task = self.tasks[index]
        rows = sum(map(task.layout.tokens, transfer.chunks))
        number = next((n for n, v in enumerate(task.program.keep) if _is_transfer(v, transfer)), -1)
        offset = -1 if self.backward else self.kept_offsets.get((index, number), -1)
        place = self._new(transfer.kind, rows, transfer.heads, kept_offset=offset, final=transfer.final)
        for component, (name, _, _) in enumerate(COMPONENTS[transfer.kind]):
            ref = self._ref(place, component, 0, rows, transfer.heads)
            receives.append(self._packet(task, transfer, ref, name))
        return place

    def _arrive(self, index: int, transfer: Transfer, place: _Place, merges: list[Merge], fills: list[Ref]) -> None:
        if not transfer.kind.is_accumulator:
            self._spread_over_chunks(index, transfer.kind, transfer.chunks, place)
            if not self.backward:
                self._keep(index, transfer, merges)
            return
        row = 0
        for chunk in transfer.chunks:
            tokens = self.tasks[index].layout.tokens(chunk)
            source = _Place(place.tensors, row, tokens, place.heads)
            row += tokens
            target = self._find(index, transfer.kind, chunk, transfer.heads)
            if target is None:
                self.places[index, transfer.kind, chunk].append(source)
                self.sums[source.tensors[0]].add(source.row, source.row + tokens, source.heads)
            elif tokens:
                merges.append(self._merge(transfer, source, target, fills))

    def _keep(self, index: int, transfer: Transfer, merges: list[Merge]) -> None:
        """Copies what backward needs out of a message of which it needs only a part."""
        task = self.tasks[index]
        for number, value in enumerate(task.program.keep):
            wanted = [c for c in value.chunks if c in transfer.chunks and task.layout.tokens(c)]
            if value.kind is not transfer.kind or not wanted or _is_transfer(value, transfer):
                continue
            rows = sum(map(task.layout.tokens, value.chunks))
            kept = self._new(value.kind, rows, value.heads, kept_offset=self.kept_offsets[index, number])
            row = {c: sum(map(task.layout.tokens, value.chunks[:i])) for i, c in enumerate(value.chunks)}
            for chunk in wanted:
                source = self._need(index, value.kind, chunk, value.heads)
                target = _Place(kept.tensors, row[chunk], source.rows, value.heads)
                merges.append(self._copy(value.kind, source, target, value.heads, first=True))

    def _copy(self, kind: Kind, source: _Place, target: _Place, heads: Heads, first: bool) -> Merge:
        parts = range(len(COMPONENTS[kind]))
        return Merge(
            kind=kind,
            source=tuple(self._ref(source, c, source.row, source.row + source.rows, heads) for c in parts),
            target=tuple(self._ref(target, c, target.row, target.row + target.rows, heads) for c in parts),
            first=first,
        )

    def _merge(self, transfer: Transfer, source: _Place, target: _Place, fills: list[Ref]) -> Merge:
        first = self._claim(target, target.row, target.row + target.rows, transfer.heads, fills)
        return self._copy(transfer.kind, source, target, transfer.heads, first)

    def _claim(
        self, place: _Place, start: int, stop: int, heads: Heads, fills: list[Ref], fill_all: bool = False
    ) -> bool:
        """Marks rows of an accumulator as written. True: all were untouched. Untouched rows among others are emptied."""
        sums = self.sums[place.tensors[0]]
        missing = sums.missing(start, stop, heads)
        first = missing == [(start, stop, heads)] and not fill_all
        if missing and not first:
            for a, b, some in missing:
                fills += [self._ref(place, c, a, b, some) for c in range(len(place.tensors))]
        if missing:
            sums.add(start, stop, heads)
        return first

    # ------------------------------------------------------------ tiles

    def _tile(self, index: int, task: Task, tile: Tile, fills: list[Ref]) -> list[Call]:
        calls = []
        for heads in _uniform(tile.heads, self.geometry.heads.group):
            key_heads = self.geometry.heads.keys_for(heads)
            query_runs = self._runs(index, task, tile.queries, heads, is_query=True)
            key_runs = self._runs(index, task, tile.keys, key_heads, is_query=False)
            for queries in query_runs:
                for keys in key_runs:
                    for rectangle in decompose(task.mask, queries.ranges, keys.ranges):
                        calls.append(self._call(rectangle, queries, keys, heads, key_heads, fills))
        return calls

    def _runs(self, index: int, task: Task, chunks: tuple[int, ...], heads: Heads, is_query: bool) -> list[_Run]:
        """Groups of chunks that lie one after the other in every tensor that a call touches."""
        if self.backward:
            kinds = (Kind.Q, Kind.DO, Kind.DQ) if is_query else (Kind.KV, Kind.DKV)
        else:
            kinds = (Kind.Q, Kind.OUT) if is_query else (Kind.KV,)
        self._provide(index, task, chunks, [k for k in kinds if k.is_accumulator], heads)
        runs: list[_Run] = []
        for chunk in chunks:
            places = tuple(self._need(index, kind, chunk, heads) for kind in kinds)
            ranges = tuple(r for r in task.layout.chunks[chunk] if r[0] < r[1])
            if not ranges:
                continue
            if runs and runs[-1].extends(places, ranges):
                runs[-1].extend(places, ranges)
            else:
                runs.append(_Run(kinds, places, ranges))
        return runs

    def _provide(self, index: int, task: Task, chunks: tuple[int, ...], kinds: list[Kind], heads: Heads) -> None:
        """Room for accumulators of chunks that live elsewhere."""
        for kind in kinds:
            absent = tuple(c for c in chunks if self._find(index, kind, c, heads) is None)
            if absent:
                rows = sum(map(task.layout.tokens, absent))
                self._spread_over_chunks(index, kind, absent, self._new(kind, rows, heads))

    def _call(self, r: Rectangle, queries: _Run, keys: _Run, heads: Heads, key_heads: Heads, fills: list[Ref]) -> Call:
        rows = (r.row_start, r.row_stop)
        columns = (r.key_start, r.key_stop)
        cost = r.area * (heads[1] - heads[0])

        def of(run: _Run, kind: Kind, component: int, span: tuple[int, int], h: Heads) -> Ref:
            place = run.place(kind)
            return self._ref(place, component, place.row + span[0], place.row + span[1], h)

        inputs = [of(queries, Kind.Q, 0, rows, heads), *(of(keys, Kind.KV, c, columns, key_heads) for c in (0, 1))]
        if not self.backward:
            place = queries.place(Kind.OUT)
            first = self._claim(place, place.row + rows[0], place.row + rows[1], heads, fills)
            sums = tuple(of(queries, Kind.OUT, c, rows, heads) for c in (0, 1))
            return Call(shape=r.shape, inputs=tuple(inputs), sums=sums, first=(first,), cost=cost)
        inputs += [of(queries, Kind.DO, c, rows, heads) for c in (0, 1)]
        own = queries.place(Kind.DO)
        has_out = own.tensors[0] == self._external("do")
        if has_out:
            inputs.append(Ref(self._external("out"), own.row + rows[0], own.row + rows[1], inputs[-1].heads))
        else:
            inputs.append(of(queries, Kind.DO, 2, rows, heads))
        dq, dkv = queries.place(Kind.DQ), keys.place(Kind.DKV)
        first = (
            self._claim(dq, dq.row + rows[0], dq.row + rows[1], heads, fills),
            self._claim(dkv, dkv.row + columns[0], dkv.row + columns[1], key_heads, fills),
        )
        sums = (of(queries, Kind.DQ, 0, rows, heads), *(of(keys, Kind.DKV, c, columns, key_heads) for c in (0, 1)))
        return Call(shape=r.shape, inputs=tuple(inputs), sums=sums, first=first, has_out=has_out, cost=cost)

    # ------------------------------------------------------------ the end

    def _finish(self, count: int) -> None:
        """Accumulators that become outputs live to the end."""
        self.step = count
        for source, _ in self.finals:
            self._touch(source.tensor)

    def _assemble(self) -> Lowered:
        offsets, arena_bytes = pack_arena(self.drafts, self.geometry)
        first = len(self.externals)
        buffers = tuple(
            Buffer(
                tensor=first + i,
                offset=offsets[i],
                rows=d.rows,
                heads=d.heads,
                has_dim=d.has_dim,
                is_sum=d.is_sum,
                kept=d.kept,
            )
            for i, d in enumerate(self.drafts)
        )
        lse = {self._external("lse")} | {first + i for i, d in enumerate(self.drafts) if not d.has_dim}
        return Lowered(
            externals=self.externals,
            buffers=buffers,
            rounds=tuple(self.rounds),
            finals=tuple(self.finals),
            empties=tuple(self._empties()),
            arena_bytes=arena_bytes,
            kept_bytes=self.kept_bytes,
            is_backward=self.backward,
            lse_tensors=frozenset(lse),
        )

    def _empties(self) -> Iterable[Ref]:
        kinds = (Kind.DQ, Kind.DKV) if self.backward else (Kind.OUT,)
        for index, task in enumerate(self.tasks):
            for kind, chunk in itertools.product(kinds, task.layout.owned(task.member)):
                for place in self.places[index, kind, chunk]:
                    stop = place.row + place.rows
                    for a, b, heads in self.sums[place.tensors[0]].missing(place.row, stop, place.heads):
                        yield from (self._ref(place, c, a, b, heads) for c in range(len(place.tensors)))


class _Run:
    """Chunks that lie together: the place of the first in each kind's tensors, and all their token ranges."""

    def __init__(self, kinds: tuple[Kind, ...], places: tuple[_Place, ...], ranges: Ranges) -> None:
        self.kinds, self.first, self.last, self.ranges = kinds, places, places, ranges

    def extends(self, places: tuple[_Place, ...], ranges: Ranges) -> bool:
        follows = all(
            a.tensors == b.tensors and a.row + a.rows == b.row and a.heads == b.heads
            for a, b in zip(self.last, places, strict=True)
        )
        return follows and self.ranges[-1][1] <= ranges[0][0]

    def extend(self, places: tuple[_Place, ...], ranges: Ranges) -> None:
        self.last = places
        if self.ranges[-1][1] == ranges[0][0]:
            joined = (self.ranges[-1][0], ranges[0][1])
            self.ranges = (*self.ranges[:-1], joined, *ranges[1:])
        else:
            self.ranges = (*self.ranges, *ranges)

    def place(self, kind: Kind) -> _Place:
        return self.first[self.kinds.index(kind)]


def _is_one_call(task: Task) -> bool:
    """A whole sequence that one kernel call computes: nothing is ever merged, so outputs are written directly."""
    if task.layout.size > 1 or len(task.program.steps) > 1:
        return False
    whole = ((0, task.layout.length),)
    return len(decompose(task.mask, whole, whole)) == 1


def _is_transfer(value: Value, transfer: Transfer) -> bool:
    return (value.kind, value.chunks, value.heads) == (transfer.kind, transfer.chunks, transfer.heads)


def _uniform(heads: Heads, group: int) -> list[Heads]:
    """Cuts query heads where needed so that each piece reads whole groups, or lies inside one."""
    start, stop = heads
    cuts = [start]
    up, down = -(-start // group) * group, stop // group * group
    cuts += sorted({c for c in (up, down) if start < c < stop})
    cuts.append(stop)
    return list(itertools.pairwise(cuts))


def _join(pieces: list[Ref]) -> list[Ref]:
    joined: list[Ref] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if last is not None and last.tensor == piece.tensor and last.stop == piece.start and last.heads == piece.heads:
            joined[-1] = Ref(last.tensor, last.start, piece.stop, last.heads)
        else:
            joined.append(piece)
    return joined


def _spread(rounds: list[Round], fillers: list[Call]) -> list[Round]:
    """Hands out local calls over the rounds that wait for bytes, equal work to each; all to the last if none waits."""
    waits = [i for i, r in enumerate(rounds) if r.receives] or [len(rounds) - 1]
    total = sum(call.cost for call in fillers)
    shares: dict[int, list[Call]] = defaultdict(list)
    done = 0
    for call in fillers:
        turn = min(len(waits) * (2 * done + call.cost) // (2 * total), len(waits) - 1) if total else 0
        shares[waits[turn]].append(call)
        done += call.cost
    return [
        Round(
            sends=r.sends, receives=r.receives, calls=r.calls, fillers=tuple(shares[i]), merges=r.merges, fills=r.fills
        )
        for i, r in enumerate(rounds)
    ]
