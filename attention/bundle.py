"""Documents that one program serves: those of one group, one structure and one schedule, packed one after the other.

A schedule's program names chunks, and which chunks see each other does not depend on how long they are (zigzag and contiguous
layouts), or is the same for many lengths (windows: ``hdp.attention.pieces``; stripes: ``hdp.attention.stripes``). So all such
documents of a group run one program, in which a chunk is the rows of all of them: what is sent, copied, computed and merged
is counted once for a bundle and not for each document.

[Note: nominal rows] A program is laid out for one *nominal* document whose chunks have a few tokens each; rows of its tensors
are nominal rows. :meth:`Bundle.rows` turns a border between chunks into the row at which it lies in each document's own
part. Chunks without tokens, and parts of chunks under a window, make a program depend on the length: there a bundle holds
documents of one length, and nominal rows are their own. Between borders, what a window or stripes allow is cut document by
document (``hdp.attention.regions``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from hdp.attention.layout import Layout, make_layout, parse_layout
from hdp.attention.mask import Mask
from hdp.attention.pieces import UNIT, Family, extents, family_of, kinds
from hdp.attention.schedules import cuts_chunks, get_schedule, lay_out, ways_of
from hdp.attention.schedules.double_ring import DoubleRing
from hdp.attention.schedules.sight import sight_of
from hdp.attention.stripes import StripeFamily, ranges_by_length, seen_by_length

Ways = tuple[tuple[int, bool], ...]


@dataclass(frozen=True, slots=True)
class Structure:
    """What documents of one group and schedule must have in common to run as one."""

    layout: str
    size: int
    mask: Mask
    """Without the window where the document fits into it."""
    length: int | None
    """Tokens, where the program depends on them; None: any."""


def structure_of(layout: str, length: int, size: int, mask: Mask) -> Structure:
    """The structure of one document."""
    if mask.window is not None and mask.window >= length:
        mask = Mask(causal=mask.causal)
    layout = "contiguous" if size == 1 else layout
    name, stripe = parse_layout(layout)
    if name == "striped" and length <= size * stripe:  # one round: each member has one range
        name = layout = "contiguous"
    # A chunk without tokens need not travel, so a document of fewer tokens than chunks has a program of its own, too.
    return Structure(layout, size, mask, None if size == 1 or length >= 2 * size else length)


@dataclass(frozen=True, slots=True)
class Pattern:
    """What of a bundle decides its program, its group apart."""

    layout: str
    size: int
    mask: Mask
    """Any window stands for all, unless there is a length."""
    schedule: str
    length: int | None
    """As the structure's."""
    family: Family | StripeFamily | None
    """The pieces into which a window cuts the chunks, or which stripes see each other; None: chunks stay whole."""
    both_ways: Ways = ()
    """For which (direction, is_key) pieces go the shorter way round (``Sight.ways``)."""

    @property
    def nominal(self) -> Layout:
        """The layout of the nominal document, cut as the schedule sends it. See [Note: nominal rows]."""
        return _nominal(self)


@lru_cache(maxsize=1024)
def _nominal(pattern: Pattern) -> Layout:
    if pattern.length is not None:
        return lay_out(make_layout(pattern.layout, pattern.length, pattern.size), pattern.mask, pattern.schedule)
    if pattern.family is not None:
        return pattern.family.pieces(pattern.both_ways)
    tokens = UNIT * _parts(pattern.layout, pattern.size, pattern.schedule)
    chunks = pattern.size * (2 if pattern.layout == "zigzag" else 1)
    return lay_out(make_layout(pattern.layout, tokens * chunks, pattern.size), Mask(), pattern.schedule)


