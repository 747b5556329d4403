"""What lies between two steps: gradients that are there already, steps and evaluations that fail, plain forward passes."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from engines import CollectiveRecorder, full_gradients, make_engine, make_model, plan_batch
from tiny import exact_gradient, gradient_errors, loss_sums, make_documents, make_reference

import hdp

CAPACITY = 64
FIRST, SECOND = [60, 20, 64, 30, 41], [100, 9, 64, 33]
ENGINES = ("fsdp-step", "fsdp-slot", "hsdp-step", "fsdp-step, streams", "fsdp-slot, streams", "ddp")
"""``streams``: as on devices that have some, where FSDP2 runs its collectives by itself."""


def world_of(name: str) -> int:
    return 4 if name.startswith("hsdp") else 2


def made(world: hdp.World, name: str, model: Any = None) -> Any:
    kind, _, streams = name.partition(", ")
    engine: Any = make_engine(world, kind, make_model() if model is None else model)
    if streams:
        engine.beside = None
    return engine


def batch_of(world: hdp.World, engine: Any, lengths: list[int]) -> hdp.PlannedBatch:
    return plan_batch(world, engine, make_documents(lengths, seed=len(lengths)), CAPACITY, planner="naive")


def held(engine: Any) -> list[torch.Tensor | None]:
    """This rank's gradients, copied."""
    parts = [None if p.grad is None else getattr(p.grad, "_local_tensor", p.grad) for p in engine.parameters()]
    return [None if part is None else part.clone() for part in parts]


