"""The grid of ``benchmarks/attention.py``: what ``auto`` chooses against fixed pairs of schedules."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

HOSTS = 4
SHAPES = [(tokens, heads) for heads in ((8, 8), (8, 2)) for tokens in (2048, 4096)]
RATIOS = (0.3, 1.0, 4.0)
"""Of the longest multi-head shape; on the same links the ratio of the others is 1/4, 1/2 and twice as large."""
KINDS = ("nic", "peer")
WITHIN = 1.05
"""Pairs slower by more than this are not measured to the end."""
ROUNDS = 3
DUEL = {2048: 10, 4096: 5}
"""By tokens: more rounds of the choice and the two fastest others, which alone decide; three times as many where the choice is
behind by 2 %."""
PAIRS = (
    "ring/ring",
    "ring/ring_q",
    "direct/direct",
    "token_ring/token_ring",
    "all_gather/all_gather",
    "all_gather:2/all_gather:2",
    "ulysses/ulysses",
    "ulysses:2/ulysses:2",
    "ulysses_home/ulysses_home",
    "ulysses_home:2/ulysses_home:2",
    "hybrid:2/hybrid:2",
)


def middle(values: Sequence[float]) -> float:
    """Mean of the middle half: steadier than the median where a CPU quota makes steps long or short by turns."""
    ordered, quarter = sorted(values), len(values) // 4
    return statistics.fmean(ordered[quarter : len(ordered) - quarter])


def auto_grid(cluster: Any) -> dict[str, float]:
    """Prints which pair wins where; the largest loss of ``auto``, and whether all sent what closed forms say."""
    from attention import chosen, forwards, is_as_said, rate_for

    worst, equal, found = 0.0, True, dict(zip(SHAPES, forwards(cluster, SHAPES, HOSTS), strict=True))
    widest = max(SHAPES, key=lambda shape: shape[0] * shape[1][1])
    for kind, ratio in itertools.product(KINDS, RATIOS):
        rate = rate_for(ratio, *widest, HOSTS, found[widest])
        picks = chosen(cluster, SHAPES, HOSTS, kind, rate)
        jobs = [
            {
                "tokens": tokens,
                "heads": heads,
                "rounds": ROUNDS,
                "candidates": [f"hdp:{name}" for name in names],
                "within": WITHIN,
                "keep": [f"hdp:{pick}"],
                "duel": DUEL[tokens],
            }
            for (tokens, heads), pick in picks.items()
            for names in [PAIRS if pick in PAIRS else (*PAIRS, pick)]
        ]
        for (shape, pick), times in zip(picks.items(), cluster.run_all(HOSTS, rate, jobs, kind == "peer"), strict=True):
            seconds = {n.removeprefix("hdp:"): statistics.median(t["seconds"]) for n, t in times.items()}
            if shape[1][1] % HOSTS == 0:  # closed forms of Ulysses are for heads that can be dealt out whole
                equal &= all(is_as_said(n, *shape, HOSTS, t["sent"]) for n, t in times.items())
            again = {n.removeprefix("hdp:"): middle(t["again"]) for n, t in times.items() if t["again"]}
            best = min(again, key=lambda n: again[n])
            loss = again[pick] / again[best] - 1
            worst = max(worst, loss)
            table = ", ".join(f"{n} {s * 1000:.0f}" for n, s in sorted(seconds.items(), key=lambda item: item[1]))
            duel = ", ".join(f"{n} {s * 1000:.0f}" for n, s in sorted(again.items(), key=lambda item: item[1]))
            own = ratio * rate_for(1.0, *shape, HOSTS, found[shape]) / rate_for(1.0, *widest, HOSTS, found[widest])
            print(
                f"{shape[0]} tokens, {shape[1]} {kind} ratio {own:.2f}: auto {pick} ({loss:+.1%} on {best}); ms: {duel};"
                f" before: {table}",
                flush=True,
            )
    return {"auto_worst": worst, "bytes_equal": int(equal)}
