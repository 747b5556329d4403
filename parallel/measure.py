"""Measures the machine at the start of a job: in seconds, of the model's shape alone, leaving nothing behind.

One layer of each kind is run with parameters of its own (``hdp.parallel.skeleton``), so that the model may be sharded, too
large for one rank, or not there yet. Every rank keeps its own times; what plans count with is the median rank's.
"""

from __future__ import annotations

import contextlib
import logging
import platform
import time
from collections.abc import Iterator
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from hdp.attention.route import AttentionRuntime
from hdp.balance.cost import CostModel, recompute_bytes
from hdp.balance.devices import DEVICES
from hdp.balance.host import HostCosts
from hdp.balance.machine import Machine, Probe, Tile
from hdp.balance.measured import predicted
from hdp.balance.models import ModelShape
from hdp.offload.layers import find_layers
from hdp.parallel.costs import NotKnown, device_name
from hdp.parallel.measure_layers import (
    Stopwatch,
    Terms,
    call_layers,
    passage,
    terms_of,
    time_head,
    time_layers,
    time_tiles,
    time_whole,
)
from hdp.parallel.measure_links import exchange, measure_links, peers_of
from hdp.parallel.metrics import gather_numbers
from hdp.parallel.profile_clock import Quota, host_clock, measure_own_quota
from hdp.parallel.profile_collectives import collective_rates, measure_overlap
from hdp.parallel.profile_host import Clock, host_costs
from hdp.parallel.shapes import see_shape
from hdp.parallel.skeleton import Sample, class_of, make_sample, make_whole, shape_of
from hdp.parallel.world import World

if TYPE_CHECKING:
    from hdp.parallel.engine import Engine

COMPUTE, LINKS = "compute", "links"
PARTS = (COMPUTE, LINKS)
TILES_SECONDS, LAYERS_SECONDS, HEAD_SECONDS = 1.5, 3.0, 0.4
"""What is spent on each, about; two lengths of a layer are timed whatever they take."""
HOST_TURNS, HOST_SECONDS = 3, 0.02
WHOLE_BYTES, WHOLE_PASS, WHOLE_SECONDS = 1 << 28, 0.5, 1.0
"""A model of so few bytes runs whole, over as many tokens as a pass of so many seconds holds; what is spent on it, about."""
WHOLE_TOKENS = (1024, 256, 64)
WHOLE_OFF = 0.1
"""Of what its layers say, beyond which they are taken to cost what the whole model shows."""
SUM_BYTES, SUM_RUNS = 1 << 21, 32
PROBE_SECONDS, PROBE_LINK_SECONDS = 0.15, 0.06
PROBE_BYTES = (1 << 19, 1 << 23)
OFF = 0.25
OF_LINKS = ("message_byte", "gather_byte", "reduce_byte")
"""Host costs that are measured with links."""

logger = logging.getLogger("hdp")


class NotMeasurable(Exception):
    """A model that cannot be measured; the message says why, the same on all ranks."""


@contextlib.contextmanager
def leaving_nothing(world: World) -> Iterator[World]:
    """A world to measure in, of the same ranks and channel; afterwards all is as before: random numbers, counters, buffers.

    On a GPU the peak of allocated memory counts anew from what is allocated then.
    """
    runtime, channel = world.runtime, world.channel
    own = AttentionRuntime(
        runtime.rank, channel, runtime.device, runtime.backend_name, runtime.wire_dtype, schedule=None
    )
    own.ranks_per_node = runtime.ranks_per_node
    counted = channel.sent_bytes, channel.messages, list(channel.waited), channel.notes_waits
    channel.notes_waits = False
    on_gpu = world.device.type == "cuda"
    try:
        with torch.random.fork_rng(devices=[world.device] if on_gpu else []):
            yield replace(world, runtime=own)
    finally:
        channel.sent_bytes, channel.messages, channel.waited[:], channel.notes_waits = counted
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(world.device)


def measure(engine: Engine, parts: tuple[str, ...] = PARTS, before: Machine | None = None) -> Machine:
    """The machine of an engine's ranks and model; of ``before`` what is not among ``parts`` stays. A collective.

    Raises:
        NotMeasurable: on all ranks alike.
    """
    with leaving_nothing(engine.world) as world, torch.enable_grad():
        quota = measure_own_quota(world, torch.get_num_threads())
        made = before
        if COMPUTE in parts or made is None:
            made = _computed(engine, world, quota, made)
        if LINKS in parts or before is None:
            made = _linked(made, world, quota)
        made = replace(made, probe=probe(world, _probe_bytes(made), has_quota(made)))
        told = [made if world.rank == 0 else None]  # words about a device may differ
        dist.broadcast_object_list(told, group=world.control, group_src=0)
        assert told[0] is not None
        return told[0]


