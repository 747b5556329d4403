"""FSDP2's collectives beside computation: the same bits as one after the other, and nothing left gathered."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import full_gradients, make_engine
from tiny import make_documents, make_model
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy

import hdp
from hdp.parallel import collectives

LENGTHS = [120, 20, 30, 9, 11, 40, 64, 64]


def loader_of(engine: hdp.Engine, lengths: list[int], steps: int = 1, capacity: int = 64) -> hdp.Loader:
    documents = make_documents(lengths)
    return hdp.Loader(
        documents,
        engine,
        tokens_per_step=10**5,
        capacity=capacity,
        planner="naive",
        seed=None,
        steps=steps,
    )


def accumulate(world: hdp.World, name: str, beside: bool, slow: bool) -> tuple[dict[str, Tensor | None], int]:
    """Gradients of two batches in turn, the second added to the first; how many reductions were waited for later."""
    later = 0
    engine = make_engine(world, name, make_model())
    assert engine.beside is not None
    engine.beside.allowed &= beside
    wait = collectives.TimedWork.wait
    chance = random.Random(world.rank)

    def late(work: collectives.TimedWork, *timeout: Any) -> bool:
        nonlocal later
        later += any(work is pending for pending, _ in engine.beside.pending)
        if slow:
            time.sleep(0.02 * chance.random())
        return wait(work, *timeout)

    collectives.TimedWork.wait = late  # type: ignore[method-assign]
    try:
        for batch in loader_of(engine, LENGTHS, steps=2):
            engine.forward_backward(batch)
    finally:
        collectives.TimedWork.wait = wait  # type: ignore[method-assign]
    assert not engine.beside.pending and not engine.beside.aside
    return full_gradients(engine), later


@pytest.mark.parametrize("name", ["fsdp-step", "fsdp-slot"])
def test_the_same_bits_as_one_after_the_other(ranks, name):
    plain = ranks(3).run(accumulate, name, False, False)
    assert all(later == 0 for _, later in plain)
    for slow in (False, True):
        for (ours, later), (exact, _) in zip(ranks(3).run(accumulate, name, True, slow), plain, strict=True):
            assert later > 0
            assert ours.keys() == exact.keys()
            for key, gradient in exact.items():
                assert torch.equal(ours[key], gradient), key


def evaluate_between_steps(world: hdp.World) -> list[float]:
    """One short document: two of three ranks run nothing. After a step they must not keep the old parameters."""
    engine = hdp.shard(make_model(), world)
    optimizer = torch.optim.SGD(engine.parameters(), lr=0.5)
    losses = [engine.evaluate(make_documents([30]), capacity=64)]
    for batch in loader_of(engine, LENGTHS, 2, 180 // world.world_size):
        engine.forward_backward(batch)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(engine.evaluate(make_documents([30]), capacity=64))
    return losses


def test_ranks_that_run_nothing_keep_nothing_gathered(ranks):
    alone = ranks(1).run(evaluate_between_steps)[0]
    for losses in ranks(3).run(evaluate_between_steps):
        assert losses == pytest.approx(alone, rel=1e-5)
    assert alone[2] != pytest.approx(alone[0], rel=1e-3)


def optimizer_in_backward(world: hdp.World) -> tuple[list[float], list[float]]:
    """Hooks that read a gradient as soon as it is there see it whole."""
    engine = hdp.shard(make_model(), world)
    seen: list[float] = []
    for parameter in engine.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: seen.append(float(p.grad.to_local().norm())))
    for batch in loader_of(engine, LENGTHS):
        engine.forward_backward(batch)
    return sorted(seen), sorted(float(p.grad.to_local().norm()) for p in engine.parameters())


def test_hooks_see_whole_gradients(ranks):
    for seen, final in ranks(3).run(optimizer_in_backward):
        assert seen == final


def test_a_gather_that_was_waited_for_is_not_waited_for_again():
    class Once(dist.Work):
        count = 0

        def wait(self, *timeout: Any) -> bool:
            self.count += 1
            return True

    work, waits = Once(), []
    timed = collectives.TimedWork(work, waits)
    assert timed.wait() and timed.wait()
    assert work.count == 1 and len(waits) == 1


def half_precision_reductions(world: hdp.World, regime: str) -> dict[str, Tensor | None]:
    """A policy that says nothing of reductions: they travel in bf16 and are cast afterwards."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    engine = hdp.shard(make_model(), world, regime=regime, mp_policy=policy)
    assert engine.beside is not None and not engine.beside.allowed
    for batch in loader_of(engine, LENGTHS):
        engine.forward_backward(batch)
    return full_gradients(engine)


