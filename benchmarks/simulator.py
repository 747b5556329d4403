"""The paper's ablation in the simulator, what `auto` adds, and how long simulating takes.

    python benchmarks/simulator.py [--seeds 3] [--quick]

ByteScale reports, for a 7B model at 2M tokens of context on 1,024 GPUs: static mesh 1, dynamic communication 1.59, selective
offloading 2.01, balance 3.69. The hardware is fitted to its times per layer and per hop (`hdp.balance.simulator.paper`);
the ablation is held out. Each variant changes one assumption. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import replace

from hdp.balance import CostModel, Topology, plan
from hdp.balance.distributions import draw_lengths
from hdp.balance.models import MODELS
from hdp.balance.simulator import Cluster, simulate
from hdp.balance.simulator.paper import REPORTED, STEPS, Assumptions, lengths, run

PLAIN = Assumptions()
SMALL_HOST = replace(PLAIN, host_memory=16e9)
VARIANTS = {
    "as fitted": PLAIN,
    "16 GB of host memory a rank": SMALL_HOST,
    "and a mesh that hides nothing": replace(SMALL_HOST, mesh_overlap=0.0),
    "gradients travel in bf16": replace(PLAIN, gradient_bytes=2),
    "hops of 2.35 ms, as beside compute": replace(PLAIN, hop=2.35e-3),
    "Alg. 1 sorted": replace(PLAIN, dealing="sorted"),
    "1,024 ranks, no tensor parallelism": replace(PLAIN, ranks=1024),
}
LIMIT = 0.15


def ablation(assumed: Assumptions, seeds: int) -> dict[str, float]:
    """Mean seconds of each step over some batches."""
    totals = dict.fromkeys(STEPS, 0.0)
    for seed in range(seeds):
        batch = lengths(seed, tokens=assumed.tokens)
        for step in STEPS:
            totals[step] += run(step, batch, assumed).seconds / seeds
    return totals


def largest(planner: str, regime: str) -> tuple[float, float]:
    """(seconds of the step, seconds to simulate it): 12,288 ranks, 33.6M tokens, GitHub-like at 2M."""
    shape = MODELS["llama-7b"]
    cost, topology = CostModel.from_shape(shape, flops=400e12), Topology(world_size=12288)
    batch = draw_lengths("github", tokens=1 << 25, context=1 << 21, seed=0)
    made = plan(batch, topology, cost, capacity=8192, planner=planner, regime=regime)
    start = time.perf_counter()
    simulation = simulate(made, cost, Cluster.of_model(shape, topology))
    return simulation.seconds, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="batches of every variant; default: 3")
    parser.add_argument("--quick", action="store_true", help="the first variant only")
    options = parser.parse_args()
    print(f"{platform.machine()}, {time.strftime('%Y-%m-%d')}")
    print(f"{'speed-up over the static mesh (seconds)':40}" + "".join(f"{step[:20]:>22}" for step in STEPS))
    print(f"{'reported':40}" + "".join(f"{REPORTED.get(step, float('nan')):>22.2f}" for step in STEPS))
    result: dict[str, object] = {}
    for name, assumed in VARIANTS.items():
        seconds = ablation(assumed, options.seeds)
        gains = {step: seconds["static mesh"] / seconds[step] for step in STEPS}
        print(f"{name:40}" + "".join(f"{gains[step]:12.2f} ({seconds[step]:5.0f} s)" for step in STEPS), flush=True)
        errors = {step: gains[step] / value - 1 for step, value in REPORTED.items() if step != "static mesh"}
        result[name] = {"speed_up": gains, "seconds": seconds, "error": errors}
        if name == "as fitted":
            result["ablation_within_15_percent"] = all(abs(e) <= LIMIT for e in errors.values())
        if options.quick:
            break
    slowest = 0.0
    for planner in ("static", "naive", "auto"):
        for regime in ("step", "slot"):
            step, taken = largest(planner, regime)
            slowest = max(slowest, taken)
            print(
                f"12,288 ranks, {planner}, regime {regime}: a step of {step:.2f} s, simulated in {taken:.2f} s",
                flush=True,
            )
    result["simulation_seconds_12288"] = slowest
    print(json.dumps(result))


if __name__ == "__main__":
    main()