@lru_cache(maxsize=256)
def _distances(
    family: Family | StripeFamily, causal: bool, way: tuple[int, bool, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Hops that each piece travels one way round, and by its shortest ways."""
    direction, is_key, width = way
    sight = sight_of(family.pieces(), Mask(causal=causal, window=1), width)
    far, near = sight.distances_of(sight.shortest_ways(direction, is_key), direction, is_key)
    return np.array(far), np.array(near)


def _parts(layout: str, size: int, name: str) -> int:
    """Pieces into which the schedule cuts each chunk."""
    schedule = get_schedule(name)
    if size == 1 or not isinstance(schedule, DoubleRing):
        return 1
    return schedule.parts(make_layout(layout, 2 * size, size))


def bundles_of(
    structure: Structure,
    schedule: str,
    group: tuple[int, ...],
    member: int,
    sequences: Sequence[int],
    lengths: Sequence[int],
    first_rows: Sequence[int],
) -> list[Bundle]:
    """Documents of one structure, as :class:`Bundle` takes them, in as few bundles as one program each serves."""
    bundle = Bundle(structure, schedule, group, member, sequences, lengths, first_rows)
    parts: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, kind in enumerate(map(tuple, bundle.kinds().tolist())):
        parts[kind].append(number)
    if len(parts) == 1:
        return [bundle]
    every = sequences, lengths, first_rows
    return [
        part
        for some in parts.values()
        for part in bundles_of(structure, schedule, group, member, *([values[n] for n in some] for values in every))
    ]


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
        self._counts: dict[tuple[int, ...], int] = {}
        self._borders: dict[tuple[int, ...], np.ndarray] = {}
        self._ranges: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}

    # ------------------------------------------------------------ what it runs

    @cached_property
    def pattern(self) -> Pattern:
        """What its outline is made of. Raises ValueError where one program does not serve all of its documents."""
        structure, mask, length = self.structure, self.structure.mask, self._length
        if length is None and mask.window is not None:
            mask = Mask(causal=mask.causal, window=1)
        ways: Ways = ()
        if self._family is not None and mask.window is not None:
            ways = tuple(way for way, (far, near) in self._far_and_near.items() if 2 * near.sum() <= far.sum())
        return Pattern(structure.layout, structure.size, mask, self.schedule, length, self._family, ways)

    @cached_property
    def _length(self) -> int | None:
        """That of all documents, where the program depends on it."""
        if self.structure.length is not None or self.structure.mask.window is None or not self._is_cut_by_length:
            return self.structure.length
        length = int(self.lengths[0])
        if (self.lengths != length).any():
            raise ValueError(
                f"schedule {self.schedule!r} under a window runs documents of one length, not {self.lengths}"
            )
        return length

    def kinds(self) -> np.ndarray:
        """[documents, n]: documents for which not all numbers are equal cannot run as one."""
        if self.structure.mask.window is not None and self._is_cut_by_length:
            return self.lengths[:, None]
        if self._stripe and (self._seen != self._seen[0]).any():
            return self._seen.reshape(len(self.lengths), -1)
        if isinstance(self._family, Family):
            by_pieces = kinds(self._extents, self._family.wholes)
            if (by_pieces != by_pieces[0]).any():
                return by_pieces
        has_ways = self._family is not None and self.structure.mask.window is not None
        ways = [2 * near <= far for far, near in self._far_and_near.values()] if has_ways else []
        return np.stack(ways, axis=1) if ways else np.zeros((len(self.lengths), 0), dtype=bool)

    @cached_property
    def _is_cut_by_length(self) -> bool:
        """Whether the schedule cuts chunks by their tokens, besides where windows end."""
        return self.structure.size > 1 and not self._stripe and isinstance(get_schedule(self.schedule), DoubleRing)

    @cached_property
    def _stripe(self) -> int:
        """Tokens of a stripe; 0: there are none."""
        name, stripe = parse_layout(self.structure.layout)
        return stripe if name == "striped" and self.structure.length is None else 0

    @cached_property
    def _seen(self) -> np.ndarray:
        """[documents, queries, keys]: which member's stripes see whose."""
        size = self.structure.size
        if not cuts_chunks(self.schedule):  # all tokens travel anyway
            return np.ones((len(self.lengths), size, size), dtype=bool)
        return seen_by_length(self.lengths, size, self._stripe, self.structure.mask)

    @cached_property
    def _family(self) -> Family | StripeFamily | None:
        structure, window = self.structure, self.structure.mask.window
        if self._stripe:
            bits = self._seen[0].astype(object) @ (1 << np.arange(structure.size, dtype=object))
            return StripeFamily(structure.size, tuple(int(b) for b in bits))
        if window is None or structure.length is not None or structure.size == 1 or self._is_cut_by_length:
            return None
        if not cuts_chunks(self.schedule):
            return None
        keys_stay = any(not is_key for _, is_key, _ in ways_of(self.schedule))
        return family_of(structure.layout, structure.size, self._extents, keys_together=keys_stay)

    @cached_property
    def _extents(self) -> np.ndarray:
        assert self.structure.mask.window is not None
        return extents(self._shares, self.structure.mask.window)

    @cached_property
    def _far_and_near(self) -> dict[tuple[int, bool], tuple[np.ndarray, np.ndarray]]:
        """By (direction, is_key), tokens times hops of each document: one way round, and by the shortest ways."""
        assert self._family is not None
        found = {}
        for way in ways_of(self.schedule):
            if self.structure.size % way[2]:
                continue  # its program says so
            far, near = _distances(self._family, self.structure.mask.causal, way)
            found[way[:2]] = self.tokens @ far, self.tokens @ near
        return found

    # ------------------------------------------------------------ rows

    @cached_property
    def layout(self) -> Layout:
        """How the nominal document is cut into chunks."""
        return self.pattern.nominal

    @cached_property
    def _shares(self) -> np.ndarray:
        """Tokens [documents, chunks] of whole chunks, zigzag or contiguous."""
        size, lengths = self.structure.size, self.lengths[:, None]
        shares = lengths // size + (np.arange(size) < lengths % size)
        if self.structure.layout == "zigzag":
            return np.concatenate([(shares + 1) // 2, shares[:, ::-1] // 2], axis=1)
        return shares

    @cached_property
    def tokens(self) -> np.ndarray:
        """[documents, chunks] of :attr:`layout`."""
        if isinstance(self._family, Family):
            window = self.structure.mask.window
            assert window is not None
            return self._family.cut(self._shares, window)
        if self._length is not None:
            row = [self.layout.tokens(c) for c in range(len(self.layout.chunks))]
            return np.tile(np.array(row, dtype=np.int64), (len(self.lengths), 1))
        parts = 1 if self._stripe else _parts(self.structure.layout, self.structure.size, self.schedule)
        if parts == 1:
            return self._shares
        cuts = self._shares[:, :, None] * np.arange(parts + 1) // parts
        return np.diff(cuts, axis=2).reshape(len(self.lengths), -1)

    @cached_property
    def _starts(self) -> np.ndarray:
        """The first token of each chunk, where chunks are in the order of their tokens."""
        return np.cumsum(self.tokens, axis=1) - self.tokens

    def ranges(self, chunks: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Token ranges [n, 2] of these chunks, document after document, and [documents + 1] where each document's begin."""
        if chunks not in self._ranges:
            count = len(self.lengths)
            if self._length is not None:
                one = np.array([r for c in chunks for r in self.layout.chunks[c]], dtype=np.int64).reshape(-1, 2)
                found = np.tile(one, (count, 1))
            elif self._stripe:
                (member,) = chunks  # stripes of several members lie between each other
                self._ranges[chunks] = ranges_by_length(self.lengths, self.structure.size, self._stripe, member)
                return self._ranges[chunks]
            else:
                starts = self._starts[:, list(chunks)]
                found = np.stack([starts, starts + self.tokens[:, list(chunks)]], axis=2).reshape(-1, 2)
            self._ranges[chunks] = np.arange(count + 1) * (len(found) // max(count, 1)), found
        return self._ranges[chunks]

    def ends(self, chunks: tuple[int, ...]) -> np.ndarray:
        """[chunks + 1, documents]: within one document, where the first chunk begins (0) and each of them ends."""
        if chunks not in self._ends:
            found = np.zeros((len(chunks) + 1, len(self.lengths)), dtype=np.int64)
            np.cumsum(self.tokens[:, list(chunks)].T, axis=0, out=found[1:])
            self._ends[chunks] = found
        return self._ends[chunks]

    def count(self, chunks: tuple[int, ...]) -> int:
        """Rows of a tensor that holds these chunks of all documents."""
        if chunks not in self._counts:
            self._counts[chunks] = int(self.ends(chunks)[-1].sum())
        return self._counts[chunks]

    def borders(self, chunks: tuple[int, ...], bases: np.ndarray | None = None) -> np.ndarray:
        """[nominal borders, documents]: rows of such a tensor, document after document, for :meth:`at`.

        ``bases``: first row of each document; None: one lies behind the other.
        """
        if bases is None:
            if chunks not in self._borders:
                totals = self.ends(chunks)[-1]
                self._borders[chunks] = self.borders(chunks, np.cumsum(totals) - totals)
            return self._borders[chunks]
        return bases[None] if self._length is not None else bases + self.ends(chunks)

    def at(self, borders: np.ndarray, nominal: int) -> np.ndarray:
        """[documents]: the row that is ``nominal`` in the nominal document. See [Note: nominal rows]."""
        return borders[0] + nominal if self._length is not None else borders[nominal // UNIT]

    def rows(self, chunks: tuple[int, ...], nominal: int, bases: np.ndarray | None = None) -> np.ndarray:
        """:meth:`at` in a tensor of these chunks."""
        return self.at(self.borders(chunks, bases), nominal)
