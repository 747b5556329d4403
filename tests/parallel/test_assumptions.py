"""What planners are told when nobody says anything."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from engines import plan_batch
from harness import Ranks
from stand_in import machine_of
from tiny import make_documents, make_model
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import LlamaConfig

import hdp
from hdp.balance import Machine, ModelShape, make_plan
from hdp.balance.machine import Tile
from hdp.parallel.costs import BYTE_SECONDS, CALL_SECONDS, MESSAGE_SECONDS, NotKnown, assume
from hdp.parallel.schedules import chooser_of


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
    plan = make_plan(lengths, world_size=2, capacity=2048, planner="auto", cost=known.cost, topology=known.topology())
    sizes = plan.group_sizes()
    assert sizes[2] >= 1 and sizes[1] >= 8, plan.describe_groups()


def test_half_precision_is_faster():
    model = make_model(attention="sdpa")
    slow, fast = (assume(model, torch.device("cpu"), 2, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert slow.cost.linear == 2 * fast.cost.linear


def test_a_model_without_a_shape_is_not_guessed_at():
    with pytest.raises(NotKnown, match=r"Linear has no config that tells its shape, .*: give hdp.Loader\(machine="):
        assume(torch.nn.Linear(2, 2), torch.device("cpu"), 2, torch.float32)


def told(world: hdp.World) -> tuple:
    engine = hdp.shard(make_model(), world)
    batch = plan_batch(world, engine, make_documents([9, 9]), 50)
    return engine.machine, batch.machine.topology().world_size


def test_an_engine_knows_a_machine_once_a_loader_needs_it_alike_on_all_ranks(ranks):
    found = ranks(3).run(told)
    assert found[0][0] is not None and all(f == found[0] for f in found) and found[0][1] == 3
    assert found[0][0].source == "assumed" and found[0][0].nodes == (3,)


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
    engine = hdp.shard(make_model(), world)
    chooser = chooser_of(plan_batch(world, engine, make_documents([9, 9]), 50).machine)
    return chooser.byte_seconds, chooser.message_seconds, chooser.call_seconds


def test_auto_counts_what_messages_and_calls_take_from_a_core(ranks):
    found = ranks(2).run(rates)
    assert found == [(BYTE_SECONDS["cpu"], MESSAGE_SECONDS["cpu"], CALL_SECONDS["cpu"])] * 2
    assert min(found[0]) > 0


def three_models(world: hdp.World) -> list[Any]:
    """What three engines in one world plan for: the second of another shape, the third of half the dtype; planned in turn, the
    first one last."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    models = ((make_model(), {}), (make_model("mha"), {}), (make_model(), {"mp_policy": policy}))
    engines = [hdp.shard(model, world, **options) for model, options in models]
    for engine in reversed(engines):
        plan_batch(world, engine, make_documents([9, 9]), 50)
    return [engine.machine for engine in engines]


def test_plans_are_for_the_model_of_their_engine():
    with Ranks(2) as two:
        for first, second, half in two.run(three_models):
            assert second.cost.ring_bytes == 2 * first.cost.ring_bytes  # twice the key/value heads
            assert half.cost.ring_bytes == first.cost.ring_bytes / 2 and half.cost.linear == first.cost.linear / 2
            assert chooser_of(half).flops == 2 * chooser_of(first).flops


def given(world: hdp.World, folder: str) -> tuple[Machine, ...]:
    """What batches are planned for: a file, a value, the engine's own; then on a world of another size."""
    engine = hdp.shard(make_model(), world)
    documents, capacity = make_documents([9, 9]), 50
    assumed = plan_batch(world, engine, documents, capacity).machine
    mine = replace(assumed, flops=1e9, device="mine")
    file = f"{folder}/{world.rank}.json"
    mine.write(file)
    options = ({"machine": file}, {"machine": mine}, {}, {"machine": "assume"})
    found = [plan_batch(world, engine, documents, capacity, **option).machine for option in options]
    larger = replace(mine, nodes=(2, 2, 1), speeds=(1.0, 1.0, 1.0, 0.5, 1.0))
    return assumed, *found, plan_batch(world, engine, documents, capacity, machine=larger).machine


def test_a_loader_plans_for_the_machine_it_is_given(ranks, tmp_path):
    for assumed, file, value, own, again, fewer in ranks(2).run(given, str(tmp_path)):
        assert file == value == replace(assumed, flops=1e9, device="mine")
        assert own == again == assumed
        assert fewer == value  # which has two ranks, on one node


def unlike(world: hdp.World) -> str:
    engine = hdp.shard(make_model(), world)
    machine = machine_of(world.world_size, flops=1e9 * (1 + world.rank))
    try:
        plan_batch(world, engine, make_documents([9, 9]), 50, machine=machine)
    except hdp.PlanMismatch as error:
        return str(error)
    return "planned"


def test_ranks_with_other_machines_are_named(ranks):
    for rank, text in enumerate(ranks(2).run(unlike)):
        assert f"rank {rank}, step 0: ranks [{1 - rank}] plan for another machine than this rank" in text


class Shapeless(torch.nn.Module):
    """A model of one's own: no config tells its shape, and its layer has no weights to be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.lm_head = torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)


def without_shape(world: hdp.World) -> str:
    world.runtime.schedule = "auto"
    model = Shapeless()
    engine = hdp.shard(model, world, layers=[model.body])
    try:
        plan_batch(world, engine, make_documents([9, 9]), 50)
    except ValueError as error:
        return str(error)
    return "planned"


def test_auto_without_anything_to_choose_by_is_refused_at_once():
    with Ranks(1) as alone:
        assert "schedule='auto' needs to know links and rates" in alone.run(without_shape)[0]


def test_tiles_are_those_that_take_longer_than_a_launch():
    """One head of what a model's heads take, beyond the shortest; noise that makes a short one faster leaves it out."""
    shape = ModelShape.from_config(make_model(attention="sdpa").config)
    seconds = [(16, 1e-4, 2e-4), (64, 3e-4, 1.9e-4), (256, 5e-4, 9e-4), (1024, 5e-3, 9e-3), (4096, 7e-2, 9e-2)]
    tiles = tuple(Tile(tokens=n, forward=f, backward=b) for n, f, b in seconds)
    machine = machine_of(2, shape=shape, tiles=tiles)
    found = chooser_of(machine).tiles
    assert [tokens for tokens, *_ in found] == [256, 1024, 4096]
    for (_, *each), (_, *whole) in zip(found, seconds[2:], strict=True):
        assert each == pytest.approx([(t - s) / shape.heads for t, s in zip(whole, seconds[0][1:], strict=True)])
    assert chooser_of(replace(machine, tiles=tiles[:3])).tiles == ()
