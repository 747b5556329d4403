"""Every engine, in both regimes and precisions, gives the gradient of one process; none issues collectives alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import (
    ENGINES,
    CollectiveRecorder,
    full_gradients,
    full_parameters,
    make_engine,
    make_model,
    plan_batch,
    worlds_of,
)
from tiny import exact_gradient, gradient_errors, loss_sums, make_documents, make_reference
from torch.distributed.fsdp import CPUOffloadPolicy

import hdp

pytestmark = pytest.mark.slow

CAPACITY = 64
LIMIT = 1e-5
BATCHES = {
    "mixed": [10, 115, 40, 3, 73, 21, 60, 2, 17],
    "only short": [10, 20, 5, 33, 7, 12, 50, 3, 64, 1, 2],
    "fewer than ranks": [17],
    "one long": [120],
}


CASES = [(name, world, batch) for name in ENGINES for world in worlds_of(name) for batch in BATCHES]


def one_step(world: hdp.World, name: str, lengths: list[int], planner: str) -> Any:
    engine = make_engine(world, name, make_model())
    batch = plan_batch(world, engine, make_documents(lengths), CAPACITY, planner=planner)
    before = engine.evaluate(batch.documents, capacity=CAPACITY)
    result = engine.forward_backward(batch)
    gradients = full_gradients(engine)
    norm = None if hasattr(engine, "deepspeed") else float(engine.clip_grad_norm_(1e9))
    after = engine.evaluate(make_documents([9]), capacity=CAPACITY)  # all ranks but one have nothing to do
    return result.loss, gradients if world.rank == 0 else None, norm, (before, after)


@pytest.mark.parametrize(("name", "world", "batch"), CASES)
def test_gradients_are_exact(ranks, exactness, name, world, batch):
    lengths = BATCHES[batch]
    planner = "auto" if world == 3 else "naive"
    results = ranks(world).run(one_step, name, lengths, planner)
    loss, gradient = exact_gradient("gqa", make_documents(lengths))
    errors = gradient_errors(results[0][1], gradient)
    worst = max(errors, key=errors.__getitem__)
    exactness(f"world {world}, {batch}, {planner}, gqa, {name}", errors[worst], worst)
    assert errors[worst] <= LIMIT, f"{worst}: {errors[worst]:.2e}"
    norm = float(torch.stack([g.norm() for g in gradient.values()]).norm())
    short, _ = exact_gradient("gqa", make_documents([9]))
    for found, _, clipped, evaluations in results:
        assert found == pytest.approx(loss, rel=1e-6)
        assert clipped is None or clipped == pytest.approx(norm, rel=1e-5)
        assert evaluations == pytest.approx((loss, short), rel=1e-6)


def with_parameters_in_host_memory(world: hdp.World, lengths: list[int], regime: str) -> Any:
    policy = CPUOffloadPolicy(pin_memory=False)
    engine = hdp.shard(make_model(), world, regime=regime, offload_policy=policy)
    batch = plan_batch(world, engine, make_documents(lengths), CAPACITY, planner="naive")
    engine.forward_backward(batch)
    gradients = full_gradients(engine)
    optimizer = torch.optim.SGD(engine.parameters(), lr=0.1)
    norm = float(engine.clip_grad_norm_(1e9))
    optimizer.step()
    return gradients, norm, all(p.device.type == "cpu" for p in engine.parameters())


@pytest.mark.parametrize("regime", ["step", "slot"])
def test_parameters_in_host_memory(ranks, regime):
    lengths = BATCHES["mixed"]
    _, gradient = exact_gradient("gqa", make_documents(lengths))
    for found, norm, on_cpu in ranks(2).run(with_parameters_in_host_memory, lengths, regime):
        assert max(gradient_errors(found, gradient).values()) <= LIMIT
        assert norm == pytest.approx(float(torch.stack([g.norm() for g in gradient.values()]).norm()), rel=1e-5)
        assert on_cpu


# ---------------------------------------------------------------- ten steps


def train(world: hdp.World, name: str, lengths: list[int]) -> Any:
    def sgd(parameters: list) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.3, momentum=0.9)

    engine = make_engine(world, name, make_model(), optimizer=sgd)
    if name == "ddp":  # ZeRO-1 in plain torch
        from torch.distributed.optim import ZeroRedundancyOptimizer

        optimizer: Any = ZeroRedundancyOptimizer(engine.parameters(), torch.optim.SGD, lr=0.3, momentum=0.9)
    else:
        optimizer = engine.deepspeed if hasattr(engine, "deepspeed") else sgd(list(engine.parameters()))
    losses = []
    for step in range(10):
        batch = plan_batch(world, engine, make_documents(lengths, seed=step), CAPACITY, planner="auto")
        losses.append(engine.forward_backward(batch).loss)
        optimizer.step()
        if not hasattr(engine, "deepspeed"):
            optimizer.zero_grad()
    parameters = full_parameters(engine)
    return losses, parameters if world.rank == 0 else None


def train_alone(lengths: list[int]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Plain training in one process, float64."""
    model = make_reference()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    losses = []
    for step in range(10):
        total, weight = loss_sums(model, make_documents(lengths, seed=step))
        optimizer.zero_grad()
        (total / weight).backward()
        optimizer.step()
        losses.append(float(total.detach()) / weight)
    return losses, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ENGINES)
