"""What the choice of attention schedules needs to know, from what planners know of the ranks."""

from __future__ import annotations

import logging
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from hdp.attention.auto import AUTO, Chooser
from hdp.attention.predict import Links
from hdp.balance.topology import Topology
from hdp.parallel.costs import HOST_SECONDS, Assumptions, NotKnown, assume
from hdp.parallel.metrics import gather_numbers

if TYPE_CHECKING:
    from hdp.parallel.world import World

logger = logging.getLogger("hdp")


def assume_for(model: nn.Module, world: World, dtype: torch.dtype) -> Assumptions | None:
    """What plans assume of a model that computes in ``dtype``; rank 0 says it, as a warning where it is a guess or unknown."""
    try:
        made = assume(model, world.device, world.world_size, dtype, world.runtime.ranks_per_node)
    except NotKnown as error:
        if world.rank == 0:
            logger.warning("%s", error)
        return None
    if world.rank == 0:
        where = "its config" if made.has_config else "its modules, without a config"
        logger.log(
            logging.INFO if made.has_config else logging.WARNING,
            "plans assume of %s, by %s: %s; of %s: %.4g TFLOP/s, %d ranks a node, %.4g GB/s inside and %.4g GB/s across%s",
            type(model).__name__.removeprefix("FSDP"),
            where,
            made.model,
            made.device,
            made.flops / 1e12,
            made.topology.node_size,
            made.topology.intra.bandwidth / 1e9,
            made.topology.inter.bandwidth / 1e9,
            "" if made.has_config else "; give hdp.Loader(cost=...) where that is wrong",
        )
    return made


def take_assumptions(world: World, made: Assumptions | None) -> None:
    """Plans and choices are made for the model of the last engine, unless a user said for what.

    What was measured meanwhile is kept.
    """
    runtime, known, before = world.runtime, world.assumptions, world.assumed
    if known is None:
        world.tell(made)
    elif made is None or known is not world.told:
        return
    elif before is not None and made != before:
        if world.rank == 0:
            logger.warning(
                "a model of another shape or dtype: batches are planned for it from now on; give loaders of the other model"
                " cost= and topology="
            )
        if runtime.chooser == assumed_chooser(before):
            runtime.chooser = None
        now, then = vars(known.cost), vars(before.cost)
        changed = {name: value for name, value in now.items() if value != then[name]}
        world.tell(replace(made, cost=replace(made.cost, **changed)))
    world.assumed = made


def set_chooser(world: World) -> None:
    """Lets ``"auto"`` choose by what is assumed of the model and the ranks, unless somebody set a chooser.

    Raises ValueError if ``hdp.init`` was told ``"auto"`` and nothing is known to choose by, or not the same on all ranks.
    """
    runtime = world.runtime
    if runtime.chooser is None and world.assumptions is not None:
        runtime.chooser = assumed_chooser(world.assumptions)
    if runtime.chooser is None and AUTO in (runtime.schedule or "").split("/"):
        raise ValueError(
            f"schedule={runtime.schedule!r} needs to know links and rates, of which nothing is known here: set"
            " world.runtime.chooser = hdp.parallel.schedules.make_chooser(topology, flops=...) before the engine is made, alike"
            " on all ranks, or name a schedule"
        )
    if AUTO in (runtime.schedule or "").split("/"):
        mine = zlib.crc32(repr(runtime.chooser).encode())
        different = (gather_numbers(world, mine)[:, 0] != mine).nonzero().flatten().tolist()
        if different:
            raise ValueError(
                f"schedule={runtime.schedule!r}: ranks {different} would choose by other numbers than rank {world.rank}"
                f" ({runtime.chooser}): set world.runtime.chooser alike on all ranks, or name a schedule"
            )


def assumed_chooser(known: Assumptions) -> Chooser:
    """Chooses by what planners are told when nothing was measured."""
    return make_chooser(
        known.topology,
        flops=known.flops,
        byte_seconds=known.byte_seconds,
        message_seconds=known.message_seconds,
        call_seconds=known.call_seconds,
    )


def make_chooser(
    topology: Topology,
    *,
    flops: float,
    kind: str = "nic",
    byte_seconds: float = 0.0,
    message_seconds: float = HOST_SECONDS,
    call_seconds: float = HOST_SECONDS,
    kept_limit: float | None = None,
) -> Chooser:
    """Resolves the schedule ``"auto"`` on these ranks; set it as ``world.runtime.chooser``.

    Args:
        topology: nodes and links, equal on all ranks.
        flops: operations a second that attention attains on one rank.
        kind: ``"nic"``: a rank's traffic shares one port; ``"peer"``: each pair of ranks has a link of its own.
        byte_seconds: what a byte sent or received takes from computation.
        message_seconds, call_seconds: what a message and a kernel call take beyond that, see ``hdp.parallel.costs``.
        kept_limit: bytes that a layer may keep from forward to backward beside its own shards; None: any.
    """
    links = Links(
        kind=kind,
        inner_rate=topology.intra.bandwidth,
        outer_rate=topology.inter.bandwidth,
        latency=topology.intra.latency if topology.nodes == 1 else topology.inter.latency,
    )
    per_node = topology.ranks_per_node if topology.nodes > 1 else None
    return Chooser(
        links=links,
        flops=flops,
        ranks_per_node=per_node,
        byte_seconds=byte_seconds,
        message_seconds=message_seconds,
        call_seconds=call_seconds,
        kept_limit=kept_limit,
    )
