"""What lowering produces: one rank's program for one micro-batch and direction, flat, on numbered tensors.

Nothing here names a chunk, a member or a document any more: tables of rows to be moved, kernel calls on ranges of rows,
messages, and buffers with their place in the arena. See ``hdp.attention.lower`` for how it is made and
``hdp.attention.executor`` for how it is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np

from hdp.attention.mask import Shape
from hdp.attention.program import HeadCount, Heads, Kind

Width = Literal["model", "sum", "wire", "byte", "kernel"]
"""Which dtype a tensor has: the model's, the accumulators', the one in which inputs travel; bytes of several tensors; the
one in which a kernel is called where its result is merged (``Geometry.kernel_bytes``)."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What of a layer, and of the backend, decides the lowered program."""

    heads: HeadCount
    head_dim: int
    model_bytes: int
    """Bytes of an element of q, k, v."""
    sum_bytes: int
    """Bytes of an element of accumulators (fp32: 4; 8 when the model is float64)."""
    wire_bytes: int | None = None
    """Bytes of an element of q, k, v on their way; None: as ``model_bytes``, without a cast."""
    widens: bool = False
    """Whether kernels whose results are merged are given inputs in the accumulators' dtype (``Backend.widens``)."""

    @property
    def sums_are_outputs(self) -> bool:
        """Whether accumulators have the model's dtype, so that outputs can be accumulated in place."""
        return self.model_bytes == self.sum_bytes

    @property
    def casts_inputs(self) -> bool:
        """Whether q, k, v travel in another dtype than the model's."""
        return self.wire_bytes is not None and self.wire_bytes != self.model_bytes

    def bytes_of(self, width: Width) -> int:
        """Bytes of an element."""
        if width == "byte":
            return 1
        if width == "wire" and self.wire_bytes is not None:
            return self.wire_bytes
        if width == "kernel" and self.widens:
            return self.sum_bytes
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
READY: dict[Kind, tuple[Component, ...]] = {
    **COMPONENTS,
    Kind.DO: (Component("do", True, "model"), Component("lse", False, "sum"), Component("out", True, "kernel")),
}
"""What kernels read: of queries that came with delta an ``out`` with that sum (``hdp.attention.moves``, REBUILD)."""


def wire_width(kind: Kind, component: Component, final: bool, geometry: Geometry) -> Width:
    """The dtype in which a component travels: complete results in the model's, q, k, v in ``wire`` where that differs."""
    if kind in (Kind.Q, Kind.KV):
        return "wire" if geometry.casts_inputs else "model"
    return "model" if final and component.has_dim else component.width


@dataclass(frozen=True, slots=True)
class Buffer:
    """A tensor in the arena, or in the tensor that forward keeps for backward."""

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


class Op(IntEnum):
    """What a row of a table of moves does."""

    COPY = 0
    """target = source, cast where dtypes differ."""
    ADD = 1
    """target += source."""
    MERGE = 2
    """(target, target2) and (source, source2) are partial (out, lse): merged into the target."""
    REBUILD = 3
    """target becomes an ``out`` with sum(source * target) = source2: source is dO, source2 delta."""
    ZERO = 4
    """target = 0."""
    EMPTY = 5
    """target = -inf: the lse of rows that no key has reached."""


FIELDS = (
    *("op", "source", "source_row", "source_head", "target", "target_row", "target_head", "rows", "heads", "has_dim"),
    *("source2", "source2_row", "source2_head", "target2", "target2_row", "target2_head"),
)
"""Columns of a table of moves, int64 [moves, 16]. Tensors beyond the program's are results of kernels, in order."""
NOTHING = np.zeros((0, len(FIELDS)), dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows of one numbered tensor, a range for each launch of a call: what kernels read."""

    tensor: int
    starts: np.ndarray
    stops: np.ndarray
    heads: Heads | None
    """None: all heads of the tensor."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Call:
    """Kernel launches on rectangles of one shape: one launch for each document, or one for all that lie together."""

    shape: Shape
    inputs: tuple[Rows, ...]
    """Forward: q, k, v. Backward: q, k, v, do, lse, out."""
    wide: bool
    """Inputs are cast to the accumulators' dtype: see ``Geometry.widens``."""
    costs: np.ndarray
    """Of each launch, query-key pairs times heads."""
    results: np.ndarray
    """Table of moves of what the launches return: result c of launch i is tensor count + i * components + c."""
    bounds: np.ndarray
    """[launches + 1]: the rows of ``results`` that belong to each launch."""
    cuts: tuple[tuple[np.ndarray, np.ndarray], ...] = ()
    """For backends that take several rectangles a launch: where each begins and the last ends, in rows and in keys."""

    @property
    def launches(self) -> int:
        return len(self.costs)


@dataclass(frozen=True, kw_only=True, slots=True)
class Packet:
    """One message: all that goes to, or comes from, one rank in one round and lane, and is of one sort."""

    peer: int
    """Rank of the world."""
    lane: int
    sequence: int
    """The first sequence in it."""
    what: str
    """Names of the tensors in it, and how many sequences besides the first."""
    terms: int = 0
    """Checksum of what both ends must mean alike: the sequences' layouts, groups and masks, the chunks and heads in it."""
    late: bool = False
    """Receive: partials for this rank's own tokens, which no step waits for. See [Note: late]."""


@dataclass(frozen=True, slots=True)
class Space:
    """Bytes of the arena (``tensor`` < 0) or of the kept tensor, or dense rows of one of the caller's tensors."""

    tensor: int
    start: int
    stop: int
    kept: bool = False


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Round:
    """One step of all sequences of the micro-batch, in the order in which it is run."""

    gathers: np.ndarray
    """Before anything is sent: what this round's calls read is brought together, sums are emptied, messages are packed."""
    sends: tuple[tuple[Packet, Space], ...]
    receives: tuple[tuple[Packet, Space], ...]
    calls: tuple[Call, ...]
    fillers: int = 0
    """How many launches of the program's local calls to run here, if it cannot be asked whether the receives are done."""
    merges: np.ndarray
    """After the receives are there."""
    late: np.ndarray
    """LAG rounds later. See [Note: late]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Lowered:
    """One rank's program for one micro-batch and direction. Tensors 0..len(externals)-1 are the caller's."""

    externals: tuple[str, ...]
    buffers: tuple[Buffer, ...]
    rounds: tuple[Round, ...]
    fillers: tuple[Call, ...]
    """Calls of whole local sequences, in order, to be computed while bytes are in flight."""
    finals: np.ndarray
    """After the last round: accumulators cast into outputs, and zeros in rows that nothing was added to."""
    arena_bytes: int
    kept_bytes: int
    is_backward: bool
    dense: frozenset[str]
    """The caller's tensors that are sent as they lie: they must be dense."""
    sends_delta: bool
    """Whether ``delta`` = sum(do * out) leaves this rank."""
