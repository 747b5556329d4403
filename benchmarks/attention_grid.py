"""The grid of ``benchmarks/attention.py``: what ``auto`` chooses against every fixed schedule, forward and backward apart."""

from __future__ import annotations

import statistics
from typing import Any

TOKENS, HOSTS = 2048, 4
GRID = [
    (heads, kind, ratio) for heads in ((8, 8), (8, 2)) for kind in ("nic", "peer") for ratio in (0.3, 1.0, 4.0)
]  # x forward and backward: 24 cases
FORWARD = ("ring", "direct", "token_ring", "all_gather", "ulysses", "ulysses:2", "hybrid:2")
BACKWARD = {
    "ring": "ring",
    "ring_q": "ring",
    "direct": "direct",
    "token_ring": "direct",
    "all_gather": "direct",
    "ulysses": "ulysses",
    "ulysses:2": "ulysses:2",
    "hybrid:2": "hybrid:2",
}
"""Backward schedule: a forward that it can follow."""


def auto_grid(cluster: Any) -> dict[str, float]:
    """Prints which schedule wins where; the largest loss of ``auto``."""
    from attention import chosen, rate_for, speed

    worst, speeds = 0.0, {}
    for heads, kind, ratio in GRID:
        if heads not in speeds:
            speeds[heads] = speed(cluster, TOKENS, heads, HOSTS)
        measured = speeds[heads]
        rate = rate_for(ratio, TOKENS, heads, HOSTS, measured.forward)
        picks = chosen(TOKENS, heads, HOSTS, kind, rate, measured)
        for parts, names, pick in (("forward", FORWARD, picks[0]), ("backward", tuple(BACKWARD), picks[1])):
            names = names if pick in names else (*names, pick)
            spelled = {
                n: f"hdp:{n}/token_ring" if parts == "forward" else f"hdp:{BACKWARD.get(n, n)}/{n}" for n in names
            }
            if parts == "forward":
                spelled |= {n: f"hdp:{n}/{n}" for n in ("ulysses", "ulysses:2", "hybrid:2", "ring") if n in names}
            options = {"tokens": TOKENS, "heads": heads, "rounds": 4, "parts": parts}
            times = cluster.run(HOSTS, rate, mesh=kind == "peer", candidates=list(spelled.values()), **options)
            seconds = {n: statistics.median(times[c]["seconds"]) for n, c in spelled.items()}
            best = min(seconds, key=lambda n: seconds[n])
            loss = seconds[pick] / seconds[best] - 1
            worst = max(worst, loss)
            table = ", ".join(f"{n} {s * 1000:.0f}" for n, s in sorted(seconds.items(), key=lambda item: item[1]))
            print(f"{heads} {kind} ratio {ratio} {parts}: auto {pick} ({loss:+.1%} on {best}); ms: {table}", flush=True)
    return {"auto_worst": worst}
