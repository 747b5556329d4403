"""Lowers one rank's part of a micro-batch to a flat list of operations on numbered tensors.

A micro-batch holds shards of several sequences, each with a program of its own (``hdp.attention.program``). Step ``i`` of
all of them together is round ``i`` of the micro-batch. What comes out names no sequence, chunk or member any more: kernel
calls on row ranges of tensors, messages, merges, and one arena in which every received or travelling buffer has its
place. It is made once per micro-batch and layer geometry, in time linear in the programs' steps, and reused by all layers.
"""

from __future__ import annotations

import gc
import itertools
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from hdp.attention.arena import pack_arena
from hdp.attention.fillers import local_calls, spread
from hdp.attention.kept import Kept
from hdp.attention.layout import Layout
from hdp.attention.lowered import COMPONENTS, LAG, Buffer, Call, Copy, Geometry, Lowered, Merge, Packet, Ref, Round
from hdp.attention.mask import Mask, decompose
from hdp.attention.messages import Message, messages
from hdp.attention.packets import MessageLowering, Party, join_refs
from hdp.attention.places import Place, Places
from hdp.attention.program import Heads, Kind, RankProgram, Transfer
from hdp.attention.tiles import Setting, TileLowering


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


def lower(tasks: Sequence[Task], geometry: Geometry, backward: bool, ranks_per_node: int | None = None) -> Lowered:
    """This rank's flat program; ``tasks`` in the same order on every rank (ascending sequence).

    In each round, sequences that are spread over several nodes come first, then those inside one, so that the slow links
    are busy earliest; whole local ones fill the waits (Zeppelin's order). ``ranks_per_node`` None: one node.
    """
    with _no_collection():
        return _Lowering(tasks, geometry, backward, ranks_per_node).run()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's cycle collector waits: the many small objects of a program hold no cycles, and it takes a third of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Lowering:
    def __init__(self, tasks: Sequence[Task], geometry: Geometry, backward: bool, ranks_per_node: int | None) -> None:
        self.tasks, self.geometry, self.backward = tasks, geometry, backward
        # Sharers agree on the order: it follows from the group and the sequence alone.
        self.order = sorted(range(len(tasks)), key=lambda i: not _spans_nodes(tasks[i], ranks_per_node))
        self.externals = BACKWARD_TENSORS if backward else FORWARD_TENSORS
        self.places = Places(geometry, self.externals)
        self.tiles = TileLowering(self.places, backward)
        self.settings = [Setting(i, t.sequence, t.member, t.layout, t.mask) for i, t in enumerate(tasks)]
        self.finals: list[Copy] = []
        self.keeps = [Kept(task.program, task.layout, geometry) for task in tasks]
        self.mail = MessageLowering(self.places, backward)
        self.parties = [
            Party(i, t.sequence, t.member, t.layout, t.group, kept, _terms(t, geometry))
            for i, (t, kept) in enumerate(zip(tasks, self.keeps, strict=True))
        ]
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
        arrivals: list[tuple[int, Message, list[Packet], list[Place]]] = []
        self.tiles.begin_step()
        tasks = ((i, self.tasks[i]) for i in self.order)
        active = [(i, t, t.program.steps[step]) for i, t in tasks if step < len(t.program.steps)]
        for index, _, part in active:
            for message in self._messages(part.sends):
                sends += self.mail.send(self.parties[index], message, self.tiles.fills)
        for index, _, part in active:
            for message in self._messages(part.receives):
                arrivals.append((index, message, *self.mail.receive(self.parties[index], message)))
        for index, task, part in active:
            out = fillers if task.layout.size == 1 else calls
            for tile in part.tiles:
                out += self.tiles.calls(self.settings[index], tile)
        for index, message, packets, places in arrivals:
            came = [self._arrive(index, t, place) for t, place in zip(message.transfers, places, strict=True)]
            late = all(self._is_late(index, t, some) for t, some in zip(message.transfers, came, strict=True))
            if late:
                for tensor in (tensor for place in places for tensor in place.tensors):
                    self.places.touch(tensor, extra=LAG)
            receives += [replace(packet, late=late) for packet in packets]
            merges += [replace(merge, late=late) for some in came for merge in some]
        return Round(
            fills=tuple(self.tiles.fills),
            sends=tuple(sends),
            receives=tuple(receives),
            casts=tuple(self.tiles.casts),
            calls=tuple(calls),
            merges=tuple(merges),
        )

    def _messages(self, transfers: Sequence[Transfer]) -> list[Message]:
        return messages(transfers, self.geometry.heads, joins=self.geometry.joins)

    def _is_late(self, index: int, transfer: Transfer, merges: Sequence[Merge]) -> bool:
        """Whether all that arrived is added to sums that stay here. See [Note: late]."""
        task = self.tasks[index]
        owned = all(task.layout.owners[chunk] == task.member for chunk in transfer.chunks)
        return transfer.kind.is_accumulator and owned and not any(merge.first for merge in merges)

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
        return _join_merges(merges)

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
        lse = {self.places.external("lse")} | {
            first + i for i, d in enumerate(drafts) if not d.has_dim and d.width != "byte"
        }
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


def _join_merges(merges: Iterable[Merge]) -> list[Merge]:
    """One merge for rows that lie together on both sides: chunks of one message, mostly."""
    joined: list[Merge] = []
    for merge in merges:
        last = joined[-1] if joined else None
        if last is not None and (last.kind, last.first) == (merge.kind, merge.first):
            pairs = zip((*last.source, *last.target), (*merge.source, *merge.target), strict=True)
            refs = [join_refs(pair) for pair in pairs]
            if all(len(both) == 1 for both in refs):
                parts = len(merge.source)
                source, target = (tuple(r[0] for r in some) for some in (refs[:parts], refs[parts:]))
                joined[-1] = replace(last, source=source, target=target)
                continue
        joined.append(merge)
    return joined


def _terms(task: Task, geometry: Geometry) -> int:
    layout = task.layout
    return zlib.crc32(repr((layout.name, layout.length, task.group, task.mask, geometry)).encode())


def _spans_nodes(task: Task, ranks_per_node: int | None) -> bool:
    return ranks_per_node is not None and len({rank // ranks_per_node for rank in task.group}) > 1


def _is_one_call(task: Task) -> bool:
    """A whole sequence that one kernel call computes: nothing is ever merged, so outputs are written directly."""
    if task.layout.size > 1 or len(task.program.steps) > 1:
        return False
    whole = ((0, task.layout.length),)
    return len(decompose(task.mask, whole, whole)) == 1
