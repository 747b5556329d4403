"""Lowers one rank's part of a micro-batch to a flat list of operations on numbered tensors.

A micro-batch holds shards of several sequences, each with a program of its own (``hdp.attention.program``). Step ``i`` of
all of them together is round ``i`` of the micro-batch. What comes out names no sequence, chunk or member any more: kernel
calls on row ranges of tensors, messages, merges, and one arena in which every received or travelling buffer has its
place. It is made once per micro-batch and layer geometry, in time linear in the programs' steps, and reused by all layers.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from hdp.attention.arena import buffer_bytes, pack_arena
from hdp.attention.fillers import local_calls, spread
from hdp.attention.layout import Layout
from hdp.attention.lowered import (
    COMPONENTS,
    LAG,
    Buffer,
    Call,
    Copy,
    Geometry,
    Lowered,
    Merge,
    Packet,
    Ref,
    Round,
    Width,
)
from hdp.attention.lowered import wire_width as width_on_wire
from hdp.attention.mask import Mask, decompose
from hdp.attention.places import Place, Places
from hdp.attention.program import Heads, Kind, RankProgram, Transfer, Value
from hdp.attention.tiles import Setting, TileLowering, missing


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


class _Lowering:
    def __init__(self, tasks: Sequence[Task], geometry: Geometry, backward: bool) -> None:
        self.tasks, self.geometry, self.backward = tasks, geometry, backward
        self.externals = BACKWARD_TENSORS if backward else FORWARD_TENSORS
        self.places = Places(geometry, self.externals)
        self.tiles = TileLowering(self.places, backward)
        self.settings = [Setting(i, t.sequence, t.member, t.layout, t.mask) for i, t in enumerate(tasks)]
        self.finals: list[Copy] = []
        self.keeps = [_Keep(task, geometry) for task in tasks]
        self.kept_bytes = 0
        for keep in self.keeps:
            self.kept_bytes = keep.place_at(self.kept_bytes)

    def run(self) -> Lowered:
        for index, task in enumerate(self.tasks):
            self._place_own(index, task)
        count = max((len(t.program.steps) for t in self.tasks), default=0)
        fillers: list[Call] = []
        rounds = []
        for step in range(count):
            self.places.step = step
            rounds.append(self._lower_round(step, fillers))
        self.places.step = count
        for source, _ in self.finals:  # accumulators that become outputs live to the end
            self.places.touch(source.tensor)
        fillers = local_calls(fillers, rounds, self.geometry.heads)
        return self._assemble(spread(rounds, fillers), fillers)

    # ------------------------------------------------------------ what is here at the start

    def _place_own(self, index: int, task: Task) -> None:
        geometry, layout = self.geometry, task.layout
        kinds = (Kind.Q, Kind.KV, Kind.DO, Kind.DQ, Kind.DKV) if self.backward else (Kind.Q, Kind.KV, Kind.OUT)
        own = [(chunk, layout.tokens(chunk)) for chunk in layout.owned(task.member)]
        rows = sum(tokens for _, tokens in own)
        for kind in kinds:
            heads = geometry.heads.of(kind)
            tensors = tuple(self.places.external(c.name) for c in COMPONENTS[kind])
            place = Place(tensors, task.row, rows, heads, heads[0], heads[1] - heads[0])
            if kind.is_accumulator and not geometry.sums_are_outputs and not _is_one_call(task):
                place = self._accumulate_apart(kind, task, tensors, rows, heads)
            self.places.spread(index, kind, own, place)
        if self.backward:
            for value, offset in zip(task.program.keep, self.keeps[index].offsets, strict=True):
                tokens = [(c, layout.tokens(c)) for c in value.chunks]
                total = sum(t for _, t in tokens)
                place = self.places.new(value.kind, total, value.heads, kept_offset=offset, travels=True)
                self.places.spread(index, value.kind, tokens, place)

    def _accumulate_apart(self, kind: Kind, task: Task, outputs: tuple[int, ...], rows: int, heads: Heads) -> Place:
        """fp32 accumulators in the arena for outputs of a narrower dtype; cast into the outputs at the end."""
        place = self.places.new(kind, rows, heads)
        for accumulator, output in zip(place.tensors, outputs, strict=True):
            self.finals.append((Ref(accumulator, 0, rows), Ref(output, task.row, task.row + rows)))
        return place

    # ------------------------------------------------------------ one round

    def _lower_round(self, step: int, fillers: list[Call]) -> Round:
        sends: list[Packet] = []
        receives: list[Packet] = []
        merges: list[Merge] = []
        calls: list[Call] = []
        arrivals: list[tuple[int, Transfer, Place]] = []
        self.tiles.begin_step()
        active = [(i, t, t.program.steps[step]) for i, t in enumerate(self.tasks) if step < len(t.program.steps)]
        for index, _, part in active:
            for transfer in part.sends:
                sends += self._send(index, transfer)
        for index, _, part in active:
            for transfer in part.receives:
                arrivals.append((index, transfer, self._receive(index, transfer, receives)))
        for index, task, part in active:
            out = fillers if task.layout.size == 1 else calls
            for tile in part.tiles:
                out += self.tiles.calls(self.settings[index], tile)
        for index, transfer, place in arrivals:
            came = self._arrive(index, transfer, place)
            if self._is_late(index, transfer, came):
                receives = [replace(p, late=True) if p.ref.tensor in place.tensors else p for p in receives]
                came = [replace(merge, late=True) for merge in came]
                for tensor in place.tensors:
                    self.places.touch(tensor, extra=LAG)
            merges += came
        return Round(
            fills=tuple(self.tiles.fills),
            sends=tuple(sends),
            receives=tuple(receives),
            casts=tuple(self.tiles.casts),
            calls=tuple(calls),
            merges=tuple(merges),
        )

    def _is_late(self, index: int, transfer: Transfer, merges: Sequence[Merge]) -> bool:
        """Whether all that arrived is added to sums that stay here. See [Note: late]."""
        task = self.tasks[index]
        owned = all(task.layout.owners[chunk] == task.member for chunk in transfer.chunks)
        return transfer.kind.is_accumulator and owned and not any(merge.first for merge in merges)

    def _send(self, index: int, transfer: Transfer) -> list[Packet]:
        task, kind, heads = self.tasks[index], transfer.kind, transfer.heads
        parts: list[Place] = []
        for chunk in transfer.chunks:
            if task.layout.tokens(chunk):
                parts += self._pieces(index, kind, chunk, heads)
        if kind.is_accumulator:
            if any(task.layout.owners[chunk] == task.member for chunk in transfer.chunks):
                raise ValueError(f"sequence {task.sequence}: member {task.member} sends away its own {kind.name}")
            for place in parts:  # rows that no tile has reached travel as zeros
                self.places.claim(
                    place, place.row, place.row + place.rows, place.heads, self.tiles.fills, fill_all=True
                )
        packets = []
        for number, component in enumerate(COMPONENTS[kind]):
            width = width_on_wire(kind, component, transfer.final, self.geometry)
            size = self.geometry.bytes_of(width)
            as_is = all(self._element_bytes(p.tensors[number], component.width) == size for p in parts)
            refs = _join([self.places.rows_of(p, number, extra=1) for p in parts])
            if as_is and len(refs) == 1 and refs[0].heads is None:
                packets.append(self._packet(task, transfer, refs[0], component.name))
                continue
            rows = sum(map(task.layout.tokens, transfer.chunks))
            staging = self.places.buffer(rows, heads[1] - heads[0], component.has_dim, width, extra=1)
            pack = _pack(parts, [self.places.rows_of(p, number) for p in parts], staging, heads)
            packets.append(self._packet(task, transfer, Ref(staging, 0, rows), component.name, pack))
        if kind.is_accumulator:
            for chunk in transfer.chunks:
                self.places.take(index, kind, chunk, heads)
        return packets

    def _element_bytes(self, tensor: int, default: Width) -> int:
        index = tensor - len(self.externals)
        return self.geometry.bytes_of(self.places.drafts[index].width if index >= 0 else default)

    def _pieces(self, index: int, kind: Kind, chunk: int, heads: Heads) -> list[Place]:
        """Places of all these heads; an error if some are not here."""
        gaps = self.places.gaps(index, kind, chunk, heads)
        if gaps:
            task = self.tasks[index]
            raise missing(task.sequence, self.places.step, task.member, kind, chunk, gaps[0])
        return self.places.pieces(index, kind, chunk, heads)

    def _packet(self, task: Task, transfer: Transfer, ref: Ref, name: str, pack: tuple[Copy, ...] = ()) -> Packet:
        peer = task.group[transfer.peer]
        return Packet(ref=ref, peer=peer, lane=transfer.lane, sequence=task.sequence, what=name, pack=pack)

    def _receive(self, index: int, transfer: Transfer, receives: list[Packet]) -> Place:
        task = self.tasks[index]
        rows = sum(map(task.layout.tokens, transfer.chunks))
        offset = -1 if self.backward else self.keeps[index].offset_of(transfer)
        place = self.places.new(
            transfer.kind, rows, transfer.heads, kept_offset=offset, travels=True, final=transfer.final
        )
        for number, component in enumerate(COMPONENTS[transfer.kind]):
            receives.append(self._packet(task, transfer, self.places.rows_of(place, number), component.name))
        return place

    def _arrive(self, index: int, transfer: Transfer, place: Place) -> list[Merge]:
        merges: list[Merge] = []
        layout, kind = self.tasks[index].layout, transfer.kind
        row = 0
        for chunk in transfer.chunks:
            tokens = layout.tokens(chunk)
            source = Place(place.tensors, row, tokens, place.heads, place.base, place.count, place.is_wire)
            row += tokens
            if not tokens:
                continue
            if not kind.is_accumulator:
                self.places.put(index, kind, chunk, source)
                if not self.backward:
                    self._keep(index, transfer, chunk, source, merges)
                continue
            gaps = self.places.gaps(index, kind, chunk, transfer.heads)
            for target in self.places.pieces(index, kind, chunk, transfer.heads):
                merges.append(self._merge(kind, source.narrow(target.heads), target))
            for heads in gaps:  # it goes on from here: the message's own buffer is its place
                self.places.put(index, kind, chunk, source.narrow(heads))
                self.places.filled(source.narrow(heads))
        return merges

    def _merge(self, kind: Kind, source: Place, target: Place) -> Merge:
        first = self.places.claim(target, target.row, target.row + target.rows, target.heads, self.tiles.fills)
        return self._copy(kind, source, target, first)

    def _copy(self, kind: Kind, source: Place, target: Place, first: bool) -> Merge:
        parts = range(len(COMPONENTS[kind]))
        return Merge(
            kind=kind,
            source=tuple(self.places.rows_of(source, c) for c in parts),
            target=tuple(self.places.rows_of(target, c) for c in parts),
            first=first,
        )

    def _keep(self, index: int, transfer: Transfer, chunk: int, source: Place, merges: list[Merge]) -> None:
        """Copies what backward needs out of a message of which it needs only a part."""
        layout = self.tasks[index].layout
        for value, offset in self.keeps[index].parts(transfer.kind, chunk):
            low, high = max(value.heads[0], source.heads[0]), min(value.heads[1], source.heads[1])
            if low >= high:
                continue
            rows = sum(map(layout.tokens, value.chunks))
            kept = self.places.new(value.kind, rows, value.heads, kept_offset=offset, travels=True)
            row = sum(layout.tokens(c) for c in value.chunks[: value.chunks.index(chunk)])
            target = Place(kept.tensors, row, source.rows, (low, high), kept.base, kept.count)
            merges.append(self._copy(value.kind, source.narrow((low, high)), target, first=True))

    # ------------------------------------------------------------ the end

    def _assemble(self, rounds: Sequence[Round], fillers: Sequence[Call]) -> Lowered:
        empties = tuple(self._empties())
        drafts = self.places.drafts
        offsets, arena_bytes = pack_arena(drafts, self.geometry)
        first = len(self.externals)
        buffers = tuple(
            Buffer(
                tensor=first + i,
                offset=offset,
                rows=d.rows,
                heads=d.heads,
                has_dim=d.has_dim,
                width=d.width,
                kept=d.kept,
            )
            for i, (d, offset) in enumerate(zip(drafts, offsets, strict=True))
        )
        lse = {self.places.external("lse")} | {first + i for i, d in enumerate(drafts) if not d.has_dim}
        return Lowered(
            externals=self.externals,
            buffers=buffers,
            rounds=tuple(rounds),
            fillers=tuple(fillers),
            finals=tuple(self.finals),
            empties=empties,
            arena_bytes=arena_bytes,
            kept_bytes=self.kept_bytes,
            is_backward=self.backward,
            lse_tensors=frozenset(lse),
        )

    def _empties(self) -> Iterator[Ref]:
        kinds = (Kind.DQ, Kind.DKV) if self.backward else (Kind.OUT,)
        for index, task in enumerate(self.tasks):
            for kind, chunk in itertools.product(kinds, task.layout.owned(task.member)):
                yield from self.places.unfilled(index, kind, chunk)


class _Keep:
    """What one sequence keeps from forward to backward, and where: the same bytes in both directions."""

    def __init__(self, task: Task, geometry: Geometry) -> None:
        self.task, self.geometry = task, geometry
        self.offsets: list[int] = []
        self._whole: dict[tuple[Kind, tuple[int, ...], Heads], int] = {}
        self._parts: dict[tuple[Kind, int], list[tuple[Value, int]]] = defaultdict(list)

    def place_at(self, start: int) -> int:
        """Lays the kept values out from byte ``start``; returns where they end."""
        program, layout = self.task.program, self.task.layout
        messages = {(t.kind, t.chunks, t.heads) for step in program.steps for t in step.receives}
        for value in program.keep:
            self.offsets.append(start)
            if (value.kind, value.chunks, value.heads) in messages:
                self._whole[value.kind, value.chunks, value.heads] = start
            else:
                for chunk in value.chunks:
                    self._parts[value.kind, chunk].append((value, start))
            rows = sum(map(layout.tokens, value.chunks))
            for component in COMPONENTS[value.kind]:
                width = width_on_wire(value.kind, component, False, self.geometry)
                heads = value.heads[1] - value.heads[0]
                start += buffer_bytes(self.geometry, rows, heads, component.has_dim, width)
        return start

    def offset_of(self, transfer: Transfer) -> int:
        """Where a message that is kept whole is received; -1 if it is not."""
        return self._whole.get((transfer.kind, transfer.chunks, transfer.heads), -1)

    def parts(self, kind: Kind, chunk: int) -> Iterable[tuple[Value, int]]:
        """Values that this chunk is a part of, to be copied."""
        return self._parts.get((kind, chunk), ())


def _is_one_call(task: Task) -> bool:
    """A whole sequence that one kernel call computes: nothing is ever merged, so outputs are written directly."""
    if task.layout.size > 1 or len(task.program.steps) > 1:
        return False
    whole = ((0, task.layout.length),)
    return len(decompose(task.mask, whole, whole)) == 1


def _pack(parts: Sequence[Place], sources: Sequence[Ref], staging: int, heads: Heads) -> tuple[Copy, ...]:
    """Copies into a message: rows of one chunk after the other, each piece into its heads."""
    copies, row = [], 0
    for place, source in zip(parts, sources, strict=True):
        columns = None if place.heads == heads else (place.heads[0] - heads[0], place.heads[1] - heads[0])
        copies.append((source, Ref(staging, row, row + place.rows, columns)))
        if place.heads[1] == heads[1]:  # the last piece of its chunk
            row += place.rows
    return tuple(copies)


def _join(pieces: list[Ref]) -> list[Ref]:
    joined: list[Ref] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if last is not None and last.tensor == piece.tensor and last.stop == piece.start and last.heads == piece.heads:
            joined[-1] = Ref(last.tensor, last.start, piece.stop, last.heads)
        else:
            joined.append(piece)
    return joined