def test_parameters_after_ten_steps(ranks, name):
    lengths = [10, 90, 40, 3, 33]
    losses, parameters = train_alone(lengths)
    results = ranks(worlds_of(name)[0]).run(train, name, lengths)
    assert results[0][0] == pytest.approx(losses, rel=1e-5)
    assert all(found == results[0][0] for found, _ in results)
    for key, value in results[0][1].items():
        exact = parameters[key]
        assert float((value.double() - exact).norm()) <= 2e-5 * float(exact.norm()), key


# ---------------------------------------------------------------- collectives


def recorded(world: hdp.World, name: str, lengths: list[int]) -> Any:
    engine = make_engine(world, name, make_model())
    batch = plan_batch(world, engine, make_documents(lengths), CAPACITY, planner="naive")
    with CollectiveRecorder() as recorder:
        engine.evaluate(make_documents([9]), capacity=CAPACITY)
        engine.forward_backward(batch)
        if hasattr(engine, "deepspeed"):
            engine.deepspeed.step()
        else:
            engine.clip_grad_norm_(1.0)
        engine.evaluate(make_documents(lengths), capacity=CAPACITY, planner="naive")
    return recorder.calls


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("batch", ["mixed", "fewer than ranks"])
def test_all_ranks_issue_the_same_collectives(ranks, name, batch):
    calls = ranks(worlds_of(name)[-1]).run(recorded, name, BATCHES[batch])
    assert len(calls[0]) > 3, "the recorder saw nothing"
    for rank in calls:
        assert [c[0::2] for c in rank] == [c[0::2] for c in calls[0]]  # names and sizes
        if not name.startswith("hsdp"):  # whose groups have other names on other ranks
            assert rank == calls[0]


# ---------------------------------------------------------------- the loss


def sample_step(world: hdp.World, documents: list) -> Any:
    engine = make_engine(world, "fsdp-step", make_model())
    result = engine.forward_backward(
        plan_batch(world, engine, documents, CAPACITY, planner="naive", reduction="sample")
    )
    return result.loss, full_gradients(engine)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_sample_mean(ranks, world):
    """Each document counts alike; one without labels counts not at all."""
    documents: list[Any] = make_documents([30, 60 * world, 1, 12, 2])
    labels = documents[3].clone()
    labels[:6] = -100
    documents[3] = {"input_ids": documents[3], "labels": labels}
    model = make_reference()
    means = [total / weight for total, weight in (loss_sums(model, [d]) for d in documents) if weight]
    loss = torch.stack(means).mean()
    loss.backward()
    found, gradient = ranks(world).run(sample_step, documents)[0]
    assert found == pytest.approx(float(loss), rel=1e-6)
    errors = gradient_errors(gradient, {name: p.grad for name, p in model.named_parameters()})
    assert max(errors.values()) <= LIMIT, errors
