"""Which machine a loader plans for: the one it is given, else its engine's, else the one that is found when it is needed."""

from __future__ import annotations

import logging
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from hdp.balance.machine import Machine
from hdp.balance.plan import PlanError
from hdp.parallel.costs import NotKnown, assume, device_name
from hdp.parallel.shapes import see_shape

if TYPE_CHECKING:
    from hdp.parallel.engine import Engine
    from hdp.parallel.world import World

MEASURE, ASSUME = "measure", "assume"
VARIABLE = "HDP_MACHINE"
"""Environment variable: what loaders take whose engine has no machine and who are given none. Default: ``"measure"``."""

logger = logging.getLogger("hdp")


def find_machine(engine: Engine, asked: Machine | str | Path | None) -> Machine | None:
    """The machine that ``hdp.Loader(machine=asked)`` plans for; the engine's from now on, where that has none. None: not known.

    Args:
        asked: a machine; a file of one; ``"measure"`` (a collective, but what was measured before is only probed);
            ``"assume"``: from model and device; None: the engine's, else what the environment variable ``HDP_MACHINE`` says,
            else ``"measure"``.

    Raises:
        ValueError: no file of a machine, a device of which nothing is known and that is not to be measured.
    """
    if asked is None and engine.machine is not None:
        return engine.machine
    if asked is None:
        asked = os.environ.get(VARIABLE) or MEASURE
    made = _obtain(engine, asked)
    if engine.machine is None:
        engine.machine = made
    return made


def find_anew(engine: Engine) -> Machine | None:
    """Measures whatever was measured before, makes it the engine's machine and keeps it for later starts. A collective."""
    engine.machine = measured(engine, anew=True)
    engine.memory.restart()
    engine.time_log.restart()
    return engine.machine


def _obtain(engine: Engine, asked: Machine | str | Path) -> Machine | None:
    if isinstance(asked, Machine):
        return fitted(asked, engine.world)
    if asked == ASSUME:
        return assumed(engine)
    if asked == MEASURE:
        made = measured(engine)
        engine.memory.restart()
        return made
    if not Path(asked).is_file():
        raise PlanError(
            f"machine is {str(asked)!r}: give a file of hdp profile --out, a Machine, {MEASURE!r} or {ASSUME!r}"
        )
    return fitted(Machine.read(asked), engine.world)


def fitted(machine: Machine, world: World) -> Machine:
    """A machine on the ranks of this world, where it was measured on others."""
    if machine.world_size == world.world_size:
        return machine
    if world.rank == 0:
        logger.warning(
            "the machine is one of %d ranks, the world has %d: its rates and links are taken for all of these",
            machine.world_size,
            world.world_size,
        )
    return replace(machine, nodes=world.nodes, speeds=(), probe=None)


def read_for_all(world: World, path: str | Path) -> Machine | None:
    """The machine in a file that rank 0 has, on every rank; None where there is no such file. A collective."""
    told: list[Machine | PlanError | None] = [None]
    if world.rank == 0 and Path(path).is_file():
        try:
            told = [Machine.read(path)]
        except PlanError as error:  # raised by all
            told = [error]
    dist.broadcast_object_list(told, group=world.control, group_src=0)
    if isinstance(told[0], PlanError):
        raise told[0]
    return None if told[0] is None else fitted(told[0], world)


# ---------------------------------------------------------------- measured


def measured(engine: Engine, *, anew: bool = False) -> Machine | None:
    """What an earlier start has measured, where a probe finds it as it was; else measured now. Rank 0 says which. A collective.

    ``anew``: whatever an earlier start has measured. What cannot be measured is assumed, with a warning.
    """
    from hdp.parallel.machine_cache import key_of, load, store
    from hdp.parallel.measure import PARTS, NotMeasurable, has_quota, measure, probe, what_is_off

    world, start = engine.world, time.perf_counter()
    reason = why_not(engine)
    if reason:
        return _assumed_instead(engine, reason)
    with world.guard.watch("measuring the machine"):
        try:
            key = key_of(engine)
            before = None if anew else load(world, key)
            if before is None or before.probe is None:
                made = measure(engine)
                _say(world, made, f"measured in {time.perf_counter() - start:.1f} s")
            else:
                off = what_is_off(before.probe, probe(world, before.probe.size, has_quota(before)))
                if not off:
                    _say(world, before, f"as measured before, probed in {time.perf_counter() - start:.1f} s")
                    return before
                if world.rank == 0:
                    what = "; ".join(off.values())
                    logger.warning("the machine is not as it was when it was measured (%s): measured again", what)
                made = measure(engine, tuple(part for part in PARTS if part in off), before)
                _say(world, made, f"measured again in {time.perf_counter() - start:.1f} s")
            store(world, key, made)
            return made
        except NotMeasurable as error:
            return _assumed_instead(engine, str(error))


