"""Whole steps as a new user gets them, over our best setting and over packed rivals, on batches and links that differ.

    python benchmarks/defaults.py --cluster PATH [--only CELL,...] [--keep FILE] [--rounds N]      (5 to 8 minutes a cell)

A Llama of 4 layers, width 256, 8 heads, FSDP2, AdamW; nothing is set but the capacity: planner, schedule, machine are what
``hdp.init``, ``hdp.shard`` and ``hdp.Loader`` do by themselves. In the same processes, in turn:

- ours otherwise: planners auto, naive, bytescale with schedules ring, ulysses, ulysses_home, all_gather, auto;
- rivals: Ulysses and all-gather of packed micro-batches (``packed.py``) on every static mesh that holds the longest document,
  planned as planner ``static`` does.

One step of each screens; the two fastest of ours and of the rivals then run beside the default, in rounds whose order changes.
Of each round the ratio counts, of ratios the median. A cell has ``default_loss`` (default over the best of ours, 1 where it is
itself the best), ``vs_rival`` (best rival over the default), ``imbalance`` and ``waiting`` of the default, and ``predicted``:
what its plan was predicted to take over what it took.

Cells: ``tail_free``, ``tail_200``, ``tail_50``: 40 log-normal documents, 16,072 tokens, longest 3,000, capacity 1,024, links
without limit and of 200 and 50 Mbit/s; ``mild_*``: the same for 52 documents, longest 3,500; ``tail_8``: eight hosts of a
quarter core, 200 Mbit/s.
PATH is a program that starts one process per host: ``PATH -n RANKS -r RATE -c CPU_PERCENT -- COMMAND``. The last line of the
output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROUNDS = 4
PLANNERS = ("auto", "naive", "bytescale")
SCHEDULES = ("ring", "ulysses", "ulysses_home", "all_gather", "auto")
RIVALS = ("ulysses", "all_gather")
MOST_STEPS = 1 << 20


def mild() -> list[int]:
    """52 documents, log-normal with a longest of 3,500."""
    drawn = np.random.default_rng(7).lognormal(sigma=1.4, size=52)
    return np.maximum(np.rint(drawn / drawn.max() * 3500), 16).astype(int).tolist()


@dataclass(frozen=True)
class Cell:
    """A batch on some hosts."""

    batch: str
    rate: str
    capacity: int = 1024
    heads: tuple[int, int] = (8, 8)
    hosts: int = 4
    cpu: int = 50


RATES = {"free": "none", "200": "200mbit", "50": "50mbit"}
CELLS = {f"{batch}_{name}": Cell(batch, rate) for batch in ("tail", "mild") for name, rate in RATES.items()}
CELLS["tail_8"] = Cell("tail", "200mbit", hosts=8, cpu=25)


# ---------------------------------------------------------------- on the hosts


def worker(cell: Cell, rounds: int) -> dict[str, Any]:
    """What rank 0 found."""
    import torch.distributed as dist
    from same_mesh_worker import BATCHES, LEARNING_RATE, Batch, clocked, documents_of, llama
    from torch.optim import AdamW

    import hdp

    with hdp.init(timeout=600) as world:
        clocked()  # registers the rivals' attention
        lengths = BATCHES["tail"].lengths if cell.batch == "tail" else mild()
        documents = documents_of(Batch(lengths, cell.capacity))
        engine = hdp.shard(llama(cell.heads, "hdp"), world)
        optimizer = AdamW(engine.parameters(), lr=LEARNING_RATE)
        options: dict[str, Any] = {"tokens_per_step": sum(lengths), "capacity": cell.capacity, "steps": MOST_STEPS}
        said = world.runtime.schedule
        last: dict[str, hdp.StepResult] = {}

        def ours(name: str, planner: str | None, schedule: str | None) -> Callable[[], float]:
            keywords = {} if planner is None else {"planner": planner}
            batches: list[Iterator[hdp.PlannedBatch]] = []

            def step() -> float:
                world.runtime.schedule = said if schedule is None else schedule
                if not batches:
                    batches.append(iter(hdp.Loader(documents, engine, **options, **keywords)))
                last[name] = engine.forward_backward(next(batches[0]))
                engine.clip_grad_norm_(1.0)
                optimizer.step()
                optimizer.zero_grad()
                return last[name].loss

            return step

        runs = {"default": ours("default", None, None)}
        runs["default"]()  # measures the machine
        for planner in PLANNERS:
            for schedule in SCHEDULES:
                name = f"{planner} {schedule}"
                runs[name] = ours(name, planner, schedule)
        runs |= _rivals(world, cell, documents)

        def timed(name: str) -> float:
            dist.barrier(group=world.control)
            start = time.perf_counter()
            runs[name]()
            dist.barrier(group=world.control)
            return _longest(world, time.perf_counter() - start)

        screened: dict[str, float] = {}
        for name in runs:
            runs[name]()  # plans, lowers, gathers for the first time
            screened[name] = timed(name)
        rest = [name for name in runs if name != "default"]
        best = [
            name
            for is_rival in (False, True)
            for name in sorted((n for n in rest if n.startswith("rival") == is_rival), key=screened.__getitem__)[:2]
        ]
        seconds: dict[str, list[float]] = {name: [] for name in ("default", *best)}
        for number in range(rounds):
            order = list(seconds) if number % 2 else list(reversed(seconds))
            for name in order:
                seconds[name].append(timed(name))
        result = last["default"]
        assert result.predicted is not None and engine.machine is not None
        return {
            "seconds": seconds,
            "screened": screened,
            "imbalance": result.imbalance,
            "waiting": result.waiting_share,
            "predicted": result.predicted.seconds,
            "busy": result.busy_seconds,
            "groups": next(hdp.Loader(documents, engine, **options).plan_batches())[1].describe_groups(),
            "host": json.loads(engine.machine.to_json())["host"],
        }


def _rivals(world: Any, cell: Cell, documents: list) -> dict[str, Callable[[], float]]:
    from packed_training import PackedMesh
    from same_mesh_worker import LEARNING_RATE, llama

    from hdp.balance import CostModel, Topology
    from hdp.balance.planners import make_problem
    from hdp.balance.planners.static import _degrees, _mesh

    lengths = [len(document) for document in documents]
    model = llama(cell.heads, "packed")
    cost = CostModel.from_shape(model.config, flops=1e10)
    topology = Topology(world_size=world.world_size, ranks_per_node=world.world_size)
    problem = make_problem(lengths, topology, cost, capacity=cell.capacity, regime="step", planner="static")
    found: dict[str, Callable[[], float]] = {}
    for degree in _degrees(problem):
        plan = _mesh(problem, "static", degree, "balanced")
        mesh = PackedMesh(llama(cell.heads, "packed"), world, plan, LEARNING_RATE)
        for how in RIVALS:
            found[f"rival {how} {degree}"] = lambda mesh=mesh, how=how: mesh.step(documents, how)
    return found


def _longest(world: Any, seconds: float) -> float:
    from hdp.parallel.metrics import gather_numbers

    return float(gather_numbers(world, seconds)[:, 0].max())


# ---------------------------------------------------------------- from outside


def run_cell(cluster: str, name: str, rounds: int) -> dict[str, Any]:
    cell = CELLS[name]
    start = [cluster, "-n", str(cell.hosts), "-r", cell.rate, "-c", str(cell.cpu), "--"]
    command = [*start, sys.executable, __file__, "--worker", name, "--rounds", str(rounds)]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HDP_CACHE": cache, "HDP_MACHINE": "measure"}
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, env=environment, timeout=3600)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    seconds: dict[str, list[float]] = found["seconds"]
    default = seconds["default"]

    def ratio(other: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[other], default, strict=True))

    ours = [other for other in seconds if other != "default" and not other.startswith("rival")]
    rivals = [other for other in seconds if other.startswith("rival")]
    figures = {
        "default_loss": 1.0 / min([1.0, *map(ratio, ours)]),
        "vs_rival": min(map(ratio, rivals)),
        "imbalance": found["imbalance"],
        "waiting": found["waiting"],
        "predicted": found["predicted"] / statistics.median(default),
        "seconds": {other: round(statistics.median(each), 3) for other, each in seconds.items()},
    }
    screened = ", ".join(f"{n} {s:.2f}" for n, s in sorted(found["screened"].items(), key=lambda pair: pair[1]))
    print(
        f"{name}: default {found['groups']}; {json.dumps(figures)}\n  screened: {screened}\n  host {found['host']}",
        flush=True,
    )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", help="program that starts one process per host")
    parser.add_argument("--only", default=",".join(CELLS), help=f"of {', '.join(CELLS)}")
    parser.add_argument("--keep", type=Path, help="JSON file of the cells' figures")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(worker(CELLS[arguments.worker], arguments.rounds)), flush=True)
        return
    if not arguments.cluster:
        sys.exit("give --cluster PATH")
    keep = arguments.keep
    figures: dict[str, Any] = json.loads(keep.read_text()) if keep and keep.exists() else {}
    for name in arguments.only.split(","):
        figures[name] = run_cell(arguments.cluster, name, arguments.rounds)
        if keep:
            keep.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
