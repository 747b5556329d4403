"""The route of a micro-batch: which shards lie where in its packed tokens, and the programs that follow from it.

A route is made once per micro-batch and handed to every attention call explicitly. It lowers its programs on first use,
per layer geometry (heads, head_dim, dtype, mask, direction), and all layers, backward and recomputation reuse them.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hdp.attention.auto import Chooser, parse_schedule, resolve
from hdp.attention.backends import Backend, backend_names, resolve_backend
from hdp.attention.bound import Bound, Workspace
from hdp.attention.calls import Calls
from hdp.attention.channel import Channel
from hdp.attention.executor import Executor
from hdp.attention.layout import parse_layout
from hdp.attention.lower import Task, lower
from hdp.attention.lowered import Geometry, Lowered
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount
from hdp.attention.tasks import Part, tasks_of


@dataclass(frozen=True, kw_only=True)
class RouteShard:
    """This rank's part of one sequence."""

    sequence: int
    """Its number, the same on all sharers."""
    length: int
    """Tokens of the whole sequence."""
    group: tuple[int, ...]
    """Ranks that share it, in ring order."""
    schedule: str = "local"
    """Of forward (``hdp.attention.schedules``, or ``"auto"``); ``local`` serves a group of one rank only."""
    schedule_backward: str | None = None
    """None: as forward."""
    layout: str = "zigzag"
    """Which tokens are whose (``hdp.attention.layout``)."""

    @property
    def names(self) -> tuple[str, str]:
        """Forward and backward schedule."""
        return self.schedule, self.schedule if self.schedule_backward is None else self.schedule_backward


WIRE_DTYPES = (torch.bfloat16, torch.float16)


def check_options(backend: str, wire_dtype: torch.dtype | None, schedule: str | None) -> None:
    """Raises ValueError for what no :class:`AttentionRuntime` can be made with."""
    if backend not in backend_names():
        raise ValueError(f"unknown attention backend {backend!r}: choose one of {', '.join(backend_names())}")
    if wire_dtype is not None and wire_dtype not in WIRE_DTYPES:
        raise ValueError(f"wire_dtype is {wire_dtype!r}: choose torch.bfloat16, torch.float16 or None")
    if schedule is not None:
        parse_schedule(schedule)


class AttentionRuntime:
    """What all routes of a process share: its rank, channel, arena and backend.

    Args:
        rank: of the world. channel: to the other ranks.
        device: where attention runs.
        backend: name of the attention backend (see ``hdp.attention.backends``).
        chooser: resolves the schedule ``"auto"``.
        wire_dtype: bf16 or fp16: q, k, v of an fp32 model travel so, at half the bytes; None: as the model computes.
        schedule: see :attr:`schedule`.

    Raises:
        ValueError: an unknown backend or schedule, or a wire dtype that saves nothing.
    """

    def __init__(
        self,
        rank: int,
        channel: Channel,
        device: torch.device,
        backend: str = "auto",
        wire_dtype: torch.dtype | None = None,
        chooser: Chooser | None = None,
        schedule: str | None = None,
    ) -> None:
        check_options(backend, wire_dtype, schedule)
        self.rank, self.channel, self.device, self.backend_name = rank, channel, device, backend
        self.wire_dtype, self.chooser = wire_dtype, chooser
        self.schedule = schedule
        self.ranks_per_node: int | None = None
        """Ranks r with the same r // ranks_per_node share a node; None: all do. The same on all ranks."""
        self.workspace = Workspace(device)
        self._executors: dict[torch.dtype, Executor] = {}

    @property
    def schedule(self) -> str | None:
        """Schedule of all shared sequences, whatever the plan says: a name, two joined by "/" (forward/backward), or "auto".
        None: the plan's. Raises ValueError when it is set to another name."""
        return self._schedule

    @schedule.setter
    def schedule(self, name: str | None) -> None:
        self._fixed = None if name is None else parse_schedule(name)
        self._schedule = name

    def schedules(self, shard: RouteShard, key: LayerKey, chooser: Chooser | None = None) -> tuple[str, str]:
        """Forward and backward schedule of a sequence, as this runtime runs it; ``chooser`` counts where the runtime has none.
        Raises ValueError if ``"auto"`` cannot be resolved."""
        if len(shard.group) == 1:
            return "local", "local"
        try:
            return resolve(
                self._fixed or shard.names,
                self.chooser or chooser,
                length=shard.length,
                group=shard.group,
                layout=shard.layout,
                geometry=key.geometry(self.wire_dtype_for(key.dtype)),
                mask=key.mask,
            )
        except ValueError as error:
            raise ValueError(f"sequence {shard.sequence}: {error}") from error

    def executor(self, dtype: torch.dtype) -> Executor:
        """Runs programs of this dtype. Raises ValueError if no backend, or not the one asked for, can."""
        if dtype not in self._executors:
            backend = resolve_backend(self.backend_name, self.device, dtype)
            self._executors[dtype] = Executor(backend, self.channel)
        return self._executors[dtype]

    def backend(self, dtype: torch.dtype) -> Backend:
        """The backend for this dtype."""
        return self.executor(dtype).backend

    def wire_dtype_for(self, dtype: torch.dtype) -> torch.dtype | None:
        """The dtype in which q, k, v of this dtype travel, if it is another; float64 stays exact."""
        return self.wire_dtype if dtype == torch.float32 else None

    @property
    def peak_bytes(self) -> int:
        """Size of the arena: the most that received and travelling buffers of a program have needed."""
        return self.workspace.peak_bytes


