"""The choice of attention schedules by what is known of the machine."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from hdp.attention.auto import AUTO, Chooser
from hdp.attention.predict import Links
from hdp.balance.machine import Machine

if TYPE_CHECKING:
    from hdp.parallel.world import World

LEAST_TILES = 3
"""Lengths below which one rate is taken for all calls."""


@lru_cache(maxsize=64)
def chooser_of(machine: Machine, kept_per_token: float | None = None) -> Chooser:
    """Resolves the schedule ``"auto"`` on the ranks of a machine.

    ``kept_per_token``: bytes that a layer may keep of each token beside what it saves anyway; None: any.
    """
    topology, host = machine.topology(), machine.host
    return Chooser(
        links=Links(
            kind=machine.link_kind,
            inner_rate=topology.intra.bandwidth,
            outer_rate=topology.inter.bandwidth,
            latency=topology.intra.latency if topology.nodes == 1 else topology.inter.latency,
        ),
        flops=machine.flops,
        backward_factor=machine.cost.backward_quadratic or 2.5,
        ranks_per_node=topology.ranks_per_node if topology.nodes > 1 else None,
        step_seconds=host.round_seconds,
        byte_seconds=host.message_byte,
        message_seconds=host.message_seconds,
        call_seconds=host.piece_seconds,
        sum_seconds=host.sum_byte,
        tiles=tiles_of(machine),
        kept_per_token=kept_per_token,
    )


def tiles_of(machine: Machine) -> tuple[tuple[int, float, float], ...]:
    """Seconds of one head beyond what the shortest tile takes, which is all launch, of lengths that take longer; empty if too
    few were measured."""
    if machine.shape is None or not machine.tiles:
        return ()
    launch, *rest = machine.tiles
    heads = machine.shape.heads
    found = [(t.tokens, (t.forward - launch.forward) / heads, (t.backward - launch.backward) / heads) for t in rest]
    longer = tuple(each for each in found if min(each[1:]) > 0)
    return longer if len(longer) >= LEAST_TILES else ()


def check_chooser(world: World, machine: Machine | None) -> None:
    """Raises ValueError if ``hdp.init`` was told ``"auto"`` and nothing is known to choose by."""
    runtime = world.runtime
    if AUTO in (runtime.schedule or "").split("/") and runtime.chooser is None and machine is None:
        raise ValueError(
            f"schedule={runtime.schedule!r} needs to know links and rates, of which nothing is known here: give"
            " hdp.Loader(machine=...), a file of hdp profile or a Machine, or name a schedule"
        )
