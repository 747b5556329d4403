"""Turns the messages of a program into packets: rows of numbered tensors that are sent, or filled, in one go."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hdp.attention.arena import buffer_bytes
from hdp.attention.kept import Kept
from hdp.attention.layout import Layout
from hdp.attention.lowered import COMPONENTS, Copy, Packet, Ref
from hdp.attention.lowered import wire_width as width_on_wire
from hdp.attention.messages import Message, arrange
from hdp.attention.places import Place, Places
from hdp.attention.program import Heads, Transfer
from hdp.attention.tiles import missing


@dataclass(frozen=True)
class Party:
    """One sequence, as its messages see it."""

    task: int
    sequence: int
    member: int
    layout: Layout
    group: tuple[int, ...]
    """Ranks of the world, by member."""
    kept: Kept
    terms: int
    """Checksum of what all sharers must say of the sequence alike: its layout, group, mask, heads."""

    def rows(self, transfer: Transfer) -> int:
        return sum(map(self.layout.tokens, transfer.chunks))

    def packet(self, transfer: Transfer, ref: Ref, name: str, pack: tuple[Copy, ...] = ()) -> Packet:
        content = f"{transfer.kind.value} {transfer.chunks} {transfer.heads}"
        return Packet(
            ref=ref,
            peer=self.group[transfer.peer],
            lane=transfer.lane,
            sequence=self.sequence,
            what=name,
            terms=zlib.crc32(content.encode(), self.terms),
            pack=pack,
        )


class MessageLowering:
    """Lowers messages one by one."""

    def __init__(self, places: Places, backward: bool) -> None:
        self.places, self.backward = places, backward

    # ------------------------------------------------------------ sending

    def send(self, party: Party, message: Message, fills: list[Ref]) -> list[Packet]:
        """Its packets. Sums that leave are forgotten; rows of them that no tile has reached travel as zeros (``fills``)."""
        pieces = [self._leaving(party, transfer, fills) for transfer in message.transfers]
        if message.is_one:
            packets = [self._joined(party, message, pieces)]
        else:
            packets = [
                self._single(party, transfer, number, parts)
                for transfer, parts in zip(message.transfers, pieces, strict=True)
                for number in range(len(COMPONENTS[transfer.kind]))
            ]
        for transfer in message.transfers:
            if transfer.kind.is_accumulator:
                for chunk in transfer.chunks:
                    self.places.take(party.task, transfer.kind, chunk, transfer.heads)
        return packets

    def _leaving(self, party: Party, transfer: Transfer, fills: list[Ref]) -> list[Place]:
        """Where what is sent lies."""
        kind, parts = transfer.kind, []
        for chunk in transfer.chunks:
            if party.layout.tokens(chunk):
                gaps = self.places.gaps(party.task, kind, chunk, transfer.heads)
                if gaps:
                    raise missing(party.sequence, self.places.step, party.member, kind, chunk, gaps[0])
                parts += self.places.pieces(party.task, kind, chunk, transfer.heads)
        if kind.is_accumulator:
            if any(party.layout.owners[chunk] == party.member for chunk in transfer.chunks):
                raise ValueError(f"sequence {party.sequence}: member {party.member} sends away its own {kind.name}")
            for place in parts:
                self.places.claim(place, place.row, place.row + place.rows, place.heads, fills, fill_all=True)
        return parts

    def _joined(self, party: Party, message: Message, pieces: Sequence[list[Place]]) -> Packet:
        """All components in one packet: as they lie, if that is how they travel; else copied together first."""
        first, geometry = message.transfers[0], self.places.geometry
        shapes = [(t.kind, party.rows(t), t.heads, t.final) for t in message.transfers]
        _, order, size = arrange([(k, rows, h[1] - h[0], f) for k, rows, h, f in shapes], geometry)
        run = self._run([self._as_is(message.transfers[p], c, pieces[p]) for p, c in order])
        if run is not None:
            root, start = run
            whole = self.places.drafts[root - len(self.places.externals)]
            self.places.touch(root, extra=1)
            if (
                start
                or whole.bytes(geometry) != buffer_bytes(geometry, size, 1, False, "byte")
                or whole.width != "byte"
            ):
                root = self.places.part(root, start, size, 1, False, "byte")
            return party.packet(first, Ref(root, 0, size), message.name)
        root, staged = self.places.joint(shapes, extra=1)
        pack: tuple[Copy, ...] = ()
        for transfer, parts, place in zip(message.transfers, pieces, staged, strict=True):
            for number in range(len(COMPONENTS[transfer.kind])):
                sources = [self.places.rows_of(p, number) for p in parts]
                pack += _pack(parts, sources, place.tensors[number], transfer.heads)
        return party.packet(first, Ref(root, 0, size), message.name, pack)

    def _single(self, party: Party, transfer: Transfer, number: int, parts: list[Place]) -> Packet:
        """One component."""
        component, heads = COMPONENTS[transfer.kind][number], transfer.heads
        ref = self._as_is(transfer, number, parts)
        if ref is not None:
            self.places.touch(ref.tensor, extra=1)
            return party.packet(transfer, ref, component.name)
        width = width_on_wire(transfer.kind, component, transfer.final, self.places.geometry)
        rows = party.rows(transfer)
        staging = self.places.buffer(rows, heads[1] - heads[0], component.has_dim, width, extra=1)
        pack = _pack(parts, [self.places.rows_of(p, number) for p in parts], staging, heads)
        return party.packet(transfer, Ref(staging, 0, rows), component.name, pack)

    def _as_is(self, transfer: Transfer, number: int, parts: list[Place]) -> Ref | None:
        """The rows of one tensor that hold this component as it travels; None if it must be copied first."""
        component, geometry = COMPONENTS[transfer.kind][number], self.places.geometry
        size = geometry.bytes_of(width_on_wire(transfer.kind, component, transfer.final, geometry))
        refs = join_refs([self.places.rows_of(p, number) for p in parts])
        if len(refs) != 1 or refs[0].heads is not None:
            return None
        index = refs[0].tensor - len(self.places.externals)
        has = geometry.bytes_of(self.places.drafts[index].width if index >= 0 else component.width)
        return refs[0] if has == size else None

    def _run(self, refs: Sequence[Ref | None]) -> tuple[int, int] | None:
        """(tensor, byte) at which these rows lie one after the other in the bytes of one tensor; None if they do not."""
        begin: tuple[int, int] | None = None
        end = (-1, -1)
        for ref in refs:
            index = -1 if ref is None else ref.tensor - len(self.places.externals)
            if ref is None or index < 0:
                return None
            draft = self.places.drafts[index]
            root, offset = (draft.root, draft.root_offset) if draft.root >= 0 else (index, 0)
            row = draft.row_bytes(self.places.geometry)
            start = (root, offset + ref.start * row)
            if begin is None:
                begin = start
            elif start != end:
                return None
            end = (root, offset + ref.stop * row)
        return None if begin is None else (begin[0] + len(self.places.externals), begin[1])

    # ------------------------------------------------------------ receiving

    def receive(self, party: Party, message: Message) -> tuple[list[Packet], list[Place]]:
        """Its packets, and where each transfer arrives."""
        if message.is_one:
            shapes = [(t.kind, party.rows(t), t.heads, t.final) for t in message.transfers]
            kept = -1 if self.backward else party.kept.offset_of(message.transfers)
            root, places = self.places.joint(shapes, kept_offset=kept)
            size = self.places.drafts[root - len(self.places.externals)].rows
            return [party.packet(message.transfers[0], Ref(root, 0, size), message.name)], places
        packets, places = [], []
        for transfer in message.transfers:
            kept = -1 if self.backward else party.kept.offset_of((transfer,))
            place = self.places.new(
                transfer.kind,
                party.rows(transfer),
                transfer.heads,
                kept_offset=kept,
                travels=True,
                final=transfer.final,
            )
            places.append(place)
            for number, component in enumerate(COMPONENTS[transfer.kind]):
                packets.append(party.packet(transfer, self.places.rows_of(place, number), component.name))
        return packets, places


def _pack(parts: Sequence[Place], sources: Sequence[Ref], staging: int, heads: Heads) -> tuple[Copy, ...]:
    """Copies into a message: rows of one chunk after the other, each piece into its heads."""
    copies: list[Copy] = []
    row = 0
    for place, source in zip(parts, sources, strict=True):
        columns = None if place.heads == heads else (place.heads[0] - heads[0], place.heads[1] - heads[0])
        copy = source, Ref(staging, row, row + place.rows, columns)
        joined = [join_refs((a, b)) for a, b in zip(copies[-1], copy, strict=True)] if copies else []
        if joined and all(len(both) == 1 for both in joined):  # rows that lie together on both sides
            copies[-1] = joined[0][0], joined[1][0]
        else:
            copies.append(copy)
        if place.heads[1] == heads[1]:  # the last piece of its chunk
            row += place.rows
    return tuple(copies)


def join_refs(pieces: Iterable[Ref]) -> list[Ref]:
    """The same rows, those that lie one after the other in one."""
    joined: list[Ref] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if last is not None and last.tensor == piece.tensor and last.stop == piece.start and last.heads == piece.heads:
            joined[-1] = Ref(last.tensor, last.start, piece.stop, last.heads)
        else:
            joined.append(piece)
    return joined
