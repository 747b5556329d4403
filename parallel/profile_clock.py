"""The CPU quota of the container that a rank runs in, and a clock of the host that stands still while it waits.

A container with a quota throttles its threads for the rest of a period once they have used it up. How much that is, is measured
by computing without a pause: the same in every kind of container, and what a rank is left with where several share one.
"""

from __future__ import annotations

import hashlib
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from hdp.parallel.world import World

SECONDS = 0.6
"""For which computing is watched, twice."""
PAUSE = 1e-3
"""Seconds without progress that may be throttling."""
LEAST_PAUSES = 4
FULL = 0.95
"""Of what the threads could compute: beyond it nothing holds them back."""
MORE = 1.15
"""Times as much that twice as many threads would compute, at least, if others and not a quota held them back."""


@dataclass(frozen=True, kw_only=True)
class Quota:
    """What a rank may compute."""

    period: float = 0.0
    """Seconds; 0: no quota."""
    cores: float = 0.0
    """Seconds of CPU in each second."""

    def share(self, threads: int) -> float:
        """Part of each period for which ``threads`` threads that compute without a pause run, up to 1."""
        return min(self.cores / threads, 1.0) if self.period else 1.0


NO_QUOTA = Quota()


def measure_quota(world: World, threads: int) -> Quota:
    """Of this rank, when all compute with ``threads`` threads each; mean over ranks. ``NO_QUOTA`` unless all have one."""
    found = measure_own_quota(world, threads)
    sums = torch.tensor([found.period, found.cores, float(found.period > 0)], dtype=torch.float64)
    dist.all_reduce(sums, group=world.control)
    period, cores, ranks = (sums / world.world_size).tolist()
    return Quota(period=period, cores=cores) if ranks == 1.0 else NO_QUOTA


def measure_own_quota(world: World, threads: int) -> Quota:
    """Of this rank alone, when all compute with ``threads`` threads each; a collective. Ranks may differ."""
    dist.barrier(group=world.control)
    once = watch(threads)
    dist.barrier(group=world.control)
    return judge(once, watch(2 * threads), threads)


@dataclass(frozen=True, kw_only=True)
class Watched:
    """Threads that computed without a pause of their own."""

    cores: float
    """Seconds of CPU that they got in each second."""
    pauses: tuple[float, ...]
    """When they went on after each pause, in seconds."""


def judge(once: Watched, twice: Watched, threads: int) -> Quota:
    """``once``: with as many threads; ``twice``: with twice as many, which share a quota but not busy cores."""
    if once.cores > FULL * threads or twice.cores > MORE * once.cores or len(once.pauses) < LEAST_PAUSES:
        return NO_QUOTA
    gaps = [b - a for a, b in zip(once.pauses, once.pauses[1:], strict=False)]
    return Quota(period=statistics.median(gaps), cores=once.cores)


def watch(threads: int, seconds: float = SECONDS) -> Watched:
    """Computes for ``seconds``. What is counted lies between the first pause and the last: whole periods."""
    others = [threading.Thread(target=_compute, args=(seconds,), daemon=True) for _ in range(threads - 1)]
    for other in others:
        other.start()
    begin = (time.perf_counter(), time.process_time())
    pauses = _compute(seconds)
    end = (time.perf_counter(), time.process_time())
    for other in others:
        other.join()
    if len(pauses) >= 2:
        begin, end = pauses[0], pauses[-1]
    cores = (end[1] - begin[1]) / max(end[0] - begin[0], 1e-9)
    return Watched(cores=cores, pauses=tuple(wall for wall, _ in pauses))


def _compute(seconds: float) -> list[tuple[float, float]]:
    """When it went on after each pause: on the wall, and in CPU seconds of the process. Holds no lock of Python's."""
    block, pauses = bytes(1 << 16), []
    last = time.perf_counter()
    stop = last + seconds
    while last < stop:
        hashlib.sha256(block)
        now = time.perf_counter()
        if now - last > PAUSE:
            pauses.append((now, time.process_time()))
        last = now
    return pauses


def host_clock(device: torch.device, quota: Quota) -> Callable[[], float]:
    """Seconds for which the host has worked, as long as they take when it works without a pause.

    GPUs: time on the wall, once the device is done, for the host runs ahead of it. CPUs: what the calling thread has computed;
    the threads that move bytes run beside it. Under a quota they do not: what all threads have computed counts, and takes as
    long as the quota makes it. On the wall, what starts with its quota unused would look faster and what waits slower.
    """
    if device.type == "cuda":

        def wall() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return wall
    if quota.share(torch.get_num_threads()) < 1.0:
        return lambda: time.process_time() / quota.cores
    return time.thread_time
