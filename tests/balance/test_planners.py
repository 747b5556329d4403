"""Every planner keeps the rules of a plan, whatever the batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st

from hdp.balance import PLANNERS, CostModel, DoesNotFit, Link, Plan, PlanError, Topology, make_plan

CAPACITY = 64

worlds = st.integers(7, 20)
nodes = st.sampled_from([1, 4, 8])


def check(plan: Plan, lengths: list[int]) -> None:
    """The rules, from what ranks are told to run rather than from the plan's arrays."""
    plan.validate()
    seen = [np.zeros(length, dtype=int) for length in lengths]
    slots_of: dict[int, set[int]] = {}
    counts = set()
    for rank in range(plan.world_size):
        micro_batches = plan.micro_batches(rank)
        counts.add(len(micro_batches))
        assert [mb.slot for mb in micro_batches] == sorted({mb.slot for mb in micro_batches})
        for mb in micro_batches:
            assert mb.tokens <= plan.capacity
            for shard in mb.shards:
                assert rank in shard.group
                slots_of.setdefault(shard.sequence, set()).add(mb.slot)
                for start, stop in shard.ranges:
                    seen[shard.sequence][start:stop] += 1
    assert all((tokens == 1).all() for tokens in seen)
    assert all(len(slots) == 1 for slots in slots_of.values())
    if plan.regime == "slot":
        assert len(counts) == 1


@pytest.mark.parametrize("regime", ["step", "slot"])
@pytest.mark.parametrize("planner", PLANNERS)
@given(data=st.data(), world=worlds, node=nodes)
@examples(20)
def test_every_token_once_within_capacity(
    planner: str, regime: str, data: st.DataObject, world: int, node: int
) -> None:
    longest_batch = 8 if planner == "flexsp" else 40  # its programmes take seconds
    lengths = data.draw(st.lists(st.integers(0, 400), max_size=longest_batch))
    topology = Topology(world_size=world, ranks_per_node=node)
    plan = make_plan(lengths, world_size=world, capacity=CAPACITY, regime=regime, planner=planner, topology=topology)
    check(plan, lengths)


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize(
    "lengths", [[], [0], [0, 0, 0], [1], [1] * 7, [64] * 9, [65], [96] * 12, [512], [512, 1, 1, 0]], ids=str
)
def test_edges(planner: str, lengths: list[int]) -> None:
    for regime in ("step", "slot"):
        check(make_plan(lengths, world_size=8, capacity=CAPACITY, regime=regime, planner=planner), lengths)


@pytest.mark.parametrize("planner", PLANNERS)
def test_the_same_plan_twice(planner: str) -> None:
    lengths = np.random.default_rng(0).integers(0, 300, 12)
    plans = [make_plan(lengths, world_size=8, capacity=CAPACITY, planner=planner) for _ in range(2)]
    assert plans[0].digest == plans[1].digest


def test_too_long_names_the_sequence_and_the_offload_that_would_fit() -> None:
    cost = CostModel.from_shape("llama-7b", flops=400e12)
    with pytest.raises(PlanError, match=r"sequence 1 of 1000 tokens .* 8 ranks x 64 .* offload ratio of 0\.\d+ would"):
        make_plan([3, 1000], world_size=8, capacity=CAPACITY, cost=cost)


@pytest.mark.parametrize("options", [{}, {"recompute": "auto"}])
def test_the_advice_speaks_of_no_layers_where_nobody_said_what_model_it_is(options) -> None:
    with pytest.raises(DoesNotFit, match=r"use at least \d+ ranks, a capacity of at least") as caught:
        make_plan([3, 100_000], world_size=8, capacity=CAPACITY, **options)
    assert "of 32 layers" not in str(caught.value)
    assert "only the model's cost tells" in str(caught.value) and "ratio" not in str(caught.value)


def test_the_advice_counts_the_layers_of_the_model() -> None:
    cost = replace(CostModel.from_shape("llama-7b", flops=400e12), layers=6)
    with pytest.raises(DoesNotFit, match="so would computing 2 of 6 layers again"):
        make_plan([3, 700], world_size=8, capacity=CAPACITY, cost=cost)
    with pytest.raises(DoesNotFit) as caught:  # the first and the last stay as they are: there are no others
        make_plan([3, 600], world_size=8, capacity=CAPACITY, cost=replace(cost, layers=2))
    assert "layers" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"planner": "best"}, "unknown planner 'best'"),
        ({"regime": "never"}, "unknown regime 'never'"),
        ({"capacity": 0}, "capacity is 0"),
        ({"lengths": [-1]}, "sequence 0 has -1 tokens"),
        ({"lengths": [1.5]}, "float64"),
        ({"offload": 2.0}, "offload is 2.0"),
        ({"offload": "auto"}, "copy_bandwidth"),
        ({"world_size": 0}, "world_size is 0"),
        ({"topology": Topology(world_size=4)}, "4 ranks, world_size is 8"),
    ],
    ids=str,
)
def test_refused(arguments: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_plan(**{"lengths": [1], "world_size": 8, "capacity": 64, **arguments})


@pytest.mark.parametrize(
    "fields", [{"world_size": -1}, {"world_size": 8, "ranks_per_node": 0}, {"world_size": 2.0}, {"world_size": True}]
)
def test_bad_topologies(fields: dict) -> None:
    with pytest.raises(PlanError, match="give a whole number"):
        Topology(**fields)


def test_bad_links() -> None:
    with pytest.raises(PlanError, match="bandwidth is 0"):
        Link(bandwidth=0)
    with pytest.raises(PlanError, match="latency is -1"):
        Link(bandwidth=1, latency=-1)