@pytest.mark.parametrize("regime", ["step", "slot"])
def test_reductions_that_are_cast_block(ranks, regime):
    for found in ranks(2).run(half_precision_reductions, regime):
        assert all(torch.isfinite(gradient).all() and gradient.abs().max() < 1e3 for gradient in found.values())


def assigned_checkpoint(world: hdp.World, regime: str) -> dict[str, Tensor | None]:
    """Parameters replaced by those of a checkpoint before the first step, and gradients accumulated over two."""
    engine = hdp.shard(make_model(), world, regime=regime)
    state = {name: value.clone() for name, value in engine.model.state_dict().items()}
    engine.model.load_state_dict(state, assign=True)
    for batch in loader_of(engine, LENGTHS, steps=2):
        engine.forward_backward(batch)
    return full_gradients(engine)


@pytest.mark.parametrize("regime", ["step", "slot"])
def test_parameters_of_a_checkpoint(ranks, regime):
    name = f"fsdp-{regime}"
    exact = ranks(2).run(accumulate, name, False, False)
    for ours, (wanted, _) in zip(ranks(2).run(assigned_checkpoint, regime), exact, strict=True):
        assert all(torch.equal(ours[key], gradient) for key, gradient in wanted.items())


def failing_step(world: hdp.World, regime: str) -> tuple[bool, bool, list[float]]:
    """A step that fails on every rank between two that do not: gradients before it stay, and the next reads new parameters."""
    engine = hdp.shard(make_model(), world, regime=regime)
    held = list(engine.parameters())  # as an optimizer does
    good, bad = (next(iter(loader_of(engine, LENGTHS))) for _ in range(2))
    engine.forward_backward(good)
    before = [parameter.grad.to_local().clone() for parameter in held]
    losses = [engine.forward_backward(good).loss]
    engine.model.zero_grad()
    engine.forward_backward(good)
    loss = engine._loss
    engine._loss = lambda inputs: loss(inputs) * torch.ones(3).sum().item().missing  # type: ignore[method-assign]
    failed = False
    try:
        engine.forward_backward(bad)
    except AttributeError:
        failed = True
    engine._loss = loss  # type: ignore[method-assign]
    same = all(torch.equal(parameter.grad.to_local(), grad) for parameter, grad in zip(held, before, strict=True))
    with torch.no_grad():
        for parameter in held:
            parameter.mul_(0.5)
    losses.append(engine.forward_backward(good).loss)
    return failed, same, losses


def loss_of_halved_parameters(world: hdp.World, regime: str) -> float:
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    engine = hdp.shard(model, world, regime=regime)
    return engine.forward_backward(next(iter(loader_of(engine, LENGTHS)))).loss


@pytest.mark.parametrize("regime", ["step", "slot"])
def test_after_a_step_that_failed_everywhere(ranks, regime):
    results = ranks(2).run(failing_step, regime)
    halved = ranks(2).run(loss_of_halved_parameters, regime)[0]
    for failed, same, losses in results:
        assert failed and same
        assert losses[1] == pytest.approx(halved, rel=1e-6) and losses[1] != pytest.approx(losses[0], rel=1e-3)


def outside_a_step(world: hdp.World) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None]]:
    """A user's own forward and backward through the sharded model, nobody waiting for anything afterwards."""
    found = []
    for beside in (True, False):
        engine = hdp.shard(make_model(), world)
        assert engine.beside is not None
        engine.beside.allowed &= beside
        for _ in range(2):
            ids = make_documents([33])[0][None]
            engine.model(input_ids=ids, labels=ids).loss.backward()
        found.append(full_gradients(engine))
    return found[0], found[1]


def test_reductions_outside_a_step_block(ranks):
    for ours, exact in ranks(2).run(outside_a_step):
        assert all(torch.equal(ours[key], gradient) for key, gradient in exact.items())
