"""The cost model: against its formula, the crossing points it implies, and its limits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from stand_in import machine_of
from transformers import AutoConfig

from hdp.attention.bundle import Bundle, structure_of
from hdp.attention.lower import Task, lower
from hdp.attention.lowered import Geometry
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount
from hdp.balance import MODELS, CostModel, Link, ModelShape, Plan, PlanError, Topology, evaluate
from hdp.balance.cost import TICK
from hdp.balance.host import HostCosts
from hdp.balance.memory import activation_peak, capacity_with, eq3, hidden_ratio, ratio_for

COST = CostModel.from_shape("llama-7b", flops=400e12)
TOPOLOGY = Topology(world_size=64)


def test_whole_sequences_cost_a_s2_plus_b_s() -> None:
    shape = MODELS["llama-7b"]
    s = np.array([1, 1000, 8192, 131072])
    attention = 2 * s**2 * 4096 * 32 * 3.5
    linear = 2 * s * (shape.layer_weights * 32 + 4096 * 32000) * 3
    expected = (attention + linear) / 400e12
    np.testing.assert_allclose(COST.quantise(s, TOPOLOGY).work * TICK, expected, rtol=1e-6, atol=2 * TICK)


@pytest.mark.parametrize(("across", "tokens"), [(0, 500), (1, 4000)])
def test_where_the_ring_stops_hiding(across: int, tokens: int) -> None:
    """LLaMA-7B with 8 key/value heads: about 500 tokens a rank inside a node and 4,000 across nodes."""
    size = 16
    for factor, hides in ((1.05, True), (0.9, False)):
        costs = COST.quantise([int(size * tokens * factor)], TOPOLOGY)
        spread = int(costs.share(0, size, across)) * size
        assert (spread <= costs.work[0] + 8 * size) == hides


def test_a_micro_batch_runs_one_packed_ring_per_group() -> None:
    """A short document's bytes hide behind a long one's attention when both are on the same ranks, and only then."""
    lengths = [32768, 512]
    together = Plan.from_groups(
        lengths, [range(4)] * 2, [0, 0], world_size=8, capacity=16384, regime="step", planner="test"
    )
    apart = Plan.from_groups(
        lengths, [range(4)] * 2, [0, 1], world_size=8, capacity=16384, regime="step", planner="test"
    )
    assert evaluate(together, COST, TOPOLOGY_8).makespan < evaluate(apart, COST, TOPOLOGY_8).makespan


TOPOLOGY_8 = Topology(world_size=8)


def test_what_sharing_takes_the_host() -> None:
    """Tiles for each document, rounds and messages once for all of a group, bytes as they are sent and received."""
    host = {"tile_seconds": 1e-4, "message_seconds": 2e-4, "round_seconds": 3e-4, "byte_seconds": 1e-11}
    lengths, size = [30000, 9000, 700], 4
    plan = Plan.from_groups(
        lengths, [range(4), range(4), (5,)], [0, 0, 0], world_size=8, capacity=16384, regime="step", planner="test"
    )
    cost = replace(COST, **host)
    free, paid = (evaluate(plan, each, TOPOLOGY_8) for each in (COST, cost))
    messages = 2 * (size - 1) + 2 * (2 * size - 3)  # forward; backward, keys and values and their gradients
    sent = sum(lengths[:2]) * (size - 1) / size * (COST.ring_bytes + COST.ring_bytes_backward)
    shared = 2 * size * (2 * 1e-4 + 3e-4) + messages * 2e-4 + 2 * sent * 1e-11
    difference = (paid.busy - free.busy) * TICK / COST.layers
    np.testing.assert_allclose(difference[:4], shared, rtol=1e-5)
    assert difference[5] == pytest.approx(2 * 1e-4, rel=1e-5) and not difference[[4, 6, 7]].any()
    costs = cost.quantise(lengths, TOPOLOGY_8)
    alone = [replace(plan, lengths=np.array([n]), slots=np.array([0]), group_offsets=np.array([0, 4]), group_ranks=np.arange(4))
             for n in lengths]  # fmt: skip
    for i, each in enumerate(alone):
        assert evaluate(each, cost, TOPOLOGY_8).makespan == pytest.approx(int(costs.share(i, 4, 0)), abs=2)
    assert not COST.quantise(lengths, TOPOLOGY_8).has_host and costs.has_host
    np.testing.assert_array_equal(costs.without_host().work, COST.quantise(lengths, TOPOLOGY_8).work)


def test_planning_counts_the_hosts_of_a_machine() -> None:
    """Planners count rounds, messages and tiles of a layer as the simulator's hosts do, set-up once a micro-batch."""
    host = HostCosts(
        piece_seconds=1e-5,
        message_seconds=2e-5,
        round_seconds=3e-5,
        message_byte=0.0,
        piece_setup=4e-5,
        message_setup=5e-5,
    )
    machine = machine_of(4, replace(COST, ring_bytes=0.0, ring_bytes_backward=0.0), host=host)
    costs = machine.planning.quantise([100], machine.topology())
    layers = COST.layers
    for size in (2, 3, 4):
        for phase in (0, 1):
            said = costs.host(phase, 3, 0, size) * TICK
            walked = layers * host.layer_seconds(3, size, bool(phase)) + host.setup_seconds(3, size, bool(phase))
            assert said == pytest.approx(walked, rel=1e-6)


def test_sharers_wait_for_the_last_of_them() -> None:
    lengths = [4000, 8000, 100]
    plan = Plan.from_groups(
        lengths, [(0,), (0, 1), (1,)], [0, 1, 0], world_size=2, capacity=8192, regime="step", planner="test"
    )
    costs = COST.quantise(lengths, Topology(world_size=2))
    result = evaluate(plan, COST, Topology(world_size=2))
    assert result.makespan == int(costs.work[0]) + int(costs.share(1, 2, 0))
    assert result.busy[1] == int(costs.work[2]) + int(costs.share(1, 2, 0))


