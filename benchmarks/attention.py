"""What distributed attention costs: exposed communication, Python, copies, and the same work done by others.

    python benchmarks/attention.py --cluster PATH [--lock FILE] [--only NAME,...]        (about 25 minutes)

Four hosts of half a core each, fp32, heads of 64. Link rates are derived in the run: the ``ratio`` of a case is how long one
forward's bytes take on the wire over how long its tiles take. A and B are interleaved in one process; medians, with the
smallest and largest in brackets.

- ``exposed_half``, ``exposed_equal``: (step - the same tiles without communication) / the latter, forward and backward of
  the ring, ratio 0.5 and 1; ``mixed_half``, ``mixed_equal``: with whole sequences beside the shared one.
- ``step_us``: microseconds of Python a program step with a null backend, the largest; ``local_overhead``: whole sequences
  against plain SDPA, the largest.
- ``vs_torch_ring``, ``vs_ulysses``: their time over ours (the pair that ``auto`` chooses) where communication takes as long
  as computation, the smaller of 2 and 4 hosts; ``..._half``: the same at ratio 0.5. Theirs: torch's templated ring with its
  head-tail balancer, the faster of both rotations; an all-to-all on SDPA.
- ``cpu_ratio_4``: CPU seconds a rank, 8K tokens, over a quarter of one rank's dense SDPA.
- ``tokenring_mesh``: ring over TokenRing, forward, MHA, a link for each pair, ratio 4; ``ring_mesh_gqa``: TokenRing over
  ring, GQA 4:1; ``auto_mesh``: whether ``auto`` picks the winner of both.
- ``bytes_equal``: whether every rank sent what the closed form says.
- ``auto_worst``: how much slower the choice of ``auto`` is than the best fixed pair, the largest over a grid of 24 cases.

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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from attention_grid import auto_grid
from scipy.optimize import nnls

from hdp.attention.choose import Case, Links, Rates, choose
from hdp.attention.costs import cost
from hdp.attention.counts import Sizes, count
from hdp.attention.layout import make_layout
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount
from hdp.attention.schedules import get_schedule

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


@dataclass
class Speed:
    """One host's tiles without communication, and what communication takes from it on links that do not limit."""

    forward: float
    """Seconds."""
    backward: float
    byte_seconds: float
    """A byte sent or received."""
    message_seconds: float
    """A tensor sent or received."""

    def rates(self, tokens: int, heads: int, hosts: int) -> Rates:
        area = tokens * (tokens + 1) / 2 * heads / hosts
        return Rates(
            forward=area / self.forward,
            backward=area / self.backward,
            step_seconds=1e-3,
            byte_seconds=self.byte_seconds,
            message_seconds=self.message_seconds,
        )


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


def speeds(cluster: Cluster, shapes: Sequence[tuple[int, tuple[int, int]]], hosts: int) -> list[Speed]:
    """Of each (tokens, heads), measured with links that do not limit.

    What communication takes is fitted to bytes and messages of two schedules, one with few large messages and one with many.
    """
    schedules, parts = ("ring", "ulysses:2"), ("forward", "backward")
    jobs = [
        {
            "tokens": tokens,
            "heads": heads,
            "candidates": [f"{kind}:{name}/{name}" for name in schedules for kind in ("hdp", "quiet")],
            "rounds": 3,
            "parts": part,
        }
        for tokens, heads in shapes
        for part in parts
    ]
    found = iter(cluster.run_all(hosts, None, jobs))
    tiles, handled, lost, weights = [], [], [], []
    for tokens, heads in shapes:
        seconds = []
        for part in parts:
            times = {name: statistics.median(t["seconds"]) for name, t in next(found).items()}
            seconds.append(times["quiet:ring/ring"])
            for name in schedules:
                handled.append(traffic(name, tokens, heads, hosts, part == "backward"))
                lost.append(times[f"hdp:{name}/{name}"] - times[f"quiet:{name}/{name}"])
                weights.append(1 / times[f"quiet:{name}/{name}"])  # noise grows with what is timed
        tiles.append(seconds)
    scale = np.array(weights)
    (byte, message), _ = nnls(np.array(handled) * scale[:, None], np.array(lost) * scale)
    print(f"{hosts} hosts: communication takes {byte * 1e9:.2f} s a GB, {message * 1e6:.0f} us a message", flush=True)
    return [Speed(*seconds, byte_seconds=byte, message_seconds=message) for seconds in tiles]


def traffic(name: str, tokens: int, heads: tuple[int, int], hosts: int, backward: bool) -> tuple[int, int]:
    """Bytes and messages, sent and received, of the member that has most."""
    layout, count_ = make_layout("zigzag", tokens, hosts), HeadCount(query=heads[0], key=heads[1])
    schedule, most = get_schedule(name), (0, 0)
    for member in range(hosts):
        program = (schedule.backward if backward else schedule.forward)(layout, Mask(), count_, member)
        counted = count(program, layout, Mask(), count_, member, SIZES, backward)
        most = max(most, (counted.sent_bytes + counted.received_bytes, sum(s.messages for s in counted.steps)))
    return most


