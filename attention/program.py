"""The attention program of one sequence: what each member of its group sends, receives and computes, step by step.

A schedule (``hdp.attention.schedules``) is a pure function that returns the :class:`RankProgram` of one member. A program
moves *values*: a kind, a chunk of the sequence, a range of heads.

======  ===========================================  ====================================================
kind    what it holds, per token and head            how it behaves
======  ===========================================  ====================================================
Q       queries                                      input: copied when sent, dropped after its last use
KV      keys and values                              input
DO      gradient of out, global lse, delta           input (backward only)
OUT     partial out and lse                          accumulator: merged where it arrives, gone when sent
DQ      partial gradient of the queries              accumulator
DKV     partial gradients of keys and values         accumulator
======  ===========================================  ====================================================

[Note: steps] One step posts its transfers, computes its tiles while they are in flight, then completes them:

- it sends inputs that were present when the step began, and accumulators as they were then;
- its tiles read inputs present when the step began, and add to the accumulators at this member;
- inputs it receives are present from the next step on; accumulators it receives are merged after its tiles.

Step ``i`` of one member exchanges only with step ``i`` of another: rounds follow one global order, so that grouped
calls cannot wait for each other in a circle. The checker proves this and the coverage of every program.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

Heads = tuple[int, int]  # [start, stop); key/value heads for KV and DKV, query heads for all other kinds


class Kind(Enum):
    """What a value holds; see the module's table."""

    Q = "q"
    KV = "kv"
    DO = "do"
    OUT = "out"
    DQ = "dq"
    DKV = "dkv"

    @property
    def is_accumulator(self) -> bool:
        return self in (Kind.OUT, Kind.DQ, Kind.DKV)

    @property
    def is_per_key(self) -> bool:
        """Whether heads are counted in key/value heads."""
        return self in (Kind.KV, Kind.DKV)


@dataclass(frozen=True, kw_only=True)
class HeadCount:
    """Heads of one attention layer; ``query`` is a multiple of ``key``."""

    query: int
    key: int

    def __post_init__(self) -> None:
        if self.key < 1 or self.query % self.key:
            raise ValueError(
                f"{self.query} query heads over {self.key} key/value heads: the first must be a multiple of the second"
            )

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.query // self.key

    def of(self, kind: Kind) -> Heads:
        """All heads of a value of this kind."""
        return (0, self.key if kind.is_per_key else self.query)

    def keys_for(self, queries: Heads) -> Heads:
        """Key/value heads that a range of query heads reads."""
        return queries[0] // self.group, -(-queries[1] // self.group)


@dataclass(frozen=True, kw_only=True, slots=True)
class Transfer:
    """One message: the values of some chunks, packed one after the other."""

    kind: Kind
    chunks: tuple[int, ...]
    """Chunks of the layout, in the order in which they lie in the message."""
    heads: Heads
    peer: int
    """Member of the group that it goes to or comes from."""
    lane: int = 0
    """0 or 1: lanes progress independently of each other (two communicators)."""
    final: bool = False
    """An accumulator that is complete travels in the model's dtype; partials travel in fp32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """All pairs that the mask allows between the tokens of some chunks, for some query heads."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    heads: Heads
    """Query heads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Value:
    """Inputs that stay at a member from forward to backward: one whole message that it received, or its own."""

    kind: Kind
    chunks: tuple[int, ...]
    heads: Heads
    block: int = 0
    """Values of one kind, of the same heads and block, are kept in one tensor, in the order of their tokens."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """See [Note: steps]."""

    sends: tuple[Transfer, ...] = ()
    receives: tuple[Transfer, ...] = ()
    tiles: tuple[Tile, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RankProgram:
    """One member's part in one direction of one sequence's attention."""

    steps: tuple[Step, ...]
    keep: tuple[Value, ...] = ()
    """Forward: received inputs that backward needs again. Backward: what it expects to find kept."""
