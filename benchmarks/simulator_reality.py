"""Predicted against measured step times, on the ranks that this is started on.

    torchrun --nnodes N ... benchmarks/simulator_reality.py --out reality.json
    torchrun --nnodes N ... benchmarks/simulator_reality.py --draw 1        # six other batches, drawn with seed 1

Measures the model and the links as ``hdp profile`` does, plans batches with several planners, simulates each plan, then runs
it on FSDP2 and compares. Prints one line a case; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import hdp
from hdp.balance import PLANNERS, plan
from hdp.balance.cost import TICK
from hdp.balance.distributions import draw_lengths
from hdp.balance.evaluate import evaluate
from hdp.balance.host import HostCosts
from hdp.balance.plan import Plan
from hdp.balance.simulator import Cluster, Simulation, simulate
from hdp.parallel.batch import PlannedBatch
from hdp.parallel.metrics import StepResult
from hdp.parallel.profile import profile

CAPACITY = 1024
BATCHES = {
    "one giant": [4096],
    "giant and short": [3000, 400, 300, 200, 100, 90, 80, 60, 50, 40, 30, 20],
    "two long": [2000, 1800, 128, 100, 64, 64, 50],
    "long tail": [1500, 900, 700, 500, 400, 300, 200, 200, 150, 100, 100, 100, 80, 60, 60, 50, 40, 30, 20, 10],
    "all short": [250, 240, 230, 220, 210, 200, 190, 180, 170, 160, 150, 140, 130, 120, 110, 100, 90, 80, 70, 60],
    "all equal": [1000] * 6,
    "above capacity": [1300, 1200, 1150, 1100],
}
DRAWN = ("github", "byted", "lognormal-pareto", "source-tree", "short", "one-giant")
RESTLESS = 0.15
"""Spread of measured steps beyond which a case is measured up to three times as often."""
SCALE = 32
"""A drawn token stands for so many of the distribution's."""


def drawn(seed: int) -> dict[str, list[int]]:
    """One batch of each distribution, of which the simulator has seen none: about 5,000 tokens, documents of up to 3,500."""
    batches = {}
    for name in DRAWN:
        lengths = draw_lengths(name, tokens=5000 * SCALE, context=3500 * SCALE, seed=seed)
        batches[f"{name} {seed}"] = np.maximum(lengths // SCALE, 2).tolist()
    return batches


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planners", default="static,naive,auto", help=f"of {', '.join(PLANNERS)}")
    parser.add_argument("--batches", default=",".join(BATCHES))
    parser.add_argument("--draw", type=int, metavar="SEED", help="batches drawn with this seed instead of --batches")
    parser.add_argument("--repeats", type=int, default=3, help="measured steps of each plan; the median counts")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--budget", type=float, default=40.0, help="seconds of the profile")
    parser.add_argument("--timeline", action="store_true", help="print when each micro-batch ran, said and measured")
    parser.add_argument("--out", help="JSON file of all cases")
    parser.add_argument("--profile", help="write the profile, as hdp profile does")
    return parser.parse_args()


def build(options: argparse.Namespace) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=options.hidden,
        intermediate_size=2 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        max_position_embeddings=65536,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="hdp")


def main() -> None:
    options = arguments()
    world = hdp.init(timeout=170)
    model = build(options)
    measured = profile(model, world, lengths=(64, 128, 256, 512, 1024, 2048), budget=options.budget)
    if world.rank == 0:
        for sample in measured.samples:
            print(
                f"profile {sample.documents} x {sample.length}: {sample.seconds:.4f} s, fit {100 * sample.error:+.1f} %"
            )
        print(f"profile {measured.cost}\n{measured.intra} {measured.inter}\n{measured.host}")
        print(f"gather {measured.gather_bandwidth:.4g} B/s, reduce {measured.reduce_bandwidth:.4g} B/s", flush=True)
        if options.profile:
            measured.write(options.profile)
    engine = hdp.shard(model, world)
    bytes_ = 4.0 * measured.parameters
    gather, reduce = collective_seconds(engine, world)
    cluster = Cluster(
        topology=measured.topology(),
        sharding="sharded",
        parameter_bytes=bytes_,
        gradient_bytes=bytes_,
        blocking=True,
        overlap=measured.overlap,
        gather_bandwidth=bytes_ / gather,
        reduce_bandwidth=bytes_ / reduce,
        host=measured.host,
    )
    if world.rank == 0:
        print(
            f"overlap {measured.overlap:.2f}; gather {gather:.3f} s, reduce {reduce:.3f} s of an empty step", flush=True
        )
    cases = []
    batches = (
        {name: BATCHES[name] for name in options.batches.split(",")} if options.draw is None else drawn(options.draw)
    )
    for name, lengths in batches.items():
        for planner in options.planners.split(","):
            made = plan(lengths, cluster.topology, measured.cost, capacity=CAPACITY, planner=planner)
            batch = planned(lengths, made, len(cases))
            simulated = simulate(made, measured.cost, cluster)
            predicted = simulated.seconds
            hostless = simulate(made, measured.cost, replace(cluster, host=HostCosts())).seconds
            plain = evaluate(made, measured.cost, cluster.topology).seconds
            seconds = []
            while len(seconds) <= options.repeats or (
                len(seconds) <= 3 * options.repeats and spread(seconds) > RESTLESS
            ):
                torch.distributed.barrier(group=world.control)
                time.sleep(0.05)  # throttled hosts regain their share
                result = engine.forward_backward(batch)
                seconds.append(result.seconds)
                for parameter in engine.parameters():
                    parameter.grad = None
            real, least = statistics.median(seconds[1:]), min(seconds[1:])
            case = {
                "batch": name,
                "planner": planner,
                "predicted": predicted,
                "evaluated": plain,
                "seconds": seconds[1:],
            }
            cases.append({**case, "hostless": hostless, "measured": real, "least": least})
            if world.rank == 0:
                print(
                    f"{name:16} {planner:8} predicted {predicted:.3f} measured {real:.3f} ({predicted / real - 1:+.1%}),"
                    f" least {least:.3f} ({predicted / least - 1:+.1%}), spread {spread(seconds):.0%} of {len(seconds) - 1},"
                    f" without host costs {hostless:.3f}, evaluate {plain:.3f}"
                    f" {made.describe_groups()}",
                    flush=True,
                )
                if options.timeline:
                    show(simulated, result)
    if world.rank == 0:
        summary = summarise(cases)
        if options.out:
            with open(options.out, "w", encoding="utf-8") as file:
                json.dump(cases, file, indent=1)
        print(json.dumps(summary))
    world.close()