def speed(cluster: Cluster, tokens: int, heads: tuple[int, int], hosts: int) -> Speed:
    """Of one shape."""
    return speeds(cluster, [(tokens, heads)], hosts)[0]


def rate_for(ratio: float, tokens: int, heads: tuple[int, int], hosts: int, seconds: float) -> float:
    """Bytes a second at which the ring's forward bytes take ``ratio`` times its tiles."""
    return max(sent("ring", tokens, heads, hosts, backward=False)) / (ratio * seconds)


def chosen(tokens: int, heads: tuple[int, int], hosts: int, kind: str, rate: float, measured: Speed) -> tuple[str, str]:
    """What ``auto`` takes."""
    case = Case(
        length=tokens,
        size=hosts,
        heads=HeadCount(query=heads[0], key=heads[1]),
        sizes=SIZES,
        links=Links(kind=kind, inner_rate=rate, outer_rate=rate, latency=1e-3),
        rates=measured.rates(tokens, heads[0], hosts),
    )
    return choose(case).names


def exposed(cluster: Cluster) -> dict[str, float]:
    tokens, heads, hosts = 16384, (4, 4), 4
    measured = speed(cluster, tokens, heads, hosts)
    print(f"tiles of {tokens} tokens, {heads[0]} heads, on {hosts} hosts: {measured.forward:.2f} s forward")
    print(f"and {measured.backward:.2f} s backward")
    found: dict[str, float] = {}
    for label, ratio in (("half", 0.5), ("equal", 1.0)):
        rate = rate_for(ratio, tokens, heads, hosts, measured.forward)
        for name, local in (("exposed", []), ("mixed", [4096, 4096])):
            pair = ["hdp:ring/ring", "quiet:ring/ring"]
            times = cluster.run(hosts, rate, tokens=tokens, heads=heads, candidates=pair, rounds=4, local=local)
            a, b = (times[c]["seconds"] for c in pair)
            shares = [x / y - 1 for x, y in zip(a, b, strict=True)]
            found[f"{name}_{label}"] = statistics.median(shares)
            print(f"{name}, ratio {ratio}: step {spread(a)} s, tiles alone {spread(b)} s, exposed {spread(shares)}")
            if not local:
                expected = [
                    sum(pair)
                    for pair in zip(*(sent("ring", tokens, heads, hosts, b) for b in (False, True)), strict=True)
                ]
                equal = all(row == expected for row in times[pair[0]]["sent"])
                found["bytes_equal"] = min(found.get("bytes_equal", 1), int(equal))
    return found


def rivals(cluster: Cluster) -> dict[str, float]:
    theirs = {"vs_torch_ring": ("torch_alltoall", "torch_allgather"), "vs_ulysses": ("ulysses_sdpa",)}
    ratios: dict[str, list[float]] = {name + end: [] for end in ("", "_half") for name in theirs}
    for hosts in (2, 4):
        tokens, heads = 2048 * hosts, (8, 8)
        measured = speed(cluster, tokens, heads, hosts)
        for ratio in (0.5, 1.0):
            rate = rate_for(ratio, tokens, heads, hosts, measured.forward)
            ours = "hdp:" + "/".join(chosen(tokens, heads, hosts, "nic", rate, measured))
            candidates = [ours, *theirs["vs_torch_ring"], *theirs["vs_ulysses"]]
            times = cluster.run(hosts, rate, tokens=tokens, heads=heads, candidates=candidates, rounds=4)
            line = [f"{c} {spread(times[c]['seconds'])}" for c in candidates]
            print(f"{hosts} hosts, ratio {ratio}: " + "; ".join(line), flush=True)
            base = statistics.median(times[ours]["seconds"])
            for name, group in theirs.items():
                fastest = min(statistics.median(times[c]["seconds"]) for c in group)
                ratios[name + ("" if ratio == 1.0 else "_half")].append(fastest / base)
    return {name: min(values) for name, values in ratios.items()}


def cpu_ratio(cluster: Cluster) -> dict[str, float]:
    candidates = ["hdp:ring/ring", "torch_alltoall", "ulysses_sdpa"]
    times = cluster.run(4, None, tokens=8192, heads=(8, 8), candidates=candidates, rounds=3, dense=True)
    dense = statistics.median(times["dense"]["cpu"]) / 4
    found = {c: statistics.median(times[c]["cpu"]) / dense for c in candidates}
    print("CPU seconds a rank over a quarter of dense: " + ", ".join(f"{c} {r:.3f}" for c, r in found.items()))
    return {"cpu_ratio_4": found["hdp:ring/ring"]}


def mesh(cluster: Cluster) -> dict[str, float]:
    tokens, hosts, found, right = 4096, 4, {}, True
    names = ["hdp:ring/ring", "hdp:token_ring/token_ring"]
    for key, heads in (("tokenring_mesh", (8, 8)), ("ring_mesh_gqa", (8, 2))):
        measured = speed(cluster, tokens, heads, hosts)
        rate = rate_for(4.0, tokens, heads, hosts, measured.forward)
        auto = chosen(tokens, heads, hosts, "peer", rate, measured)[0]
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
        print(f"== {name}", flush=True)
        figures |= PIECES[name](cluster)
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
