"""Measures what attention's tiles and messages cost the host: tiny documents, many and few, whole and on rings of some sizes.

Documents of one group run one program, so one document more has tiles of its own and no message. Few against many documents
tell what a tile costs; larger groups what a round costs; and documents dealt to rings that turn both ways, which send twice the
messages in as many rounds, what a message costs. All come out of one least-squares fit. On two ranks both ways round are one,
so that rounds and messages cannot be told apart and share what they cost.

Time on the wall would count the waits for messages, which a step fills with other work. So the host is timed by a clock that
stands still while it waits (``profile_clock``), all cases in turn, and the median over the turns counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

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
"""Blocks of runs of each case, in turn."""
SECONDS = 0.06
"""What a block takes, about."""


Group = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One micro-batch that is timed; every rank has a case of the same number at the same time."""

    groups: tuple[Group, ...]
    """Of each document."""

    @property
    def pieces(self) -> int:
        """Tiles, forward and backward together."""
        return 2 * sum(map(len, self.groups))

    @property
    def messages(self) -> int:
        """Sent and received, forward and backward together. On two ranks both ways round are one."""
        size = len(self.groups[0])
        ways = len(set(self.groups)) if size > 2 else 1
        return ways * sum(ring_messages(size, backward) for backward in (False, True))

    @property
    def rounds(self) -> int:
        """Of the micro-batch's programs, forward and backward together; whole documents have none."""
        size = len(self.groups[0])
        return 2 * size if size > 1 else 0


def cases(rank: int, world_size: int) -> list[Case]:
    """Of one rank: whole documents, and rings of neighbouring ranks; those that are left over have smaller ones."""
    made = []
    for size in sorted({1, min(2, world_size), min(LARGEST_GROUP, world_size)}):
        first = rank // size * size
        group = tuple(range(first, min(first + size, world_size)))
        made += [Case(groups=(group,) * documents) for documents in (FEW, MANY)]
        if size > 2:
            made.append(Case(groups=(group, group[::-1]) * (MANY // 2)))
    return made


def host_costs(
    world: World,
    shape: ModelShape,
    dtype: torch.dtype,
    quota: Quota = NO_QUOTA,
    *,
    turns: int = TURNS,
    seconds: float = SECONDS,
) -> HostCosts:
    """Fitted to all ranks' times, equal on all of them. One rank has no messages.

    Args:
        turns: blocks of runs of each case, in turn.
        seconds: that a block takes, about.
    """
    clock = host_clock(world.device, quota)
    found = cases(world.rank, world.world_size)
    layers, setups = [], []
    for case in found:
        make = _make(world, case)
        layers.append(_layer(world, shape, dtype, make()))
        setups.append(_setup(shape, dtype, make))
    counts = np.array([(case.pieces, case.messages, case.rounds) for case in found], dtype=np.float64)
    piece, message, turn = fitted(world, counts, _times(world, clock, layers, turns, seconds))
    piece_setup, message_setup = fitted(world, counts[:, :2], _times(world, clock, setups, turns, seconds))
    return HostCosts(
        piece_seconds=piece,
        message_seconds=message,
        round_seconds=turn,
        piece_setup=piece_setup,
        message_setup=message_setup,
    )


def _make(world: World, case: Case) -> Callable[[], MicroBatchInputs]:
    """Documents that leave each rank as many tokens in all cases."""
    length = 2 * len(case.groups[0]) * (MANY // FEW) * FEW // len(case.groups)
    return micro_batch(world, [torch.zeros(length, dtype=torch.int64)] * len(case.groups), case.groups)


def _setup(shape: ModelShape, dtype: torch.dtype, make: Callable[[], MicroBatchInputs]) -> Callable[[], None]:
    """Makes the programs of one micro-batch, both directions."""
    heads = HeadCount(query=shape.heads, key=shape.kv_heads)
    key = LayerKey(heads=heads, head_dim=shape.head_dim, dtype=dtype, mask=Mask())

    def run() -> None:
        inputs = make()
        for backward in (False, True):
            inputs.route.program(key, backward)

    return run


def fitted(world: World, counts: np.ndarray, times: Sequence[Sequence[float]]) -> list[float]:
    """Seconds of each thing that is counted, none negative: least squares over the cases of all ranks, the same on each.

    ``counts``: [cases, things], this rank's; ``times``: of each case, in each turn. What all cases of a turn have in common, a
    slower machine in that turn above all, falls out.
    """
    each = np.array(times)
    seconds = np.median(each - each.mean(axis=0), axis=1)
    seconds, counts = seconds - seconds.mean(), counts - counts.mean(axis=0)
    things = counts.shape[1]
    sums = torch.from_numpy(np.append((counts.T @ counts).ravel(), counts.T @ seconds))
    dist.all_reduce(sums, group=world.control)
    matrix, vector = sums[: things * things].reshape(things, things).numpy(), sums[things * things :].numpy()
    best, least = np.zeros(things), 0.0
    for number in range(things, 0, -1):  # the best subset whose terms are not negative
        for chosen in combinations(range(things), number):
            terms = np.zeros(things)
            terms[list(chosen)] = np.linalg.lstsq(matrix[np.ix_(chosen, chosen)], vector[list(chosen)], rcond=1e-9)[0]
            error = float(terms @ matrix @ terms - 2 * terms @ vector)
            if terms.min() >= 0 and error < least - 1e-9 * abs(least):
                best, least = terms, error
    return [float(term) for term in best]


def micro_batch(world: World, documents: list[Tensor], groups: Sequence[Group]) -> Callable[[], MicroBatchInputs]:
    """Makes the inputs of one micro-batch of ``documents`` on ``groups``, each time anew as in training."""
    lengths = np.array([len(d) for d in documents], dtype=np.int64)
    plan = Plan.from_groups(
        lengths,
        list(groups),
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


def _times(
    world: World, clock: Clock, runs: Sequence[Callable[[], None]], turns: int, block: float
) -> list[list[float]]:
    """Seconds that each takes the host, in some turns; all ranks run one at once and equally often."""

    def timed(run: Callable[[], None], times: int, clock: Clock = clock) -> float:
        dist.barrier(group=world.control)
        start = clock()
        for _ in range(times):
            run()
        return (clock() - start) / times

    for run in runs:
        run()
    once = torch.tensor([timed(run, 1, time.perf_counter) for run in runs], dtype=torch.float64)
    dist.all_reduce(once, op=dist.ReduceOp.MAX, group=world.control)
    repeats = [max(int(block / max(seconds, 1e-9)), 1) for seconds in once.tolist()]
    found = [[timed(run, times) for run, times in zip(runs, repeats, strict=True)] for _ in range(turns)]
    return [list(times) for times in zip(*found, strict=True)]
