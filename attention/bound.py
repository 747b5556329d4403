"""A lowered program bound to tensors: descriptors of all of them for tables of moves, and views of what kernels read.

Descriptors of buffers in the arena, and views into it, are the same for every layer, so they are made once for a program;
those of a layer's own tensors are made when they are first used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hdp.attention.backends import Backend
from hdp.attention.backends.protocol import Cut, Cuts
from hdp.attention.lowered import Call, Geometry, Lowered, Packet, Round, Rows, Space
from hdp.attention.moves import CODES, NO_RESULTS, describe, is_fused, run_on_cpu, run_with_torch

if TYPE_CHECKING:
    from hdp.attention.moves_triton import DeviceTable


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


@dataclass(frozen=True, slots=True, eq=False)
class BoundCall:
    """A call on numbered lists of views."""

    call: Call
    inputs: tuple[int, ...]
    results: np.ndarray
    """As the call's, with the numbers of results behind those of the program's tensors."""
    cuts: tuple[Cuts, ...]


@dataclass(frozen=True, slots=True)
class _Slot:
    """Rows of one tensor that a call reads, cut into its launches."""

    tensor: int
    heads: tuple[int, int] | None
    cut: Cut
    wide: bool


class Bound:
    """One rank's program in one direction, for one dtype and backend, with its place in the arena. Reused by all layers."""

    def __init__(
        self,
        lowered: Lowered,
        geometry: Geometry,
        dtype: torch.dtype,
        backend: Backend,
        workspace: Workspace,
        wire_dtype: torch.dtype | None = None,
    ) -> None:
        self.lowered, self.geometry, self.backend, self.workspace = lowered, geometry, backend, workspace
        self.dtype, self.wire_dtype = dtype, wire_dtype or dtype
        self.sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.is_backward, self.dense, self.sends_delta = lowered.is_backward, lowered.dense, lowered.sends_delta
        self.components = 3 if lowered.is_backward else 2
        """Tensors that a launch returns."""
        self._first = len(lowered.externals)
        self.tensors = self._first + len(lowered.buffers)
        self._device = workspace.storage.device
        self._slots: list[_Slot] = []
        self._numbers: dict[tuple[object, ...], int] = {}
        self._cu_seqlens: dict[bytes, Tensor] = {}
        self.rounds: tuple[Round, ...] = lowered.rounds
        self.calls = tuple(tuple(map(self._call, r.calls)) for r in lowered.rounds)
        self.fillers = tuple(map(self._call, lowered.fillers))
        self._template = self._describe_buffers()
        self._kept = np.flatnonzero([False] * self._first + [b.kept for b in lowered.buffers])
        self._arena = np.flatnonzero([False] * self._first + [not b.kept for b in lowered.buffers])
        self._offsets = np.array([0] * self._first + [b.offset for b in lowered.buffers], dtype=np.int64)
        self.fused = is_fused(self._device, dtype)
        """Whether tables of moves run as kernels (``hdp.attention.moves_triton``)."""
        self._device_tables: dict[tuple[int, int, int], DeviceTable] = {}
        self._address = -1
        self._arena_views: dict[int, list[Tensor]] = {}
        self._arena_spaces: dict[tuple[int, int], Tensor] = {}

    def _describe_buffers(self) -> np.ndarray:
        template = np.zeros((self.tensors, 4), dtype=np.int64)
        for number, buffer in enumerate(self.lowered.buffers, start=self._first):
            width = self.geometry.head_dim if buffer.has_dim else 1
            template[number, 1:] = buffer.heads * width, width, CODES[self.dtype_of(number)]
        return template

    def dtype_of(self, number: int) -> torch.dtype:
        """The dtype of the buffer with this number."""
        width = self.lowered.buffers[number - self._first].width
        kernel = self.sum_dtype if self.geometry.widens else self.dtype
        return {"model": self.dtype, "sum": self.sum_dtype, "wire": self.wire_dtype, "kernel": kernel}[width]

    def bind(self, externals: Sequence[Tensor], kept: Tensor | None) -> Binding:
        """The tensors of one call. ``externals``: the caller's, as ``lowered.externals`` names them."""
        arena = self.workspace.reserve(self.lowered.arena_bytes)
        if arena.data_ptr() != self._address:
            self._address = arena.data_ptr()
            self._arena_views, self._arena_spaces = {}, {}
            self._template[self._arena, 0] = self._offsets[self._arena] + self._address
        return Binding(self, externals, arena, kept, self._template.copy())

    def describe(self, descriptors: np.ndarray, externals: Sequence[Tensor], kept: Tensor | None) -> None:
        """Fills in what differs from layer to layer."""
        for number, tensor in enumerate(externals):
            if tensor.dim() > 1:
                descriptors[number] = describe(tensor)
        if kept is not None and len(self._kept):
            descriptors[self._kept, 0] = self._offsets[self._kept] + kept.data_ptr()

    # ------------------------------------------------------------ tables on a GPU

    @cached_property
    def _places(self) -> np.ndarray:
        """Memory, first byte and end of each tensor: the arena is memory 0, what is kept 1, the caller's each its own."""
        externals = [(2 + n, 0, 1) for n in range(self._first)]
        sizes = [b.rows * b.heads * (self.geometry.head_dim if b.has_dim else 1) for b in self.lowered.buffers]
        buffers = [
            (int(b.kept), b.offset, b.offset + size * self.dtype_of(n).itemsize)
            for n, (b, size) in enumerate(zip(self.lowered.buffers, sizes, strict=True), start=self._first)
        ]
        return np.array([*externals, *buffers], dtype=np.int64).reshape(-1, 3)

    @cached_property
    def most_results(self) -> int:
        """Tensors that the call with the most launches returns."""
        calls = [call for part in (*self.calls, self.fillers) for call in part]
        return max((call.call.launches for call in calls), default=0) * self.components

    def device_table(self, table: np.ndarray, first: int = 0, last: int | None = None) -> DeviceTable:
        """Moves [first, last) of one of the program's tables, on the device. Made once."""
        from hdp.attention.moves_triton import on_device

        stop = len(table) if last is None else last
        key = id(table), first, stop  # the program keeps its tables
        if key not in self._device_tables:
            self._device_tables[key] = on_device(table[first:stop], self._places, self._template[:, 3], self._device)
        return self._device_tables[key]

    # ------------------------------------------------------------ numbering

    def _call(self, call: Call) -> BoundCall:
        results = call.results.copy()
        results[:, 1] += self.tensors
        results[results[:, 10] >= 0, 10] += self.tensors
        inputs = tuple(self._slot(rows, call.wide) for rows in call.inputs)
        return BoundCall(call, inputs, results, tuple(self._cut(*c) for c in call.cuts))

    def _slot(self, rows: Rows, wide: bool) -> int:
        key = rows.tensor, rows.heads, rows.starts.tobytes(), rows.stops.tobytes(), wide
        if key not in self._numbers:
            self._numbers[key] = len(self._slots)
            self._slots.append(_Slot(rows.tensor, rows.heads, Cut.of(rows.starts, rows.stops), wide))
        return self._numbers[key]

    def _cut(self, rows: np.ndarray, keys: np.ndarray) -> Cuts:
        """``cu_seqlens`` of a launch; one tensor for all that are cut alike."""
        for cuts in (rows, keys):
            if cuts.tobytes() not in self._cu_seqlens:
                self._cu_seqlens[cuts.tobytes()] = torch.from_numpy(cuts).to(self._device)
        longest = [max(b - a for a, b in pairwise(c.tolist())) for c in (rows, keys)]
        return self._cu_seqlens[rows.tobytes()], self._cu_seqlens[keys.tobytes()], longest[0], longest[1]

    # ------------------------------------------------------------ tensors

    def buffer(self, number: int, space: Tensor) -> Tensor:
        """A buffer, in the arena's bytes or in those that are kept."""
        buffer, dtype = self.lowered.buffers[number - self._first], self.dtype_of(number)
        shape = (buffer.rows, buffer.heads, self.geometry.head_dim) if buffer.has_dim else (buffer.rows, buffer.heads)
        size = dtype.itemsize
        for n in shape:
            size *= n
        return space[buffer.offset : buffer.offset + size].view(dtype).view(shape)

    def is_in_arena(self, number: int) -> bool:
        return number >= self._first and not self.lowered.buffers[number - self._first].kept


