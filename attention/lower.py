"""Lowers one rank's part of a micro-batch: the outlines of its bundles, with rows, bytes and places in the arena filled in.

Step ``i`` of all bundles together is round ``i`` of the micro-batch. What goes to one rank in one round and lane is one
message, whatever the number of sequences in it; what is copied, computed and merged in a round is one table. It is made
once per micro-batch and layer geometry and reused by all layers.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from hdp.attention.bundle import Bundle
from hdp.attention.fillers import Local, local_calls
from hdp.attention.launches import Launches
from hdp.attention.lowered import Call, Geometry, Lowered, Op, Packet, Round, Space
from hdp.attention.outline import outline
from hdp.attention.outlined import BACKWARD_TENSORS, FORWARD_TENSORS, KernelCall, Mail, Move, Outline, Piece, Region
from hdp.attention.places import Ref
from hdp.attention.regions import Regions
from hdp.attention.spaces import Message, Root, Spaces, laid_out, whole
from hdp.attention.tables import Tables, Tensor, stack


@dataclass(frozen=True)
class Task:
    """One bundle of the micro-batch and the schedules, forward and backward, that it runs."""

    bundle: Bundle
    names: tuple[str, str]


def lower(
    tasks: Sequence[Task],
    geometry: Geometry,
    backward: bool,
    ranks_per_node: int | None = None,
    *,
    packs: bool = False,
) -> Lowered:
    """This rank's flat program.

    In each round, sequences that are spread over several nodes come first, then those inside one, so that the slow links
    are busy earliest; whole local ones fill the waits (Zeppelin's order).

    Args:
        tasks: the bundles, in any order: it follows from their groups and sequences, the same on all sharers.
        ranks_per_node: None: one node. packs: whether the backend takes several rectangles a launch.
    """
    order = sorted(tasks, key=lambda t: (not _spans_nodes(t.bundle.group, ranks_per_node), int(t.bundle.sequences[0])))
    return _Lowering(order, geometry, backward, packs).run()


Parcel = tuple[Packet, Callable[[], Space]]


@dataclass(frozen=True)
class _Draft:
    """A round whose messages are not located yet: what says where their bytes lie knows it once all buffers have a place."""

    part: Round
    sends: list[Parcel]
    receives: list[Parcel]

    def located(self, part: Round) -> Round:
        return replace(
            part,
            sends=tuple((packet, lies()) for packet, lies in self.sends),
            receives=tuple((packet, lies()) for packet, lies in self.receives),
        )


class _Lowering:
    def __init__(self, tasks: Sequence[Task], geometry: Geometry, backward: bool, packs: bool) -> None:
        self.geometry, self.backward = geometry, backward
        self.packs = packs
        self.bundles = [t.bundle for t in tasks]
        self.outlines = [self._outline(task) for task in tasks]
        self.externals = BACKWARD_TENSORS if backward else FORWARD_TENSORS
        first = [len(self.externals)]
        for one in self.outlines:
            first.append(first[-1] + len(one.drafts))
        self.tables = Tables(self.bundles, self.outlines, geometry, self.externals, first)
        self.launches, self.regions = Launches(self.tables, backward, packs), Regions(self.tables, backward, packs)
        self.spaces = Spaces(self.tables)
        self.dense: set[str] = set()
        self.sends_delta = False

    def run(self) -> Lowered:
        count = max((len(o.turns) for o in self.outlines), default=0)
        incoming = [self._messages(step, sends=False) for step in range(count)]
        outgoing = [self._messages(step, sends=True) for step in range(count)]
        aliases = self.spaces.make_roots(incoming)
        drafts = [self._round(step, outgoing[step], incoming[step], aliases) for step in range(count)]
        local = [
            Local(index, call, self._costs(index, call))
            for index, one in enumerate(self.outlines)
            if one.is_local
            for turn in one.turns
            for call in turn.calls
        ]
        rounds, fillers = local_calls(
            local, [d.part for d in drafts], self.geometry.heads, self._calls, packs=self.packs
        )
        finals = [
            self.tables.empties(),
            self.tables.table((i, m) for i, o in enumerate(self.outlines) for m in o.finals),
        ]
        kept_bytes, arena_bytes = self.spaces.place()
        return Lowered(
            externals=self.externals,
            buffers=self.spaces.located(),
            rounds=tuple(d.located(part) for d, part in zip(drafts, rounds, strict=True)),
            fillers=tuple(fillers),
            finals=stack(finals),
            arena_bytes=arena_bytes,
            kept_bytes=kept_bytes,
            is_backward=self.backward,
            dense=frozenset(self.dense),
            sends_delta=self.sends_delta,
        )

    def _outline(self, task: Task) -> Outline:
        bundle = task.bundle
        try:
            return outline(bundle.pattern, bundle.member, task.names, self.backward, self.geometry)
        except ValueError as error:
            raise ValueError(
                f"sequence {bundle.sequences[0]}, shared by ranks {bundle.group}, schedule {task.names[self.backward]!r}:"
                f" {error}"
            ) from error

    def _calls(self, index: int, call: KernelCall | Region, **which: Any) -> tuple[list[Call], np.ndarray]:
        """Launches of one bundle, and what must be emptied before."""
        if isinstance(call, Region):
            return self.regions.call(index, call, **which)
        return self.launches.call(index, call, **which)

    def _costs(self, index: int, call: KernelCall | Region) -> np.ndarray:
        """Of each document of a bundle, query-key pairs times heads."""
        return self.regions.costs(index, call) if isinstance(call, Region) else self.launches.costs(index, call)

    # ------------------------------------------------------------ messages

    def _messages(self, step: int, *, sends: bool) -> list[Message]:
        """What goes to, or comes from, each rank: one message a lane and sort, in an order that both ends share."""
        found: dict[tuple[int, int, bool], list[tuple[int, Mail]]] = {}
        for index, one in enumerate(self.outlines):
            if step < len(one.turns):
                group = self.bundles[index].group
                for mail in one.turns[step].sends if sends else one.turns[step].receives:
                    found.setdefault((group[mail.peer], mail.lane, mail.is_sum), []).append((index, mail))
        return list(found.items())

    def _packet(self, key: tuple[int, int, bool], parts: Sequence[tuple[int, Mail]], late: bool = False) -> Packet:
        names = dict.fromkeys(piece.name for _, mail in parts for piece in mail.pieces)
        terms = 0
        for index, mail in parts:
            terms = zlib.crc32(mail.content, zlib.crc32(self._terms[index], terms))
        more = sum(len(self.bundles[index].sequences) for index, _ in parts) - 1
        what = "+".join(names) + (f" (and of {more} more)" if more else "")
        sequence = int(self.bundles[parts[0][0]].sequences[0])
        return Packet(peer=key[0], lane=key[1], sequence=sequence, what=what, terms=terms, late=late)

    @cached_property
    def _terms(self) -> list[bytes]:
        """What all sharers must say of each bundle alike."""
        return [
            repr((b.structure.layout, b.structure.mask, b.group, self.geometry)).encode()
            + b.sequences.tobytes()
            + b.lengths.tobytes()
            for b in self.bundles
        ]

    def _send(
        self, step: int, key: tuple[int, int, bool], parts: Sequence[tuple[int, Mail]], packs: list[np.ndarray]
    ) -> Parcel | None:
        """The message, and where its bytes will lie; ``packs`` collects what brings them together."""
        pieces = [(index, piece) for index, mail in parts for piece in mail.pieces]
        self.sends_delta = self.sends_delta or any(piece.name == "delta" for _, piece in pieces)
        shapes = [self._shape(index, piece) for index, piece in pieces]
        begins, size = laid_out(shapes)
        if not size:
            return None
        packet = self._packet(key, parts)
        lies = self._as_it_lies(pieces, begins, size) or self._dense_rows(pieces)
        if lies is None:
            lies = self._pack(step, pieces, packs)
        return packet, lies

    def _shape(self, index: int, piece: Piece) -> tuple[int, int, bool]:
        """Bytes, bytes of an element, whether it has vectors."""
        element = self.geometry.bytes_of(piece.width)
        count = piece.heads * (self.geometry.head_dim if piece.has_dim else 1)
        return self.bundles[index].count(piece.chunks) * count * element, element, piece.has_dim

    def _as_it_lies(
        self, pieces: Sequence[tuple[int, Piece]], begins: Sequence[int], size: int
    ) -> Callable[[], Space] | None:
        if any(piece.tensor < 0 for _, piece in pieces):
            return None
        numbers = [self.tables.number(index, piece.tensor) for index, piece in pieces]
        root, starts = self.spaces.root_of[numbers[0]], set()
        for number, begin in zip(numbers, begins, strict=True):
            starts.add(self.spaces.inside[number] - begin)
            if self.spaces.root_of[number] is not root:
                return None
        if len(starts) > 1:
            return None
        (start,) = starts
        return lambda: Space(-1, root.at + start, root.at + start + size, root.kept)

    def _dense_rows(self, pieces: Sequence[tuple[int, Piece]]) -> Callable[[], Space] | None:
        """Rows of one of the caller's tensors that lie together."""
        if len(pieces) != 1 or len(pieces[0][1].moves) != 1:
            return None
        (index, piece), (ref,) = pieces[0], pieces[0][1].moves[0].source
        tensor = self.tables.tensor(index, ref.tensor)
        if ref.tensor >= len(self.externals) or ref.heads is not None:
            return None
        if self.geometry.bytes_of(piece.width) != self.geometry.bytes_of(tensor.width):
            return None
        starts, stops = self.tables.rows(index, ref, ref.start), self.tables.rows(index, ref, ref.stop)
        if (starts[1:] != stops[:-1]).any():
            return None
        self.dense.add(self.externals[ref.tensor])
        space = Space(ref.tensor, int(starts[0]), int(stops[-1]))
        return lambda: space

    def _pack(self, step: int, pieces: Sequence[tuple[int, Piece]], packs: list[np.ndarray]) -> Callable[[], Space]:
        root = Root([], step, step + 1)
        self.spaces.roots["out", step, len(self.spaces.roots)] = root
        for index, piece in pieces:
            rows = self.bundles[index].count(piece.chunks)
            number = self.spaces.add(root, rows, piece.heads, piece.has_dim, piece.width)
            borders = self.bundles[index].borders(piece.chunks)
            target = Tensor(piece.chunks, piece.heads, piece.has_dim, piece.width, borders, False)
            packs.append(self.tables.table(((index, move) for move in piece.moves), made=(number, target)))
        self.spaces.lay_out(root)
        return lambda: Space(-1, root.at, root.at + root.bytes)

    # ------------------------------------------------------------ rounds

    def _round(
        self, step: int, outgoing: Sequence[Message], incoming: Sequence[Message], aliases: set[tuple[int, int]]
    ) -> _Draft:
        turns = [(i, o.turns[step]) for i, o in enumerate(self.outlines) if step < len(o.turns)]
        gathers = [self.tables.fills(i, turn.fills) for i, turn in turns]
        gathers.append(self.tables.table((i, move) for i, turn in turns for move in turn.gathers))
        sends = [self._send(step, key, parts, gathers) for key, parts in outgoing]
        receives: list[Parcel] = []
        merges: list[np.ndarray] = []
        late: list[np.ndarray] = []
        comes_late: set[int] = set()
        for key, parts in incoming:
            is_late = all(mail.late for _, mail in parts)
            peer, lane, is_sum = key
            root = self.spaces.roots.get(("in", step, peer, lane, int(is_sum)))
            if root is None:  # received where it is kept
                ((index, mail),) = parts
                root = self.spaces.roots["kept", index, mail.keeps]
            if root.bytes:
                receives.append((self._packet(key, parts, is_late), whole(root)))
            comes_late |= {id(mail) for _, mail in parts} if is_late else set()
            merges += [self._keep(i, mail) for i, mail in parts if mail.keeps >= 0 and (i, mail.keeps) not in aliases]
        for index, turn in turns:  # in each bundle's own order: what comes first is written, what comes later is added
            for mail in turn.receives:
                moves = self.tables.table((index, move) for move in mail.merges)
                (late if id(mail) in comes_late else merges).append(moves)
        calls = []
        for index, turn in turns:
            if not self.outlines[index].is_local:
                for call in turn.calls:
                    made, empty = self._calls(index, call)
                    gathers.append(empty)
                    calls += made
        part = Round(
            gathers=stack(gathers),
            sends=(),
            receives=(),
            calls=tuple(calls),
            merges=stack(merges),
            late=stack(late),
        )
        return _Draft(part, [s for s in sends if s is not None], receives)

    def _keep(self, index: int, mail: Mail) -> np.ndarray:
        block = self.outlines[index].kept[mail.keeps]
        pairs = zip(mail.pieces, block.tensors, strict=True)
        rows = sum(self.bundles[index].layout.tokens(c) for c in block.chunks)
        moves = [Move(Op.COPY, (Ref(p.tensor, 0, rows),), (Ref(kept, 0, rows),)) for p, kept in pairs]
        return self.tables.table((index, move) for move in moves)


def _spans_nodes(group: tuple[int, ...], ranks_per_node: int | None) -> bool:
    return ranks_per_node is not None and len({rank // ranks_per_node for rank in group}) > 1
