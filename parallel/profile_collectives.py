"""Collectives of sharded training, and how much of messages hides behind computing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from hdp.parallel.measure_links import PIECE
from hdp.parallel.metrics import gather_numbers
from hdp.parallel.profile_host import Clock
from hdp.parallel.world import World

ROUNDS = 6
MESSAGE = 1 << 20
"""Bytes of the message that computing hides."""


def collective_rates(world: World, clock: Clock, rounds: int = ROUNDS) -> tuple[float, float, float, float]:
    """Bytes per second of an all-gather and of a reduce-scatter, the ways of sharded training; seconds of the host a byte.

    A GPU's collectives take nothing from what is computed beside them.
    """
    if world.world_size == 1:
        return 0.0, 0.0, 0.0, 0.0
    count = (1 << 18) // world.world_size * world.world_size
    whole = torch.zeros(count, device=world.device)
    part = torch.zeros(count // world.world_size, device=world.device)
    rates, host = [], []
    for call, arguments in (
        (_call("all_gather_single", "all_gather_into_tensor"), (whole, part)),
        (_call("reduce_scatter_single", "reduce_scatter_tensor"), (part, whole)),
    ):
        times, works = [], []
        for _ in range(rounds + 1):
            dist.barrier(group=world.control)
            begin, start = clock(), time.perf_counter()
            call(*arguments, group=world.channel.lanes[0])
            _synchronize(world.device)
            times.append(time.perf_counter() - start)
            works.append(clock() - begin)
        seconds, work = _means(world, statistics.median(times[1:]), statistics.median(works[1:]))
        rates.append(4.0 * count / seconds)
        host.append(work / (4.0 * count) if world.device.type == "cpu" else 0.0)
    return rates[0], rates[1], host[0], host[1]


def measure_overlap(world: World, rounds: int = ROUNDS) -> float:
    """How much of the shorter hides when a message and matrix products of about equal time run at once."""
    if world.world_size == 1:
        return 1.0
    alone = statistics.median(_exchange(world) for _ in range(rounds))
    matrix = torch.randn(256, 256, device=world.device)

    def compute(times: int) -> float:
        _synchronize(world.device)
        start = time.perf_counter()
        for _ in range(times):
            torch.mm(matrix, matrix)
        _synchronize(world.device)
        return time.perf_counter() - start

    compute(8)
    times = max(int(64 * alone / compute(64)), 1)
    computing = statistics.median(compute(times) for _ in range(rounds))
    both = statistics.median(_exchange(world, lambda: compute(times)) for _ in range(rounds))
    alone, computing, both = _means(world, alone, computing, both)
    return min(max((alone + computing - both) / min(alone, computing), 0.0), 1.0)


def _exchange(world: World, meanwhile: Callable[[], object] | None = None) -> float:
    """Seconds of a message to the next rank and one from the previous, with something computed meanwhile."""
    outgoing = torch.zeros(MESSAGE, dtype=torch.uint8, device=world.device)
    incoming = torch.empty_like(outgoing)
    lane: Any = world.channel.lanes[0]
    to, source = (world.rank + 1) % world.world_size, (world.rank - 1) % world.world_size
    dist.barrier(group=world.control)
    start = time.perf_counter()
    operations = [dist.P2POp(dist.irecv, part, source, group=lane) for part in incoming.split(PIECE)]
    operations += [dist.P2POp(dist.isend, part, to, group=lane) for part in outgoing.split(PIECE)]
    works = dist.batch_isend_irecv(operations)
    if meanwhile is not None:
        meanwhile()
    for work in works:
        work.wait()
    _synchronize(world.device)
    return time.perf_counter() - start


def _means(world: World, *numbers: float) -> list[float]:
    """Over ranks, equal on all of them."""
    found: list[float] = gather_numbers(world, *numbers).mean(0).tolist()
    return found


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _call(new: str, old: str) -> Callable[..., Any]:
    """A collective of torch.distributed by its newer name where it has one."""
    return getattr(dist, new, None) or getattr(dist, old)
