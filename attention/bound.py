"""A lowered program bound to tensors: every row range becomes a view once, numbered, and is only looked up afterwards.

Slicing a tensor costs about a microsecond in Python, and a call names six. Views into the arena are the same for every layer,
so they are made once for a program; views into a layer's own tensors are made when they are first used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from hdp.attention.lowered import Buffer, Call, Copy, Geometry, Lowered, Merge, Packet, Ref
from hdp.attention.mask import Shape
from hdp.attention.program import Kind

Slot = int  # number of a view
Cuts = tuple[Tensor, Tensor, int, int]  # cumulative rows and keys (int32, on the device), longest rows and keys


class Workspace:
    """The arena of one rank: bytes for received and travelling buffers, reused by every layer, direction and batch."""

    def __init__(self, device: torch.device) -> None:
        self.storage = torch.empty(0, dtype=torch.uint8, device=device)
        self.peak_bytes = 0
        """The most that a program has needed."""

    def reserve(self, size: int) -> Tensor:
        """At least ``size`` bytes; grows, never shrinks."""
        if self.storage.numel() < size:
            self.storage = torch.empty(size, dtype=torch.uint8, device=self.storage.device)
            self.peak_bytes = size
        return self.storage


@dataclass(frozen=True, slots=True)
class BoundCall:
    """A kernel call on views."""

    shape: Shape
    inputs: tuple[Slot, ...]
    sums: tuple[Slot, ...]
    first: tuple[bool, ...]
    """One flag for each of ``sums``."""
    has_out: bool
    cuts: Cuts | None


@dataclass(frozen=True, slots=True)
class BoundMerge:
    """A merge of views."""

    is_partial: bool
    """(out, lse) partials; else sums."""
    source: tuple[Slot, ...]
    target: tuple[Slot, ...]
    first: bool


@dataclass(frozen=True, slots=True)
class BoundRound:
    """A round on views; see ``hdp.attention.lowered.Round``."""

    fills: tuple[tuple[Slot, float], ...]
    sends: tuple[tuple[Packet, Slot, tuple[tuple[Slot, Slot], ...]], ...]
    receives: tuple[tuple[Packet, Slot], ...]
    casts: tuple[tuple[Slot, Slot], ...]
    calls: tuple[BoundCall, ...]
    fillers: int
    merges: tuple[BoundMerge, ...]
    late: tuple[BoundMerge, ...]
    """Merges that wait for nobody's sake; see [Note: late] in ``hdp.attention.lowered``."""


class Views:
    """The views of one call of the operator, made when first used; arena views are there from the start."""

    __slots__ = ("_refs", "_tensors", "_views")

    def __init__(self, refs: Sequence[Ref], tensors: Sequence[Tensor | None], views: list[Tensor | None]) -> None:
        self._refs, self._tensors, self._views = refs, tensors, views

    def __getitem__(self, slot: Slot) -> Tensor:
        view = self._views[slot]
        if view is None:
            ref = self._refs[slot]
            tensor = self._tensors[ref.tensor]
            assert tensor is not None
            view = self._views[slot] = _slice(tensor, ref)
        return view