# ---------------------------------------------------------------- what ranks compute


def _computed(engine: Engine, world: World, quota: Quota, before: Machine | None) -> Machine:
    seen = see_shape(engine.model)
    if seen is None:
        raise NotMeasurable(
            f"{type(engine.model).__name__} has no shape to be seen, neither in a config nor in its modules"
        )
    shape, clock = seen.shape, compute_clock(world.device, quota)
    sample = _sample(engine, world)
    watch = Stopwatch(world, clock)
    tiles = time_tiles(watch, shape, engine.dtype, TILES_SECONDS)
    timed = time_layers(watch, sample, LAYERS_SECONDS)
    head = time_head(watch, shape, engine.dtype, HEAD_SECONDS)
    mine = terms_of(tiles, timed, sample.kinds)
    kept = sum(each.kept * kind.count for each, kind in zip(timed, sample.kinds, strict=True)) / shape.layers
    ranks = _Ranks(world)
    terms = Terms(
        quadratic=ranks.median_pair(mine.quadratic),
        call=ranks.median_pair(mine.call),
        linear=ranks.median_pair(mine.linear),
        constant=ranks.median_pair(mine.constant),
    )
    cost = cost_of(shape, terms, ranks.median(head), kept, engine.dtype.itemsize, world)
    own = sum(kind.count * sum(each.seconds[-1]) for each, kind in zip(timed, sample.kinds, strict=True))
    all_own = ranks.all(own)
    host = _host(engine, world, shape, quota)
    speeds = tuple(round(median(all_own) / seconds, 3) for seconds in all_own)
    cost, whole = _against_whole(engine, watch, cost, host.piece_seconds, speeds)
    links = before or Machine(model="", device="", nodes=world.nodes, cost=cost, flops=1.0)
    return replace(
        links,
        source="measured",
        model=str(seen),
        device=device_words(world.device),
        nodes=world.nodes,
        cost=cost,
        flops=4.0 * shape.heads * shape.head_dim / 2.0 / cost.quadratic if cost.quadratic else 1e12,
        speeds=speeds,
        whole=whole,
        tiles=tuple(
            Tile(tokens=t.tokens, forward=ranks.median(t.forward), backward=ranks.median(t.backward)) for t in tiles
        ),
        host=replace(host, **{name: getattr(links.host, name) for name in OF_LINKS}),
        parameters=max(sum(shape_of(p).numel() for p in engine.model.parameters()), 1),
        root_share=_root_share(engine.model),
        element_bytes=engine.dtype.itemsize,
        shape=shape,
    )


def _against_whole(
    engine: Engine, watch: Stopwatch, cost: CostModel, piece: float, speeds: tuple[float, ...]
) -> tuple[CostModel, float]:
    """A cost of layers, checked by all of them at once where the model is small, and what that takes over what they say; 0: too
    large.

    Caches hold one layer better than many, and models do more than their layers. Attention stays what it was measured as, by
    itself.
    """
    world, model = watch.world, engine.model
    layers = replace(cost, head=0.0)
    slowest = min(speeds)
    fits = sum(shape_of(p).numel() for p in model.parameters()) * engine.dtype.itemsize <= WHOLE_BYTES
    tokens = next((n for n in WHOLE_TOKENS if predicted(layers, n, 1, piece) / slowest <= WHOLE_PASS), 0)
    if not fits or not tokens:
        return cost, 0.0
    reason = ""
    try:
        made = make_whole(model, engine.head, world.device, engine.dtype)
        passage(made, world, tokens)()  # what a rank cannot run ends before ranks wait for each other
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    if any(_Ranks(world).all(float(bool(reason)))):
        logger.info("layers were not checked by the whole model: %s", reason or "it does not run on another rank")
        return cost, 0.0
    seconds = _Ranks(world).median(time_whole(watch, made, tokens, WHOLE_SECONDS) * speeds[world.rank])
    said = predicted(layers, tokens, 1, piece)
    ratio = seconds / said
    if abs(ratio - 1.0) <= WHOLE_OFF:
        return cost, ratio
    rest = cost.layers * (tokens * cost.linear * (1.0 + cost.backward_linear) + cost.constant)  # all but attention
    factor = min(max((seconds - (said - rest)) / rest, 0.5), 2.0) if rest > 0 else 1.0
    return replace(cost, linear=cost.linear * factor, constant=cost.constant * factor), ratio


