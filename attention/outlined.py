"""What ``hdp.attention.outline`` produces: one rank's program of one bundle, on nominal rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from hdp.attention.lowered import Op, Width
from hdp.attention.mask import Shape
from hdp.attention.places import Draft, Ref
from hdp.attention.program import Heads, Kind

FORWARD_TENSORS = ("q", "k", "v", "out", "lse")
BACKWARD_TENSORS = ("q", "k", "v", "do", "out", "lse", "delta", "dq", "dk", "dv")
RESULT = -1
"""``Ref.tensor`` of component c of what a call returns is RESULT - c."""


@dataclass(frozen=True, slots=True)
class Move:
    """Rows of one tensor into another; see :class:`~hdp.attention.lowered.Op`. Second tensors: MERGE's lse, REBUILD's delta."""

    op: Op
    source: tuple[Ref, ...]
    target: tuple[Ref, ...]


@dataclass(frozen=True, slots=True)
class KernelCall:
    """A rectangle of a tile, for all documents of the bundle."""

    shape: Shape
    inputs: tuple[Ref, ...]
    heads: int
    """Query heads."""
    results: tuple[Move, ...]


@dataclass(frozen=True, slots=True)
class Sum:
    """What a region's kernel calls return for some of its rows, or keys, is added to."""

    source: tuple[Ref, ...]
    """Results, and nominal rows of the region."""
    target: tuple[Ref, ...]
    first: bool
    """Whether nothing was written there before."""


@dataclass(frozen=True, slots=True)
class Region:
    """What the mask allows of some chunks' queries and keys: cut into rectangles document by document."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    inputs: tuple[Ref, ...]
    """All rows of the region, as a kernel call's."""
    heads: int
    """Query heads."""
    sums: tuple[Sum, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """One component of one transfer."""

    name: str
    width: Width
    heads: int
    has_dim: bool
    chunks: tuple[int, ...]
    moves: tuple[Move, ...] = ()
    """Send: what brings it together, its own tensor being number RESULT."""
    tensor: int = -1
    """Send: the buffer that is all of it, as it travels; -1: none is. Receive: the buffer it is received in."""


@dataclass(frozen=True, slots=True)
class Mail:
    """What goes to, or comes from, one member in one step, and is of one sort."""

    peer: int
    lane: int
    is_sum: bool
    pieces: tuple[Piece, ...]
    content: bytes
    """What both ends must mean alike."""
    late: bool = False
    """Receive: see [Note: late] in ``hdp.attention.lowered``."""
    merges: tuple[Move, ...] = ()
    """Receive: what becomes of it when it is there."""
    keeps: int = -1
    """Receive: the kept block that this message is, and may be received in; -1: none."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One step."""

    gathers: tuple[Move, ...]
    fills: tuple[Ref, ...]
    sends: tuple[Mail, ...]
    receives: tuple[Mail, ...]
    calls: tuple[KernelCall | Region, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """What stays from forward to backward: some heads of some chunks."""

    kind: Kind
    heads: Heads
    chunks: tuple[int, ...]
    tensors: tuple[int, ...]


@dataclass(frozen=True)
class Outline:
    """One direction of one bundle at one member. Tensors 0..len(externals)-1 are the caller's."""

    externals: tuple[str, ...]
    owned: tuple[int, ...]
    """Chunks of the caller's tensors."""
    drafts: tuple[Draft, ...]
    turns: tuple[Turn, ...]
    finals: tuple[Move, ...]
    empties: tuple[Ref, ...]
    kept: tuple[Block, ...]
    wide: bool
    is_local: bool
    lse: frozenset[int] = field(default_factory=frozenset)
    """Tensors whose empty value is -inf."""


def added(sources: tuple[Ref, ...], targets: tuple[Ref, ...], first: bool, *, is_partial: bool) -> list[Move]:
    """Sums, or (out, lse) partials, written where nothing was yet, or added."""
    if is_partial and not first:
        return [Move(Op.MERGE, sources, targets)]
    op = Op.COPY if first else Op.ADD
    return [Move(op, (s,), (t,)) for s, t in zip(sources, targets, strict=True)]


def join(moves: Iterable[Move]) -> list[Move]:
    """The same moves; those whose rows lie one after the other on both sides in one."""
    joined: list[Move] = []
    last: dict[tuple[Op, tuple[int, ...]], int] = {}
    for move in moves:
        refs = (*move.source, *move.target)
        key = move.op, tuple(r.tensor for r in refs)
        at = last.get(key)
        if at is not None:
            before = (*joined[at].source, *joined[at].target)
            if all(a.stop == b.start and a.heads == b.heads for a, b in zip(before, refs, strict=True)):
                both = tuple(Ref(a.tensor, a.start, b.stop, a.heads) for a, b in zip(before, refs, strict=True))
                count = len(move.source)
                joined[at] = Move(move.op, both[:count], both[count:])
                continue
        last[key] = len(joined)
        joined.append(move)
    return joined


def join_sums(sums: Iterable[Sum]) -> list[Sum]:
    """The same sums; those whose rows lie one after the other on both sides in one."""
    joined: list[Sum] = []
    for one in sums:
        last = joined[-1] if joined else None
        if last is not None and last.first == one.first and len(last.target) == len(one.target):
            pairs = list(zip((*last.source, *last.target), (*one.source, *one.target), strict=True))
            if all((a.tensor, a.stop, a.heads) == (b.tensor, b.start, b.heads) for a, b in pairs):
                both = tuple(Ref(a.tensor, a.start, b.stop, a.heads) for a, b in pairs)
                joined[-1] = Sum(both[: len(one.source)], both[len(one.source) :], one.first)
                continue
        joined.append(one)
    return joined