class Bound:
    """One rank's program in one direction, for one dtype, with its place in the arena. Reused by all layers."""

    def __init__(
        self,
        lowered: Lowered,
        geometry: Geometry,
        dtype: torch.dtype,
        workspace: Workspace,
        wire_dtype: torch.dtype | None = None,
    ) -> None:
        self.lowered, self.geometry, self.workspace = lowered, geometry, workspace
        self.dtype, self.wire_dtype = dtype, wire_dtype or dtype
        self.sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.is_backward = lowered.is_backward
        sent = [p.ref.tensor for r in lowered.rounds for p in r.sends if not p.pack]
        self.sends_delta = any("delta" in p.what for r in lowered.rounds for p in r.sends)
        self.dense = frozenset(lowered.externals[t] for t in sent if t < len(lowered.externals))
        """The caller's tensors that are sent as they lie: they must be dense."""
        self._refs: list[Ref] = []
        self._slots: dict[Ref, Slot] = {}
        self._cuts: dict[tuple[int, ...], Tensor] = {}
        self._device = workspace.storage.device
        self.rounds = tuple(
            BoundRound(
                fills=tuple((self._slot(ref), self._empty_value(ref)) for ref in part.fills),
                sends=tuple((p, self._slot(p.ref), self._copies(p.pack)) for p in part.sends),
                receives=tuple((p, self._slot(p.ref)) for p in part.receives),
                casts=self._copies(part.casts),
                calls=tuple(map(self._call, part.calls)),
                fillers=part.fillers,
                merges=tuple(self._merge(m) for m in part.merges if not m.late),
                late=tuple(self._merge(m) for m in part.merges if m.late),
            )
            for part in lowered.rounds
        )
        self.fillers = tuple(map(self._call, lowered.fillers))
        self.finals = self._copies(lowered.finals)
        self.empties = tuple((self._slot(ref), self._empty_value(ref)) for ref in lowered.empties)
        self._arena_address = -1
        self._arena_views: list[Tensor | None] = []

    def bind(self, externals: Sequence[Tensor], kept: Tensor | None) -> Views:
        """The views of one call. ``externals``: the caller's tensors, as ``lowered.externals`` names them."""
        arena = self.workspace.reserve(self.lowered.arena_bytes)
        if arena.data_ptr() != self._arena_address or not self._arena_views:
            self._arena_views = self._view_arena(arena)
            self._arena_address = arena.data_ptr()
        tensors: list[Tensor | None] = list(externals)
        if kept is not None and self.lowered.kept_bytes:
            tensors += [self._buffer(b, kept) if b.kept else None for b in self.lowered.buffers]
        return Views(self._refs, tensors, self._arena_views.copy())

    def _view_arena(self, arena: Tensor) -> list[Tensor | None]:
        first = len(self.lowered.externals)
        buffers = [None if b.kept else self._buffer(b, arena) for b in self.lowered.buffers]
        tensors = [None] * first + buffers
        found = [tensors[ref.tensor] for ref in self._refs]
        return [None if t is None else _slice(t, ref) for t, ref in zip(found, self._refs, strict=True)]

    def _buffer(self, buffer: Buffer, space: Tensor) -> Tensor:
        dtypes = {"model": self.dtype, "sum": self.sum_dtype, "wire": self.wire_dtype, "byte": torch.uint8}
        dtype = dtypes[buffer.width]
        shape = (buffer.rows, buffer.heads, self.geometry.head_dim) if buffer.has_dim else (buffer.rows, buffer.heads)
        size = dtype.itemsize
        for n in shape:
            size *= n
        return space[buffer.offset : buffer.offset + size].view(dtype).view(shape)

    # ------------------------------------------------------------ numbering

    def _slot(self, ref: Ref) -> Slot:
        if ref not in self._slots:
            self._slots[ref] = len(self._refs)
            self._refs.append(ref)
        return self._slots[ref]

    def _copies(self, copies: Sequence[Copy]) -> tuple[tuple[Slot, Slot], ...]:
        return tuple((self._slot(source), self._slot(target)) for source, target in copies)

    def _call(self, call: Call) -> BoundCall:
        first = call.first if not self.is_backward else (call.first[0], call.first[1], call.first[1])
        return BoundCall(
            shape=call.shape,
            inputs=tuple(map(self._slot, call.inputs)),
            sums=tuple(map(self._slot, call.sums)),
            first=first if self.is_backward else (first[0], first[0]),
            has_out=call.has_out,
            cuts=None if call.cuts is None else self._cut(*call.cuts),
        )

    def _cut(self, rows: tuple[int, ...], keys: tuple[int, ...]) -> Cuts:
        """``cu_seqlens`` of a call; one tensor for all calls that are cut alike."""
        for cuts in (rows, keys):
            if cuts not in self._cuts:
                self._cuts[cuts] = torch.tensor(cuts, dtype=torch.int32, device=self._device)
        longest = [max(b - a for a, b in pairwise(c)) for c in (rows, keys)]
        return self._cuts[rows], self._cuts[keys], longest[0], longest[1]

    def _merge(self, merge: Merge) -> BoundMerge:
        source, target = (tuple(map(self._slot, refs)) for refs in (merge.source, merge.target))
        return BoundMerge(is_partial=merge.kind is Kind.OUT, source=source, target=target, first=merge.first)

    def _empty_value(self, ref: Ref) -> float:
        return float("-inf") if not self.is_backward and ref.tensor in self.lowered.lse_tensors else 0.0


def _slice(tensor: Tensor, ref: Ref) -> Tensor:
    rows = tensor[ref.start : ref.stop]
    return rows if ref.heads is None else rows[:, ref.heads[0] : ref.heads[1]]
