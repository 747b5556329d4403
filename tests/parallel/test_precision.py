"""bf16 under every engine: as good as one rank in bf16, with weights, gradients and optimizer in fp32."""

from __future__ import annotations

import contextlib
from functools import cache
from typing import Any

import pytest
import torch
from engines import ENGINES, full_gradients, full_parameters, make_engine, make_model, plan_batch, worlds_of
from tiny import exact_gradient, gradient_errors, make_documents

import hdp

CAPACITY = 64
BATCHES = {"mixed": [10, 115, 40, 3, 73, 21, 60, 2, 17], "fewer than ranks": [17]}
AUTOCAST = ("fsdp-step", "fsdp-slot", "hsdp-step", "ddp")
"""Engines whose own mixed precision is not asked for: ``torch.autocast`` around the step."""
CASES = [(name, "own") for name in ENGINES if name != "ddp"] + [(name, "autocast") for name in AUTOCAST]


def step(world: hdp.World, name: str, precision: str, lengths: list[int], capacity: int) -> Any:
    engine = make_engine(world, name, make_model(), bf16=precision == "own")
    batch = plan_batch(world, engine, make_documents(lengths), capacity, planner="naive")
    around = torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else contextlib.nullcontext()
    with around:
        loss = engine.forward_backward(batch).loss
        evaluated = engine.evaluate(make_documents(lengths), capacity=capacity, planner="naive")
    kept = {p.dtype for p in engine.parameters()}
    gradients = {g.dtype for p in engine.parameters() if (g := p.grad) is not None}
    return loss, evaluated, full_gradients(engine), kept | gradients


def size(found: dict[str, torch.Tensor], lengths: list[int]) -> float:
    _, exact = exact_gradient("gqa", make_documents(lengths))
    return sum(e * e for e in gradient_errors(found, exact).values()) ** 0.5


@cache
def alone(ranks: Any, precision: str, batch: str) -> float:
    lengths = BATCHES[batch]
    (found,) = ranks(1).run(step, "fsdp-step", precision, lengths, sum(lengths))
    return size(found[2], lengths)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("name", "precision"), CASES)
def test_bf16_is_as_good_as_one_rank(ranks, exactness, name, precision, batch):
    lengths = BATCHES[batch]
    results = ranks(worlds_of(name)[0]).run(step, name, precision, lengths, CAPACITY)
    loss, _ = exact_gradient("gqa", make_documents(lengths))
    single, several = alone(ranks, precision, batch), size(results[0][2], lengths)
    assert 1e-4 < several <= 1.5 * single, (several, single)  # bf16 it was, and no worse
    exactness(f"{batch}, naive, gqa, {name}, bf16 ({precision}) over one rank's {single:.1e}", several, "all")
    for found, evaluated, _, dtypes in results:
        assert found == pytest.approx(loss, rel=5e-3) and evaluated == pytest.approx(found, rel=1e-5)
        assert dtypes == {torch.float32} or name.startswith("zero")  # DeepSpeed keeps them in its optimizer


def train(world: hdp.World, name: str, precision: str) -> Any:
    """Steps far below the spacing of bf16: only weights in fp32 move by them."""

    def sgd(parameters: list) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1e-4)

    engine = make_engine(world, name, make_model(), bf16=precision == "own", optimizer=sgd)
    optimizer: Any = engine.deepspeed if hasattr(engine, "deepspeed") else sgd(list(engine.parameters()))
    for number in range(10):
        batch = plan_batch(world, engine, make_documents(BATCHES["mixed"], seed=number), CAPACITY, planner="naive")
        around = torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else contextlib.nullcontext()
        with around:
            engine.forward_backward(batch)
        optimizer.step()
        if not hasattr(engine, "deepspeed"):
            optimizer.zero_grad()
    return full_parameters(engine)


@pytest.mark.parametrize(
    ("name", "precision"),
    [("fsdp-step", "own"), ("fsdp-slot", "own"), ("zero3", "own"), ("ddp", "autocast"), ("fsdp-slot", "autocast")],
)
def test_small_steps_are_not_lost(ranks, name, precision):
    hdp.register_attention()  # models are made here, where no world has done it
    before = {key: p.detach() for key, p in make_model().named_parameters()}
    if name == "zero3":  # DeepSpeed rounds the weights before it keeps them in fp32
        before = {key: p.bfloat16().float() for key, p in before.items()}
    start = {key: p.detach() for key, p in make_model().named_parameters()}
    plain = ranks(2).run(train, "fsdp-step", "fp32")[0]
    for found in ranks(2).run(train, name, precision):
        for key, weight in before.items():
            moved, wanted = found[key].float() - weight, plain[key] - start[key]
            assert float((moved - wanted).norm()) <= 0.1 * float(wanted.norm()) + 1e-7, key
