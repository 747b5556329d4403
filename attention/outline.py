"""Outlines one rank's program of one bundle: moves, messages and kernel calls on nominal rows.

A program says which chunks travel and which tiles are computed; an outline says in which tensors they lie, what is copied,
which kernel calls a tile takes and what becomes of their results. It holds for every bundle of the same pattern, whatever
its documents' lengths (see ``hdp.attention.bundle``), so it is kept from one micro-batch to the next;
``hdp.attention.lower`` fills in rows and bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache

from hdp.attention.bundle import Pattern
from hdp.attention.gathering import Gathering
from hdp.attention.layout import Layout
from hdp.attention.lowered import COMPONENTS, LAG, READY, Geometry, Op, Width, wire_width
from hdp.attention.mask import Mask, decompose
from hdp.attention.messages import messages
from hdp.attention.outlined import (
    BACKWARD_TENSORS,
    FORWARD_TENSORS,
    RESULT,
    Mail,
    Move,
    Outline,
    Piece,
    Turn,
    added,
    join,
)
from hdp.attention.places import Place, Places, Ref, Root
from hdp.attention.program import Heads, Kind, RankProgram, Step, Transfer
from hdp.attention.schedules import get_pair
from hdp.attention.tiles import Tiles


@lru_cache(maxsize=2048)
def outline(pattern: Pattern, member: int, names: tuple[str, str], backward: bool, geometry: Geometry) -> Outline:
    """The outline of one member's program. Raises ValueError if the schedules (forward, backward) do not serve the group."""
    layout, pair = pattern.nominal, get_pair(*names)
    make = pair.backward if backward else pair.forward
    program = make(layout, pattern.mask, geometry.heads, member)
    return _Outliner(program, layout, pattern.mask, member, geometry, backward).run()