class _Ranks:
    """One figure of each rank, equal on all of them."""

    def __init__(self, world: World) -> None:
        self.world = world

    def all(self, mine: float) -> list[float]:
        return [float(n) for n in gather_numbers(self.world, mine)[:, 0].tolist()]

    def median(self, mine: float) -> float:
        return median(self.all(mine))

    def median_pair(self, mine: tuple[float, float]) -> tuple[float, float]:
        return self.median(mine[0]), self.median(mine[1])


def _sample(engine: Engine, world: World) -> Sample:
    """One layer of each kind, whose calls by the model are known to work; agreed by all ranks."""
    reason = ""
    made: Sample | None = None
    for cut in (True, False):
        try:
            layers = layers_of(engine.model)
            made = make_sample(engine.model, layers, engine.head, world.device, engine.dtype, cut=cut)
            call_layers(made, world, 4)
            reason = ""
            break
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
    failed = [rank for rank, bad in enumerate(_Ranks(world).all(float(bool(reason)))) if bad]
    if failed or made is None:
        said = reason or f"it failed on rank {failed[0]}"
        raise NotMeasurable(f"layers of {type(engine.model).__name__} cannot be run by themselves ({said})")
    return made


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The model's layers, whatever has been made of their classes. Raises ValueError if there are none."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [m for m in model.modules() if class_of(m).__name__ in names]
    return layers or list(find_layers(model))


def _root_share(model: nn.Module) -> float:
    """Part of the parameters that belongs to no layer."""
    sizes = {id(p): shape_of(p).numel() for p in model.parameters()}
    layers = {id(p) for layer in layers_of(model) for p in layer.parameters()}
    whole = sum(sizes.values())
    return sum(size for number, size in sizes.items() if number not in layers) / whole if whole else 0.0


def cost_of(shape: ModelShape, terms: Terms, head: float, kept: float, element: int, world: World) -> CostModel:
    """The cost model of the median rank; bytes but those kept follow from the shape. ``head``: seconds a token, both passes."""
    (a, a_back), (b, b_back) = terms.quadratic, terms.linear
    b, b_back = (b, b_back) if b > 0 else (b_back / 3.0, b_back * 2.0 / 3.0)
    a, a_back = (a, a_back) if a > 0 else (a_back / 3.5, a_back * 2.5 / 3.5)
    ratio = b_back / b if b > 0 else 2.0  # one ratio serves layers and head
    shaped = CostModel.from_shape(
        shape,
        flops=1e12,  # for times, all of which are replaced
        bytes_per_element=element,
        gradient_bytes=max(element, 4),
        world_size=world.world_size,
        copy_bandwidth=_copy_bandwidth(world.device),
    )
    return replace(
        shaped,
        quadratic=a,
        linear=b,
        constant=sum(terms.constant),
        head=head / (1.0 + ratio),
        backward_quadratic=a_back / a if a > 0 else 2.5,
        backward_linear=ratio,
        activation_bytes=kept,
        recompute_bytes=min(kept, recompute_bytes(shape, element)),
    )


def _copy_bandwidth(device: torch.device) -> float:
    """Between device and host, of the table, until ``hdp.Activations.open`` measures it; 0: not known."""
    try:
        return DEVICES[device_name(device)].copy_bandwidth
    except NotKnown:
        return 0.0


def _host(engine: Engine, world: World, shape: ModelShape, quota: Quota) -> HostCosts:
    found = host_costs(world, shape, engine.dtype, quota, turns=HOST_TURNS, seconds=HOST_SECONDS)
    share = quota.share(torch.get_num_threads())
    ranks = _Ranks(world)
    period, share = ranks.median(quota.period), ranks.median(share)
    return replace(
        found,
        sum_byte=ranks.median(_sum_byte(world.device, compute_clock(world.device, quota))),
        quota_period=period if share < 1.0 else 0.0,
        quota_share=share,
    )


