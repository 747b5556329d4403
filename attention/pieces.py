"""Chunks cut where a window ends, named by what they see: one layout for documents of unlike lengths.

Under a window a chunk of the whole layout is cut where a following chunk begins to see its keys, and where its queries no
longer see an earlier one (``hdp.attention.refine``). Which *piece* a token is in is said by two numbers, whatever the length::

    ahead    how many of the following chunks see it as a key (both ways: and are seen by it)
    behind   how many of the chunks before are seen by it as a query

From the first token of a chunk to its last, ``ahead`` grows and ``behind`` shrinks. So all documents share one layout that has
every piece that some of them have, in an order that suits all; a document has no tokens in the others. Schedules
need no more than these numbers to know who looks at a piece; windows differ in where pieces begin.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from hdp.attention.layout import Layout

UNIT = 2
"""Tokens of a nominal piece."""


@dataclass(frozen=True, kw_only=True)
class Pieces(Layout):
    """A nominal document of pieces. ``chunks`` of a layout are the pieces here."""

    wholes: tuple[int, ...]
    """Per piece the chunk of the whole layout that it is cut from."""
    ahead: tuple[int, ...]
    behind: tuple[int, ...]
    both_ways: tuple[tuple[int, bool], ...] = ()
    """For which (direction, is_key) pieces go the shorter way round (``Sight.ways``)."""


@dataclass(frozen=True, slots=True)
class Family:
    """Which pieces a layout has."""

    layout: str
    """``"zigzag"`` or ``"contiguous"``."""
    size: int
    low: int
    """The least of ``ahead`` and ``behind`` where the end of the sequence does not cut them short."""
    reach: int
    """The most of them."""
    spread: int
    """The most by which they differ in one piece that is not near an end of the sequence."""
    keys_together: bool
    """Whether the pieces of a chunk with most ``ahead`` lie together (where keys stay), or those with most ``behind``."""

    @property
    def wholes(self) -> int:
        """Chunks of the whole layout."""
        return self.size * (2 if self.layout == "zigzag" else 1)

    def pieces(self, both_ways: tuple[tuple[int, bool], ...] = ()) -> Pieces:
        """The nominal document."""
        return _pieces(self, both_ways)

    def cut(self, shares: np.ndarray, window: int) -> np.ndarray:
        """Tokens [documents, pieces] of documents whose whole chunks have ``shares`` [documents, chunks] tokens, none 0."""
        ends = np.zeros((len(shares), self.wholes + 1), dtype=np.int64)
        np.cumsum(shares, axis=1, out=ends[:, 1:])
        wholes, ahead, behind = _numbers(self)
        last, far = self.wholes - 1 - wholes, window - 1
        # Following chunks begin to see a token `far` before they begin; chunks before are seen up to `far` after they end.
        start, stop = ends[:, wholes], ends[:, wholes + 1]
        start = np.maximum(start, np.where(ahead > 0, ends[:, wholes + ahead] - far, 0))
        start = np.maximum(start, np.where(behind < wholes, ends[:, wholes - behind] + far, 0))
        beyond = ends[:, np.minimum(wholes + ahead + 1, self.wholes)] - far
        stop = np.minimum(stop, np.where(ahead < last, beyond, stop))
        before = ends[:, np.maximum(wholes - behind + 1, 0)] + far
        stop = np.minimum(stop, np.where(behind > 0, before, stop))
        return np.maximum(stop - start, 0)


def extents(shares: np.ndarray, window: int) -> np.ndarray:
    """[documents, 3]: the least and the most of ``ahead`` and ``behind``, and the most by which they differ in one piece.

    A number that the sequence's end cuts short could be any larger one, so it counts for the most only. ``shares``
    [documents, chunks]: tokens of the whole chunks, none 0.
    """
    count = shares.shape[1]
    ends = np.zeros((len(shares), count + 1), dtype=np.int64)
    np.cumsum(shares, axis=1, out=ends[:, 1:])
    wholes, borders = np.arange(count), ends[:, None, 1:-1]
    low, reach, spread = (np.full(len(shares), n, dtype=np.int64) for n in (count - 1, 0, 0))
    for tokens in (ends[:, :-1], ends[:, 1:] - 1):  # the first and the last of each chunk: the ends of its pieces
        ahead = (borders <= tokens[:, :, None] + window - 1).sum(2) - wholes
        behind = wholes - (borders <= tokens[:, :, None] - window + 1).sum(2)
        reach = np.maximum(reach, np.maximum(ahead, behind).max(1))
        for one, other, most in ((ahead, behind, count - 1 - wholes), (behind, ahead, wholes)):
            low = np.minimum(low, np.where(one < most, one, count - 1).min(1))
            spread = np.maximum(spread, np.where(one < most, other - one, 0).max(1))
    return np.stack([np.minimum(low, reach), reach, spread], axis=1)


def family_of(layout: str, size: int, found: np.ndarray, *, keys_together: bool) -> Family:
    """A family that has all pieces of documents with these :func:`extents`.

    Where pieces stay few it has more, so that families are few and their programs are soon known: a piece that no document
    has costs next to nothing.
    """
    low, reach, spread = int(found[:, 0].min()), int(found[:, 1].max()), int(found[:, 2].max())
    count = size * (2 if layout == "zigzag" else 1)
    rounded = min(1 << (reach - 1).bit_length() if reach else 0, count - 1)
    if _most_pieces(count, 0, rounded, spread) <= MANY:
        low, reach = 0, rounded
    return Family(layout, size, low, reach, spread, keys_together)


def kinds(found: np.ndarray, count: int) -> np.ndarray:
    """[documents, n] of :func:`extents`: documents for which these differ have families of their own, so that none is large."""
    if _most_pieces(count, int(found[:, 0].min()), int(found[:, 1].max()), int(found[:, 2].max())) <= MANY:
        return found[:, :0]
    octaves = np.frexp(found[:, 1])[1][:, None]
    return octaves if (octaves != octaves[0]).any() else found[:, 1:2]


MANY = 1024
"""Pieces of a family, about, above which documents are rather parted: making a program takes time in proportion."""


def _most_pieces(count: int, low: int, reach: int, spread: int) -> int:
    return count * (reach - low + 1) * (spread + 1)


@lru_cache(maxsize=256)
def _numbers(family: Family) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    pieces = family.pieces()
    return np.array(pieces.wholes), np.array(pieces.ahead), np.array(pieces.behind)


@lru_cache(maxsize=256)
def _pieces(family: Family, both_ways: tuple[tuple[int, bool], ...]) -> Pieces:
    size, count = family.size, family.wholes
    found: list[tuple[int, int, int]] = []
    for whole in range(count):
        of_whole = {
            (min(ahead, count - 1 - whole), min(behind, whole))
            for ahead in range(family.low, family.reach + 1)
            for behind in range(max(ahead - family.spread, family.low), min(ahead + family.spread, family.reach) + 1)
        }
        order = sorted(of_whole, key=lambda p: (p[0], -p[1]) if family.keys_together else (-p[1], p[0]))
        found += [(whole, *piece) for piece in order]
    wholes, ahead, behind = zip(*found, strict=True)
    return Pieces(
        name=family.layout,
        length=UNIT * len(found),
        size=size,
        chunks=tuple(((UNIT * n, UNIT * (n + 1)),) for n in range(len(found))),
        owners=tuple(whole if whole < size else 2 * size - 1 - whole for whole in wholes),
        wholes=wholes,
        ahead=ahead,
        behind=behind,
        both_ways=both_ways,
    )
