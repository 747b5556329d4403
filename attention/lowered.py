"""What lowering produces: one rank's program for one micro-batch and direction, flat, on numbered tensors.

Nothing here names a chunk or a member any more: kernel calls on row ranges, packets, merges, and buffers with their place
in the arena. See ``hdp.attention.lower`` for how it is made and ``hdp.attention.executor`` for how it is run.
"""

from __future__ import annotations

from dataclasses import dataclass

from hdp.attention.mask import Shape
from hdp.attention.program import HeadCount, Heads, Kind


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What of a layer decides the lowered program."""

    heads: HeadCount
    head_dim: int
    model_bytes: int
    """Bytes of an element of q, k, v."""
    sum_bytes: int
    """Bytes of an element of accumulators (fp32: 4; 8 when the model is float64)."""

    @property
    def sums_are_outputs(self) -> bool:
        """Whether accumulators have the model's dtype, so that outputs can be accumulated in place."""
        return self.model_bytes == self.sum_bytes


# Components of each kind: (name, whether it has head_dim, whether it has the accumulators' dtype).
COMPONENTS: dict[Kind, tuple[tuple[str, bool, bool], ...]] = {
    Kind.Q: (("q", True, False),),
    Kind.KV: (("k", True, False), ("v", True, False)),
    Kind.DO: (("do", True, False), ("lse", False, True), ("delta", False, True)),
    Kind.OUT: (("out", True, True), ("lse", False, True)),
    Kind.DQ: (("dq", True, True),),
    Kind.DKV: (("dk", True, True), ("dv", True, True)),
}


@dataclass(frozen=True)
class Ref:
    """Rows and heads of a numbered tensor ([rows, heads, head_dim] or [rows, heads])."""

    tensor: int
    start: int
    stop: int
    heads: Heads | None = None
    """None: all heads of the tensor."""


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """A tensor in the arena, or in the tensor that forward keeps for backward."""

    tensor: int
    offset: int
    """Bytes from the start of its space."""
    rows: int
    heads: int
    has_dim: bool
    is_sum: bool
    kept: bool


@dataclass(frozen=True, kw_only=True)
class Call:
    """One kernel call: a rectangle of one tile."""

    shape: Shape
    inputs: tuple[Ref, ...]
    """Forward: q, k, v. Backward: q, k, v, do, lse, and out (own queries) or delta (queries that travelled)."""
    sums: tuple[Ref, ...]
    """Forward: out, lse. Backward: dq, dk, dv."""
    first: tuple[bool, ...]
    """Forward: one flag. Backward: for dq and for dk, dv. True: nothing there yet, write instead of adding."""
    has_out: bool = True
    """Backward: the last input is out, not delta."""
    cost: int = 0
    """Query-key pairs times heads."""


@dataclass(frozen=True, kw_only=True)
class Packet:
    """One message of one component."""

    ref: Ref
    peer: int
    """Rank of the world."""
    lane: int
    sequence: int
    what: str
    pack: tuple[Ref, ...] = ()
    """Send: pieces to be copied into ``ref`` first (chunks that do not lie together, some of the heads, a cast)."""


@dataclass(frozen=True, kw_only=True)
class Merge:
    """A received accumulator joins what is already here."""

    kind: Kind
    source: tuple[Ref, ...]
    target: tuple[Ref, ...]
    first: bool


@dataclass(frozen=True, kw_only=True)
class Round:
    """One step of all sequences of the micro-batch."""

    sends: tuple[Packet, ...]
    receives: tuple[Packet, ...]
    calls: tuple[Call, ...]
    fillers: tuple[Call, ...]
    """Calls of whole local sequences, to be computed while bytes are in flight."""
    merges: tuple[Merge, ...]
    fills: tuple[Ref, ...] = ()
    """Rows of accumulators to be emptied before anything else (0; lse: -inf)."""


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """One rank's program for one micro-batch and direction. Tensors 0..len(externals)-1 are the caller's."""

    externals: tuple[str, ...]
    buffers: tuple[Buffer, ...]
    rounds: tuple[Round, ...]
    finals: tuple[tuple[Ref, Ref], ...]
    """(accumulator, output): copies with a cast, after the last round."""
    empties: tuple[Ref, ...]
    """Output rows that nothing was added to: zeros (lse: -inf)."""
    arena_bytes: int
    kept_bytes: int
    is_backward: bool
    lse_tensors: frozenset[int]
    """Tensors whose empty value is -inf."""
