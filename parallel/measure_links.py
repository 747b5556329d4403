"""What links carry and what a byte costs: messages both ways at once, to one peer and to several, inside nodes and across."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist

from hdp.balance.topology import Link
from hdp.parallel.metrics import gather_numbers
from hdp.parallel.profile_host import Clock
from hdp.parallel.world import World

SMALL, FIRST, LARGE = 1 << 12, 1 << 18, 1 << 23
"""Bytes: for latency; the first guess at the rate; the largest message."""
SECONDS = 0.15
"""What a message that the rate is measured with takes, about."""
PIECE = 1 << 20  # larger messages travel in pieces, as in training
PEERS = 3
"""At most, to which a rank sends at once."""
OWN_LINKS = 0.5
"""Of the time that as many messages over one port take: below it each pair has a link of its own."""
ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Found:
    """Links as measured, the same on all ranks."""

    intra: Link | None
    inter: Link | None
    kind: str
    message_byte: float
    """Seconds of the host a byte sent or received."""


Peers = Sequence[tuple[int | None, int | None]]
"""To whom and from whom a rank sends and receives; None: nobody."""


def measure_links(world: World, clock: Clock) -> Found:
    """Of all kinds that there are; a collective."""
    if world.world_size == 1:
        return Found(intra=None, inter=None, kind="nic", message_byte=0.0)
    nodes = node_of_rank(world.nodes)
    order = across(world.nodes)
    links: list[Link | None] = []
    kind, byte = "nic", 0.0
    for is_inter in (False, True):
        here = [p for p in peers_of(order if is_inter else list(range(world.world_size)), world.rank, 1)]
        taken = [_if_between(here[0], world.rank, nodes, is_inter)]
        if not is_inter:
            taken = [_inside(world.nodes, world.rank)]
        if not _any(world, taken):
            links.append(None)
            continue
        link, size, seconds, byte = _link(world, taken, clock)
        links.append(link)
        several = several_of(world, order, nodes, is_inter)
        if _any(world, several[1:2]):
            kind = _kind(world, several, size, seconds)
    return Found(intra=links[0], inter=links[1], kind=kind, message_byte=byte)


def node_of_rank(nodes: Sequence[int]) -> list[int]:
    """Of each rank."""
    return [number for number, size in enumerate(nodes) for _ in range(size)]


def across(nodes: Sequence[int]) -> list[int]:
    """All ranks in an order in which neighbours live on different nodes where they can."""
    firsts = [0, *accumulate(nodes)][:-1]
    places = [(place, number) for number, size in enumerate(nodes) for place in range(size)]
    return [firsts[number] + place for place, number in sorted(places)]


def peers_of(order: Sequence[int], rank: int, distance: int) -> list[tuple[int, int]]:
    """(next, previous) of a rank in a ring of all ranks in this order."""
    at, size = order.index(rank), len(order)
    return [(order[(at + distance) % size], order[(at - distance) % size])]


def _if_between(
    pair: tuple[int, int], rank: int, nodes: Sequence[int], is_inter: bool
) -> tuple[int | None, int | None]:
    """Those of the two that this kind of link joins to ``rank``."""
    to, source = ((p if p != rank and (nodes[p] != nodes[rank]) == is_inter else None) for p in pair)
    return to, source


def _inside(sizes: Sequence[int], rank: int) -> tuple[int | None, int | None]:
    """(next, previous) in the ring of this rank's node."""
    first = 0
    for size in sizes:
        if rank < first + size:
            break
        first += size
    if size == 1:
        return None, None
    return first + (rank - first + 1) % size, first + (rank - first - 1) % size


def several_of(
    world: World, order: list[int], nodes: Sequence[int], is_inter: bool
) -> list[tuple[int | None, int | None]]:
    """Up to three peers at once: the next ones in the ring of all ranks, as far as this kind of link joins them."""
    count = min(PEERS, world.world_size - 1)
    ring = order if is_inter else list(range(world.world_size))
    pairs = [peers_of(ring, world.rank, distance)[0] for distance in range(1, count + 1)]
    return [_if_between(pair, world.rank, nodes, is_inter) for pair in pairs]


def _any(world: World, peers: Peers) -> bool:
    """Whether some rank sends."""
    mine = any(to is not None or source is not None for to, source in peers)
    return bool(gather_numbers(world, float(mine))[:, 0].any())


def _mean(world: World, seconds: float, counts: bool) -> float:
    """Over the ranks that took part."""
    rows = gather_numbers(world, seconds, float(counts))
    return float(rows[:, 0].mul(rows[:, 1]).sum() / rows[:, 1].sum().clamp_min(1.0))


def exchange(world: World, peers: Peers, size: int) -> float:
    """Seconds until this rank has sent ``size`` bytes to each peer and received as many."""
    outgoing = torch.zeros(size, dtype=torch.uint8, device=world.device)
    operations = []
    for to, source in peers:
        lane: Any = world.channel.lanes[0]
        if source is not None:
            incoming = torch.empty_like(outgoing)
            operations += [dist.P2POp(dist.irecv, part, source, group=lane) for part in incoming.split(PIECE)]
        if to is not None:
            operations += [dist.P2POp(dist.isend, part, to, group=lane) for part in outgoing.split(PIECE)]
    dist.barrier(group=world.control)
    start = time.perf_counter()
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
    return time.perf_counter() - start


def _timed(world: World, peers: Peers, size: int, rounds: int = ROUNDS) -> float:
    """Mean over ranks of the median round."""
    seconds = statistics.median(exchange(world, peers, size) for _ in range(rounds))
    return _mean(world, seconds, any(to is not None or source is not None for to, source in peers))


def _link(world: World, peers: Peers, clock: Clock) -> tuple[Link, int, float, float]:
    """The link; the size of message that it was measured with, its seconds; seconds of the host a byte.

    seconds = latency + bytes / bandwidth, from a small message and from two large ones: what a queue lets pass at first does
    not count.
    """
    exchange(world, peers, SMALL)
    latency = _timed(world, peers, SMALL, 2 * ROUNDS)
    guess = FIRST / max(_timed(world, peers, FIRST, 1), 1e-6)
    size = max(min(int(guess * SECONDS) // FIRST * FIRST, LARGE), 4 * FIRST)
    begin = clock()
    large = _timed(world, peers, size)
    work = clock() - begin
    less = _timed(world, peers, size // 4)
    bandwidth = 0.75 * size / max(large - less, 0.25 * large)
    handled = ROUNDS * size * sum((to is not None) + (source is not None) for to, source in peers)
    byte = _mean(world, work / handled if handled else 0.0, handled > 0)
    on_host = world.device.type == "cpu"
    return Link(bandwidth=bandwidth, latency=latency), size, large, byte if on_host else 0.0


def _kind(world: World, several: Peers, size: int, seconds: float) -> str:
    """``"peer"`` where messages to several peers at once take little longer than one to one."""
    count = len(several)
    together = _timed(world, several, size)
    return "peer" if together - seconds < OWN_LINKS * (count - 1) * seconds else "nic"
