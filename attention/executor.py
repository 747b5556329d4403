"""Runs lowered attention programs: posts, computes while bytes are in flight, merges, goes on.

The executor is a generator that yields whenever it has to wait, so one process can drive many virtual ranks in any order
(:func:`drive_together`); a real rank simply waits on its channel (:func:`drive`).
"""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hdp.attention.backends import Backend
from hdp.attention.channel import Channel, Parcel, VirtualNetwork
from hdp.attention.lowered import Buffer, Call, Geometry, Lowered, Merge, Packet, Ref, Round
from hdp.attention.merge import merge_partial
from hdp.attention.program import Kind


class Workspace:
    """The arena of one rank: bytes for received and travelling buffers, reused by every layer, direction and batch."""

    def __init__(self, device: torch.device) -> None:
        self.storage = torch.empty(0, dtype=torch.uint8, device=device)

    def reserve(self, size: int) -> Tensor:
        """At least ``size`` bytes; grows, never shrinks."""
        if self.storage.numel() < size:
            self.storage = torch.empty(size, dtype=torch.uint8, device=self.storage.device)
        return self.storage


@dataclass(frozen=True, kw_only=True)
class Wait:
    """What the executor waits for when it yields."""

    ticket: Any
    sends: bool
    """Wait until its sends may be overwritten; False: until its receives are there."""


Run = Generator[Wait, None, None]


class BoundProgram:
    """A lowered program with its arena views, for one dtype. Views are made once and reused by all layers."""

    def __init__(self, lowered: Lowered, geometry: Geometry, dtype: torch.dtype, workspace: Workspace) -> None:
        self.lowered, self.geometry, self.dtype, self.workspace = lowered, geometry, dtype, workspace
        self.sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self._arena_address = -1
        self._arena_views: list[Tensor | None] = []

    @property
    def sends_delta(self) -> bool:
        return any(p.what == "delta" for r in self.lowered.rounds for p in r.sends)

    def bind(self, externals: Sequence[Tensor], kept: Tensor | None) -> list[Tensor]:
        """All tensors by number: the caller's, then the buffers."""
        arena = self.workspace.reserve(self.lowered.arena_bytes)
        if arena.data_ptr() != self._arena_address:
            self._arena_views = [None if b.kept else self._view(b, arena) for b in self.lowered.buffers]
            self._arena_address = arena.data_ptr()
        tensors = list(externals)
        for buffer, view in zip(self.lowered.buffers, self._arena_views, strict=True):
            if view is None:
                assert kept is not None
                view = self._view(buffer, kept)
            tensors.append(view)
        return tensors

    def _view(self, buffer: Buffer, space: Tensor) -> Tensor:
        dtype = self.sum_dtype if buffer.is_sum else self.dtype
        shape = (buffer.rows, buffer.heads, self.geometry.head_dim) if buffer.has_dim else (buffer.rows, buffer.heads)
        size = dtype.itemsize
        for n in shape:
            size *= n
        return space[buffer.offset : buffer.offset + size].view(dtype).view(shape)


