"""The route of a micro-batch: which shards lie where in its packed tokens, and the programs that follow from it.

A route is made once per micro-batch and handed to every attention call explicitly. It lowers its programs on first use,
per layer geometry (heads, head_dim, dtype, mask, direction), and all layers, backward and recomputation reuse them.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hdp.attention.backends import Backend, resolve_backend
from hdp.attention.channel import Channel
from hdp.attention.executor import BoundProgram, Executor, Workspace
from hdp.attention.layout import make_layout
from hdp.attention.lower import Task, lower
from hdp.attention.lowered import Geometry, Lowered
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount
from hdp.attention.schedules import get_schedule


@dataclass(frozen=True, kw_only=True)
class RouteShard:
    """This rank's part of one sequence."""

    sequence: int
    length: int
    """Tokens of the whole sequence."""
    group: tuple[int, ...]
    """Ranks that share it, in ring order."""
    schedule: str = "local"
    schedule_backward: str = "local"
    layout: str = "zigzag"


class AttentionRuntime:
    """What all routes of a process share: its rank, channel, arena and backend."""

    def __init__(self, rank: int, channel: Channel, device: torch.device, backend: str = "auto") -> None:
        self.rank, self.channel, self.device, self.backend_name = rank, channel, device, backend
        self.workspace = Workspace(device)
        self._executors: dict[torch.dtype, Executor] = {}

    def executor(self, dtype: torch.dtype) -> Executor:
        if dtype not in self._executors:
            self._executors[dtype] = Executor(self.backend(dtype), self.channel)
        return self._executors[dtype]

    def backend(self, dtype: torch.dtype) -> Backend:
        """The backend for this dtype. Raises ValueError if none, or not the one asked for, runs here."""
        return resolve_backend(self.backend_name, self.device, dtype)


@dataclass(frozen=True, kw_only=True)
class LayerKey:
    """What of an attention call decides its program."""

    heads: HeadCount
    head_dim: int
    dtype: torch.dtype
    mask: Mask

    @property
    def geometry(self) -> Geometry:
        size = self.dtype.itemsize
        return Geometry(heads=self.heads, head_dim=self.head_dim, model_bytes=size, sum_bytes=max(size, 4))


class Route:
    """One micro-batch's attention on this rank. Keep it alive until the backward pass is over.

    Args:
        runtime: the process's runtime.
        shards: this rank's shards in the order of their packed tokens; ascending sequence, as on every sharer.
        serial: numbers that tell this micro-batch from others and are the same on all sharers, e.g. (step, slot).
    """

    def __init__(self, runtime: AttentionRuntime, shards: Sequence[RouteShard], serial: tuple[int, ...] = (0,)) -> None:
        self.runtime, self.shards, self.serial = runtime, tuple(shards), serial
        self._calls = {False: itertools.count(), True: itertools.count()}
        self._programs: dict[tuple[LayerKey, bool], BoundProgram] = {}
        self.handle = ROUTES.add(self)
        """int64 tensor of one element: how the route travels through the custom op."""

    @cached_property
    def tokens(self) -> int:
        """Rows of this rank's packed tensors."""
        return sum(self._layout(s).shard_tokens(s.group.index(self.runtime.rank)) for s in self.shards)

    def next_serial(self, backward: bool) -> tuple[int, ...]:
        return (*self.serial, next(self._calls[backward]))

    def program(self, key: LayerKey, backward: bool) -> BoundProgram:
        if (key, backward) not in self._programs:
            lowered = self.lowered(key, backward)
            self._programs[key, backward] = BoundProgram(lowered, key.geometry, key.dtype, self.runtime.workspace)
        return self._programs[key, backward]

    def lowered(self, key: LayerKey, backward: bool) -> Lowered:
        tasks, row = [], 0
        for shard in self.shards:
            layout, member = self._layout(shard), shard.group.index(self.runtime.rank)
            make = get_schedule(shard.schedule_backward).backward if backward else get_schedule(shard.schedule).forward
            tasks.append(
                Task(
                    sequence=shard.sequence,
                    layout=layout,
                    group=shard.group,
                    member=member,
                    row=row,
                    program=make(layout, key.mask, key.heads, member),
                    mask=key.mask,
                )
            )
            row += layout.shard_tokens(member)
        return lower(tasks, key.geometry, backward)

    @staticmethod
    def _layout(shard: RouteShard):  # noqa: ANN205 - Layout
        return make_layout(shard.layout, shard.length, len(shard.group))


class RouteRegistry:
    """Routes by number: custom ops take tensors, not objects. Holds no route alive."""

    def __init__(self) -> None:
        self._routes: weakref.WeakValueDictionary[int, Route] = weakref.WeakValueDictionary()
        self._numbers = itertools.count(1)

    def add(self, route: Route) -> Tensor:
        number = next(self._numbers)
        self._routes[number] = route
        return torch.tensor([number], dtype=torch.int64)

    def get(self, handle: Tensor) -> Route:
        """The route behind a handle. Raises RuntimeError if it is gone."""
        route = self._routes.get(int(handle.item()))
        if route is None:
            raise RuntimeError(
                f"attention route {int(handle.item())} is gone: keep the route of a micro-batch until its backward is over"
            )
        return route


ROUTES = RouteRegistry()
