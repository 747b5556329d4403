"""Makespans of other planners for ``planners.py``: made in processes of their own, within CPU seconds, and kept.

  nice -n 19 python benchmarks/rivals.py --planners flexsp --keep /tmp/rivals.json      # hours; may be stopped and resumed

Patience is counted in CPU seconds of the planner's process, so that a machine that is busy with something else does not
turn a slow planner into one without a plan. What is kept is found again by the costs of the batch and by the source of the
modules that the planner's result depends on: a planner that has changed is run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hdp.balance import CostModel, Plan, PlanError, Topology, evaluate, plan
from hdp.balance.distributions import DISTRIBUTIONS, draw_lengths
from hdp.balance.planners import PLANNERS, flexsp, make_problem

CAPACITY = 8192
CONTEXTS = (32768, 262144, 2097152)
WORLDS = (8, 64, 512, 4096, 12288)
MOST_TOKENS = 33_554_432
REGIMES = ("step", "slot")
SHARED = ("evaluate", "planners/problem", "planners/naive")
"""Modules of ``hdp.balance`` that every result depends on, besides the planner's own and the costs of the batch."""


def topology_of(world: int) -> Topology:
    """400 GB/s inside a node of 8, 50 GB/s across."""
    return Topology(world_size=world)


def cost_model() -> CostModel:
    """LLaMA-7B with 8 key/value heads at 400 TFLOP/s."""
    return CostModel.from_shape("llama-7b", flops=400e12)


def cases(worlds: list[int] | tuple[int, ...], seed: int = 0) -> Iterator[tuple[int, str, np.ndarray]]:
    """(world, label, lengths) of every batch whose longest document fits the cluster."""
    for world in worlds:
        for context in CONTEXTS:
            for name in DISTRIBUTIONS:
                if name == "short" and context != CONTEXTS[0]:
                    continue  # no document is longer than 4K anyway
                tokens = min(world * CAPACITY * 8, MOST_TOKENS)
                lengths = draw_lengths(name, tokens=tokens, context=context, seed=seed)
                if lengths.max() <= world * CAPACITY:
                    yield world, f"{name} {context // 1024}K", lengths
        if world == WORLDS[-1]:
            lengths = draw_lengths("short", tokens=world * CAPACITY * 4, context=CONTEXTS[0], seed=seed)
            yield world, "short 32K, 100,000 documents", lengths[:100_000]


class Kept:
    """Makespans in ticks by planner, source, regime and batch; in a file, or in memory alone."""

    def __init__(self, path: str | None) -> None:
        self._path = Path(path) if path else None
        self._made: dict[str, int | None] = {}
        if self._path is not None and self._path.exists():
            self._made = json.loads(self._path.read_text(encoding="utf-8"))

    def find(self, name: str, regime: str, world: int, lengths: np.ndarray, patience: float) -> int | None:
        """Makespan of the planner's plan, made now if it was not; None when it has none after ``patience`` seconds."""
        keys = {each: key_of(name, each, world, lengths, patience) for each in REGIMES}
        if keys[regime] not in self._made:
            # One search of flexsp serves both regimes.
            wanted = REGIMES if name == "flexsp" else (regime,)
            for each, ticks in makespans(name, wanted, world, lengths, patience).items():
                self._made[keys[each]] = ticks
            self._write()
        return self._made[keys[regime]]

    def _write(self) -> None:
        if self._path is not None:
            partial = self._path.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(self._made, indent=0), encoding="utf-8")
            partial.replace(self._path)


def key_of(name: str, regime: str, world: int, lengths: np.ndarray, patience: float) -> str:
    """What the result depends on, in one line."""
    folder = Path(sys.modules["hdp.balance"].__file__ or "").parent
    source, batch = hashlib.sha256(), hashlib.sha256()
    for module in (*SHARED, f"planners/{PLANNERS[name]}"):
        source.update((folder / f"{module}.py").read_bytes())
    costs = cost_model().quantise(lengths, topology_of(world))
    for terms in (costs.lengths, costs.linear, costs.attention, costs.ring):
        batch.update(np.ascontiguousarray(terms, dtype="<i8").tobytes())
    return f"{name} {regime} {world} {batch.hexdigest()[:16]} {source.hexdigest()[:16]} {patience:g}"


def makespans(
    name: str, regimes: tuple[str, ...], world: int, lengths: np.ndarray, patience: float
) -> dict[str, int | None]:
    """Per regime the ticks of the planner's best plan; None where it has none after ``patience`` CPU seconds."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sending, name, regimes, world, lengths, patience))
    process.start()
    sending.close()
    found: dict[str, int | None] = dict.fromkeys(regimes)
    try:
        found.update(receiving.recv())
    except EOFError:  # out of CPU seconds
        process.join()
        if process.exitcode not in (-24, -9):  # SIGXCPU, SIGKILL
            raise RuntimeError(f"planner {name} died with exit code {process.exitcode}") from None
    process.join()
    return found


def _work(sending: Any, name: str, regimes: tuple[str, ...], world: int, lengths: np.ndarray, patience: float) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime + patience + 1)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    topology, cost = topology_of(world), cost_model()
    found: dict[str, int] = {}
    made: list[Plan] = []
    try:
        for regime in regimes:
            if name != "flexsp":
                made = [plan(lengths, topology, cost, capacity=CAPACITY, regime=regime, planner=name)]
            else:
                made = _of_regime(made, regime) or flexsp.candidates(
                    make_problem(lengths, topology, cost, capacity=CAPACITY, regime=regime, planner=name), name
                )
            found[regime] = min(evaluate(each, cost, topology).makespan for each in made)
    except PlanError:
        pass  # no plan: the caller sees none
    sending.send(found)


def _of_regime(plans: list[Plan], regime: str) -> list[Plan]:
    return [Plan(**{**{f: getattr(each, f) for f in each.__dataclass_fields__}, "regime": regime}) for each in plans]


def main(argv: list[str] | None = None) -> int:
    """Fills the file, small worlds first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planners", default="static,bytescale,flexsp")
    parser.add_argument("--worlds", type=int, nargs="+", default=list(WORLDS))
    parser.add_argument("--patience", type=float, default=60.0, help="CPU seconds for a plan; default: 60")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", required=True, help="file of makespans")
    arguments = parser.parse_args(argv)
    kept = Kept(arguments.keep)
    for world, label, lengths in cases(arguments.worlds, arguments.seed):
        for name in arguments.planners.split(","):
            for regime in REGIMES:
                start = time.monotonic()
                ticks = kept.find(name, regime, world, lengths, arguments.patience)
                seconds = time.monotonic() - start
                print(f"{regime} {world:>6} {label:<28} {name} {ticks} {seconds:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
