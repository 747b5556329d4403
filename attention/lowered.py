"""What lowering produces: one rank's program for one micro-batch and direction, flat, on numbered tensors.

Nothing here names a chunk or a member any more: kernel calls on row ranges, packets, merges, and buffers with their place
in the arena. See ``hdp.attention.lower`` for how it is made and ``hdp.attention.executor`` for how it is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hdp.attention.mask import Shape
from hdp.attention.program import HeadCount, Heads, Kind

Width = Literal["model", "sum", "wire", "byte"]
"""Which dtype a tensor has: the model's, the accumulators', the one in which inputs travel; or bytes of several tensors."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What of a layer decides the lowered program."""

    heads: HeadCount
    head_dim: int
    model_bytes: int
    """Bytes of an element of q, k, v."""
    sum_bytes: int
    """Bytes of an element of accumulators (fp32: 4; 8 when the model is float64)."""
    wire_bytes: int | None = None
    """Bytes of an element of q, k, v on their way; None: as ``model_bytes``, without a cast."""

    @property
    def sums_are_outputs(self) -> bool:
        """Whether accumulators have the model's dtype, so that outputs can be accumulated in place."""
        return self.model_bytes == self.sum_bytes

    @property
    def casts_inputs(self) -> bool:
        """Whether q, k, v travel in another dtype than the model's."""
        return self.wire_bytes is not None and self.wire_bytes != self.model_bytes

    @property
    def joins(self) -> bool:
        """Whether an lse behind rows of any tensor begins at a multiple of its own size, so that both can be one message."""
        return all(
            self.head_dim * n % self.sum_bytes == 0 for n in (self.model_bytes, self.wire_bytes or self.model_bytes)
        )

    def bytes_of(self, width: Width) -> int:
        """Bytes of an element."""
        if width == "byte":
            return 1
        if width == "wire" and self.wire_bytes is not None:
            return self.wire_bytes
        return self.sum_bytes if width == "sum" else self.model_bytes


@dataclass(frozen=True)
class Component:
    """One tensor of a value."""

    name: str
    has_dim: bool
    """[rows, heads, head_dim]; else [rows, heads]."""
    width: Width


COMPONENTS: dict[Kind, tuple[Component, ...]] = {
    Kind.Q: (Component("q", True, "model"),),
    Kind.KV: (Component("k", True, "model"), Component("v", True, "model")),
    Kind.DO: (Component("do", True, "model"), Component("lse", False, "sum"), Component("delta", False, "sum")),
    Kind.OUT: (Component("out", True, "sum"), Component("lse", False, "sum")),
    Kind.DQ: (Component("dq", True, "sum"),),
    Kind.DKV: (Component("dk", True, "sum"), Component("dv", True, "sum")),
}


def wire_width(kind: Kind, component: Component, final: bool, geometry: Geometry) -> Width:
    """The dtype in which a component travels: complete results in the model's, q, k, v in ``wire`` where that differs."""
    if kind in (Kind.Q, Kind.KV):
        return "wire" if geometry.casts_inputs else "model"
    return "model" if final and component.has_dim else component.width


@dataclass(frozen=True, slots=True)
class Ref:
    """Rows and heads of a numbered tensor ([rows, heads, head_dim] or [rows, heads])."""

    tensor: int
    start: int
    stop: int
    heads: Heads | None = None
    """None: all heads of the tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Buffer:
    """A tensor in the arena, or in the tensor that forward keeps for backward."""

    tensor: int
    offset: int
    """Bytes from the start of its space."""
    rows: int
    heads: int
    has_dim: bool
    width: Width
    kept: bool


LAG = 2
"""Rounds by which a late partial may come after its own. See [Note: late].

[Note: late] A partial that comes home is added to a sum that nobody reads before the end, so the next round need not wait
for it: TokenRing's queries go on while results return on other links. It is waited for LAG rounds later, in the same
order on every run; its buffer lives so long. Only sums that have been written before can be added to out of turn.
"""
Copy = tuple[Ref, Ref]  # (source, target): a copy, with a cast where their dtypes differ


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One kernel call: a rectangle of one tile, or several that lie one after the other (``cuts``)."""

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
    cuts: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    """Where each rectangle begins and the last ends, in rows and in keys; None: one rectangle (``hdp.attention.fuse``)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Packet:
    """One message: one component, or several that lie one after the other (``hdp.attention.messages``)."""

    ref: Ref
    peer: int
    """Rank of the world."""
    lane: int
    sequence: int
    what: str
    terms: int = 0
    """Checksum of what both ends must mean alike: the sequence's layout, group and mask, the chunks and heads in it."""
    late: bool = False
    """Receive: a partial for this rank's own tokens, which no step waits for. See [Note: late]."""
    pack: tuple[Copy, ...] = ()
    """Send: pieces to be copied into ``ref`` first (chunks that do not lie together, some of the heads, a cast)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Merge:
    """A received accumulator joins what is already here, or (``first``) is copied to where it is needed."""

    kind: Kind
    source: tuple[Ref, ...]
    target: tuple[Ref, ...]
    first: bool
    late: bool = False
    """See [Note: late]."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """One step of all sequences of the micro-batch, in the order in which it is run."""

    fills: tuple[Ref, ...] = ()
    """Rows of accumulators to be emptied before anything else (0; lse: -inf)."""
    sends: tuple[Packet, ...]
    receives: tuple[Packet, ...]
    casts: tuple[Copy, ...] = ()
    """Inputs that arrived in another dtype, widened for this round's calls."""
    calls: tuple[Call, ...]
    fillers: int = 0
    """How many of the program's local calls to run here, if it cannot be asked whether the receives are done."""
    merges: tuple[Merge, ...]


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """One rank's program for one micro-batch and direction. Tensors 0..len(externals)-1 are the caller's."""

    externals: tuple[str, ...]
    buffers: tuple[Buffer, ...]
    rounds: tuple[Round, ...]
    fillers: tuple[Call, ...]
    """Calls of whole local sequences, in order, to be computed while bytes are in flight."""
    finals: tuple[Copy, ...]
    """(accumulator, output): copies with a cast, after the last round."""
    empties: tuple[Ref, ...]
    """Output rows that nothing was added to: zeros (lse: -inf)."""
    arena_bytes: int
    kept_bytes: int
    is_backward: bool
    lse_tensors: frozenset[int]
    """Tensors whose empty value is -inf."""