class Executor:
    """Runs bound programs with one backend over one channel."""

    def __init__(self, backend: Backend, channel: Channel) -> None:
        self.backend, self.channel = backend, channel

    def forward(self, program: BoundProgram, tensors: list[Tensor], scale: float, serial: tuple[int, ...]) -> Run:
        """``tensors`` from :meth:`BoundProgram.bind`; ``serial`` is the same on all sharers and new for every call."""
        return self._run(program, tensors, scale, serial, backward=False)

    def backward(self, program: BoundProgram, tensors: list[Tensor], scale: float, serial: tuple[int, ...]) -> Run:
        """As :meth:`forward`; if ``program.sends_delta``, the tensor ``delta`` must hold sum(do * out)."""
        return self._run(program, tensors, scale, serial, backward=True)

    def _run(
        self, program: BoundProgram, tensors: list[Tensor], scale: float, serial: tuple[int, ...], backward: bool
    ) -> Run:
        lowered = program.lowered
        previous: Any = None
        for number, part in enumerate(lowered.rounds):
            for ref in part.fills:
                _empty(tensors, ref, lowered)
            ticket = self._post(part, tensors, (*serial, backward, number))
            for call in (*part.calls, *part.fillers):
                if backward:
                    self._backward_call(call, tensors, scale)
                else:
                    self._forward_call(call, tensors, scale)
            if ticket is not None and part.receives:
                yield Wait(ticket=ticket, sends=False)
                self.channel.wait_receives(ticket)
            if previous is not None:  # see [Note: arena]: a sent buffer lives one step longer
                yield Wait(ticket=previous, sends=True)
                self.channel.wait_sends(previous)
            previous = ticket if part.sends else None
            for merge in part.merges:
                _merge(merge, tensors)
        if previous is not None:
            yield Wait(ticket=previous, sends=True)
            self.channel.wait_sends(previous)
        for ref in lowered.empties:
            _empty(tensors, ref, lowered)
        for source, target in lowered.finals:
            _slice(tensors, target).copy_(_slice(tensors, source))

    def _post(self, part: Round, tensors: list[Tensor], serial: tuple[int, ...]) -> Any:
        if not part.sends and not part.receives:
            return None
        sends = [(packet, _packed(packet, tensors)) for packet in part.sends]
        receives: list[Parcel] = [(packet, _slice(tensors, packet.ref)) for packet in part.receives]
        tag = zlib.crc32(struct.pack(f"<{len(serial)}q", *serial)) & 0x7FFFFFFF
        return self.channel.post(sends, receives, tag)

    def _forward_call(self, call: Call, tensors: list[Tensor], scale: float) -> None:
        q, k, v = (_slice(tensors, ref) for ref in call.inputs)
        out, lse = (_slice(tensors, ref) for ref in call.sums)
        partial, partial_lse = self.backend.forward(q, k, v, call.shape, scale)
        if call.first[0]:
            out.copy_(partial)
            lse.copy_(partial_lse)
        else:
            merge_partial(out, lse, partial, partial_lse)

    def _backward_call(self, call: Call, tensors: list[Tensor], scale: float) -> None:
        q, k, v, do, lse, last = (_slice(tensors, ref) for ref in call.inputs)
        out, delta = (last, None) if call.has_out else (None, last)
        partials = self.backend.backward(do, q, k, v, lse, out, delta, call.shape, scale)
        flags = (call.first[0], call.first[1], call.first[1])
        for ref, partial, first in zip(call.sums, partials, flags, strict=True):
            if first:
                _slice(tensors, ref).copy_(partial)
            else:
                _slice(tensors, ref).add_(partial)


def _slice(tensors: list[Tensor], ref: Ref) -> Tensor:
    rows = tensors[ref.tensor][ref.start : ref.stop]
    return rows if ref.heads is None else rows[:, ref.heads[0] : ref.heads[1]]


def _packed(packet: Packet, tensors: list[Tensor]) -> Tensor:
    target = _slice(tensors, packet.ref)
    row = 0
    for piece in packet.pack:
        source = _slice(tensors, piece)
        target[row : row + source.shape[0]].copy_(source)
        row += source.shape[0]
    return target


def _empty(tensors: list[Tensor], ref: Ref, lowered: Lowered) -> None:
    is_lse = not lowered.is_backward and ref.tensor in lowered.lse_tensors
    _slice(tensors, ref).fill_(float("-inf") if is_lse else 0.0)


def _merge(merge: Merge, tensors: list[Tensor]) -> None:
    source = [_slice(tensors, ref) for ref in merge.source]
    target = [_slice(tensors, ref) for ref in merge.target]
    if merge.first:
        for to, of in zip(target, source, strict=True):
            to.copy_(of)
    elif merge.kind is Kind.OUT:
        merge_partial(target[0], target[1], source[0], source[1])
    else:
        for to, of in zip(target, source, strict=True):
            to.add_(of)


def drive(run: Run, channel: Channel) -> None:
    """Runs to the end on a real rank: every wait blocks on the channel."""
    for wait in run:
        if wait.sends:
            channel.wait_sends(wait.ticket)
        else:
            channel.wait_receives(wait.ticket)


def drive_together(runs: dict[int, Run], network: VirtualNetwork, seed: int = 0) -> None:
    """Runs virtual ranks to the end in an order drawn from ``seed``. Raises RuntimeError when all of them wait."""
    draw = random.Random(seed)
    waits: dict[int, Wait | None] = dict.fromkeys(runs)
    while waits:
        ready = [rank for rank, wait in waits.items() if wait is None or _is_over(wait)]
        if ready and (draw.random() < 0.5 or not network.deliver_one()):
            rank = draw.choice(ready)
            try:
                waits[rank] = next(runs[rank])
            except StopIteration:
                del waits[rank]
        elif not ready and not network.deliver_one():
            raise RuntimeError(f"virtual ranks {sorted(waits)} wait for each other")


def _is_over(wait: Wait) -> bool:
    return wait.ticket.sends == 0 if wait.sends else not wait.ticket.receives
