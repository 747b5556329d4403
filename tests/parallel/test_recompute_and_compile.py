"""Gradient checkpointing and torch.compile, as people switch them on: the gradient of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from engines import full_gradients, make_engine, make_model, plan_batch
from tiny import exact_gradient, gradient_errors, make_documents
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

import hdp
from hdp.offload import HostTier, OffloadEngine

pytestmark = pytest.mark.slow

CAPACITY = 64
LENGTHS = [10, 115, 40, 3, 73, 21]
WRAPPER = "_checkpoint_wrapped_module."


def transformers_switch(model: Any) -> None:
    model.gradient_checkpointing_enable()


def reentrant(model: Any) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})


def torch_wrapper(model: Any) -> None:
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, LlamaDecoderLayer))


def compiled(model: Any) -> None:
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")


WAYS = {way.__name__: way for way in (transformers_switch, reentrant, torch_wrapper, compiled)}


def step(world: hdp.World, name: str, way: str) -> Any:
    model, calls = make_model(), [0]
    if way != "compiled":
        for module in model.modules():
            if isinstance(module, LlamaMLP):
                module.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    WAYS[way](model)
    model.train()
    engine = make_engine(world, name, model)
    batch = plan_batch(world, engine, make_documents(LENGTHS), CAPACITY, planner="naive")
    runs = len(engine._works(batch.plan)) * len(model.model.layers)
    engine.forward_backward(batch)
    found = {key.replace(WRAPPER, ""): gradient for key, gradient in full_gradients(engine).items()}
    return calls[0] / runs, found


CASES = [(name, way) for name in ("fsdp-step", "fsdp-slot", "ddp", "zero3") for way in WAYS]
REFUSED = ("ddp", "reentrant")


@pytest.mark.parametrize(("name", "way"), [case for case in CASES if case != REFUSED])
def test_gradients_are_exact(ranks, name, way):
    _, exact = exact_gradient("gqa", make_documents(LENGTHS))
    for ran, gradients in ranks(2).run(step, name, way):
        assert way == "compiled" or ran == 2  # once forward, once again
        errors = gradient_errors(gradients, exact)
        assert max(errors.values()) <= 1e-5, errors


def kept(world: hdp.World, name: str, way: str) -> tuple[int, Any]:
    """Messages of a step, and its gradients."""
    model = make_model()
    if way == "of one's own":
        keeping = {"use_reentrant": False, "context_fn": hdp.keep_attention}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keeping)
    elif way != "none":
        WAYS[way](model)
    model.train()
    engine = make_engine(world, name, model)
    batch = plan_batch(world, engine, make_documents(LENGTHS), CAPACITY, planner="naive")
    before = world.channel.messages
    engine.forward_backward(batch)
    found = {key.replace(WRAPPER, ""): gradient for key, gradient in full_gradients(engine).items()}
    return world.channel.messages - before, found


@pytest.mark.parametrize("name", ["fsdp-step", "fsdp-slot", "ddp", "zero1"])
def test_what_runs_again_sends_nothing(ranks, name):
    """transformers' switch, and a policy that is given: as many messages as without. Torch's wrapper knows of none."""
    _, exact = exact_gradient("gqa", make_documents(LENGTHS))
    sent = {}
    for way in ("none", "transformers_switch", "of one's own", "torch_wrapper"):
        found = ranks(2).run(kept, name, way)
        sent[way] = sum(messages for messages, _ in found)
        for _, gradients in found:
            assert max(gradient_errors(gradients, exact).values()) <= 1e-5
    assert sent["none"] == sent["transformers_switch"] == sent["of one's own"] > 0
    assert sent["torch_wrapper"] > sent["none"]


def refused(world: hdp.World) -> str:
    with pytest.raises(ValueError, match="use_reentrant=True does not work with DDP") as error:
        step(world, *REFUSED)
    return str(error.value)


def test_reentrant_checkpointing_under_ddp_is_refused(ranks):
    assert all('{"use_reentrant": False}' in text for text in ranks(2).run(refused))


def spared(world: hdp.World, name: str) -> Any:
    """Peaks of saved bytes, messages and gradients of compiled layers that keep everything and that run again."""
    model, found = make_model(), []
    compiled(model)
    engine = make_engine(world, name, model)
    batch = plan_batch(world, engine, make_documents(LENGTHS), CAPACITY, planner="naive")
    for policy in ("offload", "recompute"):
        with OffloadEngine([HostTier()], min_bytes=256) as store:
            engine.activations = hdp.Activations(store=store, policy=policy, ratio=0.0, keep_first=0, keep_last=0)
            engine.model.zero_grad()
            before = world.channel.messages
            engine.forward_backward(batch)
            found.append((store.meter.peak_device, world.channel.messages - before, full_gradients(engine)))
    return found


@pytest.mark.parametrize("name", ["fsdp-step", "fsdp-slot", "ddp"])
def test_compiled_layers_run_again_where_they_are_to(ranks, name):
    _, exact = exact_gradient("gqa", make_documents(LENGTHS))
    for (kept, messages, _), (saved, again, gradients) in ranks(2).run(spared, name):
        assert saved < kept / 2 and again == messages > 0
        assert max(gradient_errors(gradients, exact).values()) <= 1e-5


def inductor(world: hdp.World) -> Any:
    """Compiled on one rank: its C++ takes a minute to build, and what it sends and receives is the same."""
    model = make_model()
    for layer in model.model.layers if world.rank == 0 else ():
        layer.compile(dynamic=True)
    engine = make_engine(world, "fsdp-step", model)
    engine.forward_backward(plan_batch(world, engine, make_documents([30, 100]), CAPACITY, planner="naive"))
    return full_gradients(engine)


def test_compiled_to_machine_code(ranks):
    _, exact = exact_gradient("gqa", make_documents([30, 100]))
    for gradients in ranks(2).run(inductor):
        assert max(gradient_errors(gradients, exact).values()) <= 1e-5


def graphs_of(world: hdp.World) -> tuple[int, int, bool]:
    """Graphs after batches in which both ranks have work; after one in which one has; whether this one had none."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = make_model()
    for layer in model.model.layers:
        layer.compile(backend="eager", dynamic=True)
    engine = make_engine(world, "fsdp-slot", model)
    found = []
    for lengths in ([30, 41], [17, 60], [25]):
        batch = plan_batch(world, engine, make_documents(lengths), CAPACITY, planner="naive")
        engine.forward_backward(batch)
        found.append(counters["stats"]["unique_graphs"])
    is_idle = any(work.micro_batch is None or not work.micro_batch.tokens for work in engine._works(batch.plan))
    return found[1], found[2], is_idle


def test_a_rank_without_work_compiles_nothing_for_it(ranks):
    """Others would wait for it meanwhile: what it runs must not be of a size that is compiled apart, 0 or 1."""
    found = ranks(2).run(graphs_of)
    assert any(is_idle for _, _, is_idle in found)
    for before, after, _ in found:
        assert before > 0 and after == before
