"""How long the machine takes to be known at the start of a job, what knowing slow ranks is worth, and memory foreseen.

    python benchmarks/machine.py --cluster PATH [--only first,unlike] [--keep FILE]        (about 30 minutes)

A Llama of 4 layers, width 256, 8 heads, FSDP2, AdamW; 40 log-normal documents of 16,072 tokens in all, capacity 1,024.

- ``measure_first``: seconds from the call of ``hdp.Loader`` to the first planned batch on four hosts of half a core, links of
  200 Mbit/s, with nothing known before; ``measure_second``: what finding the machine takes on the next start.
- ``links_found``: on a start at 50 Mbit/s with what was kept at 200: the rate measured, in Mbit/s; ``link_kind_nic``,
  ``link_kind_peer``: whether hosts with one port, and with a link a pair, were told apart.
- ``unlike_ranks``: two hosts of half a core and two of a quarter: seconds of a step by a plan for ranks of equal speed over one
  that knows them, in turn in the same processes, the order alternating; median of the rounds' ratios, second smallest and
  second largest in brackets. 32 documents of 150 to 770 tokens, links of 200 Mbit/s; 1.5 is ideal. ``unlike_tail``: the same
  for the 40 documents, of which four are longer than the capacity.

- ``crossing``: with two nodes of two hosts, 200 Mbit/s inside and 20 across, documents that two ranks can hold and that are
  shared across nodes all the same, of ``held_by_two``; ``uneven``: the nodes that a start on three and two hosts found.
  Both train two steps.

- ``memory_median``, ``memory_worst``: how far a rank's foreseen peak is from the measured one (``machine_memory.py``).

``--only`` runs some parts; with ``--keep`` each leaves its figures in FILE, and the last line has those of all parts kept. PATH
is a program that starts one process per host: ``PATH -n RANKS -r RATE [-p] -c CPU_PERCENTS -- COMMAND``. The last line of the
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
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine_memory

HOSTS, CAPACITY, ROUNDS = 4, 1024, 9
PARTS = ("first", "links", "unlike", "nodes", "memory")
WHOLE = [150 + 20 * i for i in range(32)]
"""Tokens of documents, each of which one rank can hold."""


# ---------------------------------------------------------------- on the hosts


def worker(part: str, rounds: int) -> dict[str, Any]:
    """What rank 0 found."""
    import torch
    from same_mesh_worker import BATCHES, Batch, documents_of, llama

    import hdp
    from hdp.parallel.machine import find_machine

    torch.manual_seed(0)
    world = hdp.init()
    engine = hdp.shard(llama((8, 8), "hdp"), world)
    documents = documents_of(Batch(WHOLE, CAPACITY) if part == "whole" else BATCHES["tail"])
    options: dict[str, Any] = {"tokens_per_step": sum(map(len, documents)), "capacity": CAPACITY, "seed": None}
    begin = time.perf_counter()
    machine = find_machine(engine, "measure")
    known = time.perf_counter() - begin
    loader = hdp.Loader(documents, engine, steps=2, **options)
    batches = iter(loader)
    batch = next(batches)
    assert machine is not None
    found: dict[str, Any] = {
        "known": known,
        "planned": time.perf_counter() - begin,
        "link_kind": machine.link_kind,
        "mbit": [8e-6 * link.bandwidth for link in (machine.intra, machine.inter) if link],
        "speeds": machine.speeds,
        "machine": json.loads(machine.to_json()),
        "nodes": machine.nodes,
    }
    if part == "nodes":
        topology, plan = machine.topology(), batch.plan
        found["groups"] = [
            (int(n), plan.group(i), topology.is_local(plan.group(i))) for i, n in enumerate(plan.lengths)
        ]
        found["losses"] = []
        optimizer = torch.optim.SGD(engine.parameters(), lr=0.1)
        for each in (batch, *batches):
            found["losses"].append(engine.forward_backward(each).loss)
            optimizer.step()
            optimizer.zero_grad()
    if part in ("whole", "unlike"):
        found["ratios"], found["seconds"] = _in_turn(world, engine, documents, machine, options, rounds)
    world.close()
    return found


def _in_turn(
    world: Any, engine: Any, documents: list, machine: Any, options: dict, rounds: int
) -> tuple[list[float], dict[str, list[float]]]:
    """Steps by both plans: their ratios, and the seconds of each, without the first of each."""
    import torch
    import torch.distributed as dist

    import hdp

    optimizer = torch.optim.AdamW(engine.parameters(), lr=1e-4)
    machines = {"even": replace(machine, speeds=()), "known": machine}
    loaders = {
        name: iter(hdp.Loader(documents, engine, steps=rounds + 1, machine=each, **options))
        for name, each in machines.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in loaders}
    for turn in range(rounds + 1):
        for name in loaders if turn % 2 else reversed(list(loaders)):
            dist.barrier(group=world.control)
            start = time.perf_counter()
            engine.forward_backward(next(loaders[name]))
            engine.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
            dist.barrier(group=world.control)
            seconds[name].append(time.perf_counter() - start)
    kept = {name: each[1:] for name, each in seconds.items()}
    return [a / b for a, b in zip(kept["even"], kept["known"], strict=True)], kept


# ---------------------------------------------------------------- from outside


def hosts(
    cluster: str,
    cache: str,
    part: str,
    *,
    rate: str,
    cpu: str,
    rounds: int = 0,
    extra: Sequence[str] = (),
    count: int = HOSTS,
) -> Any:
    """The JSON value on the last line of rank 0's output. ``extra``: options of the cluster."""
    start = [cluster, "-n", str(count), "-r", rate, "-c", cpu, *extra, "--"]
    command = [*start, sys.executable, __file__, "--worker", part, "--rounds", str(rounds)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HDP_CACHE": cache, "HDP_MACHINE": "measure"}
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, env=environment, timeout=3600)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def first(cluster: str, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        cold, warm = (hosts(cluster, cache, "first", rate="200mbit", cpu="50") for _ in range(2))
    show("first start", cold)
    show("second start", warm)
    return {
        "measure_first": cold["planned"],
        "measure_second": warm["known"],
        "second_planned": warm["planned"],
        "mbit_first": cold["mbit"],
    }


def links(cluster: str, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        fast, slow = (hosts(cluster, cache, "links", rate=rate, cpu="50") for rate in ("200mbit", "50mbit"))
    with tempfile.TemporaryDirectory() as cache:
        mesh = hosts(cluster, cache, "links", rate="100mbit", cpu="50", extra=["-p"])
    for name, found in (("200 Mbit/s", fast), ("then 50 Mbit/s", slow), ("100 Mbit/s a pair", mesh)):
        show(name, found)
    return {
        "links_found": slow["mbit"],
        "links_before": fast["mbit"],
        "link_kind_nic": fast["link_kind"] == slow["link_kind"] == "nic",
        "link_kind_peer": mesh["link_kind"] == "peer",
    }


def unlike(cluster: str, rounds: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, part in (("unlike_ranks", "whole"), ("unlike_tail", "unlike")):
        with tempfile.TemporaryDirectory() as cache:
            found = hosts(cluster, cache, part, rate="200mbit", cpu="50,50,25,25", rounds=rounds)
        show(name, found)
        ratios: Sequence[float] = sorted(found["ratios"])
        inner = ratios[1:-1] if len(ratios) > 2 else ratios
        print(f"{name} {statistics.median(ratios):.3f} ({inner[0]:.3f} to {inner[-1]:.3f}), seconds {found['seconds']}")
        figures |= {name: statistics.median(ratios), f"{name}_speeds": found["speeds"]}
    return figures


def nodes(cluster: str, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        two = hosts(cluster, cache, "nodes", rate="20mbit", cpu="50", extra=["-g", "2,2", "-i", "200mbit"])
        uneven = hosts(cluster, cache, "nodes", rate="200mbit", cpu="40", extra=["-g", "3,2"], count=5)
    for name, found in (("2 and 2 hosts", two), ("3 and 2 hosts", uneven)):
        show(name, found)
        shared = [(length, group) for length, group, _ in found["groups"] if len(group) > 1]
        print(f"{name}: losses {found['losses']}, shared {shared}")
    by_two = [(length, local) for length, _, local in two["groups"] if length <= 2 * CAPACITY]
    return {
        "held_by_two": len(by_two),
        "crossing": sum(not local for _, local in by_two),
        "uneven": uneven["nodes"],
    }


def memory(cluster: str, rounds: int) -> dict[str, Any]:
    """Ranks of this machine, without a cluster."""
    found = machine_memory.measure()
    return {name: value for name, value in found.items() if name.startswith("memory_")}


def show(name: str, found: dict[str, Any]) -> None:
    mbit = ", ".join(f"{rate:.1f}" for rate in found["mbit"])
    cost, host = found["machine"]["cost"], found["machine"]["host"]
    times = f"known after {found['known']:.2f} s, planned after {found['planned']:.2f} s"
    rates = f"{found['link_kind']}, {mbit} Mbit/s; speeds {found['speeds']}"
    costs = f"linear {cost['linear']:.3g}, quadratic {cost['quadratic']:.3g}, host {host}"
    print(f"{name}: {times}; {rates}; {costs}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", help="program that starts one process per host")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--keep", type=Path, help="JSON file of the parts' figures")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(worker(arguments.worker, arguments.rounds)), flush=True)
        return
    if not arguments.cluster:
        sys.exit("give --cluster PATH")
    keep = arguments.keep
    figures: dict[str, Any] = json.loads(keep.read_text()) if keep and keep.exists() else {}
    parts = {"first": first, "links": links, "unlike": unlike, "nodes": nodes, "memory": memory}
    for name in arguments.only.split(","):
        figures |= parts[name](arguments.cluster, arguments.rounds)
        if keep:
            keep.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
