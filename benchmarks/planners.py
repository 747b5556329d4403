"""Makespan over the lower bound and planning time of ``auto``, and of the other planners on the same batches.

  python benchmarks/planners.py                       # all cases; hours, for flexsp gets 60 CPU seconds a batch
  python benchmarks/planners.py --keep rivals.json    # the same, but rivals that rivals.py has run are not run again
  python benchmarks/planners.py --rivals "" --worlds 8 64 512

LLaMA-7B with 8 key/value heads at 400 TFLOP/s, 400 GB/s inside a node of 8, 50 GB/s across, capacity 8K; eight
capacities a rank up to 33.6M tokens a step. Every combination whose longest document fits the cluster. Prints one line a
case; the last line is a JSON object:

  step_worst, step_median  over batches of at least 4 documents a rank; step_worst_few over the others
  slot_worst, slot_median  over the sharper bound
  beats_all                never behind a rival by more than 0.1 %, and ahead on every long-tailed batch (where a rival is
                           within 0.1 % of the bound, as a mesh inside a node is at 32K, nobody can be ahead)
  plan_ms_N, slot_plan_ms_N  slowest batch on N ranks, best of five runs, one core
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rivals import CAPACITY, REGIMES, WORLDS, Kept, cases, cost_model, topology_of

from hdp.balance import CostModel, Plan, Topology, evaluate, plan
from hdp.balance.bounds import slot_bound, step_bound
from hdp.balance.distributions import LONG_TAILED
from hdp.balance.planners import make_problem

FEW = 4  # documents a rank below which a batch has a limit of its own
BEHIND = 1.001


@dataclass
class Figures:
    """What all cases come to."""

    step: list[float] = field(default_factory=list)
    step_few: list[float] = field(default_factory=list)
    slot: list[float] = field(default_factory=list)
    milliseconds: dict[str, float] = field(default_factory=dict)
    behind: list[str] = field(default_factory=list)
    not_ahead: list[str] = field(default_factory=list)
    without_plan: list[str] = field(default_factory=list)
    compared: int = 0

    def summary(self) -> dict[str, Any]:
        """The JSON object of the last line."""
        out: dict[str, Any] = {}
        if self.step:
            out |= {"step_worst": max(self.step), "step_median": statistics.median(self.step)}
        if self.step_few:
            out["step_worst_few"] = max(self.step_few)
        if self.slot:
            out |= {"slot_worst": max(self.slot), "slot_median": statistics.median(self.slot)}
        out = {name: round(value, 4) for name, value in out.items()}
        out |= {name: round(value, 1) for name, value in sorted(self.milliseconds.items())}
        if self.compared:
            out["beats_all"] = not self.behind and not self.not_ahead
            out |= {"compared": self.compared, "behind": self.behind, "not_ahead": self.not_ahead}
            out["without_plan"] = self.without_plan
        return out


def timed_auto(lengths: np.ndarray, topology: Topology, cost: CostModel, regime: str, runs: int) -> tuple[Plan, float]:
    """The plan and the least milliseconds of some runs."""
    best = float("inf")
    for _ in range(runs):
        start = time.perf_counter()
        made = plan(lengths, topology, cost, capacity=CAPACITY, regime=regime, planner="auto")
        best = min(best, time.perf_counter() - start)
    return made, 1e3 * best


def run_case(
    figures: Figures,
    arguments: argparse.Namespace,
    kept: Kept,
    lengths: np.ndarray,
    world: int,
    label: str,
    regime: str,
) -> None:
    """One batch in one regime."""
    topology, cost = topology_of(world), cost_model()
    problem = make_problem(lengths, topology, cost, capacity=CAPACITY, regime=regime, planner="auto")
    bound = step_bound(problem) if regime == "step" else slot_bound(problem)
    made, ms = timed_auto(lengths, topology, cost, regime, arguments.runs)
    made.validate()
    ticks = evaluate(made, cost, topology).makespan
    ratio = ticks / bound
    few = len(lengths) < FEW * world
    if regime == "slot":
        figures.slot.append(ratio)
    else:
        (figures.step_few if few else figures.step).append(ratio)
    key = f"plan_ms_{world}" if regime == "step" else f"slot_plan_ms_{world}"
    figures.milliseconds[key] = max(ms, figures.milliseconds.get(key, 0.0))
    line = f"{regime} {world:>6} {label:<28} {len(lengths):>6} docs{' (few)' if few else '':<6} auto {ratio:.4f} {ms:.1f} ms"
    for name in arguments.rivals:
        if name == "flexsp" and world not in arguments.flexsp_worlds:
            continue
        other = kept.find(name, regime, world, lengths, arguments.patience)
        where = f"{regime} {world} {label} {name}"
        figures.compared += 1
        if other is None:
            figures.without_plan.append(where)
            line += f"  {name} -"
            continue
        line += f"  {name} {other / bound:.4f}"
        if ticks > other * BEHIND:
            figures.behind.append(where)
        elif ticks >= other > bound * BEHIND and label.split()[0] in LONG_TAILED:
            figures.not_ahead.append(where)
    print(line, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Runs the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=list(WORLDS))
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--rivals", default="static,bytescale,flexsp", help="planners to compare with; may be empty")
    parser.add_argument("--flexsp-worlds", type=int, nargs="*", default=list(WORLDS))
    parser.add_argument("--patience", type=float, default=60.0, help="CPU seconds for a rival's plan; default: 60")
    parser.add_argument("--keep", help="file of what rivals came to, as rivals.py writes it")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of auto; default: 5")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    arguments.rivals = arguments.rivals.split(",") if arguments.rivals else []
    figures, kept = Figures(), Kept(arguments.keep)
    for world, label, lengths in cases(arguments.worlds, arguments.seed):
        for regime in arguments.regimes:
            run_case(figures, arguments, kept, lengths, world, label, regime)
    print(json.dumps(figures.summary()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
