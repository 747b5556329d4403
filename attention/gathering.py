"""Brings together what a step's tiles read, and keeps what backward reads again.

[Note: gathering] A kernel call reads queries that lie together and keys that lie together. Chunks of a tile that came from
several ranks are brought into one tensor first, in the order of their tokens: one copy for each of them, and a tile is one
call a document (Ulysses), or one for each of its chunks (all-gather). What forward keeps for backward is that tensor. A block
that came in one message is used where it lies. So are a member's own tokens among themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from hdp.attention.layout import Layout
from hdp.attention.lowered import COMPONENTS, READY, Geometry, Op
from hdp.attention.outlined import Block, Move, join
from hdp.attention.places import Place, Places, Ref
from hdp.attention.program import Heads, Kind, RankProgram, Tile

INPUTS = {False: ((Kind.Q,), (Kind.KV,)), True: ((Kind.Q, Kind.DO), (Kind.KV,))}
"""By direction what a tile reads of its queries, and of its keys."""


@dataclass(frozen=True, slots=True)
class Group:
    """Chunks that were gathered: some heads of them in one tensor."""

    kind: Kind
    heads: Heads
    places: dict[int, Place]


class Gathering:
    """What lies together at one member, in one direction; ``moves`` collects what brings it there."""

    def __init__(
        self, program: RankProgram, layout: Layout, member: int, geometry: Geometry, places: Places, backward: bool
    ) -> None:
        self.program, self.layout, self.member, self.geometry = program, layout, member, geometry
        self.places, self.backward = places, backward
        self.owned = layout.owned(member)
        self.is_plain = all(len(ranges) == 1 for ranges in layout.chunks)
        self.moves: list[Move] = []
        self.blocks: list[Block] = []
        self.kept_chunks: dict[int, set[int]] = {}
        """By block, those that are in it, or will be received there."""
        self.groups: list[Group] = []
        self.waiting: list[tuple[Kind, int, Place]] = []
        """Inputs that arrived and are to be kept, but were not received where they are kept."""

    def place_kept(self) -> None:
        """What is kept, in blocks; backward finds all of them."""
        together: dict[tuple[Kind, Heads, int], list[tuple[int, ...]]] = {}
        for value in self.program.keep:
            together.setdefault((value.kind, value.heads, value.block), []).append(value.chunks)
        for number, ((kind, heads, _), parts) in enumerate(together.items()):
            chunks = parts[0] if len(parts) == 1 else self.places.in_order(c for part in parts for c in part)
            tensors = self.places.room(kind, chunks, heads, ("kept", number))
            self.blocks.append(Block(kind, heads, chunks, tensors))
            self.kept_chunks[number] = set()
            if self.backward:
                self._form_group(kind, heads, dict(self._kept_places(number)))

    def _kept_places(self, number: int) -> list[tuple[int, Place]]:
        block = self.blocks[number]
        count = block.heads[1] - block.heads[0]
        places = self.places.spread(block.tensors, block.chunks, block.heads, block.heads[0], count)
        return list(zip(block.chunks, places, strict=True))

    def gather(self, tiles: Sequence[Tile]) -> None:
        """Brings together what the step's tiles read. See [Note: gathering]."""
        wanted: dict[tuple[Kind, Heads], set[int]] = {}
        for tile in tiles:
            key_heads = self.geometry.heads.keys_for(tile.heads)
            sides = zip(INPUTS[self.backward], (tile.queries, tile.keys), (tile.heads, key_heads), strict=True)
            for kinds, chunks, heads in sides:
                for kind in kinds:
                    for some in self._as_they_came(kind, chunks, heads):
                        wanted.setdefault((kind, some), set()).update(chunks)
        for (kind, heads), unordered in wanted.items():
            chunks = self.places.in_order(unordered)
            lying = self.lying(kind, chunks, heads)
            if lying is None or (self.is_plain and len({place.tensors[0] for place in lying}) > 1):
                self._bring(kind, heads, chunks)

    def _as_they_came(self, kind: Kind, chunks: Iterable[int], heads: Heads) -> list[Heads]:
        """The heads, cut where they lie in several places."""
        cuts = set(heads)
        for chunk in chunks:
            for place in self.places.pieces(kind, chunk, heads):
                cuts |= set(place.heads)
        return list(itertools.pairwise(sorted(cuts)))

    def lying(self, kind: Kind, chunks: Sequence[int], heads: Heads) -> list[Place] | None:
        """Where kernels read some chunks: all in one group, or each by itself; None: not all are ready."""
        is_home = set(self.owned).issuperset(chunks)  # this member's own lie together from the start
        for group in () if is_home else reversed(self.groups):
            if group.kind is kind and group.heads[0] <= heads[0] and heads[1] <= group.heads[1]:
                found = [group.places.get(chunk) for chunk in chunks]
                if None not in found:
                    return [place.narrow(heads) for place in found if place is not None]
        places = []
        for chunk in chunks:
            pieces = self.places.pieces(kind, chunk, heads, ready=True)
            if len(pieces) != 1 or pieces[0].heads != heads:
                return None
            places.append(pieces[0])
        return places

    def _bring(self, kind: Kind, heads: Heads, chunks: tuple[int, ...]) -> None:
        alone = [self._came_in(kind, chunk, heads) for chunk in chunks]
        if kind is Kind.DO and (len(set(alone)) == 1 or not self.is_plain):
            for tensor in sorted(set(alone) - {-1}):
                self._rebuild(heads, tensor)
            if self.lying(kind, chunks, heads) is not None:
                return
        for some in [chunks] if self.is_plain else [(chunk,) for chunk in chunks]:
            if self.is_plain or self.lying(kind, some, heads) is None:
                self._copy_together(kind, heads, some)

    def _came_in(self, kind: Kind, chunk: int, heads: Heads) -> int:
        """The tensor in which a chunk that is not ready lies, with all heads wanted; -1: another case."""
        pieces = self.places.pieces(kind, chunk, heads)
        if self.lying(kind, (chunk,), heads) is not None or len(pieces) != 1 or pieces[0].heads != heads:
            return -1
        return pieces[0].tensors[0]

    def _rebuild(self, heads: Heads, tensor: int) -> None:
        """Of queries that came in one message: an ``out`` for them; the rest is used where it lies."""
        draft = self.places.draft(tensor)
        assert draft is not None
        held = [(c, p) for c in draft.chunks for p in self.places.pieces(Kind.DO, c, heads) if p.tensors[0] == tensor]
        out = self.places.buffer(draft.chunks, draft.heads, True, "kernel", self.places.new_root())
        place = held[0][1]
        rows = sum(map(self.layout.tokens, draft.chunks))
        do, delta = (self.places.ref(place, c, 0, rows, (place.base, place.base + place.count)) for c in (0, 2))
        self.moves.append(Move(Op.REBUILD, (do, delta), (Ref(out, 0, rows),)))
        for chunk, some in held:
            self.places.make_ready(Kind.DO, chunk, replace(some, tensors=(tensor, some.tensors[1], out)))

    def _copy_together(self, kind: Kind, heads: Heads, chunks: tuple[int, ...]) -> None:
        number, block = self.block_of(kind, heads, chunks)
        count = heads[1] - heads[0]
        if block is None:
            tensors = self.places.room(kind, chunks, heads, self.places.new_root(), components=READY[kind])
            targets = dict(zip(chunks, self.places.spread(tensors, chunks, heads, heads[0], count), strict=True))
        else:
            targets = {c: place for c, place in self._kept_places(number) if c in set(chunks)}
            self.kept_chunks[number] |= set(chunks)
        moves: list[Move] = []
        for chunk in chunks:
            moves += self._copies(kind, chunk, heads, targets[chunk])
        self.moves += join(moves)
        self._form_group(kind, heads, targets)

    def _form_group(self, kind: Kind, heads: Heads, places: dict[int, Place]) -> None:
        """What is gathered, or kept, is what kernels read, and what goes on where it has the dtype in which it travels."""
        self.groups.append(Group(kind, heads, places))
        for chunk, place in places.items():
            if kind is Kind.DO or self.layout.owners[chunk] == self.member:
                continue
            if not self.geometry.casts_inputs or not self.places.pieces(kind, chunk, heads):
                self.places.replace(kind, chunk, place)

    def block_of(self, kind: Kind, heads: Heads, chunks: Iterable[int]) -> tuple[int, Block | None]:
        """The kept block that holds these chunks; backward has found all that is kept."""
        for number, block in enumerate(self.blocks if not self.backward else ()):
            if (block.kind, block.heads) == (kind, heads) and set(chunks) <= set(block.chunks):
                return number, block
        return -1, None

    def _copies(self, kind: Kind, chunk: int, heads: Heads, target: Place) -> list[Move]:
        moves = []
        is_own = self.layout.owners[chunk] == self.member
        for piece in self.places.whole(kind, chunk, heads):
            some = target.narrow(piece.heads)
            for number, component in enumerate(READY[kind]):
                to = self.places.rows_of(some, number)
                if component.name == "out" and is_own:
                    out = replace(piece, tensors=(*piece.tensors[:2], self.places.external("out")))
                    moves.append(Move(Op.COPY, (self.places.rows_of(out, number),), (to,)))
                elif component.name == "out":
                    source = self.places.rows_of(piece, 0), self.places.rows_of(piece, 2)
                    moves.append(Move(Op.REBUILD, source, (to,)))
                else:
                    moves.append(Move(Op.COPY, (self.places.rows_of(piece, number),), (to,)))
        return moves

    def keep_waiting(self) -> None:
        """Copies what came for a kept block and was not gathered there."""
        moves: list[Move] = []
        for kind, chunk, place in self.waiting:
            number, block = self.block_of(kind, place.heads, (chunk,))
            if block is None:
                for number, block in enumerate(self.blocks):
                    if block.kind is kind and chunk in block.chunks:
                        moves += self._keep_part(number, chunk, place)
            elif chunk not in self.kept_chunks[number]:
                moves += self._keep_part(number, chunk, place)
        self.waiting = []
        self.moves += join(moves)

    def keep_own(self) -> None:
        """Copies this member's own chunks that are kept and were not gathered."""
        for number, block in enumerate(self.blocks if not self.backward else ()):
            for chunk in block.chunks:
                if self.layout.owners[chunk] == self.member and chunk not in self.kept_chunks[number]:
                    for place in self.places.pieces(block.kind, chunk, block.heads):
                        self.moves += self._keep_part(number, chunk, place)

    def _keep_part(self, number: int, chunk: int, source: Place) -> list[Move]:
        block, target = self.blocks[number], dict(self._kept_places(number))[chunk]
        heads = max(block.heads[0], source.heads[0]), min(block.heads[1], source.heads[1])
        if heads[0] >= heads[1]:
            return []
        self.kept_chunks[number].add(chunk)
        return [
            Move(
                Op.COPY,
                (self.places.rows_of(source.narrow(heads), c),),
                (self.places.rows_of(target.narrow(heads), c),),
            )
            for c in range(len(COMPONENTS[block.kind]))
        ]
