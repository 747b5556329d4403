"""Simulate training steps on a cluster that need not be at hand, and compare planners.

  hdp simulate --distribution github --context 2097152 --tokens 33.5e6 --world-size 1024 --capacity 8192
  hdp simulate --lengths lengths.txt --world-size 64 --capacity 8192 --planners static,auto --png steps.png
  hdp simulate --machine machine.json --distribution source-tree --tokens 1e6 --world-size 8 --capacity 4096

Speed-ups are over the first planner of the list. A planner that cannot plan a batch is listed with its reason.

Exit codes: 0 simulated; 1 a file could not be written; 2 bad arguments; 3 no planner could plan the batch.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from hdp.balance import PLANNERS, CostModel, PlanError, plan
from hdp.balance.machine import Machine
from hdp.balance.models import model_shape
from hdp.balance.plan import IntArray
from hdp.balance.planners.recompute import RECOMPUTE
from hdp.balance.simulator import SHARDINGS, Cluster, Simulation, simulate
from hdp.balance.simulator.picture import Row, draw
from hdp.commands.capacity import settle_capacity
from hdp.commands.plan import (
    BAD_ARGUMENTS,
    CANNOT_PLAN,
    CANNOT_WRITE,
    BadArgumentsError,
    add_batch_arguments,
    add_cluster_arguments,
    assume_missing,
    at_least_one,
    cluster_of,
    lengths_of,
    reading_arguments,
)

HELP = "simulate steps on a cluster: compare planners by table and picture"
DEFAULT = "static,naive,bytescale,auto"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_batch_arguments(parser)
    add_cluster_arguments(parser)
    parser.add_argument("--planners", default=DEFAULT, help=f"of {', '.join(PLANNERS)}; default: {DEFAULT}")
    parser.add_argument(
        "--recompute",
        choices=RECOMPUTE,
        default="off",
        help="off; auto: layers run again in backward where a document does not fit otherwise; all: all layers but those that"
        " keep everything; default: off",
    )
    parser.add_argument("--steps", type=int, default=1, help="batches to draw and simulate; default: 1")
    parser.add_argument(
        "--sharding", choices=SHARDINGS, default="sharded", help="of parameters; default: sharded (FSDP2)"
    )
    parser.add_argument(
        "--stages", type=at_least_one, default=1, help="pipeline stages of world-size ranks each; default: 1"
    )
    parser.add_argument(
        "--ranks-per-nic", type=at_least_one, default=1, help="ranks of a node that share a NIC; default: 1"
    )
    parser.add_argument("--seed", type=int, default=0, help="of drawn lengths and of planners that draw; default: 0")
    parser.add_argument("--json", metavar="OUT", help="write all figures as JSON; - for standard output")
    parser.add_argument("--png", metavar="OUT", help="draw the comparison (needs matplotlib)")
    parser.add_argument("--svg", metavar="OUT", help="the same as SVG")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One planner on one batch."""

    planner: str
    step: int
    tokens: int
    seconds: float
    waiting: float
    balance: float
    busiest: float
    micro_batches: int
    """Of the rank that runs most."""
    groups: str


def run(arguments: argparse.Namespace) -> int:
    """Simulates and writes what was asked for."""
    try:
        return _run(arguments)
    except BadArgumentsError as error:
        print(f"hdp simulate: {error}", file=sys.stderr)
        return BAD_ARGUMENTS
    except PlanError as error:
        print(f"hdp simulate: {error}", file=sys.stderr)
        return CANNOT_PLAN
    except OSError as error:
        print(f"hdp simulate: {error}", file=sys.stderr)
        return CANNOT_WRITE


def _run(arguments: argparse.Namespace) -> int:
    names = [name.strip() for name in arguments.planners.split(",")]
    unknown = [name for name in names if name not in PLANNERS]
    if unknown:
        raise BadArgumentsError(f"unknown planner {unknown[0]!r}: choose of {', '.join(PLANNERS)}")
    if arguments.steps < 1:
        raise BadArgumentsError(f"--steps is {arguments.steps}: give at least 1")
    if arguments.steps > 1 and not (arguments.distribution or arguments.dataset):
        raise BadArgumentsError(
            "--steps draws batches: give a --distribution or --dataset, or leave it at 1 for a file of lengths"
        )
    with reading_arguments():
        assume_missing(arguments, "hdp simulate")
        settle_capacity(arguments, "hdp simulate")
        cost, cluster = machine_of(arguments)
    outcomes: list[Outcome] = []
    failures: dict[str, str] = {}
    for step in range(arguments.steps):
        with reading_arguments():
            lengths = lengths_of(argparse.Namespace(**{**vars(arguments), "seed": arguments.seed + step}))
        for name in names:
            if name in failures:
                continue
            try:
                outcomes.append(_simulate(arguments, name, step, lengths, cost, cluster))
            except PlanError as error:
                failures[name] = str(error)
    rows = summarise([name for name in names if name not in failures], outcomes)
    if not rows:
        raise PlanError(f"no planner could plan the batch: {next(iter(failures.values()))}")
    text = sys.stderr if arguments.json == "-" else sys.stdout
    tokens = np.mean([o.tokens for o in outcomes if o.planner == rows[0].planner])
    title = _title(arguments, cluster, float(tokens))
    print(title, file=text)
    if arguments.machine and (note := elsewhere(Machine.read(arguments.machine), cluster)):
        print(note, file=text)
    print(table(rows, outcomes, float(tokens)), file=text)
    for name, reason in failures.items():
        print(f"{name}: {reason}", file=text)
    _write(arguments, rows, outcomes, failures, title)
    return 0