class Binding:
    """The tensors of one call of the operator."""

    def __init__(
        self, program: Bound, externals: Sequence[Tensor], arena: Tensor, kept: Tensor | None, descriptors: np.ndarray
    ) -> None:
        self.program, self._externals, self._arena, self._kept = program, externals, arena, kept
        self.descriptors = descriptors
        self.is_on_cpu = arena.device.type == "cpu" and not program.fused
        if self.is_on_cpu or program.fused:
            program.describe(descriptors, externals, kept)
        self._views: dict[int, list[Tensor]] = {}
        self._tensors: dict[int, Tensor] = {}

    def move(self, table: np.ndarray) -> None:
        """Runs a table of moves between the program's tensors."""
        if not len(table):
            return
        if self.is_on_cpu:
            run_on_cpu(self.descriptors, NO_RESULTS, table, self.program.geometry.head_dim)
        elif self.program.fused:
            self._run_fused(self.program.device_table(table))
        else:
            run_with_torch(self.tensor, table)

    def _run_fused(self, table: DeviceTable) -> None:
        from hdp.attention.moves_triton import run_on_device

        run_on_device(self._on_device, table, self.program.geometry.head_dim)

    @cached_property
    def _on_device(self) -> Tensor:
        """Descriptors of the program's tensors, and room for those of results."""
        room = np.zeros((self.program.most_results, 4), dtype=np.int64)
        return torch.from_numpy(np.concatenate([self.descriptors, room])).to(self._arena.device)

    def move_results(self, bound: BoundCall, results: Sequence[Tensor], first: int, last: int) -> None:
        """Puts what launches [first, last) of a call returned where it belongs."""
        begin, end = int(bound.call.bounds[first]), int(bound.call.bounds[last])
        skipped = first * self.program.components
        if self.is_on_cpu:
            row, head = self.program.backend.row_axis, 1
            found = np.zeros((skipped + len(results), 4), dtype=np.int64)
            found[skipped:] = [describe(t, row, head) for t in results]
            run_on_cpu(self.descriptors, found, bound.results, self.program.geometry.head_dim, begin, end)
            return
        before = self.program.tensors + skipped
        if self.program.fused:
            dense = [t if t.dim() < 3 or t.stride(-1) == 1 else t.contiguous() for t in results]
            row = self.program.backend.row_axis
            lying = torch.tensor([describe(t, row, 1) for t in dense], dtype=torch.int64)
            self._on_device[before : before + len(dense)].copy_(lying, non_blocking=True)
            if begin < end:
                self._run_fused(self.program.device_table(bound.results, begin, end))
            return

        def tensor(number: int) -> Tensor:
            return results[number - before] if number >= before else self.tensor(number)

        run_with_torch(tensor, bound.results[begin:end])

    def tensor(self, number: int) -> Tensor:
        """[rows, heads, head_dim] or [rows, heads]."""
        if number < len(self._externals):
            return self._externals[number]
        if number not in self._tensors:
            space = self._arena if self.program.is_in_arena(number) else self._kept
            assert space is not None
            self._tensors[number] = self.program.buffer(number, space)
        return self._tensors[number]

    def rows(self, slot: int) -> list[Tensor]:
        """What each launch of a call reads of one tensor, as the backend takes it."""
        program, one = self.program, self.program._slots[slot]
        in_arena = program.is_in_arena(one.tensor)
        views = program._arena_views if in_arena and not one.wide else self._views
        if slot in views:
            return views[slot]
        tensor = self.tensor(one.tensor)
        if one.heads is not None:
            tensor = tensor[:, one.heads[0] : one.heads[1]]
        if one.wide:
            found = program.backend.cut(
                tensor[one.cut.start : one.cut.stop].to(program.sum_dtype), one.cut.from_first()
            )
        else:
            found = program.backend.cut(tensor, one.cut)
        if not (in_arena and one.wide):  # what is cast is as large as what came: it goes with its call
            views[slot] = found
        return found

    def space(self, packet: Packet, space: Space) -> tuple[Packet, Tensor]:
        """What is sent, or filled, as bytes."""
        if space.tensor >= 0:
            return packet, self._externals[space.tensor][space.start : space.stop].view(-1).view(torch.uint8)
        if space.kept:
            assert self._kept is not None
            return packet, self._kept[space.start : space.stop]
        spaces, key = self.program._arena_spaces, (space.start, space.stop)
        if key not in spaces:
            spaces[key] = self._arena[space.start : space.stop]
        return packet, spaces[key]