class _Outliner:
    def __init__(
        self, program: RankProgram, layout: Layout, mask: Mask, member: int, geometry: Geometry, backward: bool
    ) -> None:
        self.program, self.layout, self.mask, self.member = program, layout, mask, member
        self.geometry, self.backward = geometry, backward
        self.externals = BACKWARD_TENSORS if backward else FORWARD_TENSORS
        self.owned = layout.owned(member)
        self.places = Places(geometry, self.externals, layout, member)
        self.gathering = Gathering(program, layout, member, geometry, self.places, backward)
        self.tiles = Tiles(layout, mask, geometry, self.places, self.gathering, backward)
        self.writes_outputs = geometry.sums_are_outputs or self._is_one_call()
        self.finals: list[Move] = []

    @property
    def fills(self) -> list[Ref]:
        """Rows of sums that must be emptied before this step."""
        return self.tiles.fills

    def run(self) -> Outline:
        self.gathering.place_kept()
        self._place_own()
        turns = [self._turn(number, step) for number, step in enumerate(self.program.steps)]
        self.places.step = len(turns)
        self.gathering.moves = []
        self.gathering.keep_waiting()
        self.gathering.keep_own()
        finals = [*self.finals, *self.gathering.moves]
        for move in self.finals:  # accumulators that become outputs live to the end
            for ref in move.source:
                self.places.touch(ref.tensor)
        empties = tuple(self._empties())
        lse = {len(self.externals) + i for i, d in enumerate(self.places.drafts) if not d.has_dim}
        return Outline(
            externals=self.externals,
            owned=self.owned,
            drafts=tuple(self.places.drafts),
            turns=tuple(turns),
            finals=tuple(finals),
            empties=empties,
            kept=tuple(self.gathering.blocks),
            wide=self.geometry.widens and not self.writes_outputs,
            is_local=self.layout.size == 1,
            lse=frozenset() if self.backward else frozenset(lse | {self.externals.index("lse")}),
        )

    # ------------------------------------------------------------ what is here at the start

    def _place_own(self) -> None:
        kinds = (Kind.Q, Kind.KV, Kind.DO, Kind.DQ, Kind.DKV) if self.backward else (Kind.Q, Kind.KV, Kind.OUT)
        for kind in kinds:
            heads = self.geometry.heads.of(kind)
            tensors = tuple(self.places.external(c.name) for c in COMPONENTS[kind])
            if kind.is_accumulator and not self.writes_outputs:
                tensors = self._accumulate_apart(kind, tensors, heads)
            ready = tuple(self.places.external(c.name) for c in READY[kind])
            for chunk, place in zip(self.owned, self._spread(tensors, heads), strict=True):
                self.places.hold(kind, chunk, place)
                self.places.make_ready(kind, chunk, replace(place, tensors=ready))

    def _spread(self, tensors: tuple[int, ...], heads: Heads) -> list[Place]:
        return self.places.spread(tensors, self.owned, heads, heads[0], heads[1] - heads[0])

    def _accumulate_apart(self, kind: Kind, outputs: tuple[int, ...], heads: Heads) -> tuple[int, ...]:
        """fp32 accumulators in the arena for outputs of a narrower dtype; cast into the outputs at the end."""
        tensors = []
        rows = sum(map(self.layout.tokens, self.owned))
        for component, output in zip(COMPONENTS[kind], outputs, strict=True):
            if not component.has_dim:  # lse is fp32 already
                tensors.append(output)
                continue
            sums = self.places.buffer(self.owned, heads[1] - heads[0], True, "sum", self.places.new_root())
            tensors.append(sums)
            self.finals.append(Move(Op.COPY, (Ref(sums, 0, rows),), (Ref(output, 0, rows),)))
        return tuple(tensors)

    def _is_one_call(self) -> bool:
        """Whole documents that one kernel call computes: nothing is ever merged, so outputs are written directly."""
        if self.layout.size > 1 or len(self.program.steps) > 1 or self.mask.window is not None:
            return False
        whole = ((0, self.layout.length),)
        return len(decompose(self.mask, whole, whole)) == 1

    # ------------------------------------------------------------ one step

    def _turn(self, number: int, step: Step) -> Turn:
        self.places.step = number
        self.tiles.fills, self.gathering.moves = [], []
        self.gathering.gather(step.tiles)
        self.gathering.keep_waiting()
        sends = [self._leave(group) for group in messages(step.sends)]
        arrivals = [(group, self._make_room(number, group)) for group in messages(step.receives)]
        calls = [call for tile in step.tiles for call in self.tiles.calls(tile)]
        receives = [self._arrive(group, room) for group, room in arrivals]
        return Turn(tuple(self.gathering.moves), tuple(self.fills), tuple(sends), tuple(receives), tuple(calls))

    # ------------------------------------------------------------ sending

    def _leave(self, transfers: Sequence[Transfer]) -> Mail:
        """A message. Sums that leave are forgotten; rows of them that no tile has reached travel as zeros (``fills``)."""
        pieces = [piece for transfer in transfers for piece in self._pieces_of(transfer)]
        for transfer in transfers:
            if transfer.kind.is_accumulator:
                for chunk in transfer.chunks:
                    self.places.take(transfer.kind, chunk, transfer.heads)
        return _mail(transfers, pieces)

    def _pieces_of(self, transfer: Transfer) -> list[Piece]:
        kind, lying = transfer.kind, []
        row = 0
        gathered = None if self.geometry.casts_inputs or kind is Kind.DO else self._gathered(transfer)
        for chunk in transfer.chunks:
            for place in [gathered[chunk]] if gathered else self.places.whole(kind, chunk, transfer.heads):
                lying.append((place, row))
            row += self.layout.tokens(chunk)
        if kind.is_accumulator:
            if any(self.layout.owners[chunk] == self.member for chunk in transfer.chunks):
                raise ValueError(f"member {self.member} sends away its own {kind.name}")
            for place, _ in lying:
                self.places.claim(place, place.row, place.row + place.rows, place.heads, self.fills, fill_all=True)
        count = transfer.heads[1] - transfer.heads[0]
        pieces = []
        for number, component in enumerate(COMPONENTS[kind]):
            width = wire_width(kind, component, transfer.final, self.geometry)
            moves = []
            for place, to in lying:
                columns = (place.heads[0] - transfer.heads[0], place.heads[1] - transfer.heads[0])
                target = Ref(RESULT, to, to + place.rows, None if columns == (0, count) else columns)
                moves.append(Move(Op.COPY, (self.places.rows_of(place, number, extra=1),), (target,)))
            moves = join(moves)
            tensor = self._as_it_travels(moves, transfer.chunks, width)
            pieces.append(Piece(component.name, width, count, component.has_dim, transfer.chunks, tuple(moves), tensor))
        return pieces

    def _gathered(self, transfer: Transfer) -> dict[int, Place] | None:
        """Places of what is sent in a group of exactly that, which can be sent as it lies."""
        for group in reversed(self.gathering.groups):
            if (group.kind, group.heads) == (transfer.kind, transfer.heads) and tuple(group.places) == transfer.chunks:
                return group.places
        return None

    def _as_it_travels(self, moves: Sequence[Move], chunks: tuple[int, ...], width: Width) -> int:
        """The buffer that is all of a piece of a message, with its chunks in the same order and its dtype; -1: none."""
        if len(moves) != 1:
            return -1
        (source,), draft = moves[0].source, self.places.draft(moves[0].source[0].tensor)
        same = draft is not None and draft.chunks == chunks and source.heads is None and source.start == 0
        if not same or draft is None or self.geometry.bytes_of(draft.width) != self.geometry.bytes_of(width):
            return -1
        return source.tensor

    # ------------------------------------------------------------ receiving

    def _make_room(self, number: int, transfers: Sequence[Transfer]) -> list[tuple[int, ...]]:
        first = transfers[0]
        root: Root = ("in", number, first.peer, first.lane, int(first.kind.is_accumulator))
        return [self.places.room(t.kind, t.chunks, t.heads, root, travels=True, final=t.final) for t in transfers]

    def _arrive(self, transfers: Sequence[Transfer], room: Sequence[tuple[int, ...]]) -> Mail:
        pieces, merges, late = [], [], True
        keeps = -1
        for transfer, tensors in zip(transfers, room, strict=True):
            count = transfer.heads[1] - transfer.heads[0]
            for component, tensor in zip(COMPONENTS[transfer.kind], tensors, strict=True):
                width = wire_width(transfer.kind, component, transfer.final, self.geometry)
                pieces.append(Piece(component.name, width, count, component.has_dim, transfer.chunks, (), tensor))
            if transfer.kind.is_accumulator:
                came, is_late = self._add(transfer, tensors)
                merges += came
                late = late and is_late
            else:
                late = False
                keeps = self._receive_input(transfer, tensors, is_alone=len(transfers) == 1)
        if late:
            for tensor in (t for tensors in room for t in tensors):
                self.places.touch(tensor, extra=LAG)
        return replace(_mail(transfers, pieces), late=late, merges=tuple(merges), keeps=keeps)

    def _receive_input(self, transfer: Transfer, tensors: tuple[int, ...], is_alone: bool) -> int:
        """Notes where an input is; the kept block that its message is, or -1."""
        kind, heads = transfer.kind, transfer.heads
        count = heads[1] - heads[0]
        places = self.places.spread(tensors, transfer.chunks, heads, heads[0], count)
        number, block = self.gathering.block_of(kind, heads, transfer.chunks)
        is_block = is_alone and block is not None and block.chunks == transfer.chunks and not self.geometry.casts_inputs
        for chunk, place in zip(transfer.chunks, places, strict=True):
            self.places.hold(kind, chunk, place)
            if kind is not Kind.DO and not self.geometry.casts_inputs:
                self.places.make_ready(kind, chunk, place)
            if not is_block and not self.backward:
                self.gathering.waiting.append((kind, chunk, place))
        if is_block:
            self.gathering.kept_chunks[number] |= set(transfer.chunks)
            return number
        return -1

    def _add(self, transfer: Transfer, tensors: tuple[int, ...]) -> tuple[list[Move], bool]:
        """Adds sums that arrive to what is here; whether nobody here waits for them."""
        kind, heads, moves = transfer.kind, transfer.heads, []
        count, waits = heads[1] - heads[0], False
        for chunk, source in zip(
            transfer.chunks, self.places.spread(tensors, transfer.chunks, heads, heads[0], count), strict=True
        ):
            waits = waits or self.layout.owners[chunk] != self.member
            gaps = self.places.gaps(kind, chunk, heads)
            for target in self.places.pieces(kind, chunk, heads):
                start, stop = target.row, target.row + target.rows
                first = self.places.claim(target, start, stop, target.heads, self.fills)
                moves += self._sum(source.narrow(target.heads), target, first)
                waits = waits or first
            for some in gaps:  # it goes on from here: the message's own buffer is its place
                self.places.hold(kind, chunk, source.narrow(some))
                self.places.filled(source.narrow(some))
        return join(moves), not waits

    def _sum(self, source: Place, target: Place, first: bool) -> list[Move]:
        sources = tuple(self.places.rows_of(source, c) for c in range(len(source.tensors)))
        targets = tuple(self.places.rows_of(target, c) for c in range(len(target.tensors)))
        return added(sources, targets, first, is_partial=not self.backward)

    # ------------------------------------------------------------ the end

    def _empties(self) -> Iterable[Ref]:
        kinds = (Kind.DQ, Kind.DKV) if self.backward else (Kind.OUT,)
        for kind, chunk in itertools.product(kinds, self.owned):
            yield from self.places.unfilled(kind, chunk)


def _mail(transfers: Sequence[Transfer], pieces: Iterable[Piece]) -> Mail:
    first = transfers[0]
    content = "; ".join(f"{t.kind.value} {t.chunks} {t.heads} {t.final}" for t in transfers).encode()
    return Mail(first.peer, first.lane, first.kind.is_accumulator, tuple(pieces), content)
