"""One process of ``benchmarks/same_mesh.py``: what many documents in one micro-batch cost before and beside computation.

- ``lower_20000_s``: CPU seconds from 20,000 documents of 1 to 8 tokens, none shared, to both directions' programs.
- ``lower_64_ms``: CPU milliseconds for 64 documents shared by 4 ranks, the slowest of three schedules.
- ``lower_window_ms``, ``lower_window_2000``, ``messages_window``, ``messages_window_2000``: see ``attention_windows.py``.
- ``messages_2``, ``messages_8``: tensors that a rank sends in a layer's forward pass with Ulysses, 128 documents on 2 and 8
  ranks; ``messages_2_one``, ``messages_8_one``: the same for one document.
- ``step_us``: microseconds of Python a program step with a null backend, the largest (see ``attention_single.py``).

Prints one JSON object.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence

import attention_windows
import torch
from attention_single import CPU, step_microseconds
from attention_worker import QuietChannel
from torch import Tensor

from hdp.attention import AttentionRuntime, Route, RouteShard, attend
from hdp.attention.lowered import Packet
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount
from hdp.attention.route import LayerKey

HEADS, DIM = 8, 32
KEY = LayerKey(heads=HeadCount(query=HEADS, key=HEADS), head_dim=DIM, dtype=torch.float32, mask=Mask())
SCHEDULES = ("ulysses", "all_gather", "ring")


class CountingChannel(QuietChannel):
    """Sends nothing, and counts what it would send."""

    def __init__(self) -> None:
        self.messages = 0

    def post(self, sends: Sequence[tuple[Packet, Tensor]], receives: Sequence[tuple[Packet, Tensor]], tag: int) -> int:
        self.messages += len(sends)
        return tag


def shared(documents: int, size: int, schedule: str, tokens: int) -> list[RouteShard]:
    """By all ranks."""
    group = tuple(range(size))
    return [RouteShard(sequence=i, length=tokens + i, group=group, schedule=schedule) for i in range(documents)]


def lowering_seconds(shards: list[RouteShard], rounds: int) -> float:
    """Median seconds of a route and the programs of both directions."""
    times = []
    for _ in range(rounds):
        runtime = AttentionRuntime(0, QuietChannel(), CPU, "cpu")
        begin = time.thread_time()
        route = Route(runtime, shards)
        for backward in (False, True):
            route.program(KEY, backward)
        times.append(time.thread_time() - begin)
    return statistics.median(times)


def messages(documents: int, size: int) -> int:
    """The most that a rank sends."""
    most = 0
    for rank in (0, size - 1):
        channel = CountingChannel()
        route = Route(AttentionRuntime(rank, channel, CPU, "cpu"), shared(documents, size, "ulysses", 64))
        attend(*(torch.zeros(route.tokens, HEADS, DIM) for _ in range(3)), route=route)
        most = max(most, channel.messages)
    return most


def main() -> None:
    torch.set_num_threads(1)
    tiny = [RouteShard(sequence=i, length=1 + i % 8, group=(0,)) for i in range(20_000)]
    figures: dict[str, float] = {"lower_20000_s": lowering_seconds(tiny, 3)}
    lowered = {name: lowering_seconds(shared(64, 4, name, 100), 7) * 1e3 for name in SCHEDULES}
    figures |= {"lower_64_ms": max(lowered.values()), **{f"lower_64_ms_{name}": ms for name, ms in lowered.items()}}
    figures |= attention_windows.figures()
    for size in (2, 8):
        figures |= {f"messages_{size}": messages(128, size), f"messages_{size}_one": messages(1, size)}
    steps = [step_microseconds(s, n) for s in ("ring", "token_ring", "direct") for n in (4, 16, 64)]
    figures["step_us"] = max(max(step["forward"], step["backward"]) for step in steps)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
