"""The gradient of every parameter equals the float64 token-mean gradient of the global batch in one process."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import IGNORE, exact_gradient, gradient_errors, make_documents, make_model

import hdp
from hdp.balance import Plan

pytestmark = pytest.mark.slow

CAPACITY = 64
LIMIT = 1e-5
WORLDS = (1, 2, 3, 4)
PLANNERS = ("naive", "static", "auto")


def full_gradient(engine: hdp.Engine) -> dict[str, torch.Tensor]:
    """By parameter; a collective."""
    gradients = {}
    for name, parameter in engine.model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        gradients[name] = parameter.grad.full_tensor()
    return gradients


ENGINES: dict[tuple, hdp.Engine] = {}
"""In a rank: engines by model, kept over the tests of a module."""


def get_engine(world: hdp.World, heads: str, **options: Any) -> hdp.Engine:
    key = (id(world), heads, *sorted(options.items()))
    if key not in ENGINES:
        ENGINES[key] = hdp.shard(make_model(heads, **options), world)
    ENGINES[key].model.zero_grad()
    return ENGINES[key]


def one_step(world: hdp.World, heads: str, documents: list, planner: str | Plan, capacity: int, options: dict) -> Any:
    """(loss, label tokens, gradient by parameter or None, groups) as this rank sees them; gradients only on rank 0."""
    engine = get_engine(world, heads, **options)
    chosen = planner if isinstance(planner, str) else (lambda lengths, **_: planner)
    loader = hdp.Loader(documents, engine, tokens_per_step=10**9, capacity=capacity, planner=chosen, seed=None)
    (batch,) = loader
    batch.plan.validate()
    result = engine.forward_backward(batch)
    if result.label_tokens == 0:
        assert all(p.grad is None for p in engine.parameters())
        return result.loss, 0, None, batch.plan.describe_groups()
    gradient = full_gradient(engine)
    return result.loss, result.label_tokens, gradient if world.rank == 0 else None, batch.plan.describe_groups()


def check(ranks, world_size, heads, documents, planner, exactness, case, *, capacity=CAPACITY, **options) -> str:
    """Runs one step and compares; returns the groups in use."""
    results = ranks(world_size).run(one_step, heads, documents, planner, capacity, options)
    loss, gradient = exact_gradient(heads, documents, **options)
    errors = gradient_errors(results[0][2], gradient)
    worst = max(errors, key=errors.__getitem__)
    exactness(case, errors[worst], worst)
    assert errors[worst] <= LIMIT, f"{worst}: {errors[worst]:.2e}"
    for found in results:
        assert found[0] == pytest.approx(loss, rel=1e-6)
        assert found[1] == results[0][1] and found[3] == results[0][3]
    return results[0][3]


def lengths_of(batch: str, world: int) -> list[int]:
    longest = world * CAPACITY - 5
    return {
        "one long": [longest],
        "only short": [10, 20, 5, 33, 7, 12, 50, 3, 64, 1, 2],
        "mixed": [10, longest, 40, 3, CAPACITY + 9 if world > 1 else 9, 21, 60, 0, 2, longest // 2, 17],
        "fewer than ranks": [17],
        "one token": [1, 40, 9, 1],
    }[batch]


BATCHES = ("one long", "only short", "mixed", "fewer than ranks", "one token")


@pytest.mark.parametrize("heads", ["gqa", "mha"])
@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("world", WORLDS)
def test_gradient_of_every_parameter(ranks, exactness, world, batch, planner, heads):
    documents = make_documents(lengths_of(batch, world))
    check(ranks, world, heads, documents, planner, exactness, f"world {world}, {batch}, {planner}, {heads}")


@pytest.mark.parametrize("world", WORLDS)
def test_masked_labels_and_weights(ranks, exactness, world):
    documents: list[Any] = []
    for i, ids in enumerate(make_documents([world * CAPACITY - 3, 30, 8, 50, 12])):
        labels = ids.clone()
        labels[: len(ids) // 3] = IGNORE
        documents.append({"input_ids": ids, "labels": labels if i != 2 else torch.full_like(ids, IGNORE)})
        if i in (0, 3):
            documents[-1]["loss_weights"] = torch.linspace(0.0, 2.0, len(ids))
    check(ranks, world, "gqa", documents, "naive", exactness, f"world {world}, masked labels and weights, naive, gqa")


@pytest.mark.parametrize("world", WORLDS)
def test_a_step_without_a_label_has_no_gradient(ranks, world):
    for loss, labels, gradient, _ in ranks(world).run(
        one_step, "gqa", make_documents([1, 1, 1]), "naive", CAPACITY, {}
    ):
        assert math.isnan(loss) and labels == 0 and gradient is None


@pytest.mark.parametrize("world", [2, 3])
def test_tied_embeddings(ranks, exactness, world):
    documents = make_documents(lengths_of("mixed", world))
    check(
        *(ranks, world, "gqa", documents, "naive", exactness, f"world {world}, mixed, naive, gqa, tied embeddings"),
        tie_word_embeddings=True,
    )


# Hand-made plans: (name, world, lengths, groups, slots, other fields). No planner here makes most of them.
PLANS: list[tuple[str, int, list[int], list[tuple[int, ...]], list[int], dict]] = [
    ("group of 3, uneven shards", 3, [50], [(0, 1, 2)], [0], {}),
    ("fewer tokens than ranks", 4, [2, 3, 1], [(0, 1, 2, 3), (3, 2, 1, 0), (1, 2)], [0, 1, 2], {}),
    ("group of 3 beside a single", 4, [49, 31], [(3, 1, 0), (2,)], [0, 0], {}),
    ("several groups in one micro-batch", 4, [40, 33, 25, 17, 9], [(0, 1), (0, 1, 2), (1, 3), (2, 3), (0,)], [0] * 5, {}),
    ("all pairs in one micro-batch", 3, [20, 21, 22, 7], [(0, 1), (1, 2), (2, 0), (1,)], [0] * 4, {}),
    ("non-contiguous ranks", 4, [70, 60, 11, 12], [(0, 2), (1, 3), (0,), (3,)], [0, 0, 1, 1], {}),
    ("reversed ring order", 3, [80, 40], [(2, 1, 0), (2, 0)], [0, 1], {}),
    ("ring order of no rank order", 4, [90, 45], [(2, 0, 3, 1), (1, 3, 0)], [0, 1], {}),
    ("missing slots", 3, [60, 20, 30, 40], [(0, 2), (1,), (0,), (1, 2)], [3, 0, 7, 9], {}),
    ("a rank without a micro-batch", 3, [60, 20], [(0, 2), (2,)], [0, 1], {}),
    ("shared last for one only", 2, [60, 20], [(0, 1), (1,)], [0, 1], {}),
    ("shared first for one only", 2, [60, 20], [(0, 1), (1,)], [1, 0], {}),
    ("contiguous layout", 3, [77, 20], [(0, 1, 2), (1,)], [0, 0], {"layout": "contiguous"}),
    ("striped layout", 3, [190, 20], [(0, 1, 2), (1,)], [0, 0], {"layout": "striped"}),
]  # fmt: skip


@pytest.mark.parametrize("heads", ["gqa", "mqa"])
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan[0])
def test_hand_made_plans(ranks, exactness, plan, heads):
    name, world, lengths, groups, slots, fields = plan
    made = Plan.from_groups(
        lengths, groups, slots, world_size=world, capacity=200, regime="step", planner="by hand", **fields
    )
    case = f"world {world}, {name}, by hand, {heads}"
    check(ranks, world, heads, make_documents(lengths), made, exactness, case)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("world", [2, 3, 4])
def test_random_plans(ranks, exactness, world, seed):
    draw = torch.Generator().manual_seed(100 * world + seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=draw))

    lengths = [number(0, 90) for _ in range(number(1, 8))] + [5]
    groups = [tuple(torch.randperm(world, generator=draw)[: number(1, world)].tolist()) for _ in lengths]
    slots = [number(0, 3) if length else -1 for length in lengths]
    made = Plan.from_groups(lengths, groups, slots, world_size=world, capacity=10**4, regime="step", planner="random")
    check(ranks, world, "gqa", make_documents(lengths), made, exactness, f"world {world}, random plan {seed}, gqa")


@pytest.mark.parametrize("schedules", [
    ("ring", "ring"), ("ring", "ring_q"), ("token_ring", "token_ring"), ("direct", "direct"), ("all_gather", "all_gather"),
    ("ulysses", "ulysses"), ("ulysses_home:2", "ulysses_home:2"), ("all_gather:2", "ring_q"), ("direct", "token_ring"),
], ids="-".join)  # fmt: skip
@pytest.mark.parametrize("world", [2, 4])
def test_schedules_over_real_ranks(ranks, exactness, world, schedules):
    lengths, everyone = [world * 30 + 1, 40, 9], tuple(range(world))
    codes = torch.tensor([1, 1, 0]).numpy()
    made = Plan.from_groups(
        lengths, [everyone, everyone[::-1], (world - 1,)], [0, 1, 1], world_size=world, capacity=200, regime="step",
        planner="by hand", schedule_names=("local", *schedules), schedules=codes, schedules_backward=2 * codes,
    )  # fmt: skip
    case = f"world {world}, forward {schedules[0]}, backward {schedules[1]}, mha"
    check(ranks, world, "mha", make_documents(lengths), made, exactness, case)