def spread(seconds: list[float]) -> float:
    """Of the steps but the first, which warms up: slowest less fastest, over the median."""
    return (max(seconds[1:]) - min(seconds[1:])) / statistics.median(seconds[1:])


def planned(lengths: list[int], made: Plan, step: int) -> PlannedBatch:
    """Documents of random tokens."""
    return PlannedBatch(
        step=step,
        plan=made,
        documents=[torch.randint(0, 255, (n,)) for n in lengths],
        indices=tuple(range(len(lengths))),
        label_tokens=sum(lengths) - len(lengths),
        loss_weight=float(sum(lengths)),
    )


def collective_seconds(engine: hdp.Engine, world: hdp.World) -> tuple[float, float]:
    """What gathering all parameters and reducing all gradients take in a step of two tokens a rank."""
    lengths = [2] * world.world_size
    groups = [(rank,) for rank in range(world.world_size)]
    made = Plan.from_groups(
        lengths, groups, [0] * len(lengths), world_size=world.world_size, capacity=2, regime="step", planner="empty"
    )
    times = []
    for step in range(6):
        torch.distributed.barrier(group=world.control)
        engine.forward_backward(planned(lengths, made, step))
        waits = [stop - start for start, stop in engine.waits]
        times.append((waits[0], sum(waits[1:])))
    medians = torch.tensor([statistics.median(t[k] for t in times[2:]) for k in (0, 1)])
    torch.distributed.all_reduce(medians, op=torch.distributed.ReduceOp.MIN, group=world.control)  # waits left out
    return float(medians[0]), float(medians[1])


def show(simulated: Simulation, result: StepResult) -> None:
    """Each rank's micro-batches: begin and end as simulated and as measured; seconds blocked in transfers."""
    for rank in range(len(result.wait_seconds)):
        mine = [i for i in range(len(simulated.rank)) if simulated.rank[i] == rank]
        said = [f"{simulated.slot[i]}{'b' if simulated.is_backward[i] else 'f'}" for i in mine]
        said = [
            f"{s} {simulated.begin[i] * TICK:.2f}-{simulated.end[i] * TICK:.2f}"
            for s, i in zip(said, mine, strict=True)
        ]
        spans = [s for s in result.spans if s.rank == rank and s.kind == "compute"]
        print(f"  rank {rank} said {', '.join(said)} busy {simulated.busy[rank] * TICK:.2f}")
        real = ", ".join(f"{s.slot} {s.start:.2f}-{s.stop:.2f}" for s in spans)
        print(f"         real {real} busy {result.busy_seconds[rank]:.2f}", flush=True)


def summarise(cases: list[dict]) -> dict[str, float]:
    """Errors against the median and against the least disturbed step, and how planners of one batch are ordered."""
    summary: dict[str, float] = {"cases": len(cases)}
    for real in ("measured", "least"):
        errors = [abs(c["predicted"] / c[real] - 1) for c in cases]
        summary[f"worst_error_{real}"] = max(errors)
        summary[f"median_error_{real}"] = statistics.median(errors)
        summary[f"within_15_percent_{real}"] = sum(e <= 0.15 for e in errors) / len(errors)
        summary[f"same_order_{real}"] = same_order(cases, real)
    return summary


def same_order(cases: list[dict], real: str) -> float:
    """Share of the pairs of planners of one batch that are ordered alike; two within 3 % of each other are a tie."""
    agree = pairs = 0
    for a in cases:
        for b in cases:
            if a["batch"] == b["batch"] and a["planner"] < b["planner"]:
                was, said = a[real] / b[real], a["predicted"] / b["predicted"]
                pairs += 1
                agree += (was - 1) * (said - 1) > 0 or abs(was - 1) < 0.03 or abs(said - 1) < 0.03
    return agree / pairs if pairs else 1.0


if __name__ == "__main__":
    main()
