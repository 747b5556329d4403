"""A lowered program bound to tensors: descriptors of all of them for tables of moves, and views of what kernels read.

Descriptors of buffers in the arena, and views into it, are the same for every layer, so they are made once for a program.
Of a layer's own tensors only addresses are new: their strides are those of the layer before, and where they are not,
what follows from them is worked out again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hdp.attention.backends import Backend
from hdp.attention.backends.protocol import Cuts
from hdp.attention.channel import Parcel
from hdp.attention.lowered import Call, Geometry, Lowered, Packet, Round, Rows, Space
from hdp.attention.moves import CODES, describe, is_fused, run_on_cpu, run_results_on_cpu, run_with_torch
from hdp.attention.program import Heads
from hdp.attention.views import Cut, Recipe

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
    lies: dict[tuple[tuple[int, ...], ...], np.ndarray] = field(default_factory=dict)
    """By the strides of what launches return: elements from row to row and from head to head, and dtype, of each tensor."""


@dataclass(frozen=True, slots=True)
class _Slot:
    """Rows of one tensor that a call reads, cut into its launches."""

    tensor: int
    heads: Heads | None
    cut: Cut
    wide: bool
    in_arena: bool


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
        self._recipes: list[Recipe | None]
        """By slot: how views are made of a tensor that lies as that of the last call."""
        self._strides: list[tuple[int, ...]] = []
        """Of the caller's tensors in the last call."""
        self._numbers: dict[tuple[object, ...], int] = {}
        self._cu_seqlens: dict[bytes, Tensor] = {}
        self.rounds: tuple[Round, ...] = lowered.rounds
        self.calls = tuple(tuple(map(self._call, r.calls)) for r in lowered.rounds)
        self.fillers = tuple(map(self._call, lowered.fillers))
        self._recipes = [None] * len(self._slots)
        self._arena_views: list[list[Tensor] | None] = [None] * len(self._slots)
        self._template = self._describe_buffers()
        self._kept = np.flatnonzero([False] * self._first + [b.kept for b in lowered.buffers])
        self._arena = np.flatnonzero([False] * self._first + [not b.kept for b in lowered.buffers])
        offsets = np.array([0] * self._first + [b.offset for b in lowered.buffers], dtype=np.int64)
        self._kept_offsets, self._arena_offsets = offsets[self._kept], offsets[self._arena]
        self.fused = is_fused(self._device, dtype)
        """Whether tables of moves run as kernels (``hdp.attention.moves_triton``)."""
        self._device_tables: dict[tuple[int, int, int], DeviceTable] = {}
        self._address = -1
        self._arena_parcels: dict[int, tuple[list[Parcel], list[Parcel]]] = {}

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
            self._arena_views, self._arena_parcels = [None] * len(self._slots), {}
            self._template[self._arena, 0] = self._arena_offsets + self._address
        strides = [t.stride() for t in externals]
        if strides != self._strides:
            self._strides = strides
            self._lay_out(externals)
        descriptors = self._template.copy()
        descriptors[: self._first, 0] = [t.data_ptr() for t in externals]
        if kept is not None and len(self._kept):
            descriptors[self._kept, 0] = self._kept_offsets + kept.data_ptr()
        return Binding(self, externals, arena, kept, descriptors)

    def _lay_out(self, externals: Sequence[Tensor]) -> None:
        """Takes up how the caller's tensors lie; what was known of others is forgotten."""
        for number, tensor in enumerate(externals):
            if tensor.dim() > 1:
                self._template[number] = describe(tensor)
        for number, slot in enumerate(self._slots):
            if slot.tensor < self._first:
                self._recipes[number] = None

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
            cut, in_arena = Cut.of(rows.starts, rows.stops), self._is_in_arena(rows.tensor)
            self._slots.append(_Slot(rows.tensor, rows.heads, cut, wide, in_arena))
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

    def _is_in_arena(self, number: int) -> bool:
        return number >= self._first and not self.lowered.buffers[number - self._first].kept


