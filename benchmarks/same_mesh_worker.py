"""One host of ``benchmarks/same_mesh.py``: trains a small Llama with hdp and with its packed rival, in turn.

    same_mesh_worker.py '[{"batch": "tail", "heads": [8, 8], "schedules": ["ulysses"], "rounds": 9}, ...]'

Rank 0 prints a JSON list, one object a job: per candidate (``hdp:SCHEDULE``, ``rival:SCHEDULE``) the seconds of each step, CPU
seconds of all ranks, and those of attention (mean over ranks).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from clocks import AttentionClock
from packed_training import PackedMesh, no_mask, packed_attention
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM

import hdp
from hdp.attention.huggingface import hdp_attention

LAYERS, WIDTH, VOCABULARY = 4, 256, 512
LEARNING_RATE = 1e-4
LOSSES_AGREE = 1e-4
KERNELS = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
)
"""Called by both sides; what is done to call them, and with what they return, is not theirs."""


def tail() -> list[int]:
    """40 documents, log-normal, 16,072 tokens."""
    drawn = np.random.default_rng(100).lognormal(sigma=1.2, size=40)
    return np.rint(drawn / drawn.max() * 3000).astype(int).tolist()


def long() -> list[int]:
    """One long document beside 30 of 50 to 483 tokens, 13,997 tokens."""
    short = np.exp(np.random.default_rng(76).uniform(np.log(50), np.log(500), 30))
    return [8000, *short.astype(int).tolist()]


@dataclass(frozen=True)
class Batch:
    """A global batch."""

    lengths: list[int]
    capacity: int
    """Tokens of a micro-batch on one rank: as many as let the longest document be shared by few ranks or all."""


BATCHES = {"tail": Batch(tail(), 1024), "equal": Batch([1000] * 16, 512), "long": Batch(long(), 2048)}


@dataclass(frozen=True)
class Job:
    """What to measure."""

    batch: str
    heads: tuple[int, int]
    """Query and key/value heads."""
    schedules: list[str]
    rounds: int
    """Each runs every candidate once; one more, before, warms up."""
    sides: tuple[str, ...] = ("hdp", "rival")
    """``variant``: hdp with the schedule that ``variants`` has for the one of the others."""
    variants: dict[str, str] = field(default_factory=dict)


def documents_of(batch: Batch) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCABULARY, (n,), generator=draw) for n in batch.lengths]


def llama(heads: tuple[int, int], attention: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH * 8 // 3,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        vocab_size=VOCABULARY,
        max_position_embeddings=1 << 20,
        use_cache=False,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation=attention)


class HdpMesh:
    """Planner ``static`` and one schedule for all documents."""

    def __init__(self, world: hdp.World, job: Job, documents: list[Tensor]) -> None:
        self.world = world
        self.engine = hdp.shard(llama(job.heads, "hdp"), world)
        self.optimizer = torch.optim.AdamW(self.engine.parameters(), lr=LEARNING_RATE)
        self.loader = hdp.Loader(
            documents,
            self.engine,
            tokens_per_step=sum(map(len, documents)),
            capacity=BATCHES[job.batch].capacity,
            planner="static",
            machine="assume",
            seed=None,
            steps=len(job.schedules) * (job.rounds + 1) * len(job.sides),
        )
        self.plan = next(self.loader.plan_batches())[1]
        self.batches: Iterator[hdp.PlannedBatch] = iter(self.loader)

    def step(self, schedule: str) -> float:
        self.world.runtime.schedule = schedule
        result = self.engine.forward_backward(next(self.batches))
        self.engine.clip_grad_norm_(1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return result.loss


class Bench:
    """Both sides, on one batch."""

    def __init__(self, job: Job, world: hdp.World, clock: AttentionClock) -> None:
        self.clock = clock
        documents = documents_of(BATCHES[job.batch])
        ours = HdpMesh(world, job, documents)
        self.plan = ours.plan
        self.runs: dict[str, Callable[[str], float]] = {
            "hdp": ours.step,
            "variant": lambda schedule: ours.step(job.variants[schedule]),
        }
        if "rival" in job.sides:
            theirs = PackedMesh(llama(job.heads, "packed"), world, ours.plan, LEARNING_RATE)
            self.runs["rival"] = lambda schedule: theirs.step(documents, schedule)

    def measure(self, candidate: str) -> dict[str, Any]:
        """A step on all ranks; a collective."""
        side, schedule = candidate.split(":", 1)
        self.clock.take()
        dist.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        loss = self.runs[side](schedule)
        dist.barrier()
        mine = (time.perf_counter() - wall, time.process_time() - cpu, *self.clock.take())
        rows: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(rows, mine)
        walls, cpus, *attention = zip(*rows, strict=True)
        return {
            "seconds": max(walls),
            "cpu": sum(cpus),
            "attention": [sum(part) / len(rows) for part in attention],
            "loss": loss,
        }


def run_job(job: Job, world: hdp.World, clock: AttentionClock) -> dict[str, Any]:
    bench = Bench(job, world, clock)
    found: dict[str, list[dict[str, Any]]] = {f"{side}:{s}": [] for s in job.schedules for side in job.sides}
    for number in range(job.rounds + 1):
        for at in range(len(job.schedules)):
            schedule = job.schedules[(at + number) % len(job.schedules)]
            sides = job.sides if number % 2 else job.sides[::-1]
            steps = {side: bench.measure(f"{side}:{schedule}") for side in sides}
            check_losses(schedule, steps)
            for side, step in steps.items():
                if number:  # the first warms up
                    found[f"{side}:{schedule}"].append(step)
            if world.rank == 0:
                shown = ", ".join(f"{side} {step['seconds']:.2f} s" for side, step in steps.items())
                print(f"round {number}, {schedule}: {shown}", file=sys.stderr, flush=True)
    return {"groups": bench.plan.describe_groups(), "slots": bench.plan.slot_count, "steps": found}


def check_losses(schedule: str, steps: dict[str, dict[str, Any]]) -> None:
    losses = {side: step["loss"] for side, step in steps.items()}
    if max(losses.values()) - min(losses.values()) > LOSSES_AGREE:
        raise RuntimeError(f"{schedule}: losses differ: {losses}")


def clocked() -> AttentionClock:
    """Counts attention of both sides."""
    clock = AttentionClock()
    for kernel in KERNELS:
        kernel._op = clock.kernel(kernel._op)
    AttentionInterface.register("hdp", clock.around(hdp_attention))
    AttentionInterface.register("packed", clock.around(packed_attention))
    AttentionMaskInterface.register("packed", no_mask)
    return clock


def main() -> None:
    torch.set_num_threads(1)
    with hdp.init(timeout=300) as world:
        clock = clocked()
        jobs = [Job(**{**job, "heads": tuple(job["heads"])}) for job in json.loads(sys.argv[1])]
        found = [run_job(job, world, clock) for job in jobs]
        if world.rank == 0:
            print(json.dumps(found))


if __name__ == "__main__":
    main()