def same(a: list[Any], b: list[Any]) -> bool:
    return all((x is None and y is None) or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def accumulate(world: hdp.World, name: str) -> Any:
    engine = made(world, name)
    for lengths in (FIRST, SECOND, FIRST):
        engine.forward_backward(batch_of(world, engine, lengths))
    return full_gradients(engine)


def sum_of(*batches: list[int]) -> dict[str, torch.Tensor]:
    found = [exact_gradient("gqa", make_documents(lengths, seed=len(lengths)))[1] for lengths in batches]
    return {name: torch.stack([gradients[name] for gradients in found]).sum(0) for name in found[0]}


@pytest.mark.parametrize("name", ENGINES)
def test_gradients_add_up(ranks, name):
    exact = sum_of(FIRST, SECOND, FIRST)
    for gradients in ranks(world_of(name)).run(accumulate, name):
        errors = gradient_errors(gradients, exact)
        assert max(errors.values()) <= 1e-5, errors


class Broken(Exception):
    pass


def fail(world: hdp.World, name: str, where: str) -> Any:
    """A step that fails on all ranks in their last micro-batch, after one that did not: gradients before it, after it, and of a
    step more."""
    engine = made(world, name)
    engine.forward_backward(batch_of(world, engine, FIRST))
    before = held(engine)
    broken = batch_of(world, engine, SECOND)
    left = len(engine._works(broken.plan))
    method = getattr(engine, where)

    def breaks(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if not left:
            raise Broken
        return method(*arguments)

    setattr(engine, where, breaks)
    with pytest.raises(Broken):
        engine.forward_backward(broken)
    delattr(engine, where)
    after = held(engine)
    engine.forward_backward(batch_of(world, engine, SECOND))
    return same(before, after), full_gradients(engine)


@pytest.mark.parametrize("where", ["_loss", "_backward"])
@pytest.mark.parametrize("name", ENGINES)
def test_a_step_that_fails_leaves_gradients_as_they_were(ranks, name, where):
    exact = sum_of(FIRST, SECOND)
    for unchanged, gradients in ranks(world_of(name)).run(fail, name, where):
        assert unchanged
        errors = gradient_errors(gradients, exact)
        assert max(errors.values()) <= 1e-5, errors


def fail_to_evaluate(world: hdp.World, name: str) -> bool:
    engine = made(world, name)
    engine.forward_backward(batch_of(world, engine, FIRST))
    before = held(engine)
    wrong = make_documents([60, 60, 60, 60])
    for document in wrong:
        document[3] = 5000
    with pytest.raises(ValueError, match="token id 5000"):
        engine.evaluate(wrong, capacity=CAPACITY)
    return any(part is not None for part in before) and same(before, held(engine))


@pytest.mark.parametrize("name", ENGINES)
def test_an_evaluation_that_fails_leaves_gradients_as_they_were(ranks, name):
    assert all(ranks(world_of(name)).run(fail_to_evaluate, name))


def fail_first(world: hdp.World, name: str, what: str) -> float:
    """The first step, or evaluation, fails before the model has run; then the loss of a step with other weights."""
    engine = made(world, name)
    wrong = make_documents([60, 60, 60, 60])
    for document in wrong:
        document[3] = 5000
    with pytest.raises(ValueError, match="token id 5000"):
        if what == "step":
            engine.forward_backward(plan_batch(world, engine, wrong, CAPACITY, planner="naive"))
        else:
            engine.evaluate(wrong, capacity=CAPACITY)
    halve(engine)
    return engine.forward_backward(batch_of(world, engine, FIRST)).loss


def fail_in_forward(world: hdp.World, name: str, _: str) -> float:
    """A forward pass of the user's own fails inside a layer."""
    engine = made(world, name)
    plain(engine)
    layer: Any = engine.model.model.layers[1]
    hook = layer.mlp.register_forward_pre_hook(lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        plain(engine)
    hook.remove()
    halve(engine)
    return engine.forward_backward(batch_of(world, engine, FIRST)).loss


@pytest.mark.parametrize("what", ["step", "evaluation", "forward"])
@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_outlives_what_fails_first(ranks, name, what):
    run = fail_in_forward if what == "forward" else fail_first
    assert ranks(world_of(name)).run(run, name, what) == pytest.approx([halved()] * world_of(name), rel=1e-5)


def halved() -> float:
    """Loss of the first batch with half the weights."""
    model = make_reference()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
        total, weight = loss_sums(model, make_documents(FIRST, seed=len(FIRST)))
    return float(total) / weight


def generate(world: hdp.World, name: str) -> tuple[int, int]:
    """Gathers of three plain forward passes, within and without ``gathered``."""
    engine = made(world, name)
    counts = []
    for context in (engine.gathered(), contextlib.nullcontext()):
        with CollectiveRecorder() as recorder, context:
            for _ in range(3):
                plain(engine)
        counts.append(sum("allgather" in call for call, *_ in recorder.calls))
    return counts[0], counts[1]


def test_generation_gathers_once_where_it_may(ranks):
    for within, without in ranks(2).run(generate, "fsdp-step"):
        assert without == 3 * within > 0


def halve(engine: Any) -> None:
    """As loading other weights does, or putting averaged ones in their place."""
    with torch.no_grad():
        for parameter in engine.parameters():
            parameter.mul_(0.5)


def plain(engine: Any) -> float:
    """Loss of one document in a forward pass of the user's own."""
    ids = make_documents([33])[0][None]
    with torch.no_grad():
        return float(engine.model(input_ids=ids, labels=ids).loss)


def look(world: hdp.World, name: str) -> dict[str, list[float]]:
    """Losses of a step, an evaluation and a plain forward, each after a plain forward and other weights."""
    found: dict[str, list[float]] = {}
    for what in ("step", "evaluate", "plain"):
        engine = made(world, name)
        plain(engine)
        halve(engine)
        if what == "step":
            loss = engine.forward_backward(batch_of(world, engine, FIRST)).loss
        elif what == "evaluate":
            loss = engine.evaluate(make_documents(FIRST, seed=len(FIRST)), capacity=CAPACITY)
        else:
            loss = plain(engine)
        found[what] = [loss]
    return found


@pytest.mark.parametrize("name", ENGINES)
def test_a_plain_forward_leaves_no_weights_behind(ranks, name):
    model = make_reference()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
        total, weight = loss_sums(model, make_documents(FIRST, seed=len(FIRST)))
        ids = make_documents([33])[0][None]
        alone = float(model(input_ids=ids, labels=ids).loss)
    whole = float(total) / weight
    for found in ranks(world_of(name)).run(look, name):
        assert found["step"] == pytest.approx([whole], rel=1e-5)
        assert found["evaluate"] == pytest.approx([whole], rel=1e-5)
        assert found["plain"] == pytest.approx([alone], rel=1e-5)


def clip(world: hdp.World, name: str) -> tuple[float, float, bool]:
    """The norm before and after a plain forward, and whether an optimizer made then trains."""
    engine = made(world, name)
    engine.forward_backward(batch_of(world, engine, FIRST))
    before = float(engine.clip_grad_norm_(1e9))
    plain(engine)
    after = float(engine.clip_grad_norm_(1e9))
    plain(engine)
    optimizer, loss = torch.optim.SGD(engine.parameters(), lr=0.1), plain(engine)
    optimizer.step()
    return before, after, plain(engine) != loss


@pytest.mark.parametrize("name", ENGINES)
def test_after_a_plain_forward_gradients_are_found(ranks, name):
    for before, after, trains in ranks(world_of(name)).run(clip, name):
        assert before == after > 0 and trains


def evaluate_long(world: hdp.World) -> tuple[float, list[bool]]:
    """A document longer than all ranks' capacity; and which modules train afterwards."""
    model = make_model()
    model.train()
    model.model.embed_tokens.eval()
    engine = made(world, "fsdp-step", model)
    loss = engine.evaluate(make_documents([300, 20]), capacity=CAPACITY)
    return loss, [module.training for module in (model, model.model.embed_tokens, model.model.layers[0])]


def test_evaluation_holds_longer_documents_and_leaves_modes_as_they_were(ranks):
    with torch.no_grad():
        total, weight = loss_sums(make_reference(), make_documents([300, 20]))
    for loss, training in ranks(2).run(evaluate_long):
        assert loss == pytest.approx(float(total) / weight, rel=1e-5)
        assert training == [True, False, True]