def machine_of(arguments: argparse.Namespace) -> tuple[CostModel, Cluster]:
    """Cost model and cluster, from the arguments or a file."""
    topology, cost = cluster_of(arguments)
    fields = {name: getattr(arguments, name) for name in ("sharding", "stages", "ranks_per_nic")}
    if arguments.machine:
        return cost, Cluster.of_machine(Machine.read(arguments.machine), topology, **fields)
    return cost, Cluster.of_model(model_shape(arguments.model), topology, **fields)


def elsewhere(machine: Machine, cluster: Cluster) -> str:
    """What to know of a machine that was measured on other ranks than are simulated; empty: it was not."""
    there, here = (machine.world_size, machine.ranks_per_node), cluster.topology
    if there == (here.world_size, here.ranks_per_node):
        return ""
    return (
        f"the machine was measured on {there[0]} ranks, {there[1]} a node, not {here.world_size}, {here.ranks_per_node} a node:"
        " its collectives are scaled as the links say"
    )


def _simulate(
    arguments: argparse.Namespace, name: str, step: int, lengths: IntArray, cost: CostModel, cluster: Cluster
) -> Outcome:
    made = plan(
        lengths,
        cluster.topology,
        cost,
        capacity=arguments.capacity,
        regime=arguments.regime,
        planner=name,
        offload=arguments.offload,
        recompute=arguments.recompute,
        seed=arguments.seed,
    )
    simulation = simulate(made, cost, cluster)
    return Outcome(
        planner=name,
        step=step,
        tokens=int(lengths.sum()),
        seconds=simulation.seconds,
        waiting=simulation.waiting,
        balance=simulation.balance,
        busiest=simulation.busiest_seconds,
        micro_batches=_most(simulation),
        groups=made.describe_groups(),
    )


def _most(simulation: Simulation) -> int:
    forward = ~simulation.is_backward & (simulation.stage == 0) & (simulation.slot >= 0)
    return int(np.bincount(simulation.rank[forward]).max(initial=0))


def summarise(names: list[str], outcomes: list[Outcome]) -> list[Row]:
    """Means over steps, in the order of ``names``."""
    rows = []
    for name in names:
        mine = [o for o in outcomes if o.planner == name]
        seconds = float(np.mean([o.seconds for o in mine]))
        waiting = float(np.mean([o.seconds * o.waiting for o in mine])) / seconds if seconds else 0.0
        busiest = float(np.mean([o.busiest for o in mine]))
        rows.append(Row(planner=name, seconds=seconds, waiting=waiting, busiest=busiest))
    return rows


def table(rows: list[Row], outcomes: list[Outcome], tokens: float) -> str:
    """One line a planner."""
    lines = [
        f"{'planner':16} {'s/step':>9} {'speed-up':>8} {'tokens/s':>10} {'waiting':>8} {'balance':>8} {'micro-batches':>13}"
    ]
    for row in rows:
        mine = [o for o in outcomes if o.planner == row.planner]
        lines.append(
            f"{row.planner:16} {row.seconds:9.4g} {rows[0].seconds / row.seconds:7.2f}x {tokens / row.seconds:10.4g}"
            f" {100 * row.waiting:7.1f}% {np.mean([o.balance for o in mine]):8.3f} {max(o.micro_batches for o in mine):13}"
        )
    return "\n".join(lines)


def _title(arguments: argparse.Namespace, cluster: Cluster, tokens: float) -> str:
    topology = cluster.topology
    source = arguments.distribution or arguments.lengths or arguments.source_tree or arguments.dataset
    what = f"{Path(arguments.machine).name}" if arguments.machine else arguments.model
    stages = f", {cluster.stages} stages" if cluster.stages > 1 else ""
    return (
        f"{what}, {Path(source).name}, {tokens / 1e6:.3g}M tokens a step, capacity {arguments.capacity}, regime "
        f"{arguments.regime}: {topology.world_size} ranks on {topology.nodes} nodes{stages}, {cluster.sharding}"
    )


def _write(
    arguments: argparse.Namespace, rows: list[Row], outcomes: list[Outcome], failures: dict[str, str], title: str
) -> None:
    if arguments.json:
        fields = {
            "title": title,
            "planners": [{**asdict(row), "speed_up": rows[0].seconds / row.seconds} for row in rows],
            "steps": [asdict(outcome) for outcome in outcomes],
            "without_plan": failures,
        }
        text = json.dumps(fields, indent=1)
        if arguments.json == "-":
            print(text)
        else:
            Path(arguments.json).write_text(text + "\n", encoding="utf-8")
    for target in (arguments.png, arguments.svg):
        if target:
            draw(Path(target), rows, title)
