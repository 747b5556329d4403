"""What distributed attention costs: exposed communication, Python, copies, and the same work done by others.

    python benchmarks/attention.py --cluster PATH [--lock FILE] [--only NAME,...]        (about 25 minutes)

Four hosts of half a core each, fp32, heads of 64. Link rates are derived in the run: the ``ratio`` of a case is how long one
forward's bytes take on the wire over how long its tiles take. A and B are interleaved in one process; medians, with the
smallest and largest in brackets.

- ``exposed_half``, ``exposed_equal``: (step - the same tiles without communication) / the latter, forward and backward of
  the ring, ratio 0.5 and 1; ``mixed_half``, ``mixed_equal``: with whole sequences beside the shared one.
- ``step_us``: microseconds of Python a program step with a null backend, the largest; ``local_overhead``: whole sequences
  against plain SDPA, the largest.
- ``vs_torch_ring``, ``vs_ulysses``, ``vs_gather``: their time over ours (the pairs that ``auto`` chooses) where communication
  takes as long as computation, the smallest of 2 and 4 hosts, one document and nine packed; ``..._half``: the same at ratio
  0.5. Theirs exchange a packed micro-batch once (``packed.py``); a ring is the fastest of that one and of torch's templated
  ring with its head-tail balancer and both rotations, document by document. Whole models: ``same_mesh.py``.
- ``cpu_ratio_4``: CPU seconds a rank, 8K tokens, over a quarter of one rank's dense SDPA.
- ``tokenring_mesh``: ring over TokenRing, forward, MHA, a link for each pair, ratio 4; ``ring_mesh_gqa``: TokenRing over
  ring, GQA 4:1; ``auto_mesh``: whether ``auto`` picks the winner of both.
- ``bytes_equal``: whether every rank sent what the closed forms say: the ring above, all pairs of the grid with 8:8 heads.
- ``auto_worst``: how much slower the choice of ``auto`` is than the best fixed pair, the largest over a grid of 24 cases.
  Rounds of all pairs find the two fastest others; further rounds of these and the choice decide.

PATH is a program that starts one process per host with limited links: ``PATH -n RANKS -r RATE [-p] -c CPU_PERCENT -- COMMAND``.
The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attention_grid import auto_grid

from hdp.attention.costs import cost
from hdp.attention.counts import Sizes
from hdp.attention.program import HeadCount

FOLDER = Path(__file__).parent
CPU_PERCENT = 50
DIM = 64
SIZES = Sizes(head_dim=DIM, model_bytes=4)


@dataclass
class Cluster:
    """Starts workers on limited links."""

    path: str
    lock: str | None

    def run(self, hosts: int, rate: float | None, mesh: bool = False, **job: Any) -> dict:
        """What rank 0 found for one job. ``rate`` in bytes a second, None: unlimited."""
        return self.run_all(hosts, rate, [job], mesh)[0]

    def run_all(self, hosts: int, rate: float | None, jobs: list[dict[str, Any]], mesh: bool = False) -> list[dict]:
        """The same for several jobs on the same links, one after the other."""
        limit = "none" if rate is None else f"{max(int(rate * 8 / 1000), 1)}kbit"
        start = [self.path, "-n", str(hosts), "-r", limit, *(["-p"] if mesh else []), "-c", str(CPU_PERCENT), "--"]
        return self.locked([*start, sys.executable, str(FOLDER / "attention_worker.py"), json.dumps(jobs)])

    def locked(self, command: list[str]) -> Any:
        command = [*(["flock", "-x", self.lock] if self.lock else []), *command]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=2400)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}")
        return json.loads(done.stdout.strip().splitlines()[-1])


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def sent(name: str, tokens: int, heads: tuple[int, int], hosts: int, backward: bool) -> list[float]:
    """Bytes of every rank by the closed form."""
    count = HeadCount(query=heads[0], key=heads[1])
    return [
        cost(
            name, backward=backward, length=tokens, size=hosts, member=m, heads=count, sizes=SIZES, causal=True
        ).sent_bytes
        for m in range(hosts)
    ]


def is_as_said(candidate: str, tokens: int, heads: tuple[int, int], hosts: int, rows: Sequence[Sequence[int]]) -> bool:
    """Whether every rank sent in every round (``rows``) what the closed forms of its two schedules say."""
    forward, backward = candidate.removeprefix("hdp:").split("/")
    both = sent(forward, tokens, heads, hosts, False), sent(backward, tokens, heads, hosts, True)
    return all(row == [sum(pair) for pair in zip(*both, strict=True)] for row in rows)


TILES = "quiet:ring/ring"


def forwards(cluster: Cluster, shapes: Sequence[tuple[int, tuple[int, int]]], hosts: int) -> list[float]:
    """Seconds of one host's share of a ring's tiles without communication, forward, of each (tokens, heads)."""
    jobs = [
        {"tokens": tokens, "heads": heads, "candidates": [TILES], "rounds": 3, "parts": "forward"}
        for tokens, heads in shapes
    ]
    return [statistics.median(found[TILES]["seconds"]) for found in cluster.run_all(hosts, None, jobs)]


def rate_for(ratio: float, tokens: int, heads: tuple[int, int], hosts: int, seconds: float) -> float:
    """Bytes a second at which the ring's forward bytes take ``ratio`` times its tiles."""
    return max(sent("ring", tokens, heads, hosts, backward=False)) / (ratio * seconds)


