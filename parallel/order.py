"""Whether ranks ran the attention of what they share in one order; found at the end of a step, on every backend.

Messages over gloo are told apart by call and direction, so ranks in different calls wait for each other until the timeout.
NCCL's carry no tag: there, one rank's gradients of one call would be taken for those of another. So the ranks compare what they
ran before anybody may use a gradient.

[Note: one sum] Every rank has a digest of each sequence that it shares: of its number, its group, and the calls of its
micro-batch in the order in which they ran here. Of g sharers the first counts (g - 1) times its digest and every other minus
its own, all modulo a prime. Where digests are equal this is 0; where some are not, the sum over all sequences and ranks is
anything else, but for one chance in 2^53. It is one number a rank, exact in float64, beside those that a step gathers anyway.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any

import torch.distributed as dist
from torch import Tensor

from hdp.attention.calls import describe
from hdp.attention.route import Route
from hdp.parallel.errors import CallMismatch
from hdp.parallel.metrics import gather_numbers
from hdp.parallel.world import World

PRIME = 2**53 - 111
"""The largest below 2^53: what is taken modulo it is exact in float64."""
SHOWN = 4
"""Sequences that one message names at most."""

Ran = dict[tuple[tuple[int, ...], int], tuple[tuple[int, ...], list[int]]]
"""By serial of the micro-batch and sequence: the group, and the calls as in ``Calls.order``."""


class CallOrder:
    """What one rank ran of shared sequences in one step. Holds no route alive, so none of its buffers."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._ran: list[tuple[Any, ...]] = []

    def add(self, route: Route) -> None:
        """A micro-batch; what it has run is looked at when the step is over."""
        shared = [shard for shard in route.shards if len(shard.group) > 1]
        if shared:
            self._ran.append((route.serial, shared, route.calls.order))

    def number(self) -> float:
        """What this rank counts. See [Note: one sum]."""
        total = 0
        for serial, shards, order in self._ran:
            calls = blake2b(struct.pack(f"<{len(serial)}q", *serial) + order.tobytes(), digest_size=16).digest()
            for shard in shards:
                said = struct.pack(f"<{1 + len(shard.group)}q", shard.sequence, *shard.group)
                digest = int.from_bytes(blake2b(said, digest_size=8, key=calls).digest(), "little") % PRIME
                total += digest * (len(shard.group) - 1) if self.rank == shard.group[0] else -digest
        return float(total % PRIME)

    def check(self, world: World, numbers: Tensor, where: str) -> None:
        """Compares all ranks' :meth:`number` (float64, one a rank); ``where`` begins the message.

        Raises:
            CallMismatch: on every rank, if they do not add up; names sequences, ranks and calls.
        """
        if sum(map(int, numbers.tolist())) % PRIME == 0:
            return
        mine: Ran = {
            (serial, shard.sequence): (shard.group, order.tolist())
            for serial, shards, order in self._ran
            for shard in shards
        }
        found: list[Ran] = [{} for _ in range(world.world_size)]
        dist.all_gather_object(found, mine, group=world.control)
        raise CallMismatch(f"{where}: {describe_differences(found)}")


def check_calls(world: World, routes: Iterable[Route], where: str = "a step") -> None:
    """For a loop without an engine: whether all ranks ran the attention of these routes in one order. A collective.

    Call it before gradients are used: over NCCL, whose messages carry nothing by which they could be told apart, nothing else
    notices that ranks walked two calls in different orders. Engines do it by themselves in every step and evaluation.

    Raises:
        CallMismatch: on every rank, if they did not; names sequences, ranks and calls.
    """
    order = CallOrder(world.rank)
    for route in routes:
        order.add(route)
    order.check(world, gather_numbers(world, order.number())[:, 0], where)


def describe_differences(ran: Sequence[Ran]) -> str:
    """What differs between the ranks' accounts of their sequences, in words."""
    found = []
    for key in sorted(set().union(*ran)):
        serial, sequence = key
        group = next(account[key][0] for account in ran if key in account)
        first = ran[group[0]].get(key)
        for rank in group[1:]:
            other = ran[rank].get(key)
            if other != first:
                found.append(
                    f"sequence {sequence} (micro-batch {serial}): {_first_difference(group[0], first, rank, other)}"
                )
                break
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return (
        "ranks ran the attention of what they share in different orders, so that gradients of one call may have been taken for"
        f" another's; all are discarded: {'; '.join(found[:SHOWN])}{more}. All sharers of a sequence must run the same layers,"
        " and walk the same branches backward, in the same order"
    )


def _first_difference(
    one: int, first: tuple[tuple[int, ...], list[int]] | None, two: int, other: tuple[tuple[int, ...], list[int]] | None
) -> str:
    if first is None or other is None or first[0] != other[0]:
        groups = ["has none" if account is None else f"shares it with {account[0]}" for account in (first, other)]
        return f"rank {one} {groups[0]}, rank {two} {groups[1]}"
    at = next((i for i, (a, b) in enumerate(zip(first[1], other[1], strict=False)) if a != b), None)
    at = min(len(first[1]), len(other[1])) if at is None else at
    calls = [
        describe(order[at] >> 1, bool(order[at] & 1)) if at < len(order) else "nothing more"
        for order in (first[1], other[1])
    ]
    return f"rank {one} ran {calls[0]} where rank {two} ran {calls[1]}"
