"""Striped documents of unlike lengths in one layout: which member's stripes see whose is all that a schedule asks.

A chunk is a member's whole shard, many ranges of it, and stays whole. Whether some of its tokens see some of another's
follows from the distance of the nearest two stripes: of one round, of one round and the next, and of what is left behind the
last whole round, where stripes are shorter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from hdp.attention.layout import Layout
from hdp.attention.mask import Mask

NEVER = 1 << 60


@dataclass(frozen=True, kw_only=True)
class Stripes(Layout):
    """A nominal document of two rounds of stripes of one token: a chunk has ``UNIT`` tokens as everywhere."""

    seen: tuple[int, ...]
    """Per chunk, as a query, a bit for each chunk that it sees."""
    both_ways: tuple[tuple[int, bool], ...] = ()
    """As :attr:`hdp.attention.pieces.Pieces.both_ways`."""


@dataclass(frozen=True, slots=True)
class StripeFamily:
    """All striped documents whose chunks see each other alike."""

    size: int
    seen: tuple[int, ...]

    def pieces(self, both_ways: tuple[tuple[int, bool], ...] = ()) -> Stripes:
        """The nominal document."""
        return _stripes(self, both_ways)


@lru_cache(maxsize=256)
def _stripes(family: StripeFamily, both_ways: tuple[tuple[int, bool], ...]) -> Stripes:
    size = family.size
    return Stripes(
        name="striped",
        length=2 * size,
        size=size,
        chunks=tuple(((m, m + 1), (size + m, size + m + 1)) for m in range(size)),
        owners=tuple(range(size)),
        seen=family.seen,
        both_ways=both_ways,
    )


def seen_by_length(lengths: np.ndarray, size: int, stripe: int, mask: Mask) -> np.ndarray:
    """[documents, queries, keys]: whether a member's tokens see some of another's. Lengths are at least one round."""
    rounds, shares, before = _rest(lengths, size, stripe)
    q, k = np.arange(size)[:, None], np.arange(size)[None, :]
    shares_q, before_q, before_k = shares[:, :, None], before[:, :, None], before[:, None, :]
    same = np.where(q > k, (q - k - 1) * stripe + 1, np.where(q == k, 0, NEVER))
    following = np.where((q < k) & (rounds[:, None, None] >= 2), (size - (k - q) - 1) * stripe + 1, NEVER)
    behind = np.where(shares_q > 0, (size - 1 - k) * stripe + before_q + 1, NEVER)
    both = (q > k) & (shares_q > 0) & (shares[:, None, :] > 0)
    left = np.where(both, before_q - before_k - shares[:, None, :] + 1, NEVER)
    nearest = np.minimum(np.minimum(same, following), np.minimum(behind, left))
    if not mask.causal:
        nearest = np.minimum(nearest, nearest.transpose(0, 2, 1))
    return nearest < (NEVER if mask.window is None else mask.window)


def ranges_by_length(lengths: np.ndarray, size: int, stripe: int, member: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ranges [n, 2] of one member's shard, document after document, and [documents + 1] where each one's begin."""
    rounds, shares, before = _rest(lengths, size, stripe)
    bounds = np.concatenate([[0], np.cumsum(rounds + 1)])
    document = np.repeat(np.arange(len(lengths)), rounds + 1)
    number = np.arange(bounds[-1]) - bounds[document]
    is_whole = number < rounds[document]
    starts = number * size * stripe + np.where(is_whole, member * stripe, before[document, member])
    return bounds, np.stack([starts, starts + np.where(is_whole, stripe, shares[document, member])], axis=1)


def _rest(lengths: np.ndarray, size: int, stripe: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whole rounds, and of what is left behind them each member's tokens, and those before."""
    rounds, rest = lengths // (size * stripe), lengths[:, None] % (size * stripe)
    members = np.arange(size)
    shares = rest // size + (members < rest % size)
    return rounds, shares, members * (rest // size) + np.minimum(members, rest % size)
