"""Predicted against measured step times, on the ranks that this is started on.

    torchrun --nnodes N ... benchmarks/simulator_reality.py --out reality.json
    torchrun --nnodes N ... benchmarks/simulator_reality.py --draw 1        # six other batches, drawn with seed 1

Measures the model and the links with what ``hdp profile`` calls, plans batches with several planners, simulates each plan as
``hdp simulate --machine`` does, then runs it on FSDP2 and compares. Prints one line a case; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import hdp
from hdp.balance import PLANNERS, plan
from hdp.balance.cost import TICK, CostModel
from hdp.balance.distributions import draw_lengths
from hdp.balance.evaluate import evaluate
from hdp.balance.host import HostCosts
from hdp.balance.machine import Machine
from hdp.balance.plan import IntArray, Plan
from hdp.balance.simulator import Cluster, Simulation, simulate
from hdp.parallel.batch import PlannedBatch
from hdp.parallel.engine import Engine
from hdp.parallel.metrics import StepResult
from hdp.parallel.profile import profile
from hdp.parallel.profile_clock import Quota, host_clock
from hdp.parallel.profile_sharding import host_seconds, whole_batch

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
RESTLESS = 0.03
"""Uncertainty of a median beyond which a batch is measured up to three times as often."""
TIE = 0.03
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
    parser.add_argument("--repeats", type=int, default=5, help="measured steps of each plan; the median counts")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--budget", type=float, default=40.0, help="seconds of the profile")
    parser.add_argument("--timeline", action="store_true", help="print when each micro-batch ran, said and measured")
    parser.add_argument("--out", help="JSON file of all cases")
    parser.add_argument("--machine", help="write what was measured, as hdp profile does")
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
        tell(measured)
        if options.machine:
            measured.write(options.machine)
    host = measured.host
    quota = Quota(period=host.quota_period, cores=host.quota_share * torch.get_num_threads())
    reference = Reference(Engine(build(options), world), host_clock(world.device, quota))
    engine = hdp.shard(model, world)
    batches = (
        {name: BATCHES[name] for name in options.batches.split(",")} if options.draw is None else drawn(options.draw)
    )
    planners = options.planners.split(",")
    cases: list[dict] = []
    for name, lengths in batches.items():
        said = {planner: predict(measured, lengths, planner) for planner in planners}
        plans = {planner: made for planner, (made, _) in said.items()}
        steps, speed = run(engine, reference, lengths, plans, options.repeats)
        now, there = slowed(measured.cost, Cluster.of_machine(measured), speed)
        for planner, (made, as_profiled) in said.items():
            simulated = simulate(made, now, there)
            seconds = [result.seconds for result in steps[planner]]
            case = {
                "batch": name,
                "planner": planner,
                "predicted": simulated.seconds,
                "speed": speed,
                "as_profiled": as_profiled.seconds,
                "hostless": simulate(made, now, replace(there, host=HostCosts())).seconds,
                "evaluated": evaluate(made, measured.planning, there.topology).seconds,
                "measured": statistics.median(seconds),
                "noise": noise(seconds),
                "seconds": seconds,
            }
            cases.append(case)
            if world.rank == 0:
                print(line(case, made), flush=True)
                if options.timeline:
                    show(simulated, steps[planner][len(seconds) // 2])
    if world.rank == 0:
        if options.out:
            with open(options.out, "w", encoding="utf-8") as file:
                json.dump(cases, file, indent=1)
        print(json.dumps(summarise(cases)))
    world.close()


def predict(measured: Machine, lengths: Sequence[int] | IntArray, planner: str) -> tuple[Plan, Simulation]:
    """The plan of a batch, and what the profile says of it: as ``hdp simulate --machine`` does."""
    cluster = Cluster.of_machine(measured)
    made = plan(lengths, cluster.topology, measured.planning, capacity=CAPACITY, planner=planner)
    return made, simulate(made, measured.cost, cluster)


class Reference:
    """A micro-batch that is timed again and again: how fast the machine is just now, against when it was profiled."""

    def __init__(self, engine: Engine, clock: Callable[[], float]) -> None:
        self.engine, self.clock = engine, clock
        self.profiled = statistics.median([self.seconds() for _ in range(6)][1:])

    def seconds(self) -> float:
        """Of the host, for 16 documents of 128 tokens on every rank."""
        return host_seconds(self.engine, whole_batch(self.engine, 16, 128), self.clock)


def slowed(cost: CostModel, cluster: Cluster, speed: float) -> tuple[CostModel, Cluster]:
    """Where computing takes ``speed`` times as long; links are as they were."""
    host = cluster.host
    times = [field.name for field in fields(host) if not field.name.startswith("quota")]
    return (
        replace(cost, **{name: getattr(cost, name) * speed for name in ("quadratic", "linear", "constant", "head")}),
        replace(cluster, host=replace(host, **{name: getattr(host, name) * speed for name in times})),
    )


def run(
    engine: hdp.Engine, reference: Reference, lengths: list[int], plans: dict[str, Plan], repeats: int
) -> tuple[dict[str, list[StepResult]], float]:
    """Measured steps of each plan, in turn, so that what slows the machine for a while slows all of them; how much slower the
    machine was meanwhile than when it was profiled.

    As many as asked for; where some plan's are restless, up to three times as many of all. The first of each, which warms
    up, is left out. The same on all ranks: a step's seconds are.
    """
    steps: dict[str, list[StepResult]] = {planner: [] for planner in plans}
    references = []
    for turn in range(3 * repeats + 1):
        if turn > repeats and all(noise([r.seconds for r in of[1:]]) < RESTLESS for of in steps.values()):
            break
        for number, (planner, made) in enumerate(plans.items()):
            torch.distributed.barrier(group=engine.world.control)
            time.sleep(0.05)  # throttled hosts regain their share
            steps[planner].append(engine.forward_backward(planned(lengths, made, turn * len(plans) + number)))
            for parameter in engine.parameters():
                parameter.grad = None
        references.append(reference.seconds())
    return {planner: of[1:] for planner, of in steps.items()}, statistics.median(references) / reference.profiled


def tell(measured: Machine) -> None:
    for s in measured.samples:
        print(f"profile {s.documents} x {s.length}: {s.seconds:.4f} s, fit {100 * s.error:+.1f} %")
    print(f"profile {measured.cost}\n{measured.intra} {measured.inter}\n{measured.host}")
    rates = f"gather {measured.gather_bandwidth:.4g} B/s, reduce {measured.reduce_bandwidth:.4g} B/s"
    print(f"{rates}, overlap {measured.overlap:.2f}")
    print(f"sharding takes {measured.sharding_seconds:.3f} s of the host a step", flush=True)


def line(case: dict, made: Plan) -> str:
    real, predicted, seconds = case["measured"], case["predicted"], case["seconds"]
    return (
        f"{case['batch']:18} {case['planner']:7} predicted {predicted:.3f} measured {real:.3f} ({predicted / real - 1:+.1%}),"
        f" +- {case['noise']:.1%}, {min(seconds):.3f} to {max(seconds):.3f} of {len(seconds)},"
        f" machine {case['speed']:.2f}, as profiled {case['as_profiled']:.3f},"
        f" without host costs {case['hostless']:.3f}, evaluate {case['evaluated']:.3f} {made.describe_groups()}"
    )


def noise(seconds: list[float]) -> float:
    """How uncertain the median of measured steps is: half of the middle half of them, over the median and sqrt(steps)."""
    if len(seconds) < 2:
        return math.inf
    low, high = np.quantile(seconds, [0.25, 0.75])
    return float(high - low) / 2 / statistics.median(seconds) / len(seconds) ** 0.5 * 1.86


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
    """Errors against the median of the measured steps, and how planners of one batch are ordered."""
    errors = [abs(c["predicted"] / c["measured"] - 1) for c in cases]
    pairs = [(a, b) for a in cases for b in cases if a["batch"] == b["batch"] and a["planner"] < b["planner"]]
    ties = [pair for pair in pairs if is_tie(*pair)]
    return {
        "cases": len(cases),
        "worst_error": max(errors),
        "median_error": statistics.median(errors),
        "within_15_percent": sum(e <= 0.15 for e in errors) / len(errors),
        "as_profiled_within_15_percent": sum(abs(c["as_profiled"] / c["measured"] - 1) <= 0.15 for c in cases)
        / len(cases),
        "worst_noise": max(c["noise"] for c in cases),
        "pairs": len(pairs),
        "ties": len(ties),
        "same_order": sum(same_order(*pair) for pair in pairs if pair not in ties),
    }


def is_tie(a: dict, b: dict) -> bool:
    """Two planners whose measured steps differ by less than their medians are uncertain, or that differ by 3 % or less."""
    was, said = a["measured"] / b["measured"] - 1, a["predicted"] / b["predicted"] - 1
    return abs(was) <= max(TIE, 2 * math.hypot(a["noise"], b["noise"])) or abs(said) <= TIE


def same_order(a: dict, b: dict) -> bool:
    return (a["measured"] < b["measured"]) == (a["predicted"] < b["predicted"])


if __name__ == "__main__":
    main()
