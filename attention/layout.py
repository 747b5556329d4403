"""How the tokens of one sequence are laid over the ranks of its group.

A *chunk* is the smallest piece that a schedule moves or computes with; it is a tuple of token ranges, mostly of one.
A *layout* says which chunk holds which tokens and which member of the group owns it. Members are numbered 0..size-1 in
ring order; which ranks of the world they are is not known here.

Every layout gives member ``m`` exactly ``length // size`` tokens, plus one if ``m < length % size``: no padding, so a
sequence of ``s`` tokens fits ``ceil(s / capacity)`` ranks for every ``s``. Shards may be empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

Range = tuple[int, int]  # [start, stop) in tokens of the sequence
Ranges = tuple[Range, ...]

LAYOUTS = ("zigzag", "contiguous", "striped")
"""``striped`` takes the tokens of a stripe after a colon: ``"striped:16"``."""
DEFAULT_STRIPE = 64  # tokens


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Chunks of one sequence and their owners."""

    name: str
    length: int
    """Tokens of the sequence."""
    size: int
    """Members of the group."""
    chunks: tuple[Ranges, ...]
    """Per chunk its token ranges, ascending."""
    owners: tuple[int, ...]
    """Per chunk the member that owns it."""

    def owned(self, member: int) -> tuple[int, ...]:
        """Chunks of ``member``, in the order in which their tokens lie in its shard."""
        return self._owned[member]

    @property
    def _owned(self) -> tuple[tuple[int, ...], ...]:
        return _owned_chunks(self.owners, self.size)

    def tokens(self, chunk: int) -> int:
        return sum(stop - start for start, stop in self.chunks[chunk])

    def shard_tokens(self, member: int) -> int:
        return self.length // self.size + (member < self.length % self.size)

    def shard_ranges(self, member: int) -> Ranges:
        """Token ranges of ``member``'s shard in the order of its packed tokens; touching ranges are joined."""
        joined: list[Range] = []
        for chunk in self.owned(member):
            for start, stop in self.chunks[chunk]:
                if start == stop:
                    continue
                if joined and joined[-1][1] == start:
                    joined[-1] = (joined[-1][0], stop)
                else:
                    joined.append((start, stop))
        return tuple(joined)


@lru_cache(maxsize=256)
def _owned_chunks(owners: tuple[int, ...], size: int) -> tuple[tuple[int, ...], ...]:
    owned: list[list[int]] = [[] for _ in range(size)]
    for chunk, owner in enumerate(owners):
        owned[owner].append(chunk)
    return tuple(tuple(chunks) for chunks in owned)


def zigzag(length: int, size: int) -> Layout:
    """Two chunks a member, ``m`` and ``2 size - 1 - m``: each member gets 1/size of a causal mask's area.

    ByteScale section 1.6 ("packed ring attention"), without its demand that 2 x size divides the length: a member's
    tokens are halved, so the front and the back chunk of one member differ by at most one token.
    """
    shares = [length // size + (m < length % size) for m in range(size)]
    sizes = [(share + 1) // 2 for share in shares] + [share // 2 for share in reversed(shares)]
    return _contiguous_chunks("zigzag", length, size, sizes, (*range(size), *reversed(range(size))))


def contiguous(length: int, size: int) -> Layout:
    """One chunk a member, in order: for bidirectional attention, where every member has equal work anyway."""
    sizes = [length // size + (m < length % size) for m in range(size)]
    return _contiguous_chunks("contiguous", length, size, sizes, tuple(range(size)))


def striped(length: int, size: int, stripe: int = DEFAULT_STRIPE) -> Layout:
    """One chunk a member, made of every size-th block of ``stripe`` tokens (Striped Attention, MTraining).

    The last, incomplete round of stripes is divided so that the shards still differ by at most one token.
    """
    if stripe < 1:
        raise ValueError(f"stripe is {stripe}: a stripe holds at least 1 token")
    rounds, rest = divmod(length, size * stripe)
    ranges: list[list[Range]] = [[] for _ in range(size)]
    for round_ in range(rounds):
        base = round_ * size * stripe
        for m in range(size):
            ranges[m].append((base + m * stripe, base + (m + 1) * stripe))
    position = rounds * size * stripe
    for m in range(size):
        share = rest // size + (m < rest % size)
        if share:
            ranges[m].append((position, position + share))
        position += share
    chunks = tuple(tuple(r) if r else ((length, length),) for r in ranges)
    name = "striped" if stripe == DEFAULT_STRIPE else f"striped:{stripe}"
    return Layout(name=name, length=length, size=size, chunks=chunks, owners=tuple(range(size)))


def _contiguous_chunks(name: str, length: int, size: int, sizes: list[int], owners: tuple[int, ...]) -> Layout:
    chunks, position = [], 0
    for tokens in sizes:
        chunks.append(((position, position + tokens),))
        position += tokens
    return Layout(name=name, length=length, size=size, chunks=tuple(chunks), owners=owners)


def make_layout(name: str, length: int, size: int) -> Layout:
    """The layout called ``name`` of ``length`` tokens over ``size`` members. Raises ValueError for an unknown name."""
    if length < 0 or size < 1:
        raise ValueError(f"cannot lay {length} tokens over {size} ranks: lengths are >= 0, groups >= 1")
    base, stripe = parse_layout(name)
    return _striped(length, size, stripe) if base == "striped" else _plain(base, length, size)


@lru_cache(maxsize=4096)
def _plain(name: str, length: int, size: int) -> Layout:
    return {"zigzag": zigzag, "contiguous": contiguous}[name](length, size)


@lru_cache(maxsize=8)  # few: a million tokens in stripes of 64 take two megabytes
def _striped(length: int, size: int, stripe: int) -> Layout:
    return striped(length, size, stripe)


@lru_cache(maxsize=256)
def parse_layout(name: str) -> tuple[str, int]:
    """Name and tokens of a stripe. Raises ValueError for an unknown name, or a stripe that is no number of tokens."""
    base, colon, number = name.partition(":")
    if base not in LAYOUTS or (colon and base != "striped"):
        raise ValueError(
            f"unknown layout {name!r}: choose one of {', '.join(LAYOUTS)}, or striped:16 for stripes of 16 tokens"
        )
    if not colon:
        return base, DEFAULT_STRIPE
    if not (number.isascii() and number.isdecimal()) or int(number) < 1:
        raise ValueError(f"layout {name!r}: a stripe holds at least 1 token, such as 'striped:16'")
    return base, int(number)
