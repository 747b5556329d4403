"""Options of ``hdp.init`` that decide how shared sequences are computed."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from engines import make_engine, make_model, plan_batch
from harness import PATIENCE, Ranks
from stand_in import machine_of
from tiny import make_documents

import hdp
from hdp.attention.auto import Chooser
from hdp.attention.predict import Links
from hdp.balance import Plan
from hdp.parallel.schedules import chooser_of

LENGTHS, GROUPS, SLOTS = [90, 61, 9, 17], [(0, 1), (1, 0), (0,), (1,)], [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"schedule": "rign"},
            "unknown attention schedule 'rign' .* choose one of auto, ring, ring_q, token_ring, direct",
        ),
        ({"schedule": "ring/"}, "unknown attention schedule ''"),
        ({"schedule": "hybrid"}, "needs a whole number after the colon"),
        ({"schedule": "ring/ulysses"}, "starts from what its own forward keeps"),
        ({"schedule": "local"}, "unknown attention schedule 'local'"),
        ({"wire_dtype": torch.float32}, "wire_dtype is torch.float32: choose torch.bfloat16"),
        ({"wire_dtype": "bf16"}, "wire_dtype is 'bf16'"),
        ({"backend": "flashattn"}, "unknown attention backend 'flashattn'"),
        ({"timeout": "300"}, "timeout is '300' s"),
        ({"timeout": float("nan")}, "timeout is nan s"),
        pytest.param(
            {"device": "cuda"},
            "device is 'cuda', but torch finds no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_refused_before_anybody_is_waited_for(options, message):
    with pytest.raises(ValueError, match=message):
        hdp.init(**options)
    assert not torch.distributed.is_initialized()


def again(world: hdp.World, **options: Any) -> hdp.World:
    """The same ranks in a job with other options."""
    world.close()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return hdp.init(timeout=PATIENCE, device="cpu", **options)


def joined(world: hdp.World, options: list[dict[str, Any]]) -> str:
    try:
        again(world, **options[world.rank]).close()
    except ValueError as error:
        return str(error)
    return "joined"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([{"schedule": "auto"}, {}], "hdp.init: schedule is auto on rank 0, None on rank 1: give all ranks the same"),
        ([{}, {"wire_dtype": torch.bfloat16}], "wire_dtype is None on rank 0, torch.bfloat16 on rank 1"),
        ([{"schedule": "ring/ring_q"}] * 2, "joined"),
    ],
)
def test_ranks_must_agree(options, message):
    with Ranks(2) as two:
        assert all(message in found for found in two.run(joined, options))


def step(world: hdp.World, options: dict[str, Any], layout: str = "zigzag") -> tuple[float, float, int]:
    """Loss, gradient norm and bytes that this rank sent in attention, of a step whose plan says ring."""
    world = again(world, **options)
    engine = make_engine(world, "fsdp-step", make_model("gqa"))
    plan = Plan.from_groups(
        LENGTHS, GROUPS, SLOTS, world_size=2, capacity=200, regime="step", planner="by hand", layout=layout
    )
    batch = plan_batch(world, engine, make_documents(LENGTHS), 200, planner=lambda *_, **__: plan)
    before = world.channel.sent_bytes
    loss = engine.forward_backward(batch).loss
    return loss, float(engine.clip_grad_norm_(1.0)), world.channel.sent_bytes - before


@pytest.fixture(scope="module")
def by_plan() -> list[tuple[float, float, int]]:
    with Ranks(2) as two:
        return two.run(step, {})


@pytest.mark.parametrize("schedule", ["ring", "ring/ring_q", "ulysses", "direct", "auto"])
def test_a_schedule_for_all_shared_sequences(by_plan, schedule):
    with Ranks(2) as two:
        found = two.run(step, {"schedule": schedule})
    for (loss, norm, sent), (want, want_norm, ring) in zip(found, by_plan, strict=True):
        assert (loss, norm) == pytest.approx((want, want_norm), rel=1e-5)
        if schedule != "auto":  # which may well choose the ring
            assert (sent == ring) == (schedule == "ring"), schedule


def choosing(world: hdp.World) -> str:
    world = again(world, schedule="auto")
    links = Links(inner_rate=1e9 * (1 + world.rank), outer_rate=1e9)
    world.runtime.chooser = Chooser(links=links, flops=1e12)
    engine = make_engine(world, "fsdp-step", make_model("gqa"))
    try:
        plan_batch(world, engine, make_documents([9, 9]), 50)
    except hdp.PlanMismatch as error:
        return str(error)
    return "planned"


def test_ranks_that_would_choose_by_other_numbers_are_refused():
    with Ranks(2) as two:
        found = two.run(choosing)
    for rank, text in enumerate(found):
        assert f"rank {rank}, step 0: ranks [{1 - rank}] plan for another machine than this rank" in text


def nodes(world: hdp.World, local: list[int], tensor_parallel: int) -> tuple[int | None, int, int | None]:
    """Ranks of a node as attention, planners and the choice of schedules are told of them."""
    os.environ["LOCAL_WORLD_SIZE"] = str(local[world.rank])
    world = again(world, tensor_parallel=tensor_parallel)
    if tensor_parallel > 1:
        return world.runtime.ranks_per_node, 0, None
    engine = make_engine(world, "fsdp-step", make_model("gqa"))
    machine = plan_batch(world, engine, make_documents([9, 9]), 50).machine
    return world.runtime.ranks_per_node, machine.topology().nodes, chooser_of(machine).ranks_per_node


@pytest.mark.parametrize(
    ("local", "tensor_parallel", "expected"),
    [
        ([2] * 4, 1, (2, 2, 2)),
        ([1] * 4, 1, (1, 4, 1)),
        ([4] * 4, 1, (None, 1, None)),
        ([3, 3, 3, 1], 1, (3, 2, 3)),  # nodes that differ
        ([1, 3, 3, 3], 1, (1, 4, 1)),  # only single ranks lie between all borders
        ([3, 3, 2, 2], 1, (None, 1, None)),  # which no launcher says
        ([2] * 4, 2, (1, 0, None)),
    ],
)
def test_nodes_are_those_of_the_launcher(local, tensor_parallel, expected):
    with Ranks(4) as four:
        assert four.run(nodes, local, tensor_parallel) == [expected] * 4


def test_a_narrower_way(by_plan):
    """Keys and values of an fp32 model in bf16: half their bytes, and the rounding of bf16."""
    with Ranks(2) as two:
        found = two.run(step, {"wire_dtype": torch.bfloat16})
    for (loss, norm, sent), (want, want_norm, ring) in zip(found, by_plan, strict=True):
        assert sent < 0.9 * ring  # gradients still travel in fp32
        assert (loss, norm) == pytest.approx((want, want_norm), rel=1e-2) and norm != want_norm


@pytest.mark.parametrize("layout", ["striped:5", "striped", "contiguous"])
def test_a_layout_of_the_plan(by_plan, layout):
    with Ranks(2) as two:
        found = two.run(step, {}, layout)
    for (loss, norm, _), (want, want_norm, _) in zip(found, by_plan, strict=True):
        assert (loss, norm) == pytest.approx((want, want_norm), rel=1e-5)


def test_an_unknown_layout_is_a_plan_error():
    with pytest.raises(hdp.PlanError, match="unknown layout 'zigzag:4'"):
        Plan.from_groups(
            LENGTHS, GROUPS, SLOTS, world_size=2, capacity=200, regime="step", planner="by hand", layout="zigzag:4"
        )


def chosen_by_default(world: hdp.World) -> dict[str, set[tuple[str, str]]]:
    """Schedules that plans name for shared documents, by where the machine is from, and of a planner that names its own."""
    engine = hdp.shard(make_model(), world)
    documents = make_documents([150, 20, 30])

    def ring_q(lengths: Any, **options: Any) -> hdp.Plan:
        made = hdp.make_plan(lengths, **{**options, "planner": "naive"})
        shared = (np.diff(made.group_offsets) > 1).astype(np.int64)
        return replace(made, schedule_names=("local", "ring_q"), schedules=shared)

    found = {}
    for name, source, planner in (
        ("measured", "measured", "naive"),
        ("assumed", "assumed", "naive"),
        ("named", "measured", ring_q),
    ):
        loader = hdp.Loader(
            documents, engine, tokens_per_step=200, capacity=100, planner=planner, seed=None,
            machine=machine_of(world.world_size, source=source),
        )  # fmt: skip
        (batch,) = loader
        assert math.isfinite(engine.forward_backward(batch).loss)
        groups = [batch.plan.group(i) for i in range(3)]
        found[name] = {batch.plan.schedule(i) for i, group in enumerate(groups) if len(group) > 1}
        assert all(batch.plan.schedule(i) == ("local", "local") for i, group in enumerate(groups) if len(group) == 1)
    return found


def test_shared_documents_choose_where_the_machine_was_measured(ranks):
    for found in ranks(2).run(chosen_by_default):
        assert found == {"measured": {("auto", "auto")}, "assumed": {("ring", "ring")}, "named": {("ring_q", "ring_q")}}