def _sum_byte(device: torch.device, clock: Clock) -> float:
    """Seconds a byte of writing an fp32 tensor to new memory, as kernels do with results, and adding it to another."""
    total, part = (torch.ones(SUM_BYTES // 4, device=device) for _ in range(2))
    total.add_(part * 0.5)
    start = clock()
    for _ in range(SUM_RUNS):
        total.add_(part * 0.5)
    return (clock() - start) / (SUM_RUNS * SUM_BYTES)


def compute_clock(device: torch.device, quota: Quota) -> Clock:
    """Under a quota that of the host, which counts what computing takes in the long run; else time on the wall."""
    if quota.share(torch.get_num_threads()) < 1.0:
        return host_clock(device, quota)

    def wall() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return wall


def device_words(device: torch.device) -> str:
    """What computes: a GPU's name; the processor and the threads of a rank."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads a rank"


# ---------------------------------------------------------------- links


def _linked(made: Machine, world: World, quota: Quota) -> Machine:
    if world.world_size == 1:
        return replace(made, intra=None, inter=None, link_kind="nic")
    clock = host_clock(world.device, quota)
    found = measure_links(world, clock)
    gather, reduce, gather_byte, reduce_byte = collective_rates(world, clock, rounds=3)
    host = replace(made.host, message_byte=found.message_byte, gather_byte=gather_byte, reduce_byte=reduce_byte)
    return replace(
        made,
        intra=found.intra,
        inter=found.inter,
        link_kind=found.kind,
        overlap=measure_overlap(world, rounds=3),
        gather_bandwidth=gather,
        reduce_bandwidth=reduce,
        host=host,
    )


# ---------------------------------------------------------------- the probe


def _probe_bytes(machine: Machine) -> int:
    """Of a message that takes the time that a probe of links may take."""
    links = [link for link in (machine.intra, machine.inter) if link is not None]
    least = min((link.bandwidth for link in links), default=0.0)
    return int(min(max(least * PROBE_LINK_SECONDS, PROBE_BYTES[0]), PROBE_BYTES[1]))


def has_quota(machine: Machine) -> bool:
    """Whether its hosts compute under a CPU quota."""
    return machine.host.quota_period > 0


def probe(world: World, size: int, by_cpu: bool) -> Probe:
    """How fast ranks compute and how long a message to the next takes, all at once: half a second at most. A collective.

    ``by_cpu``: of a second of CPU, for hosts with a quota: how many of its periods half a second holds is chance.
    """
    dist.barrier(group=world.control)
    rate = _products(world.device, time.process_time if by_cpu else time.perf_counter)
    seconds = 0.0
    if world.world_size > 1:
        peers = peers_of(list(range(world.world_size)), world.rank, 1)
        seconds = min(exchange(world, peers, size) for _ in range(2))
    rows = gather_numbers(world, rate, seconds)
    return Probe(compute=tuple(rows[:, 0].tolist()), size=size, seconds=tuple(rows[:, 1].tolist()))


def _products(device: torch.device, clock: Clock) -> float:
    """Matrix products a second of the clock."""
    side = 1024 if device.type == "cuda" else 128
    matrix = torch.full((side, side), 0.5, device=device)
    out = torch.empty_like(matrix)
    torch.mm(matrix, matrix, out=out)
    start, begin, count = time.perf_counter(), clock(), 0
    while time.perf_counter() - start < PROBE_SECONDS:
        for _ in range(16):
            torch.mm(matrix, matrix, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        count += 16
    return count / max(clock() - begin, 1e-9)


def what_is_off(then: Probe, now: Probe) -> dict[str, str]:
    """Parts of which some rank is off by a quarter or more, and in which way."""
    found = {}
    for part, old, new, what in (
        (COMPUTE, then.compute, now.compute, "computes {:.0%} of what it did"),
        (LINKS, now.seconds, then.seconds, "is sent {:.0%} of what it was in the same time"),
    ):
        ratios = [(n / o if o > 0 and n > 0 else 1.0, rank) for rank, (o, n) in enumerate(zip(old, new, strict=True))]
        far, rank = max(ratios, key=lambda pair: max(pair[0], 1.0 / max(pair[0], 1e-9)))
        if max(far, 1.0 / max(far, 1e-9)) > 1.0 + OFF:
            found[part] = f"rank {rank} {what.format(far)}"
    return found
