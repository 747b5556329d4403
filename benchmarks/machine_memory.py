"""Memory as it is foreseen and as it is measured: every rank's peak of a step, over schedules, regimes and offload ratios.

    python benchmarks/machine_memory.py            # or: python benchmarks/machine.py --only memory

Real FSDP2 over gloo, four ranks, two small Llamas; a step holds documents of four, two and one rank in two micro-batches of all
ranks and ends with AdamW. Measured is what torch's allocator has handed out at most (``benchmarks/allocations.py``), what
offload keeps in its own pool included; that of a GPU counts the same. Prints one JSON object.

memory_median, memory_worst: |foreseen / measured - 1| over all ranks and cases. Limits: 0.05 and 0.10.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import allocations
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import hdp
from hdp.attention.bound import Workspace
from hdp.balance.foresee import Peak
from hdp.parallel.activations import Activations
from hdp.parallel.engine import Engine

RANKS = 4
SCHEDULES = ("ring", "ulysses", "all_gather", "hybrid:2")
REGIMES = ("step", "slot")
RATIOS = (0.0, 0.5, 1.0)
LIMITS = {"memory_median": 0.05, "memory_worst": 0.10}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A small Llama."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=65536,
            use_cache=False,
        )
        return AutoModelForCausalLM.from_config(config, attn_implementation="hdp")


SHAPES = {
    "grouped": Shape(hidden=256, intermediate=688, layers=6, heads=8, kv_heads=4, vocabulary=4096),
    "deep": Shape(hidden=384, intermediate=768, layers=10, heads=8, kv_heads=8, vocabulary=2048),
}


def plan_of(schedule: str, ratio: float, regime: str, ranks: int) -> hdp.Plan:
    """A document of all ranks and one of half of them, whole ones beside and after them."""
    half = ranks // 2
    lengths = [260 * ranks, 160 * half, *[150] * ranks, *[300] * ranks]
    whole = [(rank,) for rank in range(ranks)]
    groups = [tuple(range(ranks)), tuple(range(half)), *whole, *whole]
    slots = [0, 0, *[int(rank < half) for rank in range(ranks)], *[1] * ranks]
    offload = tuple((rank, slot, ratio) for rank in range(ranks) for slot in (0, 1)) if ratio else ()
    return hdp.Plan.from_groups(
        lengths,
        groups,
        slots,
        world_size=ranks,
        capacity=1024,
        regime=regime,
        planner="benchmark",
        schedule_names=("local", schedule),
        offload=offload,
    )


def batch_of(plan: hdp.Plan, vocabulary: int) -> hdp.PlannedBatch:
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(0, vocabulary, (n,), generator=generator) for n in plan.lengths.tolist()]
    labels = int(plan.lengths.sum()) - len(documents)
    return hdp.PlannedBatch(
        step=0,
        plan=plan,
        documents=documents,
        indices=tuple(range(len(documents))),
        label_tokens=labels,
        loss_weight=float(labels),
    )


class Steps:
    """An engine and its optimizer, measured from the moment before its model was made."""

    def __init__(self, world: hdp.World, shape: Shape, regime: str) -> None:
        allocations.start()
        self.world, self.shape, self.regime = world, shape, regime
        self.base = allocations.allocated()
        self.engine: Engine = hdp.shard(shape.model(), world, regime=regime)
        self.optimizer = torch.optim.AdamW(self.engine.parameters(), lr=1e-4)
        self.is_warm = False

    def step(self, batch: hdp.PlannedBatch) -> None:
        self.engine.forward_backward(batch)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def measure(self, schedule: str, ratio: float, activations: Activations) -> tuple[Peak, allocations.Peak]:
        """Foreseen and measured, of this rank."""
        plan = plan_of(schedule, ratio, self.regime, self.world.world_size)
        batch = batch_of(plan, self.shape.vocabulary)
        runtime = self.world.runtime
        runtime.workspace = Workspace(self.world.device)  # the arena keeps what the last case needed
        runtime._executors.clear()
        self.engine.activations = activations if ratio else None
        for _ in range(1 if self.is_warm else 2):  # the optimizer's state, and the arena, are there
            self.step(batch)
        self.is_warm = True
        gc.collect()
        with allocations.Peak(activations.store if ratio else None) as measured:
            self.step(batch)
        assert self.engine.foresight is not None
        return self.engine.foresight.peak(plan, self.world.rank), measured


def run_rank(world: hdp.World, shape: str, regime: str, folder: str) -> list[dict[str, Any]]:
    """All schedules and ratios; what this rank found."""
    torch.set_num_threads(1)
    steps, found = Steps(world, SHAPES[shape], regime), []
    with Activations.open(world, folder=folder) as activations:
        for schedule in SCHEDULES:
            for ratio in RATIOS:
                peak, measured = steps.measure(schedule, ratio, activations)
                taken = measured.bytes - steps.base
                found.append(
                    {
                        "shape": shape,
                        "regime": regime,
                        "schedule": schedule,
                        "ratio": ratio,
                        "rank": world.rank,
                        "foreseen": peak.bytes,
                        "measured": taken,
                        "error": peak.bytes / taken - 1.0,
                        "when": peak.when,
                        "parts": peak.parts,
                        "operators": measured.operators[:6],
                    }
                )
        steps.engine.activations = None
    return found


def worker(shape: str, regime: str, folder: str) -> None:
    """One process; rank 0 prints what all have found."""
    with hdp.init(device="cpu") as world:
        mine = run_rank(world, shape, regime, folder)
        rows: list[Any] = [None] * world.world_size
        torch.distributed.all_gather_object(rows, mine, group=world.control)
        if world.rank == 0:
            print(json.dumps([one for row in rows for one in row]))


def start(shape: str, regime: str, folder: str) -> list[dict[str, Any]]:
    """A job of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command += [__file__, "--worker", shape, regime, folder]
    done = subprocess.run(
        command, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{shape}, {regime}: {done.stderr[-4000:]}")
    line = next(line for line in done.stdout.splitlines() if line.startswith("[{"))
    return json.loads(line)  # type: ignore[no-any-return]


def measure(shapes: tuple[str, ...] = tuple(SHAPES), regimes: tuple[str, ...] = REGIMES) -> dict[str, Any]:
    """The figures, and the cases that they are of."""
    cases: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="hdp-memory-") as folder:
        for shape in shapes:
            for regime in regimes:
                cases += start(shape, regime, folder)
    errors = [abs(case["error"]) for case in cases]
    figures = {"memory_median": statistics.median(errors), "memory_worst": max(errors)}
    for name, value in figures.items():
        print(f"{name}: {value:.4f} (limit {LIMITS[name]})", file=sys.stderr)
    by_kind = {
        f"{shape}, {regime}, ratio {ratio:g}": [
            min(_errors(cases, shape=shape, regime=regime, ratio=ratio), default=0.0),
            max(_errors(cases, shape=shape, regime=regime, ratio=ratio), default=0.0),
        ]
        for shape in shapes
        for regime in regimes
        for ratio in RATIOS
    }
    return {**figures, "limits": LIMITS, "least and largest error": by_kind, "cases": cases}


def _errors(cases: list[dict[str, Any]], **which: Any) -> list[float]:
    return [case["error"] for case in cases if all(case[name] == value for name, value in which.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=3, metavar=("SHAPE", "REGIME", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--regimes", nargs="*", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--out", type=Path, help="write the JSON there as well")
    options = parser.parse_args()
    if options.worker:
        worker(*options.worker)
        return
    text = json.dumps(measure(tuple(options.shapes), tuple(options.regimes)), indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