def chosen(
    cluster: Cluster, shapes: Sequence[tuple[int, tuple[int, int]]], hosts: int, kind: str, rate: float
) -> dict[tuple[int, tuple[int, int]], str]:
    """What ``auto`` takes of each (tokens, heads), on a machine that is measured there as at the start of any job."""
    lengths: dict[tuple[int, int], list[int]] = {}
    for tokens, heads in shapes:
        lengths.setdefault(heads, []).append(tokens)
    jobs = [{"choose": heads, "lengths": each} for heads, each in lengths.items()]
    found = dict(zip(lengths, cluster.run_all(hosts, rate, jobs, kind == "peer"), strict=True))
    for heads, each in found.items():
        print(f"{kind} {rate / 1e6:.1f} MB/s, heads {heads}: {each['host']}", flush=True)
    return {(tokens, heads): found[heads][str(tokens)] for tokens, heads in shapes}


def exposed(cluster: Cluster) -> dict[str, float]:
    tokens, heads, hosts = 16384, (4, 4), 4
    pair = ["hdp:ring/ring", TILES]
    (tiles,) = cluster.run_all(
        hosts, None, [{"tokens": tokens, "heads": heads, "candidates": [TILES], "rounds": 3, "parts": "forward"}]
    )
    forward = statistics.median(tiles[TILES]["seconds"])
    print(f"tiles of {tokens} tokens, {heads[0]} heads, on {hosts} hosts: {forward:.2f} s forward")
    found: dict[str, float] = {"bytes_equal": 1}
    for label, ratio in (("half", 0.5), ("equal", 1.0)):
        rate = rate_for(ratio, tokens, heads, hosts, forward)
        cases = {"exposed": [], "mixed": [4096, 4096]}
        jobs = [
            {"tokens": tokens, "heads": heads, "candidates": pair, "rounds": 5, "local": local}
            for local in cases.values()
        ]
        for name, times in zip(cases, cluster.run_all(hosts, rate, jobs), strict=True):
            a, b = (times[c]["seconds"] for c in pair)
            shares = [x / y - 1 for x, y in zip(a, b, strict=True)]
            found[f"{name}_{label}"] = statistics.median(shares)
            print(f"{name}, ratio {ratio}: step {spread(a)} s, tiles alone {spread(b)} s, exposed {spread(shares)}")
            found["bytes_equal"] &= is_as_said(pair[0], tokens, heads, hosts, times[pair[0]]["sent"])
    return found


THEIRS = {
    "vs_torch_ring": ("packed:ring", "torch:alltoall", "torch:allgather"),
    "vs_ulysses": ("packed:ulysses",),
    "vs_gather": ("packed:all_gather",),
}


