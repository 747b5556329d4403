"""Bandwidth of a tier, all ranks of a node copying at once: they share its links, its memory and its disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from hdp.balance.machine import CopyRates
from hdp.offload.buffers import BufferPool
from hdp.offload.errors import OffloadError
from hdp.offload.split import Split
from hdp.offload.streams import Copies, Done, Stream
from hdp.offload.tiers import Slot, Tier

PIECE = 16 << 20
"""Bytes of one copy that is timed."""


def _nothing() -> None:
    return None


def measure_bandwidth(
    tier: Tier,
    *,
    nbytes: int = 256 << 20,
    piece: int = PIECE,
    rounds: int = 3,
    device: torch.device | str = "cpu",
    barrier: Callable[[], None] = _nothing,
    slowest: Callable[[float], float] = lambda seconds: seconds,
) -> CopyRates:
    """Copies ``nbytes`` out and back, ``rounds`` times, and takes the middle time of each direction.

    Args:
        tier: the tier; needs room for ``nbytes``.
        nbytes: bytes of one measurement, in pieces of ``piece`` bytes (a saved activation's size).
        barrier: returns when all ranks of the node have called it, so that they copy at the same time.
        slowest: the largest of all ranks' seconds, such as an all-reduce with MAX; every rank gets the same figure.
    """
    target = torch.device(device)
    copies = Copies.for_device(target)
    count = max(1, nbytes // piece)
    split = Split(piece, 1, piece)
    pool = BufferPool()
    source = pool.lease(piece) if target.type == "cpu" else torch.empty(piece, dtype=torch.uint8, device=target)
    source.random_(0, 256)
    slots: list[Slot] = []
    try:
        for _ in range(count):
            slot = tier.reserve(piece)
            if slot is None:
                raise OffloadError(
                    f"{tier.name}: no room for {nbytes} bytes to measure with; give fewer or raise its budget"
                )
            slots.append(slot)
        out, back = (
            (copies.device_out, copies.device_back) if tier.on_device_stream else (copies.host_out, copies.host_back)
        )
        times: dict[str, list[float]] = {"out": [], "back": []}
        for _ in range(rounds):
            for name, stream, copy in (("out", out, tier.write), ("back", back, tier.read)):
                barrier()
                times[name].append(slowest(_timed(slots, stream, copy, source, split, copies)))
        middle = {name: sorted(seconds)[len(seconds) // 2] for name, seconds in times.items()}
        return CopyRates(out=count * piece / middle["out"], back=count * piece / middle["back"])
    finally:
        copies.close()
        for slot in slots:
            tier.release(slot)
        tier.trim()


def _timed(
    slots: Sequence[Slot],
    stream: Stream,
    copy: Callable[[Slot, torch.Tensor, Split], None],
    flat: torch.Tensor,
    split: Split,
    copies: Copies,
) -> float:
    start = time.perf_counter()
    dones: list[Done] = []
    for slot in slots:
        dones.append(stream.run(partial(copy, slot, flat, split), (copies.fence(),)))
    for done in dones:
        done.wait()
    return time.perf_counter() - start
