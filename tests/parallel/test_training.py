"""Whole runs: world size 1 is plain training, runs repeat bit for bit, evaluation and bad batches."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from harness import Ranks
from stand_in import alone, planning
from tiny import VOCABULARY, loss_sums, make_documents, make_model, make_reference

import hdp
from hdp.balance import Plan

LENGTHS = [90, 10, 33, 5, 1, 60, 12, 40, 7, 25, 18, 3]


def train(
    world: hdp.World, steps: int, options: dict, schedule: str | None = None
) -> tuple[list[float], dict[str, torch.Tensor]]:
    world.runtime.schedule = schedule
    engine = hdp.shard(make_model(), world)
    optimizer = torch.optim.AdamW(engine.parameters(), lr=1e-2)
    fields = {"tokens_per_step": 120, "capacity": 64, "steps": steps, "seed": 7, **options}
    losses = []
    for batch in hdp.Loader(make_documents(LENGTHS), engine, **fields):
        losses.append(engine.forward_backward(batch).loss)
        engine.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: p.full_tensor().detach() for name, p in engine.model.named_parameters()}
    return losses, weights if world.rank == 0 else {}


BITS = [
    ("naive", None),
    ("auto", None),
    ("naive", "token_ring"),
    ("naive", "ulysses_home:2"),
    ("naive", "direct/ring_q"),
]


@pytest.mark.parametrize(("planner", "schedule"), BITS)
@pytest.mark.parametrize("world", [2, 3])
def test_the_same_seed_gives_the_same_bits(world, planner, schedule):
    runs = []
    for _ in range(2):  # new processes each time
        with Ranks(world) as ranks:
            runs.append(ranks.run(train, 6, {"planner": planner}, schedule))
    (losses, weights), (losses_again, weights_again) = runs[0][0], runs[1][0]
    assert losses == losses_again and len(set(losses)) == 6
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)
    assert all(rank[0] == losses for rank in runs[0])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_training_follows_plain_training(ranks, world):
    """Ten AdamW steps against a loop without hdp, in float64: the same losses."""
    capacity = 96 if world == 1 else 64  # the longest document has 90 tokens
    losses, _ = ranks(world).run(train, 10, {"planner": "naive", "capacity": capacity})[0]
    model, documents = make_reference(), make_documents(LENGTHS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = hdp.Loader(
        documents, planning(alone(world)), tokens_per_step=120, capacity=capacity, planner="naive", steps=10, seed=7
    )
    expected = []
    for indices, _plan in loader.plan_batches():
        total, weight = loss_sums(model, [documents[i] for i in indices])
        (total / weight).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(total.detach()) / weight)
    assert losses == pytest.approx(expected, rel=2e-4)
    assert losses[-1] < losses[0]


def buffers(world: hdp.World, lengths: list[int]) -> tuple[int, int]:
    engine = hdp.shard(make_model(), world)
    (batch,) = hdp.Loader(make_documents(lengths), engine, tokens_per_step=10**5, capacity=64, planner="naive")
    return engine.forward_backward(batch).attention_bytes, world.runtime.peak_bytes


def test_a_step_reports_the_buffers_of_attention():
    """Of the rank that needs most, on all of them; whole documents need none."""
    with Ranks(3) as three:  # new processes: what was needed once stays
        whole, shared = (three.run(buffers, lengths) for lengths in ([20, 10, 33, 5], [90, 10, 33, 5]))
    assert {reported for reported, _ in whole} == {0}
    assert {reported for reported, _ in shared} == {max(own for _, own in shared)} != {0}


def evaluate(world: hdp.World, lengths: list[int], between_steps: bool) -> list[Any]:
    engine = hdp.shard(make_model(), world)
    documents = make_documents(lengths)
    found = [engine.evaluate(documents, capacity=64)]
    assert engine.model.training
    if between_steps:  # a step after an evaluation, and an evaluation after a step
        (batch,) = hdp.Loader(documents, engine, tokens_per_step=10**5, capacity=64, planner="naive")
        found.append(engine.forward_backward(batch).loss)
        found.append(engine.evaluate(documents, capacity=64, planner="static", tokens_per_step=70))
    return found


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_is_the_loss_of_one_process(ranks, world):
    lengths = [60 * world, *LENGTHS[1:]]
    with torch.no_grad():
        total, weight = loss_sums(make_reference(), make_documents(lengths))
    for found in ranks(world).run(evaluate, lengths, True):
        assert found == pytest.approx([float(total) / weight] * 3, rel=1e-6)


def test_evaluation_without_labels_is_nan(ranks):
    assert all(math.isnan(found[0]) for found in ranks(2).run(evaluate, [1, 1, 1], False))


def more_ranks_than_tokens(world: hdp.World, lengths: list[int]) -> tuple[float, float]:
    engine = hdp.shard(make_model(), world)
    (batch,) = hdp.Loader(make_documents(lengths), engine, tokens_per_step=9, capacity=1, planner="naive", seed=None)
    return engine.forward_backward(batch).loss, float(engine.clip_grad_norm_(1e9))


@pytest.mark.parametrize("lengths", [[2], [3], [1, 2]])
def test_more_ranks_than_tokens(ranks, lengths):
    model, documents = make_reference(), make_documents(lengths)
    total, weight = loss_sums(model, documents)
    (total / weight).backward()
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).detach())
    for found in ranks(4).run(more_ranks_than_tokens, lengths):
        assert found == pytest.approx((float(total.detach()) / weight, norm), rel=1e-5)


# ------------------------------------------------------------ refused


def refusals(world: hdp.World) -> dict[str, tuple[str, str]]:
    """Every mistake that is seen before ranks begin to work together; the world goes on working after each."""
    found: dict[str, tuple[str, str]] = {}

    def note(name: str, function: Any) -> None:
        try:
            function()
            found[name] = ("", "")
        except Exception as error:
            found[name] = (type(error).__name__, str(error))

    engine = hdp.shard(make_model(), world)
    documents = make_documents([20, 30])
    (batch,) = hdp.Loader(documents, engine, tokens_per_step=100, capacity=50, planner="naive")
    note("attention", lambda: hdp.shard(make_model(attention="sdpa"), world))
    note("no layers", lambda: hdp.shard(torch.nn.Linear(4, 4), world))
    elsewhere = Plan.from_groups([20, 30], [(0,), (0,)], [0, 0], world_size=9, capacity=99, regime="step", planner="x")
    other = copy.copy(batch)
    object.__setattr__(other, "plan", elsewhere)
    note("world", lambda: engine.forward_backward(other))
    slot = Plan.from_groups(
        [20, 30], [(0,), (0,)], [0, 0], world_size=world.world_size, capacity=99, regime="slot", planner="x"
    )
    other = copy.copy(batch)
    object.__setattr__(other, "plan", slot)
    note("regime", lambda: engine.forward_backward(other))
    note("timeout", lambda: hdp.init(timeout=0))
    note("too long", lambda: hdp.Loader(documents, engine, tokens_per_step=99, capacity=10))
    note("fine", lambda: engine.forward_backward(batch))
    return found


def test_mistakes_are_named(ranks):
    for found in ranks(2).run(refusals):
        assert found["attention"][0] == "ValueError" and 'attn_implementation="hdp"' in found["attention"][1]
        assert found["no layers"][0] == "ValueError"
        assert found["world"][0] == "ValueError" and "planned for 9 ranks, the world has 2" in found["world"][1]
        assert found["regime"][0] == "ValueError" and "regime 'slot'" in found["regime"][1]
        assert found["timeout"][0] == "ValueError" and "timeout is 0 s" in found["timeout"][1]
        assert (
            found["too long"][0] == "DoesNotFit"
            and "of 30 tokens does not fit 2 ranks x 10 tokens" in found["too long"][1]
        )
        assert found["fine"] == ("", "")


def wrong_label(world: hdp.World) -> None:
    engine = hdp.shard(make_model(), world)
    documents: list = make_documents([20, 30, 100])
    documents[1] = {"input_ids": documents[1], "labels": torch.full_like(documents[1], VOCABULARY)}
    for batch in hdp.Loader(documents, engine, tokens_per_step=10**4, capacity=60, planner="naive", seed=None):
        engine.forward_backward(batch)


def test_a_label_outside_the_vocabulary_is_named_by_all():
    ranks = Ranks(2)
    try:
        outcomes = ranks.outcomes(wrong_label)
    finally:
        ranks.close()
    told = [o for o in outcomes if o.error.startswith(f"ValueError: label {VOCABULARY} is outside the vocabulary of")]
    assert len(told) == 1, outcomes
    other = outcomes[1 - told[0].rank]
    assert other.error.startswith(f"PeerError: rank {told[0].rank} failed: ValueError: label {VOCABULARY} is outside")
