"""What hybrid data parallelism costs when there is nothing to win, and what it wins when there is.

    python benchmarks/training.py --cluster PATH      (about 15 minutes; without --cluster only the figures of one machine)

- ``tax_time``, ``tax_memory``: a step on equal short documents, engine over plain FSDP2 with the same reshard setting; two
  ranks, A and B interleaved in one run (time), three processes of its own each (memory).
- ``loss_memory_growth``: memory of the loss beyond the hidden states and their gradient, 32K tokens over 2K; the plain loss
  beside it.
- ``step_vs_static``, ``slot_vs_static``: step time of the static mesh over that of ``auto``, same engine, a long-tailed batch,
  four hosts, links such that communication is half of the static mesh's step.

PATH is a program that starts one process per host with limited links: ``PATH -n RANKS -r RATE -c CPU_PERCENT -- COMMAND``.
The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).with_name("training_worker.py")
HOSTS = 4
CPU_PERCENT = 50
"""Of one core, each host."""


def run(command: list[str]) -> dict:
    """The JSON object on the last line of a command's output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=900)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def two_ranks(*arguments: str) -> dict:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return run([*launcher, str(WORKER), *arguments])


def on_cluster(cluster: str, rate: str, *arguments: str) -> dict:
    start = [cluster, "-n", str(HOSTS), "-r", rate, "-c", str(CPU_PERCENT), "--"]
    return run([*start, sys.executable, str(WORKER), *arguments])


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def tax() -> dict[str, float]:
    times = two_ranks("tax-time", "--repeats", "24")
    ratios = {
        kind: [b / a for a, b in zip(times[f"plain {kind}"], times[f"hdp {kind}"], strict=True)]
        for kind in ("wall", "cpu")
    }
    for kind, per in (("wall", "seconds a step, the slower rank"), ("cpu", "CPU seconds a step, both ranks")):
        print(
            f"equal short documents, two ranks: plain FSDP2 {spread(times[f'plain {kind}'])}, hdp"
            f" {spread(times[f'hdp {kind}'])} {per}; ratios {spread(ratios[kind])}"
        )
    found: dict[str, list[int]] = {"plain": [], "hdp": []}
    for _ in range(3):  # malloc makes single runs differ by several percent
        for kind, peaks in found.items():
            peaks.append(two_ranks("tax-memory", "--kind", kind)["bytes"])
    memory = {kind: statistics.median(peaks) for kind, peaks in found.items()}
    for kind, peaks in found.items():
        print(f"memory of a step, {kind}: {spread([peak / 2**20 for peak in peaks])} MiB")
    return {"tax_time": statistics.median(ratios["wall"]), "tax_memory": memory["hdp"] / memory["plain"]}


def loss_memory() -> dict[str, float]:
    table = {}
    for kind, sizes in (("chunked", (2048, 8192, 32768)), ("plain", (2048, 8192))):
        for tokens in sizes:
            command = [sys.executable, str(WORKER), "loss-memory", "--kind", kind, "--tokens", str(tokens)]
            table[kind, tokens] = run(command)["bytes"]
            print(
                f"loss of {tokens} tokens, {kind}: {table[kind, tokens] / 2**20:.0f} MiB beyond hidden states and gradient"
            )
    return {"loss_memory_growth": table["chunked", 32768] / table["chunked", 2048]}


def against_static(cluster: str) -> dict[str, float]:
    free = on_cluster(cluster, "none", "steps", "--planner", "static", "--regime", "step", "--repeats", "3")
    compute, sent = statistics.median(free["seconds"]), free["sent_bytes"]
    rate = max(int(8 * sent / compute / 1e6), 1)
    print(
        f"static mesh without link limits: {compute:.2f} s a step, {sent / 2**20:.1f} MiB sent a rank: links of {rate} Mbit/s"
    )
    figures = {}
    for regime in ("step", "slot"):
        fit = on_cluster(cluster, f"{rate}mbit", "fit", "--regime", regime)
        print(f"one host, {regime}: {fit}")
        times: dict[str, list[float]] = {"static": [], "auto": []}
        for _ in range(2):  # in turn
            for planner in times:
                options = ["--planner", planner, "--regime", regime, "--repeats", "2", "--fit", json.dumps(fit)]
                result = on_cluster(cluster, f"{rate}mbit", "steps", *options, "--rate", str(rate * 1e6 / 8))
                times[planner] += result["seconds"]
                print(
                    f"{regime}, {planner}: {spread(result['seconds'])} s a step, groups {result['groups']},"
                    f" waiting {result['waiting']:.2f}"
                )
        figures[f"{regime}_vs_static"] = statistics.median(times["static"]) / statistics.median(times["auto"])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", help="program that starts one process per host with limited links")
    parser.add_argument("--only", choices=["tax", "loss", "static"], help="one part")
    options = parser.parse_args()
    figures: dict[str, float] = {}
    if options.only in (None, "tax"):
        figures |= tax()
    if options.only in (None, "loss"):
        figures |= loss_memory()
    if options.cluster and options.only in (None, "static"):
        figures |= against_static(options.cluster)
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