def test_barriers_add_up_the_slowest_of_each_slot() -> None:
    lengths = [4000, 100, 100, 4000]
    plan = Plan.from_groups(
        lengths, [(0,), (1,), (0,), (1,)], [0, 0, 1, 1], world_size=2, capacity=8192, regime="slot", planner="test"
    )
    work = COST.quantise(lengths, Topology(world_size=2)).work
    assert evaluate(plan, COST, Topology(world_size=2)).makespan == 2 * int(work[0])


@pytest.mark.parametrize(
    ("kind", "fields", "experts"),
    [
        ("llama", {"num_key_value_heads": 8}, 1),
        ("qwen2", {"num_key_value_heads": 4}, 1),
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, 4),
        ("gpt2", {}, 1),
    ],
)
def test_any_transformers_config(kind: str, fields: dict, experts: int, tmp_path) -> None:
    config = AutoConfig.for_model(kind, **fields)
    shape = ModelShape.from_config(config)
    assert shape.layers == config.num_hidden_layers
    assert shape.experts == experts
    assert shape.kv_heads == fields.get("num_key_value_heads", shape.kv_heads)
    config.save_pretrained(tmp_path)
    saved = ModelShape.from_config(tmp_path)
    assert (saved.layers, saved.hidden, saved.intermediate) == (shape.layers, shape.hidden, shape.intermediate)


def test_llama_7b_has_about_its_parameters() -> None:
    assert MODELS["mixtral-8x7b"].parameters == pytest.approx(46.7e9, rel=0.02)
    assert 5.8e9 < MODELS["llama-7b"].parameters < 7.0e9  # 7B less what 8 key/value heads save


def test_sliding_windows_are_linear_beyond_the_window() -> None:
    config = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    shape = ModelShape.from_config({**config, "vocab_size": 100, "sliding_window": 128})
    cost = CostModel.from_shape(shape, flops=1e12)
    seconds = cost.attention_seconds([128, 100_000, 200_000])
    assert seconds[2] / seconds[1] == pytest.approx(2, rel=1e-2)
    assert seconds[0] == pytest.approx(2 * 128**2 * 64 * 2 / 1e12)


def test_eq3_of_the_paper() -> None:
    """Section 4.3 with 32 layers and C = 8K: 1M tokens on 128, 68 and 8 ranks at ratios 0, 0.5 and 1."""
    for ratio, ranks in ((0.0, 128), (0.5, 68), (1.0, 8)):
        # One rank more where the paper's shards would be a fraction of a token above the capacity.
        assert ranks <= -(-(1 << 20) // capacity_with(8192, 32, ratio)) <= ranks + 1
    fast = CostModel.from_shape("llama-7b", flops=400e12, copy_bandwidth=1e12)
    assert hidden_ratio(1 << 20, fast) == 1.0
    assert eq3(1 << 20, 8192, fast)[1] == 8
    slow = CostModel.from_shape("llama-7b", flops=400e12, copy_bandwidth=1e6)
    assert eq3(1 << 20, 8192, slow) == (0.0, 128)


def test_ratio_for_is_the_smallest_that_fits() -> None:
    ratio = ratio_for(20000, 8192, 32)
    assert ratio is not None
    assert capacity_with(8192, 32, ratio) >= 20000 > capacity_with(8192, 32, ratio - 1 / 64)
    assert ratio_for(10**6, 8192, 32) is None


@pytest.mark.parametrize("fields", [{"flops": 0.0}, {"flops": float("nan")}])
def test_bad_rates(fields: dict) -> None:
    with pytest.raises(PlanError, match="flops is"):
        CostModel.from_shape("llama-7b", **fields)


def test_units_that_overflow_are_refused() -> None:
    cost = CostModel(layers=1, quadratic=1.0, linear=0.0)
    with pytest.raises(PlanError, match="check the cost model's units"):
        cost.quantise([10**6], TOPOLOGY)


def test_latency_counts_per_hop() -> None:
    slow = Topology(world_size=8, intra=Link(bandwidth=400e9, latency=1.0))
    assert int(COST.quantise([4000], slow).share(0, 4, 0)) * TICK > 2 * 3 * 32 * 1.0


@pytest.mark.parametrize("size", [2, 3, 4])
def test_what_a_ring_keeps_for_backward_is_in_the_memory(size: int) -> None:
    """Beside its own tokens a member keeps a block of keys and values; the model counts what programs really keep."""
    shape = ModelShape(name="x", layers=4, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=96, vocabulary=100)
    cost = CostModel.from_shape(shape, flops=1e12)
    tokens = 24 * size
    groups = [tuple(range(size)), (0,)]
    made = Plan.from_groups(
        np.array([tokens, 10]), groups, [0, 0], world_size=size, capacity=40, regime="step", planner="x"
    )
    bundle = Bundle(structure_of("zigzag", tokens, size, Mask()), "ring", groups[0], 0, [0], [tokens], [0])
    geometry = Geometry(heads=HeadCount(query=4, key=2), head_dim=16, model_bytes=2, sum_bytes=4)
    kept = lower([Task(bundle, ("ring", "ring"))], geometry, False).kept_bytes
    assert kept == 24 * cost.ring_bytes
    assert activation_peak(made, cost) == pytest.approx(cost.layers * (34 * cost.activation_bytes + kept))
    whole = Plan.from_groups(np.array([34]), [(0,)], [0], world_size=1, capacity=40, regime="step", planner="x")
    assert activation_peak(whole, cost) == cost.layers * 34 * cost.activation_bytes
