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
    regime_of,
)
from tiny import exact_gradient, gradient_errors, loss_sums, make_documents, make_reference
from torch.distributed.fsdp import CPUOffloadPolicy

import hdp

CAPACITY = 64
LIMIT = 1e-5
BATCHES = {
    "mixed": [10, 115, 40, 3, 73, 21, 60, 2, 17],
    "only short": [10, 20, 5, 33, 7, 12, 50, 3, 64, 1, 2],
    "fewer than ranks": [17],
    "one long": [120],
}


def worlds_of(name: str) -> tuple[int, ...]:
    return (4,) if name.startswith("hsdp") else (2, 3)


CASES = [(name, world, batch) for name in ENGINES for world in worlds_of(name) for batch in BATCHES]


def one_step(world: hdp.World, name: str, lengths: list[int], planner: str, bf16: bool, heads: str = "gqa") -> Any:
    engine = make_engine(world, name, make_model(heads), bf16=bf16)
    batch = plan_batch(world, engine, make_documents(lengths), CAPACITY, planner=planner)
    result = engine.forward_backward(batch)
    gradients = full_gradients(engine)
    return result.loss, gradients if world.rank == 0 else None


@pytest.mark.parametrize(("name", "world", "batch"), CASES)
def test_gradients_are_exact(ranks, exactness, name, world, batch):
    lengths = BATCHES[batch]
    planner = "auto" if world == 3 else "naive"
    results = ranks(world).run(one_step, name, lengths, planner, False)
    loss, gradient = exact_gradient("gqa", make_documents(lengths))
    errors = gradient_errors(results[0][1], gradient)
    worst = max(errors, key=errors.__getitem__)
    exactness(f"world {world}, {batch}, {planner}, gqa, {name}", errors[worst], worst)
    assert errors[worst] <= LIMIT, f"{worst}: {errors[worst]:.2e}"
    assert all(found[0] == pytest.approx(loss, rel=1e-6) for found in results)


@pytest.mark.parametrize("name", ["fsdp-step", "fsdp-slot", "zero1", "zero3"])
def test_bf16_is_as_good_as_one_rank(ranks, exactness, name):
    lengths = BATCHES["mixed"]
    (_, alone), *_ = ranks(1).run(alone_in_bf16, lengths)
    (_, shared), *_ = ranks(2).run(one_step, name, lengths, "naive", True)
    _, gradient = exact_gradient("gqa", make_documents(lengths))
    single, several = gradient_errors(alone, gradient), gradient_errors(shared, gradient)
    norm = sum(e * e for e in single.values()) ** 0.5, sum(e * e for e in several.values()) ** 0.5
    exactness(f"world 2, mixed, naive, gqa, {name}, bf16 over one rank's {norm[0]:.1e}", norm[1], "all")
    assert norm[1] <= 1.5 * norm[0]


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


def alone_in_bf16(world: hdp.World, lengths: list[int]) -> Any:
    engine = make_engine(world, "fsdp-step", make_model(), bf16=True)
    result = engine.forward_backward(plan_batch(world, engine, make_documents(lengths), sum(lengths), planner="naive"))
    return result.loss, full_gradients(engine)


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


@pytest.mark.parametrize("name", [n for n in ENGINES if not n.startswith("hsdp")])
def test_parameters_after_ten_steps(ranks, name):
    lengths = [10, 90, 40, 3, 33]
    losses, parameters = train_alone(lengths)
    results = ranks(2).run(train, name, lengths)
    assert results[0][0] == pytest.approx(losses, rel=1e-5)
    assert results[0][0] == results[1][0]
    for key, value in results[0][1].items():
        exact = parameters[key]
        assert float((value.double() - exact).norm()) <= 2e-5 * float(exact.norm()), key


# ---------------------------------------------------------------- collectives


def recorded(world: hdp.World, name: str, lengths: list[int]) -> Any:
    engine = make_engine(world, name, make_model())
    batch = plan_batch(world, engine, make_documents(lengths), CAPACITY, planner="naive")
    with CollectiveRecorder() as recorder:
        engine.forward_backward(batch)
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


# ---------------------------------------------------------------- odd models