def why_not(engine: Engine) -> str:
    """Why nothing is measured; empty: it can be. The same on all ranks."""
    from hdp.parallel.measure import layers_of

    if engine.world.mesh.ndim > 1:
        return "under tensor parallelism each rank computes slices of layers, which are not measured"
    if see_shape(engine.model) is None:
        return f"{type(engine.model).__name__} has no shape to be seen, neither in a config nor in its modules"
    try:
        layers_of(engine.model)
    except ValueError as error:
        return f"of {type(engine.model).__name__}, {error}"
    return ""


def _assumed_instead(engine: Engine, reason: str) -> Machine | None:
    if engine.world.rank == 0 and not engine.is_assumed:
        logger.warning("the machine is assumed, not measured: %s", reason)
    return assumed(engine)


def _say(world: World, machine: Machine, how: str) -> None:
    """Rank 0: one line of what was found, and one of ranks that are slower than the others."""
    if world.rank != 0:
        return
    tell(f"hdp: machine, {how}: {describe(machine)}")
    if machine.slow_ranks:
        ranks = ", ".join(f"rank {rank} at {speed:.2f}" for rank, speed in machine.slow_ranks.items())
        logger.warning("slower than the median rank: %s of its speed", ranks)


def tell(line: str) -> None:
    """To the user, whatever is logged."""
    print(line, file=sys.stderr, flush=True)


def describe(machine: Machine) -> str:
    """A machine in one line."""
    cost, host = machine.cost, machine.host
    tokens = 1024
    layer = machine.layer([tokens]).forward_seconds
    parts = [
        f"{machine.world_size} rank{'s' if machine.world_size > 1 else ''} on"
        f" {len(machine.nodes)} node{'s' if len(machine.nodes) > 1 else ''} of {_ranks(machine.nodes)}",
        machine.device,
        f"{tokens} tokens take {layer * 1e3:.3g} ms forward in each of {cost.layers} layers",
        *([f"all of them {machine.whole:.2f} times what one of each kind says"] if machine.whole else []),
        f"attention {machine.flops / 1e9:.4g} GFLOP/s",
    ]
    for label, link in (("inside nodes", machine.intra), ("across nodes", machine.inter)):
        if link is not None:
            parts.append(f"{label} {link.bandwidth / 1e6:.4g} MB/s and {link.latency * 1e6:.3g} us")
    if machine.world_size > 1:
        shared = (
            "each pair has a link of its own" if machine.link_kind == "peer" else "a rank's traffic shares one port"
        )
        parts += [shared, f"a message costs the host {host.message_seconds * 1e6:.3g} us, a kernel call"
                          f" {host.piece_seconds * 1e6:.3g} us"]  # fmt: skip
    return ", ".join(parts)


def _ranks(nodes: tuple[int, ...]) -> str:
    return str(nodes[0]) if len(set(nodes)) == 1 else " and ".join(map(str, nodes))


# ---------------------------------------------------------------- assumed


def assumed(engine: Engine) -> Machine | None:
    """From model and device; rank 0 says it, as a warning where it is a guess or unknown."""
    world, model = engine.world, engine.model
    device_name(world.device)  # for one that nobody knows there are no defaults
    is_first, engine.is_assumed = world.rank == 0 and not engine.is_assumed, True
    try:
        made = assume(model, world.device, world.world_size, engine.dtype, world.nodes)
    except NotKnown as error:
        if is_first:
            logger.warning("%s", error)
        return None
    if is_first:
        seen = see_shape(model)
        has_config = seen is not None and seen.has_config
        where = "its config" if has_config else "its modules, without a config"
        topology = made.topology()
        logger.log(
            logging.INFO if has_config else logging.WARNING,
            "plans assume of %s, by %s: %s; of %s: %.4g TFLOP/s, %d ranks a node, %.4g GB/s inside and %.4g GB/s across%s",
            type(model).__name__.removeprefix("FSDP"),
            where,
            made.model,
            made.device,
            made.flops / 1e12,
            topology.node_size,
            topology.intra.bandwidth / 1e9,
            topology.inter.bandwidth / 1e9,
            "" if has_config else "; give hdp.Loader(machine=...) where that is wrong",
        )
    return made
