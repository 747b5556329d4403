"""What planners are told when nobody says anything."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from engines import plan_batch
from harness import Ranks
from tiny import make_documents, make_model
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import LlamaConfig

import hdp
from hdp.balance import make_plan
from hdp.parallel.costs import BYTE_SECONDS, CALL_SECONDS, MESSAGE_SECONDS, NotKnown, assume


def test_a_small_model_on_a_cpu_shares_only_what_pays():
    model = torch.nn.Module()
    model.config = LlamaConfig(
        vocab_size=257, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2,
    )  # fmt: skip
    known = assume(model, torch.device("cpu"), 2, torch.float32)
    assert known is not None and known.device == "cpu" and known.cost.layers == 4
    assert known.cost.ring_bytes == 2 * 2 * 32 * 4  # keys and values, 2 heads of 32, fp32
    lengths = [3000, 900, 700, 400, 300, 200, 150, 100, 90, 80, 70, 60]
    plan = make_plan(lengths, world_size=2, capacity=2048, planner="auto", cost=known.cost, topology=known.topology)
    sizes = plan.group_sizes()
    assert sizes[2] >= 1 and sizes[1] >= 8, plan.describe_groups()


def test_half_precision_is_faster():
    model = make_model(attention="sdpa")
    slow, fast = (assume(model, torch.device("cpu"), 2, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert slow.cost.linear == 2 * fast.cost.linear


def test_a_model_without_a_shape_is_not_guessed_at():
    with pytest.raises(NotKnown, match=r"Linear has no config that tells its shape, .*: give hdp.Loader"):
        assume(torch.nn.Linear(2, 2), torch.device("cpu"), 2, torch.float32)


def told(world: hdp.World) -> tuple:
    engine = hdp.shard(make_model(), world)
    return engine.world.assumptions, world.assumptions.topology.world_size


def test_an_engine_sets_it_for_its_loaders_alike_on_all_ranks(ranks):
    found = ranks(3).run(told)
    assert found[0] is not None and all(f == found[0] for f in found) and found[0][1] == 3


def with_schedule(world: hdp.World, schedule: str) -> tuple:
    everyone = tuple(range(world.world_size))
    codes = torch.tensor([1, 1, 0]).numpy()
    plan = hdp.Plan.from_groups(
        [90, 60, 9], [everyone, everyone[::-1], (0,)], [0, 1, 1], world_size=world.world_size, capacity=200, regime="step",
        planner="by hand", schedule_names=("local", schedule), schedules=codes, schedules_backward=codes,
    )  # fmt: skip
    engine = hdp.shard(make_model(), world)
    batch = plan_batch(world, engine, make_documents([90, 60, 9]), 200, planner=lambda _, **__: plan)
    loss = engine.forward_backward(batch).loss
    return loss, float(engine.clip_grad_norm_(1.0))


def test_schedule_auto_works_under_an_engine(ranks):
    assert ranks(3).run(with_schedule, "auto")[0] == pytest.approx(ranks(3).run(with_schedule, "ring")[0], rel=1e-6)


def rates(world: hdp.World) -> tuple[float, float, float]:
    hdp.shard(make_model(), world)
    chooser = world.runtime.chooser
    return chooser.byte_seconds, chooser.message_seconds, chooser.call_seconds


def test_auto_counts_what_messages_and_calls_take_from_a_core(ranks):
    found = ranks(2).run(rates)
    assert found == [(BYTE_SECONDS["cpu"], MESSAGE_SECONDS["cpu"], CALL_SECONDS["cpu"])] * 2
    assert min(found[0]) > 0


def two_models(world: hdp.World) -> list[Any]:
    """What is assumed after each of three engines, the second of another shape, the third of half the dtype."""
    found = []
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for model, options in ((make_model(), {}), (make_model("mha"), {}), (make_model(), {"mp_policy": policy})):
        hdp.shard(model, world, **options)
        assert world.assumptions is not None
        found.append((world.assumptions.cost, world.runtime.chooser))
    world.tell(measured := replace(world.assumptions, cost=replace(world.assumptions.cost, copy_bandwidth=12345.0)))
    hdp.shard(make_model(), world, mp_policy=policy)
    return [*found, world.assumptions == measured]


def test_plans_are_for_the_model_of_the_last_engine():
    with Ranks(2) as two:
        for (first, chooser), (second, _), (half, faster), is_kept in two.run(two_models):
            assert second.ring_bytes == 2 * first.ring_bytes  # twice the key/value heads
            assert half.ring_bytes == first.ring_bytes / 2 and half.linear == first.linear / 2
            assert faster.flops == 2 * chooser.flops
            assert is_kept  # what was measured is not forgotten for a like model


def said_by_a_user(world: hdp.World) -> tuple[bool, bool, float]:
    """Whether what a user said outlives engines of two shapes, whether what is known outlives a model without one, and what was
    measured with another model."""
    hdp.shard(make_model(), world)
    assert world.assumptions is not None
    world.tell(replace(world.assumptions, cost=replace(world.assumptions.cost, copy_bandwidth=12345.0)))
    model = Shapeless()
    known = world.assumptions
    hdp.shard(model, world, layers=[model.body])
    is_kept = world.assumptions is known
    hdp.shard(make_model("mha"), world)
    carried = world.assumptions.cost.copy_bandwidth
    mine = replace(world.assumptions, flops=1.0)
    world.assumptions = mine
    hdp.shard(make_model(), world)
    hdp.shard(make_model("mha"), world)
    return world.assumptions is mine, is_kept, carried


def test_what_a_user_said_and_what_was_measured_is_kept():
    with Ranks(1) as alone:
        assert alone.run(said_by_a_user) == [(True, True, 12345.0)]


class Shapeless(torch.nn.Module):
    """A model of one's own: no config tells its shape, and its layer has no weights to be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.lm_head = torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)


def without_shape(world: hdp.World) -> str:
    world.runtime.schedule = "auto"
    model = Shapeless()
    try:
        hdp.shard(model, world, layers=[model.body])
    except ValueError as error:
        return str(error)
    return "made"


def test_auto_without_anything_to_choose_by_is_refused_at_once():
    with Ranks(1) as alone:
        assert "schedule='auto' needs to know links and rates" in alone.run(without_shape)[0]
