"""Where buffers lie: which of them one after the other, and at which bytes of the arena or of what is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hdp.attention.arena import ALIGNMENT, pack_arena
from hdp.attention.lowered import Buffer, Space, Width
from hdp.attention.outlined import Mail
from hdp.attention.tables import Tables


@dataclass
class Root:
    """Buffers that lie one after the other."""

    parts: list[int]
    """Their numbers."""
    born: int
    died: int
    kept: bool = False
    at: int = -1
    """Where it lies, in bytes of its space."""
    bytes: int = 0


Message = tuple[tuple[int, int, bool], list[tuple[int, Mail]]]
"""(rank, lane, whether it holds sums), and what it holds of each bundle."""


class Spaces:
    """All buffers of a micro-batch's program."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.buffers: list[Buffer] = []
        self.inside: dict[int, int] = {}
        """Bytes at which a buffer begins in its root, by its number."""
        self.root_of: dict[int, Root] = {}
        self.roots: dict[tuple[object, ...], Root] = {}
        for bundle, outline in zip(tables.bundles, tables.outlines, strict=True):
            for draft in outline.drafts:
                rows = bundle.count(draft.chunks)
                self.buffers.append(Buffer(0, rows, draft.heads, draft.has_dim, draft.width, draft.root[0] == "kept"))

    def add(self, root: Root, rows: int, heads: int, has_dim: bool, width: Width) -> int:
        """One more buffer; its number."""
        number = len(self.tables.externals) + len(self.buffers)
        self.buffers.append(Buffer(0, rows, heads, has_dim, width, False))
        root.parts.append(number)
        self.root_of[number] = root
        return number

    def located(self) -> tuple[Buffer, ...]:
        """The buffers with their places, once :meth:`place` has decided them."""
        found = []
        for number, buffer in enumerate(self.buffers, start=len(self.tables.externals)):
            root = self.root_of[number]
            at = root.at + self.inside[number]
            found.append(Buffer(at, buffer.rows, buffer.heads, buffer.has_dim, buffer.width, root.kept))
        return tuple(found)

    def _bytes(self, buffer: Buffer) -> int:
        element = self.tables.geometry.bytes_of(buffer.width)
        return buffer.rows * buffer.heads * (self.tables.geometry.head_dim if buffer.has_dim else 1) * element

    def make_roots(self, incoming: Sequence[Sequence[Message]]) -> set[tuple[int, int]]:
        """Which buffers lie together; the (bundle, kept block) pairs that are received where they are kept."""
        for index, one in enumerate(self.tables.outlines):
            group = self.tables.bundles[index].group
            for number, draft in enumerate(one.drafts, start=self.tables.first[index]):
                sort, *rest = draft.root
                if sort == "in":
                    key: tuple[object, ...] = ("in", rest[0], group[int(rest[1])], *rest[2:])
                elif sort == "sum":
                    key = ("sum", rest[0], group[int(rest[1])])
                else:
                    key = (sort, index, *rest)
                root = self.roots.setdefault(key, Root([], draft.born, draft.died, kept=sort == "kept"))
                root.parts.append(number)
                root.born, root.died = min(root.born, draft.born), max(root.died, draft.died)
                self.root_of[number] = root
            for move in one.finals:  # what becomes an output at the end of all programs lives so long
                for ref in move.source:
                    if ref.tensor >= len(self.tables.externals):
                        self.root_of[self.tables.number(index, ref.tensor)].died = len(incoming)
        for root in self.roots.values():
            self.lay_out(root)
        aliases = set()
        for step, messages in enumerate(incoming):
            for key, parts in messages:
                if len(parts) == 1 and parts[0][1].keeps >= 0:
                    aliases.add(self._receive_where_kept(step, key, *parts[0]))
        return aliases

    def _receive_where_kept(self, step: int, key: tuple[int, int, bool], index: int, mail: Mail) -> tuple[int, int]:
        kept = self.roots["kept", index, mail.keeps]
        peer, lane, is_sum = key
        root = self.roots.pop(("in", step, peer, lane, int(is_sum)))
        for number in root.parts:
            self.root_of[number] = kept
        assert kept.bytes == root.bytes
        return index, mail.keeps

    def lay_out(self, root: Root) -> None:
        """Parts one after the other: rows of vectors first, so that rows of numbers begin at multiples of their size."""
        parts = sorted(root.parts, key=lambda n: not self._buffer(n).has_dim)
        for number in parts:
            buffer = self._buffer(number)
            self.inside[number] = root.bytes = up(root.bytes, self.tables.geometry.bytes_of(buffer.width))
            root.bytes += self._bytes(buffer)

    def _buffer(self, number: int) -> Buffer:
        return self.buffers[number - len(self.tables.externals)]

    def place(self) -> tuple[int, int]:
        """Decides where roots lie; bytes of what is kept, and of the arena."""
        kept = 0
        for root in self.roots.values():
            if root.kept:
                root.at = kept
                kept = up(kept + root.bytes, ALIGNMENT)
        others = [root for root in self.roots.values() if not root.kept]
        offsets, arena = pack_arena([(root.born, root.died, root.bytes) for root in others])
        for root, offset in zip(others, offsets, strict=True):
            root.at = offset
        return kept, arena


def laid_out(shapes: Sequence[tuple[int, int, bool]]) -> tuple[list[int], int]:
    """Where pieces begin in a message, and its bytes: as :meth:`Spaces.lay_out` lays them out at its other end."""
    begins, position = [0] * len(shapes), 0
    for number in sorted(range(len(shapes)), key=lambda n: not shapes[n][2]):
        size, element, _ = shapes[number]
        begins[number] = position = up(position, element)
        position += size
    return begins, position


def whole(root: Root) -> Callable[[], Space]:
    return lambda: Space(-1, root.at, root.at + root.bytes, root.kept)


def up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
