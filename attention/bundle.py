"""Documents that one program serves: those of one group, one structure and one schedule, packed one after the other.

A schedule's program names chunks, and which chunks see each other does not depend on how long they are (zigzag and contiguous
layouts, no window). So all such documents of a group run one program, in which a chunk is the rows of all of them: what is
sent, copied, computed and merged is counted once for a bundle and not for each document.

[Note: nominal rows] A program is laid out for one *nominal* document whose chunks have a few tokens each; rows of its tensors
are nominal rows. :meth:`Bundle.rows` turns a border between chunks into the row at which it lies in each document's own
part. Windows and stripes make a program depend on the length: there a bundle holds documents of one length, and nominal
rows are their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from hdp.attention.layout import Layout, make_layout, parse_layout
from hdp.attention.mask import Mask
from hdp.attention.schedules import get_schedule, lay_out
from hdp.attention.schedules.double_ring import DoubleRing

UNIT = 2
"""Tokens of a nominal chunk: two, so that a chunk on itself is a square with a diagonal, and not one full pair."""


@dataclass(frozen=True, slots=True)
class Structure:
    """What of a document decides its program, its group and the schedule apart."""

    layout: str
    size: int
    mask: Mask
    """Without the window where the document fits into it."""
    length: int | None
    """Tokens, where the program depends on them; None: any."""

    def nominal(self, schedule: str) -> Layout:
        """The layout of the nominal document, cut as the schedule sends it. See [Note: nominal rows]."""
        return _nominal(self, schedule)

    def tokens(self, schedule: str, lengths: np.ndarray) -> np.ndarray:
        """Tokens [documents, chunks] of documents of these lengths, in the chunks of :meth:`nominal`."""
        if self.length is not None:
            layout = self.nominal(schedule)
            row = [layout.tokens(c) for c in range(len(layout.chunks))]
            return np.tile(np.array(row, dtype=np.int64), (len(lengths), 1))
        members = np.arange(self.size)
        shares = lengths[:, None] // self.size + (members < lengths[:, None] % self.size)
        if self.layout == "zigzag":
            shares = np.concatenate([(shares + 1) // 2, shares[:, ::-1] // 2], axis=1)
        parts = _parts(self, schedule)
        if parts == 1:
            return shares
        cuts = shares[:, :, None] * np.arange(parts + 1) // parts
        return np.diff(cuts, axis=2).reshape(len(lengths), -1)


def structure_of(layout: str, length: int, size: int, mask: Mask) -> Structure:
    """The structure of one document."""
    if mask.window is not None and mask.window >= length:
        mask = Mask(causal=mask.causal)
    layout = "contiguous" if size == 1 else layout
    # A chunk without tokens need not travel, so a document of fewer tokens than chunks has a program of its own, too.
    plain = mask.window is None and parse_layout(layout)[0] != "striped" and (size == 1 or length >= 2 * size)
    return Structure(layout, size, mask, None if plain else length)


@lru_cache(maxsize=1024)
def _nominal(structure: Structure, schedule: str) -> Layout:
    if structure.length is not None:
        return lay_out(make_layout(structure.layout, structure.length, structure.size), structure.mask, schedule)
    tokens = UNIT * _parts(structure, schedule)
    chunks = structure.size * (2 if structure.layout == "zigzag" else 1)
    return lay_out(make_layout(structure.layout, tokens * chunks, structure.size), structure.mask, schedule)


def _parts(structure: Structure, name: str) -> int:
    """Pieces into which the schedule cuts each chunk."""
    schedule = get_schedule(name)
    if structure.size == 1 or not isinstance(schedule, DoubleRing):
        return 1
    return schedule.parts(make_layout(structure.layout, 2 * structure.size, structure.size))


class Bundle:
    """Some documents of one micro-batch, in the order of their packed rows, that run as one on each of their sharers.

    Args:
        structure: theirs. schedule: of this direction.
        group: the ranks that share each of them. member: this rank's place there.
        sequences: their numbers. lengths: their tokens. first_rows: of this rank's shards among its packed rows.
    """

    def __init__(
        self,
        structure: Structure,
        schedule: str,
        group: tuple[int, ...],
        member: int,
        sequences: Sequence[int],
        lengths: Sequence[int],
        first_rows: Sequence[int],
    ) -> None:
        self.structure, self.schedule, self.group, self.member = structure, schedule, group, member
        self.sequences = np.asarray(sequences, dtype=np.int64)
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.first_rows = np.asarray(first_rows, dtype=np.int64)
        self._ends: dict[tuple[int, ...], np.ndarray] = {}
        self._borders: dict[tuple[int, ...], dict[int, int]] = {}
        self._bases: dict[tuple[int, ...], np.ndarray] = {}
        self._counts: dict[tuple[int, ...], int] = {}

    @cached_property
    def layout(self) -> Layout:
        """How the nominal document is cut into chunks."""
        return self.structure.nominal(self.schedule)

    @cached_property
    def tokens(self) -> np.ndarray:
        """[documents, chunks]."""
        return self.structure.tokens(self.schedule, self.lengths)

    def ends(self, chunks: tuple[int, ...]) -> np.ndarray:
        """[documents, chunks + 1]: within one document, where the first chunk begins (0) and each of them ends."""
        if chunks not in self._ends:
            found = np.zeros((len(self.lengths), len(chunks) + 1), dtype=np.int64)
            np.cumsum(self.tokens[:, list(chunks)], axis=1, out=found[:, 1:])
            self._ends[chunks] = found
        return self._ends[chunks]

    def bases(self, chunks: tuple[int, ...]) -> np.ndarray:
        """[documents]: first row of each document in a tensor that holds these chunks of all, document after document."""
        if chunks not in self._bases:
            totals = self.ends(chunks)[:, -1]
            self._bases[chunks] = np.cumsum(totals) - totals
        return self._bases[chunks]

    def count(self, chunks: tuple[int, ...]) -> int:
        """Rows of such a tensor."""
        if chunks not in self._counts:
            self._counts[chunks] = int(self.ends(chunks)[:, -1].sum())
        return self._counts[chunks]

    def rows(self, chunks: tuple[int, ...], nominal: int, bases: np.ndarray | None = None) -> np.ndarray:
        """[documents]: the row that is ``nominal`` in the nominal document, in a tensor of these chunks.

        ``bases``: first row of each document; None: as :meth:`bases`. See [Note: nominal rows].
        """
        start = self.bases(chunks) if bases is None else bases
        if self.structure.length is not None:
            return start + nominal
        if chunks not in self._borders:
            border, at = {0: 0}, 0
            for i, chunk in enumerate(chunks):
                at += self.layout.tokens(chunk)
                border[at] = i + 1
            self._borders[chunks] = border
        return start + self.ends(chunks)[:, self._borders[chunks][nominal]]