def check_shards(shards: Sequence[RouteShard], rank: int) -> None:
    """Raises ValueError for shards that cannot lie in one micro-batch of ``rank``.

    All sharers must list their common sequences in one order: rounds follow it, and another order on one rank would let it
    take one sequence's keys for another's.
    """
    before: int | None = None
    for shard in shards:
        where = f"sequence {shard.sequence}"
        if before is not None and shard.sequence <= before:
            what = "is listed twice" if shard.sequence == before else f"is listed after sequence {before}"
            raise ValueError(
                f"{where} {what}: give each sequence once, in ascending order, as on every rank that shares it"
            )
        before = shard.sequence
        if shard.length < 0:
            raise ValueError(f"{where} has length {shard.length}: give the tokens of the whole sequence, 0 or more")
        if len(set(shard.group)) < len(shard.group):
            raise ValueError(f"{where} is shared by ranks {shard.group}: name every rank once")
        if rank not in shard.group:
            raise ValueError(
                f"{where} is shared by ranks {shard.group}, and this is rank {rank}: list only what this rank has a part of"
            )


@dataclass(frozen=True, kw_only=True)
class LayerKey:
    """What of an attention call decides its program."""

    heads: HeadCount
    head_dim: int
    dtype: torch.dtype
    mask: Mask

    def geometry(self, wire_dtype: torch.dtype | None = None, *, widens: bool = False) -> Geometry:
        size = self.dtype.itemsize
        wire = None if wire_dtype is None else wire_dtype.itemsize
        return Geometry(
            heads=self.heads,
            head_dim=self.head_dim,
            model_bytes=size,
            sum_bytes=max(size, 4),
            wire_bytes=wire,
            widens=widens and size < 4,
        )


class Route:
    """One micro-batch's attention on this rank. Keep it alive until the backward pass is over.

    Args:
        runtime: the process's runtime.
        shards: this rank's shards in the order of their packed tokens; ascending sequence, as on every sharer.
        serial: numbers that tell this micro-batch from others and are the same on all sharers, e.g. (step, slot).
        chooser: resolves the schedule ``"auto"`` where the runtime has no chooser; the same on all sharers.

    Raises:
        ValueError: shards out of order, a group that this rank is no member of or that names a rank twice, a negative length.
    """

    def __init__(
        self,
        runtime: AttentionRuntime,
        shards: Sequence[RouteShard],
        serial: tuple[int, ...] = (0,),
        chooser: Chooser | None = None,
    ) -> None:
        self.runtime, self.shards, self.serial, self.chooser = runtime, tuple(shards), serial, chooser
        check_shards(self.shards, runtime.rank)
        self.calls = Calls()
        """Names of the attention calls on this route, and the order in which they ran."""
        self._programs: dict[tuple[LayerKey, bool], Bound] = {}
        row = 0
        for shard in self.shards:
            parse_layout(shard.layout)
            size = len(shard.group)
            row += shard.length // size + (shard.group.index(runtime.rank) < shard.length % size)
        self.tokens = row
        """Rows of this rank's packed tensors. A plain attribute: torch.compile cannot read a cached property."""
        self.handle = ROUTES.add(self)
        """int64 tensor of one element: how the route travels through the custom op."""

    def program(self, key: LayerKey, backward: bool) -> Bound:
        """This rank's program of one direction, lowered on first use."""
        if (key, backward) not in self._programs:
            runtime = self.runtime
            backend, wire = runtime.backend(key.dtype), runtime.wire_dtype_for(key.dtype)
            lowered, geometry = self.lowered(key, backward), self._geometry(key)
            self._programs[key, backward] = Bound(lowered, geometry, key.dtype, backend, runtime.workspace, wire)
        return self._programs[key, backward]

    def lowered(self, key: LayerKey, backward: bool) -> Lowered:
        """The program as data, before it is bound to tensors."""
        runtime = self.runtime
        packs = runtime.backend(key.dtype).packs
        return lower(self._tasks(key, backward), self._geometry(key), backward, runtime.ranks_per_node, packs=packs)

    def _geometry(self, key: LayerKey) -> Geometry:
        runtime = self.runtime
        backend = runtime.backend(key.dtype)
        return key.geometry(runtime.wire_dtype_for(key.dtype), widens=backend.widens)

    def _tasks(self, key: LayerKey, backward: bool) -> list[Task]:
        """The micro-batch's sequences, those of one group, structure and schedule together."""
        parts = [
            Part(
                sequence=shard.sequence,
                length=shard.length,
                group=shard.group,
                layout=shard.layout,
                names=self.schedules(shard, key),
            )
            for shard in self.shards
        ]
        return tasks_of(parts, self.runtime.rank, key.mask, backward)

    def schedules(self, shard: RouteShard, key: LayerKey) -> tuple[str, str]:
        """Forward and backward schedule of one sequence, ``"auto"`` resolved. Raises ValueError if it cannot be."""
        return self.runtime.schedules(shard, key, self.chooser)


class RouteRegistry:
    """Routes by number: custom ops take tensors, not objects. Holds no route alive."""

    def __init__(self) -> None:
        self._routes: weakref.WeakValueDictionary[int, Route] = weakref.WeakValueDictionary()
        self._numbers = itertools.count(1)

    def add(self, route: Route) -> Tensor:
        number = next(self._numbers)
        self._routes[number] = route
        return torch.tensor([number], dtype=torch.int64)

    def get(self, number: int) -> Route:
        """The route behind a handle's number. Raises RuntimeError if it is gone."""
        route = self._routes.get(number)
        if route is None:
            raise RuntimeError(
                f"attention route {number} is gone: keep the route of a micro-batch until its backward is over"
            )
        return route


ROUTES = RouteRegistry()
