"""Lowering of documents of unlike lengths under a window: part of ``benchmarks/attention_many.py``, alone for all cases.

``python benchmarks/attention_windows.py [ROUNDS]`` prints, for 64 log-normal documents (longest 3,000 and 32,000 tokens),
windows of 128, 512 and 4,096, rings, all-gather, Ulysses and TokenRing on 4 and 8 ranks, CPU milliseconds of each direction:
the median of micro-batches with other lengths each, and the first of all, when no program is known yet; then messages and
kernel launches.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from attention_worker import QuietChannel

from hdp.attention import AttentionRuntime, Route, RouteShard
from hdp.attention.lowered import Lowered
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount
from hdp.attention.route import LayerKey

HEADS = HeadCount(query=8, key=8)
DIM = 32
SCHEDULES = ("ring", "all_gather", "ulysses", "token_ring")
SIZES, WINDOWS, LONGEST = (4, 8), (128, 512, 4096), (3_000, 32_000)
ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Case:
    """One micro-batch, but for its lengths."""

    schedule: str
    size: int
    window: int
    longest: int
    documents: int = 64
    layout: str = "zigzag"


@dataclass(frozen=True, kw_only=True)
class Lowering:
    """One direction at rank 1."""

    milliseconds: float
    messages: int
    launches: int


def draw(case: Case, seed: int) -> list[int]:
    """Log-normal lengths."""
    drawn = np.random.default_rng(seed).lognormal(sigma=1.2, size=case.documents)
    return np.maximum(np.round(drawn * case.longest / drawn.max()), 1).astype(int).tolist()


def lower(case: Case, seed: int) -> tuple[Lowering, Lowering]:
    """Forward and backward of one micro-batch; documents of fewer tokens than chunks are whole."""
    group = tuple(range(case.size))
    shards = [
        RouteShard(sequence=i, length=n, group=group, schedule=case.schedule, layout=case.layout)
        if n >= 2 * case.size
        else RouteShard(sequence=i, length=n, group=(1,))
        for i, n in enumerate(draw(case, seed))
    ]
    key = LayerKey(heads=HEADS, head_dim=DIM, dtype=torch.float32, mask=Mask(window=case.window))
    route = Route(AttentionRuntime(1, QuietChannel(), torch.device("cpu"), "cpu"), shards)
    forward, backward = (_timed(route, key, direction) for direction in (False, True))
    return forward, backward


def _timed(route: Route, key: LayerKey, backward: bool) -> Lowering:
    begin = time.thread_time()
    made = route.lowered(key, backward)
    return Lowering(
        milliseconds=1e3 * (time.thread_time() - begin),
        messages=sum(len(part.sends) for part in made.rounds),
        launches=_launches(made),
    )


def _launches(made: Lowered) -> int:
    calls = itertools.chain(made.fillers, *(part.calls for part in made.rounds))
    return sum(call.launches for call in calls)


def figures(rounds: int = 5) -> dict[str, float]:
    """What ``attention_many.py`` prints of it, under a window of 512.

    ``lower_window_ms``: the slowest of all schedules, four and eight ranks and both directions. ``lower_window_2000``:
    milliseconds a document of 2,000 over those of 64. ``messages_window``, ``messages_window_2000``: of a rank in backward, 64
    and 2,000 documents.
    """
    slowest = 0.0
    for schedule, size in itertools.product(SCHEDULES, SIZES):
        found = _settled(Case(schedule=schedule, size=size, window=512, longest=32_000), rounds)
        slowest = max(slowest, *(statistics.median(one[way].milliseconds for one in found) for way in (0, 1)))
    few, many = (
        _settled(Case(schedule="ring", size=8, window=512, longest=32_000, documents=n), 3) for n in (64, 2_000)
    )
    times = [statistics.median(one[0].milliseconds + one[1].milliseconds for one in some) for some in (few, many)]
    return {
        "lower_window_ms": slowest,
        "lower_window_2000": times[1] / 2_000 / (times[0] / 64),
        "messages_window": max(one[1].messages for one in few),
        "messages_window_2000": max(one[1].messages for one in many),
    }


def _settled(case: Case, rounds: int) -> list[tuple[Lowering, Lowering]]:
    """Micro-batches that follow some others."""
    for seed in range(rounds):
        lower(case, seed)
    return [lower(case, seed) for seed in range(100, 100 + rounds)]


def main() -> None:
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    for longest, window, size, schedule in itertools.product(LONGEST, WINDOWS, SIZES, SCHEDULES):
        case = Case(schedule=schedule, size=size, window=window, longest=longest)
        found = [lower(case, seed) for seed in range(100, 101 + rounds)]
        ways = []
        for name, way in (("forward", 0), ("backward", 1)):
            median = statistics.median(one[way].milliseconds for one in found[1:])
            last = found[-1][way]
            ways.append(
                f"{name} {median:.1f} ms (first {found[0][way].milliseconds:.1f}),"
                f" {last.messages} messages, {last.launches} launches"
            )
        print(f"longest {longest}, window {window}, {schedule} on {size}: {'; '.join(ways)}", flush=True)


if __name__ == "__main__":
    main()
