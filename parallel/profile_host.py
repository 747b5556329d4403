"""Measures what each tile and each message of attention costs the host: many tiny sequences against few of the same tokens.

Time on the wall would count the waits for messages, which a step fills with other work. So the host is timed by a clock that
stands still while it waits (``profile_clock``), many and few in turn, and the median of the differences counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hdp.attention.mask import Mask
from hdp.attention.op import attend
from hdp.attention.program import HeadCount
from hdp.attention.route import LayerKey
from hdp.balance.host import HostCosts, ring_messages
from hdp.balance.models import ModelShape
from hdp.balance.plan import Plan
from hdp.parallel.batch import MicroBatchInputs, PlannedBatch, build_inputs
from hdp.parallel.profile_clock import NO_QUOTA, Quota, host_clock
from hdp.parallel.world import World

Clock = Callable[[], float]

MANY, FEW = 32, 8
LARGEST_GROUP = 4
TURNS = 9
"""Blocks of runs of many and of few sequences, in turn."""
SECONDS = 0.1
"""What a block takes, about."""


def host_costs(world: World, shape: ModelShape, dtype: torch.dtype, quota: Quota = NO_QUOTA) -> HostCosts:
    """Mean over ranks, equal on all of them.

    Whole sequences tell what a tile costs; rings of the first, second, ... ``LARGEST_GROUP`` ranks what a message costs beyond
    that. A rank that is left over measures no ring.
    """
    first = world.rank // LARGEST_GROUP * LARGEST_GROUP
    size = min(LARGEST_GROUP, world.world_size - first)
    clock = host_clock(world.device, quota)
    whole, whole_setup = _each(world, clock, shape, dtype, (world.rank,))
    ring, ring_setup = _each(world, clock, shape, dtype, tuple(range(first, first + size)))
    messages = ring_messages(size, backward=False) + ring_messages(size, backward=True)
    sums = torch.tensor([whole, whole_setup, 0.0, 0.0, 0.0], dtype=torch.float64)
    if messages:
        sums[2:] = torch.tensor([(ring - size * whole) / messages, (ring_setup - size * whole_setup) / messages, 1.0])
    dist.all_reduce(sums, group=world.control)
    whole, whole_setup, message, message_setup, rings = sums.clamp_min(0.0).tolist()
    return HostCosts(
        piece_seconds=whole / 2 / world.world_size,
        message_seconds=message / max(rings, 1.0),
        piece_setup=whole_setup / 2 / world.world_size,
        message_setup=message_setup / max(rings, 1.0),
    )


def _each(
    world: World, clock: Clock, shape: ModelShape, dtype: torch.dtype, group: tuple[int, ...]
) -> tuple[float, float]:
    """Seconds that one sequence more costs at the same tokens: in a layer, forward and backward; and once a micro-batch."""
    length = 2 * len(group) * (MANY // FEW)
    layers, setups = [], []
    for documents in (FEW, MANY):
        make = micro_batch(world, [torch.zeros(length * FEW // documents, dtype=torch.int64)] * documents, group)
        layers.append(_layer(world, shape, dtype, make()))
        key = LayerKey(
            heads=HeadCount(query=shape.heads, key=shape.kv_heads), head_dim=shape.head_dim, dtype=dtype, mask=Mask()
        )

        def prepare(make: Callable[[], MicroBatchInputs] = make, key: LayerKey = key) -> None:
            inputs = make()
            for backward in (False, True):
                inputs.route.program(key, backward)

        setups.append(prepare)
    more = MANY - FEW
    return _difference(world, clock, layers) / more, _difference(world, clock, setups) / more


def micro_batch(world: World, documents: list[Tensor], group: tuple[int, ...]) -> Callable[[], MicroBatchInputs]:
    """Makes the inputs of one micro-batch of ``documents`` on ``group``, each time anew as in training."""
    lengths = np.array([len(d) for d in documents], dtype=np.int64)
    plan = Plan.from_groups(
        lengths,
        [group] * len(documents),
        [0] * len(documents),
        world_size=world.world_size,
        capacity=int(lengths.sum()),
        regime="step",
        planner="profile",
    )
    batch = PlannedBatch(
        step=0,
        plan=plan,
        documents=documents,
        indices=tuple(range(len(documents))),
        label_tokens=1,
        loss_weight=1.0,
    )
    part = plan.micro_batches(world.rank)[0]
    return lambda: build_inputs(batch, part, world.runtime, world.device, {})


def _layer(world: World, shape: ModelShape, dtype: torch.dtype, inputs: MicroBatchInputs) -> Callable[[], None]:
    """Attention of one layer, forward and backward."""
    tokens = len(inputs.input_ids)

    def tensor(heads: int) -> Tensor:
        return torch.randn(tokens, heads, shape.head_dim, dtype=dtype, device=world.device, requires_grad=True)

    q, k, v = tensor(shape.heads), tensor(shape.kv_heads), tensor(shape.kv_heads)

    def run() -> None:
        out = attend(q, k, v, route=inputs.route)
        torch.autograd.grad(out, (q, k, v), out)

    return run


def _difference(world: World, clock: Clock, runs: Sequence[Callable[[], None]]) -> float:
    """How much longer the second takes the host, on all ranks at once and equally often; median of some turns."""

    def timed(run: Callable[[], None], times: int, clock: Clock = clock) -> float:
        dist.barrier(group=world.control)
        start = clock()
        for _ in range(times):
            run()
        return (clock() - start) / times

    for run in runs:
        run()
    once = torch.tensor([max(timed(run, 1, time.perf_counter) for run in runs)], dtype=torch.float64)
    dist.all_reduce(once, group=world.control)
    times = max(int(SECONDS * world.world_size / max(float(once), 1e-9)), 1)
    differences = []
    for _ in range(TURNS):
        few, many = (timed(run, times) for run in runs)
        differences.append(many - few)
    return statistics.median(differences)
