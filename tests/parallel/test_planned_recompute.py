"""Plans that recompute, end to end: made by a planner, run by FSDP2, the same bits and messages as without."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from engines import full_gradients, make_engine, plan_batch
from tiny import gradient_errors, loss_sums, make_documents, widen

import hdp
from hdp.balance import DoesNotFit
from hdp.balance.machine import CopyRates
from hdp.balance.memory import recomputed_capacity
from hdp.parallel.activations import Room

pytestmark = pytest.mark.slow

LENGTHS, CAPACITY = [180, 20, 30, 50], 64
"""The first on two ranks: 90 tokens a rank, of whose activations 64 tokens' worth fit."""
LAYERS = 6


def make_deep_model(attention: str = "hdp") -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    hdp.register_attention()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.set_attn_implementation(attention)
    return model


def run(engine: hdp.Engine, batch: hdp.PlannedBatch, runs: list[int]) -> Any:
    """(loss, gradients, messages, calls of MLPs) of one step."""
    engine.model.zero_grad()
    before, runs[0] = engine.world.channel.messages, 0
    loss = engine.forward_backward(batch).loss
    found = loss, full_gradients(engine), engine.world.channel.messages - before, runs[0]
    if hasattr(engine, "deepspeed"):
        engine.deepspeed.step()  # clears what ZeRO-3 has accumulated; the learning rate is 0
    return found


def trained(world: hdp.World, name: str, planner: str, host: float, folder: str) -> Any:
    """The planned step and the same without recomputation and offload; the plan's layers and ratios."""
    model, runs = make_deep_model(), [0]
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    engine = make_engine(world, name, model)
    options: dict[str, Any] = {"planner": planner, "recompute": "auto"}
    opening: dict[str, Any] = {"ratio": 0.0}  # no tier at all
    if host:
        opening = {"folder": folder}
        options["offload"] = 1.0
    with hdp.Activations.open(world, **opening) as engine.activations:
        engine.activations.store._min_bytes = 256
        if host:
            # Of six layers those under way are too many to count for what offload spares.
            room = Room(copies=CopyRates(out=1e12, back=1e12), host_memory=host, in_flight=0)
            engine.activations = replace(engine.activations, room=room)
        batch = plan_batch(world, engine, make_documents(LENGTHS), CAPACITY, **options)
        planned = run(engine, batch, runs)
        left = engine.activations.store.meter.left
    plan = batch.plan
    engine.activations = None
    kept = replace(batch, plan=replace(plan, offload=(), recompute=(), recompute_layers=()))
    plain = run(engine, kept, runs)
    slots = len({mb.slot for mb in plan.micro_batches(world.rank)})
    return planned, plain, (plan.recompute, plan.recompute_layers, plan.offload), slots, left


@pytest.mark.parametrize("planner", ["auto", "naive"])
@pytest.mark.parametrize("name", ["fsdp-step", "fsdp-slot", "ddp", "zero3"])
@pytest.mark.parametrize("host", [0.0, 1e5], ids=["recompute", "offload and recompute"])
def test_the_same_bits_and_messages_as_without(ranks, tmp_path, name, planner, host):
    _, exact = exact_step()
    results = ranks(2).run(trained, name, planner, host, str(tmp_path))
    assert results[0][2] == results[1][2]
    for planned, plain, (slots, layers, offload), count, left in results:
        assert slots == (0,) and 0 < layers[0] <= LAYERS - 2 and bool(offload) == bool(host)
        assert (left > 0) == bool(host)
        assert planned[0] == plain[0]
        assert all(torch.equal(planned[1][key], value) for key, value in plain[1].items())
        assert planned[2] == plain[2] > 0, "messages"
        assert planned[3] - plain[3] == layers[0], "layers that ran again"
        assert plain[3] >= count * LAYERS
        errors = gradient_errors(planned[1], exact)
        assert max(errors.values()) <= 1e-5, errors


def exact_step() -> tuple[float, dict[str, Any]]:
    model = widen(make_deep_model("eager"))
    total, weight = loss_sums(model, make_documents(LENGTHS))
    (total / weight).backward()
    return float(total.detach()) / weight, {name: p.grad for name, p in model.named_parameters()}


def refused_and_told(world: hdp.World) -> tuple[str, list[str]]:
    """The error without recomputation; the lines that rank 0 logs with it, over two batches."""
    engine = make_engine(world, "fsdp-step", make_deep_model())
    with pytest.raises(DoesNotFit) as error:
        plan_batch(world, engine, make_documents(LENGTHS), CAPACITY)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(f"{record.levelname} {record.getMessage()}")  # type: ignore[method-assign]
    logger = logging.getLogger("hdp")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        documents = make_documents([20, *LENGTHS])
        loader = hdp.Loader(
            documents, engine, tokens_per_step=10**4, capacity=CAPACITY, seed=1, steps=2, recompute="auto"
        )
        assert sum(len(batch.plan.recompute) for batch in loader) == 2
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return str(error.value), lines


