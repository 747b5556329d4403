"""The grid of ``benchmarks/attention.py``: what ``auto`` chooses against fixed pairs of schedules."""

from __future__ import annotations

import statistics
from typing import Any

HOSTS = 4
GRID = [
    (tokens, heads, kind, ratio)
    for heads in ((8, 8), (8, 2))
    for tokens in (1024, 2048)
    for kind in ("nic", "peer")
    for ratio in (0.3, 1.0, 4.0)
]
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


def auto_grid(cluster: Any) -> dict[str, float]:
    """Prints which pair wins where; the largest loss of ``auto``."""
    from attention import chosen, rate_for, speed

    worst, speeds = 0.0, {}
    for tokens, heads, kind, ratio in GRID:
        if (tokens, heads) not in speeds:
            speeds[tokens, heads] = speed(cluster, tokens, heads, HOSTS)
        measured = speeds[tokens, heads]
        rate = rate_for(ratio, tokens, heads, HOSTS, measured.forward)
        pick = "/".join(chosen(tokens, heads, HOSTS, kind, rate, measured))
        names = PAIRS if pick in PAIRS else (*PAIRS, pick)
        candidates = [f"hdp:{name}" for name in names]
        times = cluster.run(
            HOSTS, rate, mesh=kind == "peer", candidates=candidates, tokens=tokens, heads=heads, rounds=4
        )
        seconds = {n: statistics.median(times[f"hdp:{n}"]["seconds"]) for n in names}
        best = min(seconds, key=lambda n: seconds[n])
        loss = seconds[pick] / seconds[best] - 1
        worst = max(worst, loss)
        table = ", ".join(f"{n} {s * 1000:.0f}" for n, s in sorted(seconds.items(), key=lambda item: item[1]))
        print(
            f"{tokens} tokens, {heads} {kind} ratio {ratio}: auto {pick} ({loss:+.1%} on {best}); ms: {table}",
            flush=True,
        )
    return {"auto_worst": worst}
