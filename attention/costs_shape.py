"""What the closed forms of ``hdp.attention.costs`` share: the case, and the bytes and areas of its blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hdp.attention.counts import Sizes
from hdp.attention.program import HeadCount, Kind


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One direction of one member; see ``hdp.attention.counts`` for what counts as a buffer."""

    sent_bytes: float
    area: float
    """Allowed (query, key) pairs times query heads."""
    steps: int
    peak_bytes: float
    kept_bytes: float


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One member's case. A *block* is what one member owns: ``tokens`` tokens."""

    length: int
    """Tokens of the sequence."""
    size: int
    member: int
    heads: HeadCount
    sizes: Sizes
    causal: bool
    """True: causal with zigzag. False: bidirectional with contiguous."""

    @property
    def tokens(self) -> float:
        return self.length / self.size

    @property
    def area(self) -> float:
        """What each member computes if its queries, or its keys, stay."""
        return self.pairs * self.heads.query

    @property
    def pairs(self) -> float:
        """Pairs of one member's queries with all keys; with zigzag equal for all members."""
        if not self.causal:
            return self.tokens * self.length
        chunk = self.tokens / 2
        return 2 * self.size * chunk * chunk + chunk

    @property
    def home_pairs(self) -> float:
        """Pairs of one member's queries with its own keys."""
        return self.tokens * (self.tokens + 1) / 2 if self.causal else self.tokens * self.tokens

    def bytes(self, kind: Kind, heads: int | None = None, final: bool = False) -> float:
        """Bytes of a block with some heads (all if None)."""
        count = self.heads.of(kind)[1] if heads is None else heads
        return self.tokens * count * self.sizes.per_token(kind, final)

    @property
    def reads(self) -> float:
        """Blocks of others that this member's queries look at."""
        return self.size - 1 - (self.member / 2 if self.causal else 0)

    @property
    def read(self) -> float:
        """How many times others look at this member's block."""
        return (self.size - 1 + self.member) / 2 if self.causal else self.size - 1

    def half_if(self, condition: bool) -> float:
        """Weight of a block of which only one half counts if the mask is causal and ``condition`` holds."""
        return 0.5 if self.causal and condition else 1.0


def inside(value: Callable[[int], float], step: int, first: int, last: int) -> float:
    """``value(step)`` if first <= step <= last, else 0."""
    return value(step) if first <= step <= last else 0.0


def peak(steps: Iterable[float]) -> float:
    return max(steps, default=0.0)