class Binding:
    """The tensors of one call of the operator."""

    def __init__(
        self, program: Bound, externals: Sequence[Tensor], arena: Tensor, kept: Tensor | None, descriptors: np.ndarray
    ) -> None:
        self.program, self._externals, self._arena, self._kept = program, externals, arena, kept
        self.descriptors = descriptors
        self.is_on_cpu = arena.device.type == "cpu" and not program.fused
        self._views = program._arena_views.copy()
        self._tensors: dict[int, Tensor] = {}
        self._typed: dict[tuple[bool, torch.dtype], Tensor] = {}

    def move(self, table: np.ndarray) -> None:
        """Runs a table of moves between the program's tensors."""
        if not len(table):
            return
        if self.is_on_cpu:
            run_on_cpu(self.descriptors, table, self.program.geometry.head_dim)
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
            strides = tuple([t.stride() for t in results])
            if strides not in bound.lies:
                described = [describe(t, self.program.backend.row_axis)[1:] for t in results]
                bound.lies[strides] = np.array(described, dtype=np.int64).reshape(-1, 3)
            addresses, dim = [t.data_ptr() for t in results], self.program.geometry.head_dim
            run_results_on_cpu(
                self.descriptors, addresses, bound.lies[strides], skipped, bound.results, dim, begin, end
            )
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
            space = self._arena if self.program._is_in_arena(number) else self._kept
            assert space is not None
            self._tensors[number] = self.program.buffer(number, space)
        return self._tensors[number]

    def rows(self, slot: int) -> list[Tensor]:
        """What each launch of a call reads of one tensor, as the backend takes it."""
        found = self._views[slot]
        return self._make_views(slot) if found is None else found

    def _make_views(self, slot: int) -> list[Tensor]:
        program, one = self.program, self.program._slots[slot]
        recipe = program._recipes[slot] or self._learn(slot, one)
        if one.wide:
            found = recipe.views(self._widened(one))
            if one.in_arena:  # what is cast is as large as what came: it goes with its call
                return found
        elif one.tensor < len(self._externals):
            found = recipe.views(self._externals[one.tensor])
        else:
            found = recipe.views(self._typed_space(one))
        self._views[slot] = found
        if one.in_arena:
            program._arena_views[slot] = found
        return found

    def _learn(self, slot: int, one: _Slot) -> Recipe:
        backend = self.program.backend
        if one.wide:
            recipe = Recipe.of(self._widened(one), one.cut.from_first(), None, backend.lay, backend.row_axis)
        else:
            tensor = self.tensor(one.tensor)
            recipe = Recipe.of(tensor, one.cut, one.heads, backend.lay, backend.row_axis)
            if one.tensor >= len(self._externals):
                recipe = recipe.moved(int(tensor.storage_offset() - self._typed_space(one).storage_offset()))
        self.program._recipes[slot] = recipe
        return recipe

    def _widened(self, one: _Slot) -> Tensor:
        tensor = self.tensor(one.tensor)[one.cut.start : one.cut.stop]
        return (tensor if one.heads is None else tensor[:, one.heads[0] : one.heads[1]]).to(self.program.sum_dtype)

    def _typed_space(self, one: _Slot) -> Tensor:
        """The arena, or what is kept, in elements of a buffer."""
        key = one.in_arena, self.program.dtype_of(one.tensor)
        if key not in self._typed:
            space = self._arena if one.in_arena else self._kept
            assert space is not None
            self._typed[key] = space.view(key[1])
        return self._typed[key]

    def parcels(self, number: int) -> tuple[list[Parcel], list[Parcel]]:
        """What a round sends, and what it fills, as bytes."""
        found = self.program._arena_parcels.get(number)
        if found is None:
            part = self.program.rounds[number]
            found = [self._parcel(*p) for p in part.sends], [self._parcel(*p) for p in part.receives]
            if all(space.tensor < 0 and not space.kept for _, space in (*part.sends, *part.receives)):
                self.program._arena_parcels[number] = found
        return found

    def _parcel(self, packet: Packet, space: Space) -> Parcel:
        if space.tensor >= 0:
            return packet, self._externals[space.tensor][space.start : space.stop].view(-1).view(torch.uint8)
        memory = self._kept if space.kept else self._arena
        assert memory is not None
        return packet, memory[space.start : space.stop]
