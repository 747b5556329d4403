"""Measures what sharding takes the host: a step of two tokens under FSDP2, less the same step on the bare model.

Threads that move bytes of collectives are not all of it: FSDP2 copies parameters and gradients in and out, and runs hooks
around every layer.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from hdp.balance.host import HostCosts
from hdp.balance.plan import Plan
from hdp.parallel.batch import PlannedBatch
from hdp.parallel.engine import Engine
from hdp.parallel.fsdp import find_layers, shard
from hdp.parallel.models import compute_dtype
from hdp.parallel.world import World

Clock = Callable[[], float]

WARM, STEPS = 2, 9
"""Steps that are left out, and that are timed, of each engine."""
BUDGET = 10.0
"""Seconds after which no further step of an engine is begun."""


def sharding_seconds(model: nn.Module, world: World, clock: Clock) -> float:
    """Of the host a step, FSDP2's own work and what moves bytes together; mean over ranks, equal on all of them.

    ``model`` stays as it is: a copy is sharded, which takes no more memory than the gradients of a backward pass.
    """
    alone = empty_step(Engine(model, world), clock)
    copied = copy.deepcopy(model)
    if compute_dtype(copied) == torch.float16:  # which is not trained; as many bytes move
        copied.to(torch.bfloat16)
    return max(empty_step(shard(copied, world), clock) - alone, 0.0)


def spread(host: HostCosts, seconds: float, parameter_bytes: float, gradient_bytes: float) -> HostCosts:
    """``host`` whose gathers and reductions take ``seconds`` a step, in the proportion in which they move bytes alone."""
    gather, reduce = host.gather_byte * parameter_bytes, host.reduce_byte * gradient_bytes
    part = gather / (gather + reduce) if gather + reduce else 0.5
    return replace(
        host, gather_byte=seconds * part / parameter_bytes, reduce_byte=seconds * (1.0 - part) / gradient_bytes
    )


def root_share(model: nn.Module) -> float:
    """Part of the parameters that belongs to no layer: gathered first and reduced last."""
    layers = {id(p) for layer in find_layers(model) for p in layer.parameters()}
    rest = sum(p.numel() for p in model.parameters() if id(p) not in layers)
    return rest / sum(p.numel() for p in model.parameters())


def empty_step(engine: Engine, clock: Clock) -> float:
    """Seconds of the host for a step of two tokens a rank; median, mean over ranks."""
    batch, seconds, begin = whole_batch(engine, 1, 2), [], time.perf_counter()
    for step in range(WARM + STEPS):
        seconds.append(host_seconds(engine, batch, clock))
        if step >= WARM and _mean(engine.world, time.perf_counter() - begin) > BUDGET:
            break
    return statistics.median(seconds[WARM:])


def whole_batch(engine: Engine, documents: int, length: int) -> PlannedBatch:
    """So many documents on each rank, none of them shared."""
    ranks = engine.world.world_size
    lengths = [length] * documents * ranks
    groups = [(rank,) for rank in range(ranks) for _ in range(documents)]
    slots, capacity = [0] * len(lengths), documents * length
    plan = Plan.from_groups(
        lengths, groups, slots, world_size=ranks, capacity=capacity, regime="step", planner="profile"
    )
    return PlannedBatch(
        step=0,
        plan=plan,
        documents=[torch.randint(0, engine.vocabulary or 1, (n,)) for n in lengths],
        indices=tuple(range(len(lengths))),
        label_tokens=sum(lengths) - len(lengths),
        loss_weight=float(sum(lengths)),
    )


def host_seconds(engine: Engine, batch: PlannedBatch, clock: Clock) -> float:
    """Of one step; mean over ranks. Leaves no gradients."""
    dist.barrier(group=engine.world.control)
    start = clock()
    engine.forward_backward(batch)
    seconds = clock() - start
    for parameter in engine.parameters():
        parameter.grad = None
    return _mean(engine.world, seconds)


def _mean(world: World, seconds: float) -> float:
    """Over ranks, equal on all of them."""
    mean = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(mean, group=world.control)
    return float(mean) / world.world_size
