"""Measures a model on this machine at leisure, as ``hdp profile`` does: the whole model, and what sharding takes.

Every rank runs micro-batches of one length on its own, all ranks at once, so that what they share (memory bandwidth, power,
cores) is shared as in training. Links are measured in ``measure_links``, what many short sequences cost the host in
``profile_host``, what sharding costs it in ``profile_sharding``. A job measures less, in less time (``measure``).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hdp.balance.cost import CostModel, recompute_bytes
from hdp.balance.machine import Machine
from hdp.balance.measured import Sample, fit, predicted
from hdp.balance.models import ModelShape, model_shape
from hdp.parallel.batch import MicroBatchInputs
from hdp.parallel.engine import Engine
from hdp.parallel.loss import loss_sum
from hdp.parallel.measure import compute_clock, device_words
from hdp.parallel.measure_links import measure_links
from hdp.parallel.profile_clock import host_clock, measure_quota
from hdp.parallel.profile_collectives import collective_rates, measure_overlap
from hdp.parallel.profile_host import Clock, host_costs, micro_batch
from hdp.parallel.profile_sharding import root_share, sharding_seconds, spread
from hdp.parallel.world import World

REPEATS = 3
RUNS = 5
"""Of each length, after a first one; the median counts."""
BUDGET = 60.0
LEAST_LENGTHS = 4
"""Lengths that are measured even if they take longer than the budget: three terms are fitted."""
GROWTH = 3.0
"""What twice the length may take: twice to four times as long."""


def profile(
    model: nn.Module, world: World, *, lengths: Sequence[int] = (), budget: float = BUDGET, name: str = ""
) -> Machine:
    """Measures ``model`` (as for ``hdp.shard``, not wrapped: it stays so) and the links between the ranks of ``world``.

    Args:
        lengths: tokens of the documents to run; empty: 128, 256, ... as far as the budget goes.
        budget: seconds that the runs of the model may take, about.
    """
    model.to(world.device)
    engine = Engine(model, world)
    shape = model_shape(model.config)
    quota = measure_quota(world, torch.get_num_threads())
    clock = compute_clock(world.device, quota)
    head = _head_seconds(engine, shape, world, clock)
    host = host_costs(world, shape, next(model.parameters()).dtype, quota)
    samples = _measure(engine, shape, world, clock, tuple(lengths), budget)
    kept = _kept_bytes(engine, shape, world, min(s.length for s in samples))
    cost = cost_model(shape, samples, head, kept, _element(model), host.piece_seconds)
    fitted = tuple(replace(s, fitted=predicted(cost, s.length, s.documents, host.piece_seconds)) for s in samples)
    links = measure_links(world, host_clock(world.device, quota))
    gather, reduce, gather_byte, reduce_byte = collective_rates(world, host_clock(world.device, quota))
    share = quota.share(torch.get_num_threads())
    host = replace(
        host,
        message_byte=links.message_byte,
        gather_byte=gather_byte,
        reduce_byte=reduce_byte,
        quota_period=quota.period if share < 1.0 else 0.0,
        quota_share=share,
    )
    made = Machine(
        model=name or shape.name,
        device=device_words(world.device),
        nodes=world.nodes,
        cost=cost,
        flops=attention_flops(shape, cost),
        samples=fitted,
        intra=links.intra,
        inter=links.inter,
        link_kind=links.kind,
        parameters=sum(p.numel() for p in model.parameters()),
        overlap=measure_overlap(world),
        gather_bandwidth=gather,
        reduce_bandwidth=reduce,
        host=host,
        element_bytes=_element(model),
        root_share=root_share(model),
        shape=shape,
    )
    if world.device.type != "cpu" or world.world_size == 1:
        return made  # a GPU's host runs ahead; one rank moves nothing
    seconds = sharding_seconds(model, world, host_clock(world.device, quota))
    return replace(made, host=spread(host, seconds, made.parameter_bytes, made.gradient_bytes))


def cost_model(
    shape: ModelShape, samples: Sequence[Sample], head: float, kept: float, element: int, piece: float = 0.0
) -> CostModel:
    """The fitted cost model; bytes on links follow from the shape.

    ``head``: seconds per token, both passes; ``piece``: ``HostCosts.piece_seconds``, which is left out.
    """
    (a, b, c), (a_back, b_back, c_back) = fit(samples, shape.layers, head, piece)
    kv = 2 * shape.kv_heads * shape.head_dim
    # A term that one pass lacks (noise, few lengths) is split as usual: backward is twice forward, 2.5 times in attention.
    b, b_back = (b, b_back) if b > 0 else (b_back / 3.0, b_back * 2.0 / 3.0)
    a, a_back = (a, a_back) if a > 0 else (a_back / 3.5, a_back * 2.5 / 3.5)
    ratio = b_back / b if b > 0 else 2.0  # one ratio serves layers and head
    return CostModel(
        layers=shape.layers,
        quadratic=a,
        linear=b,
        constant=c + c_back,
        head=head / (1.0 + ratio),
        backward_quadratic=a_back / a if a > 0 else 2.5,
        backward_linear=ratio,
        ring_bytes=float(kv * element),
        ring_bytes_backward=float(kv * (element + max(element, 4))),
        window=shape.window,
        window_layers=shape.window_layers,
        activation_bytes=kept,
        recompute_bytes=min(kept, recompute_bytes(shape, element)),
    )


def attention_flops(shape: ModelShape, cost: CostModel) -> float:
    """Operations a second that attention attains: 4 x width for each of the s^2 / 2 pairs of a causal document. Where no
    quadratic time was found, as fast as the linear layers."""
    if cost.quadratic:
        return 2.0 * shape.heads * shape.head_dim / cost.quadratic
    return 2.0 * shape.layer_weights / cost.linear


def _element(model: nn.Module) -> int:
    return next(model.parameters()).element_size()


# ---------------------------------------------------------------- the model


def _inputs(world: World, vocabulary: int, length: int, documents: int) -> MicroBatchInputs:
    generator = torch.Generator().manual_seed(length)
    texts = [torch.randint(0, vocabulary, (length,), generator=generator) for _ in range(documents)]
    return micro_batch(world, texts, [(world.rank,)] * documents)()


def _run(engine: Engine, inputs: MicroBatchInputs, clock: Clock) -> tuple[float, float]:
    start = clock()
    loss = engine._loss(inputs)
    middle = clock()
    loss.backward()
    return middle - start, clock() - middle


def _together(world: World, values: Iterable[float]) -> list[float]:
    """Mean over ranks, equal on all of them."""
    mine = torch.tensor(list(values), dtype=torch.float64)
    dist.all_reduce(mine, group=world.control)
    return (mine / world.world_size).tolist()


def _measure(
    engine: Engine, shape: ModelShape, world: World, clock: Clock, lengths: tuple[int, ...], budget: float
) -> tuple[Sample, ...]:
    """Single documents of growing length, and packs of short ones, which tell linear from quadratic time."""
    growing = lengths or tuple(128 << k for k in range(12))
    samples: list[Sample] = []
    begin = time.perf_counter()

    def spent() -> float:
        return _together(world, [time.perf_counter() - begin])[0]

    for length in growing:
        # This length, and two packs of as many tokens after it.
        if len(samples) >= LEAST_LENGTHS and not lengths:
            ahead = 3 * GROWTH * samples[-1].seconds * (RUNS + 1)
            if spent() + ahead > budget:
                break
        samples.append(_sample(engine, shape, world, clock, length, 1))
    longest = max(s.length for s in samples)
    for count in (4, 16):
        if longest // count >= min(growing) and (lengths or spent() < budget):
            samples.append(_sample(engine, shape, world, clock, longest // count, count))
    return tuple(samples)


def _sample(engine: Engine, shape: ModelShape, world: World, clock: Clock, length: int, documents: int) -> Sample:
    inputs = _inputs(world, shape.vocabulary, length, documents)
    _run(engine, inputs, clock)  # compiles, allocates, lowers
    dist.barrier(group=world.control)
    times = [_run(engine, inputs, clock) for _ in range(RUNS)]
    engine.model.zero_grad(set_to_none=True)
    # The least would leave out what disturbs every step as well.
    forward, backward = _together(world, [statistics.median(t[phase] for t in times) for phase in (0, 1)])
    return Sample(length=length, documents=documents, forward=forward, backward=backward)


def _head_seconds(engine: Engine, shape: ModelShape, world: World, clock: Clock, tokens: int = 512) -> float:
    """Seconds per token of output head and loss, forward and backward."""
    head = engine.head
    weight = head.weight.detach().requires_grad_()
    hidden = torch.randn(tokens, shape.hidden, device=world.device, dtype=weight.dtype, requires_grad=True)
    labels = torch.zeros(tokens, dtype=torch.int64, device=world.device)
    times = []
    for _ in range(REPEATS + 1):
        start = clock()
        loss_sum(hidden, weight, None, labels).backward()
        times.append(clock() - start)
    return _together(world, [statistics.median(times[1:])])[0] / tokens


def _kept_bytes(engine: Engine, shape: ModelShape, world: World, length: int) -> float:
    """Bytes per layer and token that a pass keeps for backward, counted where autograd saves them."""
    parameters = {p.untyped_storage().data_ptr() for p in engine.model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no storage is freed and its address used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and storage.data_ptr() not in kept:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    inputs = _inputs(world, shape.vocabulary, length, 1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = engine._loss(inputs)
    loss.backward()
    engine.model.zero_grad(set_to_none=True)
    return sum(kept.values()) / shape.layers / length