class Odd(torch.nn.Module):
    """Adds to a causal model a parameter that nothing uses, and one that only tokens of one kind use."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        hdp.register_attention()
        self.inner = make_model()
        self.config = self.inner.config
        self.unused = torch.nn.Parameter(torch.ones(3))
        self.rare = torch.nn.Parameter(torch.full((self.config.hidden_size,), 0.1))
        if frozen:
            self.inner.model.embed_tokens.weight.requires_grad_(False)
            self.inner.model.layers[0].requires_grad_(False)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.inner.lm_head

    def forward(self, input_ids: torch.Tensor, **keywords: Any) -> Any:
        embedded = self.inner.model.embed_tokens(input_ids)
        marked = (input_ids == 100).unsqueeze(-1)
        if bool(marked.any()):
            embedded = embedded + marked * self.rare
        return self.inner(inputs_embeds=embedded, **keywords)


def odd_documents(lengths: list[int], frozen: bool) -> list[torch.Tensor]:
    """Token 100 stands in the second document alone."""
    documents = [ids.clamp(max=99) for ids in make_documents(lengths)]
    if not frozen:  # frozen first layers and a parameter before them that only some ranks use: FSDP2 itself cannot
        documents[1][::3] = 100
    return documents


def odd_step(world: hdp.World, name: str, lengths: list[int], frozen: bool) -> Any:
    model = Odd(frozen)
    layers = {"layers": list(model.inner.model.layers)} if name.startswith("fsdp") else {}
    engine = hdp.shard(model, world, regime=regime_of(name), **layers) if layers else make_engine(world, name, model)
    engine.forward_backward(plan_batch(world, engine, odd_documents(lengths, frozen), CAPACITY, planner="naive"))
    return full_gradients(engine)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["fsdp-step", "fsdp-slot", "ddp"])
def test_unused_rare_and_frozen_parameters(ranks, name, frozen):
    lengths = [30, 20, 40, 50]
    found = ranks(2).run(odd_step, name, lengths, frozen)
    exact = odd_reference(lengths, frozen)
    for gradients in found:
        for name_ in ("unused", "rare") if frozen else ("unused",):
            gradient = gradients.pop(name_)
            assert gradient is None or not gradient.any()
        assert ("inner.model.embed_tokens.weight" in gradients) != frozen
        errors = gradient_errors(gradients, {k: v for k, v in exact.items() if k in gradients})
        assert max(errors.values()) <= LIMIT, errors


def odd_reference(lengths: list[int], frozen: bool) -> dict[str, torch.Tensor]:
    model = Odd()
    model.inner = make_reference()
    model.double()
    total, weight = loss_sums(model, odd_documents(lengths, frozen))
    (total / weight).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


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


# ---------------------------------------------------------------- refusals


def refused(world: hdp.World, what: str) -> str:
    model = make_model()
    engine = None
    try:
        if what == "regime":
            hdp.shard(model, world, regime="wave")
        elif what == "zero3 step":
            from hdp.parallel.deepspeed import DeepSpeedEngine

            made = make_engine(world, "zero3", model)
            DeepSpeedEngine(made.deepspeed, world, regime="step")
        elif what == "batch of another regime":
            engine = make_engine(world, "fsdp-slot", model)
            (batch,) = hdp.Loader(
                make_documents([9, 9]), world, tokens_per_step=10**6, capacity=CAPACITY, planner="naive", regime="step"
            )
            engine.forward_backward(batch)
        elif what == "clip":
            make_engine(world, "zero1", model).clip_grad_norm_(1.0)
        elif what == "no layers":
            hdp.shard(torch.nn.Sequential(torch.nn.Linear(3, 3)), world)
        elif what == "soft-capped logits":
            model.config.final_logit_softcapping = 30.0
            hdp.shard(model, world)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("regime", "unknown regime 'wave': choose one of step, slot"),
        ("zero3 step", "regime 'step' cannot run with ZeRO-3"),
        ("batch of another regime", "planned for regime 'step'; this engine runs 'slot'"),
        ("clip", "set gradient_clipping in its configuration"),
        ("no layers", "no repeated layers|no output head"),
        ("soft-capped logits", "final_logit_softcapping=30.0"),
    ],
)
def test_refusals_name_the_value_and_the_fix(ranks, what, message):
    import re

    for text in ranks(2).run(refused, what):
        assert re.search(message, text), text