def test_it_is_said_what_it_costs(ranks):
    (error, lines), (_, others) = ranks(2).run(refused_and_told)
    assert "again in backward" in error
    assert others == []
    assert [line.split()[0] for line in lines] == ["WARNING", "INFO"]
    for line in lines:
        assert "recompute: 1 of " in line and "% of the step)" in line
        # Its place in the data:
        assert "document 1 of 180 tokens: more than all ranks hold as usual; 3 layers again" in line


def saved(world: hdp.World, again: int | None) -> tuple[int, int, float, float]:
    """(peak of saved bytes, without recomputation, what the plan promised to spare, bytes of all)."""
    engine = make_engine(world, "fsdp-step", make_deep_model())
    peaks = []
    for recompute in (True, False):
        with hdp.Activations.open(world, ratio=0.0) as activations:
            engine.activations = activations
            batch = plan_batch(world, engine, make_documents([180]), CAPACITY, recompute="auto")
            (micro_batch,) = batch.plan.micro_batches(world.rank)
            assert micro_batch.tokens == 90
            if again is not None:
                batch = replace(batch, plan=replace(batch.plan, recompute_layers=(again,)))
            (layers,) = batch.plan.recompute_layers
            if not recompute:
                batch = replace(batch, plan=replace(batch.plan, recompute=(), recompute_layers=()))
                activations = replace(activations, policy="offload")  # of which nothing leaves: it counts
            engine.activations = activations
            engine.forward_backward(batch)
            peaks.append(activations.store.meter.peak_device)
    cost = batch.machine.cost
    assert recomputed_capacity(CAPACITY, cost.recomputing(layers)) >= 90
    spared = layers * (cost.activation_bytes - cost.recompute_bytes) * 90
    return peaks[0], peaks[1], spared, cost.activation_bytes * LAYERS * 90


@pytest.mark.parametrize("again", [None, 4])
def test_memory_that_the_plan_promises_is_spared(ranks, again):
    """Bytes that autograd saves, counted: at least as many fewer as the plan relies on."""
    for peak, plain, spared, everything in ranks(2).run(saved, again):
        assert plain >= everything
        assert plain - peak >= spared > 0.2 * everything


def kept_layers(world: hdp.World, folder: str) -> Any:
    """What plans assume after ``open``; ratios of plans for two and four kept layers; errors of engines that keep more."""
    engine = make_engine(world, "fsdp-step", make_deep_model())
    documents = make_documents([150, 20])
    ratios, errors, micro_batches = [], [], []
    for first in (1, 2):
        with hdp.Activations.open(world, folder=folder, keep_first=first, keep_last=2) as activations:
            engine.activations = activations
            batch = plan_batch(world, engine, documents, CAPACITY, planner="naive", offload=1.0)
            cost = batch.machine.cost
            assert (cost.keep_first, cost.keep_last, cost.in_flight) == (first, 2, 2)
            ratios.append(max(mb.offload_ratio for mb in batch.plan.micro_batches(world.rank)))
            engine.forward_backward(batch)
            micro_batches.append(batch.plan.micro_batches(world.rank)[0])
            for keep in (
                (0, 2),
                (0, 3),
                (0, 0),
                (3, 2),
                (2, 1),
            ):  # of the last, as many as planned, but a first one more
                try:
                    replace(activations, keep_first=keep[0], keep_last=keep[1]).around(
                        engine.model, micro_batches[0], 75
                    )
                except ValueError as error:
                    errors.append(str(error))
    with (
        hdp.Activations.open(world, ratio=0.0) as engine.activations,
        pytest.raises(ValueError, match="copy_bandwidth"),
    ):
        plan_batch(world, engine, documents, CAPACITY, offload="auto")
    engine.activations = None
    with pytest.raises(ValueError, match='offload="off" and recompute="off"'):
        engine.forward_backward(batch)
    return ratios, errors


def test_plans_count_with_the_layers_that_the_engine_keeps(ranks, tmp_path):
    for ratios, errors in ranks(2).run(kept_layers, str(tmp_path)):
        assert 0 < ratios[0] < ratios[1]
        refused = [f"keep_first {first} and keep_last {last} need more room" for first, last in ((3, 2), (2, 1))]
        assert len(errors) == 4 and all(text in error for text, error in zip(refused * 2, errors, strict=True))