def rivals(cluster: Cluster) -> dict[str, float]:
    """One document, and nine of which one is half of all."""
    heads = (8, 8)
    ratios: dict[str, list[float]] = {name + end: [] for end in ("", "_half") for name in THEIRS}
    for hosts in (2, 4):
        tokens = 2048 * hosts
        cases = ([tokens], [tokens // 2] + [tokens // 16] * 8)
        lengths = sorted({n for documents in cases for n in documents})
        (forward,) = forwards(cluster, [(tokens, heads)], hosts)
        for ratio in (0.5, 1.0):
            rate = rate_for(ratio, tokens, heads, hosts, forward)
            taken = chosen(cluster, [(n, heads) for n in lengths], hosts, "nic", rate)
            picks = {n: taken[n, heads] for n in lengths}
            candidates = ["hdp:picks", *(name for group in THEIRS.values() for name in group)]
            shared = {"tokens": tokens, "heads": heads, "candidates": candidates, "rounds": 5}
            jobs = [{**shared, "documents": case, "picks": [picks[n] for n in case]} for case in cases]
            for case, times in zip(cases, cluster.run_all(hosts, rate, jobs), strict=True):
                line = [f"{c} {spread(times[c]['seconds'])}" for c in candidates]
                took = sorted({picks[n] for n in case})
                print(f"{hosts} hosts, ratio {ratio}, {len(case)} documents ({took}): " + "; ".join(line), flush=True)
                base = statistics.median(times["hdp:picks"]["seconds"])
                for name, group in THEIRS.items():
                    fastest = min(statistics.median(times[c]["seconds"]) for c in group)
                    ratios[name + ("" if ratio == 1.0 else "_half")].append(fastest / base)
    return {name: min(values) for name, values in ratios.items()}


def cpu_ratio(cluster: Cluster) -> dict[str, float]:
    candidates = ["hdp:ring/ring", "packed:ring", "packed:ulysses", "torch:alltoall"]
    times = cluster.run(4, None, tokens=8192, heads=(8, 8), candidates=candidates, rounds=3, dense=True)
    dense = statistics.median(times["dense"]["cpu"]) / 4
    found = {c: statistics.median(times[c]["cpu"]) / dense for c in candidates}
    print("CPU seconds a rank over a quarter of dense: " + ", ".join(f"{c} {r:.3f}" for c, r in found.items()))
    return {"cpu_ratio_4": found["hdp:ring/ring"]}


def mesh(cluster: Cluster) -> dict[str, float]:
    tokens, hosts, found, right = 4096, 4, {}, True
    names = ["hdp:ring/ring", "hdp:token_ring/token_ring"]
    for key, heads in (("tokenring_mesh", (8, 8)), ("ring_mesh_gqa", (8, 2))):
        (forward,) = forwards(cluster, [(tokens, heads)], hosts)
        rate = rate_for(4.0, tokens, heads, hosts, forward)
        auto = chosen(cluster, [(tokens, heads)], hosts, "peer", rate)[tokens, heads].partition("/")[0]
        candidates = [*names, *([f"hdp:{auto}/token_ring"] if auto not in ("ring", "token_ring") else [])]
        options = {"tokens": tokens, "heads": heads, "rounds": 4, "parts": "forward"}
        times = cluster.run(hosts, rate, mesh=True, candidates=candidates, **options)
        seconds = {c: statistics.median(times[c]["seconds"]) for c in candidates}
        ring, token_ring = seconds[names[0]], seconds[names[1]]
        found[key] = ring / token_ring if heads[0] == heads[1] else token_ring / ring
        picked = next(s for c, s in seconds.items() if c.startswith(f"hdp:{auto}/"))
        right &= picked <= 1.05 * min(seconds.values())
        print(
            f"mesh, heads {heads}: "
            + ", ".join(f"{c} {spread(times[c]['seconds'])}" for c in candidates)
            + f"; auto {auto}"
        )
    return {**found, "auto_mesh": int(right)}


def single(cluster: Cluster) -> dict[str, float]:
    found = cluster.locked([sys.executable, str(FOLDER / "attention_single.py")])
    for name, times in found["steps"].items():
        print(f"{name}: " + ", ".join(f"{what} {us:.1f} us a step" for what, us in times.items()))
    for name, share in found["local"].items():
        print(f"whole sequences, {name}: {share['overhead']:+.3%} ({share['low']:+.3%} to {share['high']:+.3%})")
    return {
        "step_us": max(max(t["forward"], t["backward"]) for t in found["steps"].values()),
        "lower_us": max(t["lower"] for t in found["steps"].values()),
        "local_overhead": max(share["overhead"] for share in found["local"].values()),
    }


PIECES = {"single": single, "exposed": exposed, "cpu": cpu_ratio, "mesh": mesh, "rivals": rivals, "auto": auto_grid}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", required=True, help="program that starts one process per host")
    parser.add_argument("--lock", help="file to hold an exclusive lock on while something is timed")
    parser.add_argument("--only", default=",".join(PIECES), help=f"some of {', '.join(PIECES)}")
    arguments = parser.parse_args()
    unknown = set(arguments.only.split(",")) - PIECES.keys()
    if unknown:
        parser.error(f"unknown piece {sorted(unknown)[0]!r}: choose some of {', '.join(PIECES)}")
    cluster = Cluster(arguments.cluster, arguments.lock)
    figures: dict[str, float] = {}
    for name in arguments.only.split(","):
        begin = time.perf_counter()
        print(f"== {name}", flush=True)
        found = PIECES[name](cluster)
        equal = [f["bytes_equal"] for f in (figures, found) if "bytes_equal" in f]
        figures |= found | ({"bytes_equal": min(equal)} if equal else {})
        print(f"-- {time.perf_counter() - begin:.0f} s", flush=True)
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
