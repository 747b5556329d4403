"""The simulator against cases computed by hand, against ``evaluate``, and against what must always hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st

from hdp.attention.costs import cost as closed_form
from hdp.attention.counts import Sizes
from hdp.attention.program import HeadCount
from hdp.balance import MODELS, CostModel, Link, ModelShape, Plan, PlanError, Topology, evaluate, plan
from hdp.balance.cost import TICK
from hdp.balance.distributions import draw_lengths
from hdp.balance.simulator import Cluster, simulate
from hdp.balance.simulator.steps import one_forward_one_backward
from hdp.balance.simulator.tables import table

LAYERS = 4
# A squared token takes 1 us a layer, a token 1 ms; backward twice that. A token's keys and values take 100 bytes.
COST = CostModel(
    layers=LAYERS,
    quadratic=1e-6,
    linear=1e-3,
    backward_quadratic=2.0,
    backward_linear=2.0,
    ring_bytes=100.0,
    ring_bytes_backward=300.0,
    activation_bytes=1000.0,
)
FAST, SLOW = Link(bandwidth=1e12), Link(bandwidth=1e3)


def world(size: int, inter: Link = FAST, intra: Link = FAST, node: int = 1) -> Topology:
    return Topology(world_size=size, ranks_per_node=node, intra=intra, inter=inter)


def of(lengths: list[int], groups: list[tuple[int, ...]], slots: list[int], size: int, **fields: object) -> Plan:
    fields = {"regime": "step", "capacity": 1 << 20, "planner": "test", **fields}
    return Plan.from_groups(lengths, groups, slots, world_size=size, **fields)


def near(seconds: float) -> object:
    return pytest.approx(seconds, abs=1e-6, rel=1e-6)


# ---------------------------------------------------------------- by hand


def test_one_document_on_one_rank():
    made = of([100], [(0,)], [0], 1)
    simulation = simulate(made, COST, Cluster(topology=world(1)))
    forward = LAYERS * (100 * 1e-3 + 100**2 * 1e-6)
    assert simulation.seconds == near(3 * forward)
    assert simulation.end[~simulation.is_backward][0] * TICK == near(forward)
    assert simulation.waiting == 0


def test_ring_that_links_hold_up():
    """Two ranks, nothing to compute worth mentioning: forward sends one block of each, backward its gradients."""
    cost = replace(COST, quadratic=1e-15, linear=1e-15)
    simulation = simulate(of([100], [(0, 1)], [0], 2), cost, Cluster(topology=world(2, SLOW)))
    # Member 0's back half is looked at by nobody, so its hop takes half; member 1 sends all of its 50 tokens. Backward of
    # two members sends no keys, only the gradients (200 bytes a token).
    forward, backward = LAYERS * 50 * 100 / 1e3, LAYERS * 50 * 200 / 1e3
    assert simulation.seconds == near(forward + backward)


def test_what_is_to_be_chosen_counts_as_a_ring():
    made = of([900, 40], [(0, 1), (1,)], [0, 1], 2)
    ring, auto = (simulate(each, COST, Cluster(topology=world(2, SLOW))) for each in (made, made.with_schedule("auto")))
    assert auto.seconds == ring.seconds > 0
    assert made.with_schedule("auto").schedule(0) == ("auto", "auto")
    assert made.with_schedule("auto").schedule(1) == ("local", "local")


def test_ring_that_compute_hides():
    simulation = simulate(of([1000], [(0, 1)], [0], 2), COST, Cluster(topology=world(2)))
    assert simulation.seconds == near(3 * LAYERS * (1000 * 1e-3 + 1000**2 * 1e-6) / 2)


def test_whole_sequences_fill_waits():
    """The same with a local document on each rank whose attention is as long as the hop: it costs nothing more."""
    cost = replace(COST, linear=1e-15)
    cluster = Cluster(topology=world(2, Link(bandwidth=1e5)))
    shared = simulate(of([400], [(0, 1)], [0], 2), cost, cluster)
    both = simulate(of([400, 50, 50], [(0, 1), (0,), (1,)], [0, 0, 0], 2), cost, cluster)
    hop, tile = 200 * 100 / 1e5, 400**2 * 1e-6 / 4
    assert hop - tile > 50**2 * 1e-6
    # Forward: one hop, and a tile after it. Backward: a tile, then gradients (twice the bytes) beside the other one.
    assert shared.seconds == near(LAYERS * (hop + tile + 2 * tile + 2 * hop))
    assert both.seconds == near(shared.seconds)


def test_without_overlap_they_add_up():
    cost = replace(COST, linear=1e-15)
    topology = world(2, Link(bandwidth=1e5))
    made = of([400], [(0, 1)], [0], 2)
    hidden = simulate(made, cost, Cluster(topology=topology)).seconds
    apart = simulate(made, cost, Cluster(topology=topology, overlap=0.0)).seconds
    assert apart - hidden == near(LAYERS * (400**2 * 1e-6 / 4) * 3)


def test_a_late_rank_holds_up_its_sharer():
    """Rank 1 first runs a document of its own; rank 0 waits for it with the shared one."""
    simulation = simulate(of([300, 100], [(1,), (0, 1)], [0, 1], 2), COST, Cluster(topology=world(2)))
    alone = 3 * LAYERS * (300 * 1e-3 + 300**2 * 1e-6)
    shared = 3 * LAYERS * (100 * 1e-3 + 100**2 * 1e-6) / 2
    # Rank 0 has computed its dense part and its first tile of the first layer when rank 1 arrives.
    assert simulation.seconds == pytest.approx(alone + shared, rel=1e-3)
    assert simulation.finish[0] * TICK == pytest.approx(alone + shared, rel=1e-3)


def test_two_ranks_share_one_nic():
    """Two rings across nodes at once: each has half of a shared NIC, and one alone has all of it."""
    cost = replace(COST, quadratic=1e-15, linear=1e-15)
    topology = Topology(world_size=4, ranks_per_node=2, intra=FAST, inter=SLOW)
    two = of([100, 100], [(0, 2), (1, 3)], [0, 0], 4)
    one = of([100], [(0, 2)], [0], 4)
    own = simulate(two, cost, Cluster(topology=topology)).seconds
    shared = simulate(two, cost, Cluster(topology=topology, ranks_per_nic=2)).seconds
    alone = simulate(one, cost, Cluster(topology=topology, ranks_per_nic=2)).seconds
    assert shared == pytest.approx(own, rel=0.05)  # the same rate a rank while both send
    assert alone == pytest.approx(own / 2, rel=0.01)


def test_collectives_of_regime_step():
    """Parameters are gathered before, gradients reduced behind; what a layer hides does not show."""
    cluster = Cluster(topology=world(2, SLOW), sharding="sharded", parameter_bytes=80.0, gradient_bytes=160.0)
    gather, reduce = 80 / 2 / 1e3, 160 / 2 / 1e3
    made = of([100, 100], [(0,), (1,)], [0, 0], 2)
    compute = 3 * LAYERS * (100 * 1e-3 + 100**2 * 1e-6)
    hidden = simulate(made, COST, cluster).seconds
    assert hidden == near(compute + gather / LAYERS + reduce / LAYERS)
    assert simulate(made, COST, replace(cluster, blocking=True)).seconds == near(compute + gather + reduce)


def test_regime_slot_meets_in_every_layer():
    made = of([200, 100, 100, 200], [(0,), (1,), (0,), (1,)], [0, 0, 1, 1], 2, regime="slot")
    free = simulate(replace(made, regime="step"), COST, Cluster(topology=world(2))).seconds
    cluster = Cluster(topology=world(2), sharding="sharded", parameter_bytes=1e-3, gradient_bytes=1e-3)
    long = 3 * LAYERS * (200 * 1e-3 + 200**2 * 1e-6)
    assert simulate(made, COST, cluster).seconds == pytest.approx(2 * long, rel=0.12)
    assert free < 1.7 * long


def test_copies_that_do_not_hide_show():
    made = of([1000], [(0,)], [0], 1, offload=((0, 0, 1.0),))
    compute = 3 * LAYERS * (1000 * 1e-3 + 1000**2 * 1e-6)
    fast = simulate(made, replace(COST, copy_bandwidth=1e9), Cluster(topology=world(1)))
    assert fast.seconds == near(compute)
    copy = 1000 * 1000.0 * (LAYERS - 2) / 1e4
    slow = simulate(made, replace(COST, copy_bandwidth=1e4), Cluster(topology=world(1)))
    assert copy < slow.seconds < 2 * copy + compute
    with pytest.raises(PlanError, match="copy_bandwidth"):
        simulate(made, COST, Cluster(topology=world(1)))


@pytest.mark.parametrize(("stages", "count"), [(2, 1), (2, 5), (4, 3), (4, 8)])
def test_pipeline_bubble(stages: int, count: int):
    """Equal micro-batches through p stages take (m + p - 1) / m of their time on one of them."""
    made = of([100] * count, [(0,)] * count, list(range(count)), 1)
    one = simulate(made, COST, Cluster(topology=world(1))).seconds / count
    piped = simulate(made, COST, Cluster(topology=world(1), stages=stages)).seconds
    assert piped == pytest.approx(one / stages * (count + stages - 1), rel=1e-6)


def test_pipeline_of_unequal_ranks_does_not_hang():
    lengths = [400, 100, 100, 300, 200]
    groups = [(0, 1), (0,), (0,), (0, 1), (1,)]
    made = of(lengths, groups, [0, 1, 2, 5, 3], 2)
    simulation = simulate(made, COST, Cluster(topology=world(2), stages=4))
    assert simulation.seconds > 0
    assert (simulation.end > simulation.begin).all()


def test_order_of_one_forward_one_backward():
    places = one_forward_one_backward(3, 2, 0)
    assert np.argsort(places.T.ravel()).tolist() == [0, 2, 1, 4, 3, 5]  # f0 f1 b0 f2 b1 b2 of (f0 b0 f1 b1 f2 b2)


# ---------------------------------------------------------------- against the rest of the library


@examples(40)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=40), st.integers(1, 6), st.booleans())
def test_equals_evaluate_without_communication(lengths: list[int], size: int, random_slots: bool):
    """Whole documents only: both are sums, to the tick."""
    groups = [(i % size,) for i in range(len(lengths))]
    slots = [-1 if n == 0 else (i // size if random_slots else 0) for i, n in enumerate(lengths)]
    made = of(lengths, groups, slots, size)
    cost = replace(COST, constant=0.01, head=1e-4)
    idle = round(cost.layers * cost.constant / TICK)  # a rank without a document runs a dummy
    ticks = simulate(made, cost, Cluster(topology=world(size))).ticks
    assert ticks == max(evaluate(made, cost, world(size)).makespan, idle)


@pytest.mark.parametrize("planner", ["static", "naive", "auto"])
def test_close_to_evaluate_with_rings(planner: str):
    """The closed form that planners compare is within some percent of the simulated step."""
    cost = CostModel.from_shape("llama-7b", flops=400e12)
    lengths = draw_lengths("github", tokens=2_000_000, context=131072, seed=1)
    topology = Topology(world_size=32)
    made = plan(lengths, topology, cost, capacity=8192, planner=planner)
    said = evaluate(made, cost, topology).seconds
    assert simulate(made, cost, Cluster(topology=topology)).seconds == pytest.approx(said, rel=0.08)


@pytest.mark.parametrize("size", [2, 3, 5, 8])
@pytest.mark.parametrize("backward", [False, True])
def test_ring_sends_what_its_programs_send(size: int, backward: bool):
    """On one link shared by all, the time of the messages is the sum of the closed form's bytes."""
    shape = MODELS["llama-7b"]
    length = 2 * size * 64
    heads, sizes = HeadCount(query=shape.heads, key=shape.kv_heads), Sizes(head_dim=shape.head_dim, model_bytes=2)
    form = [
        closed_form(
            "ring", backward=backward, length=length, size=size, member=m, heads=heads, sizes=sizes, causal=True
        )
        for m in range(size)
    ]
    counted = table("ring", "ring", backward, size, "zigzag", shape, 2)
    assert counted["weight"].sum() * length == pytest.approx(sum(f.sent_bytes for f in form))
    bytes_ = 2 * shape.kv_heads * shape.head_dim * 2.0
    cost = CostModel(layers=1, quadratic=1e-18, linear=1e-18, ring_bytes=bytes_, ring_bytes_backward=3 * bytes_)
    made = of([length], [tuple(range(size))], [0], size)
    simulation = simulate(made, cost, Cluster(topology=world(size, Link(bandwidth=1e9))))
    both = [
        closed_form(
            "ring", backward=b, length=length, size=size, member=m, heads=heads, sizes=sizes, causal=True
        ).sent_bytes
        for b in (False, True)
        for m in range(size)
    ]
    assert int(simulation.nic_busy.sum()) * TICK == pytest.approx(sum(both) / 1e9, rel=1e-6)


@pytest.mark.parametrize("names", ["token_ring", "direct", "all_gather:2", "ulysses"])
def test_other_schedules_send_what_their_programs_send(names: str):
    shape = ModelShape(name="m", layers=2, hidden=64, heads=4, kv_heads=4, head_dim=16, intermediate=64, vocabulary=64)
    cost = replace(CostModel.from_shape(shape, flops=1e12), layers=2)
    made = of([2048], [(0, 1, 2, 3)], [0], 4, schedule_names=(names,), schedules=np.zeros(1, dtype=np.int64))
    topology = world(4, Link(bandwidth=1e9))
    simulation = simulate(made, cost, Cluster(topology=topology, shape=shape))
    counted = sum(table(names, names, b, 4, "zigzag", shape, 2)["weight"].sum() for b in (False, True))
    assert int(simulation.nic_busy.sum()) * TICK == pytest.approx(2 * 2048 * counted / 1e9, rel=1e-6)
    with pytest.raises(PlanError, match="shape"):
        simulate(made, cost, Cluster(topology=topology))


# ---------------------------------------------------------------- what must always hold


@st.composite
def plans(draw: st.DrawFn) -> tuple[Plan, Topology]:
    size = draw(st.integers(1, 8))
    node = draw(st.sampled_from([1, 2, 4, 8]))
    lengths = draw(st.lists(st.integers(1, 4000), min_size=1, max_size=20))
    topology = Topology(world_size=size, ranks_per_node=node, intra=Link(bandwidth=1e6), inter=Link(bandwidth=2e5))
    planner = draw(st.sampled_from(["static", "naive", "auto"]))
    regime = draw(st.sampled_from(["step", "slot"]))
    return plan(lengths, topology, COST, capacity=4096, planner=planner, regime=regime), topology


@examples(40)
@given(plans(), st.sampled_from(["none", "replicated", "sharded"]))
def test_slower_parts_never_help(case: tuple[Plan, Topology], sharding: str):
    made, topology = case
    fields = {} if sharding == "none" else {"parameter_bytes": 1e5, "gradient_bytes": 1e5}
    cluster = Cluster(topology=topology, sharding=sharding, **fields)
    base = simulate(made, COST, cluster)
    assert base.busy.max() <= base.ticks
    assert (base.finish <= base.ticks).all() and (base.end >= base.begin).all()
    slack = 2000  # ticks: rounding of pieces
    slow = replace(topology, inter=Link(bandwidth=topology.inter.bandwidth / 2))
    assert simulate(made, COST, replace(cluster, topology=slow)).ticks >= base.ticks - slack
    late = replace(topology, intra=replace(topology.intra, latency=1e-3), inter=replace(topology.inter, latency=1e-3))
    assert simulate(made, COST, replace(cluster, topology=late)).ticks >= base.ticks - slack
    assert simulate(made, replace(COST, linear=2e-3), cluster).ticks > base.ticks
    if sharding != "none":
        assert simulate(made, COST, replace(cluster, gradient_bytes=2e5)).ticks >= base.ticks - slack


@examples(20)
@given(plans())
def test_deterministic(case: tuple[Plan, Topology]):
    made, topology = case
    first, second = (simulate(made, COST, Cluster(topology=topology)) for _ in range(2))
    assert first.ticks == second.ticks
    assert np.array_equal(first.end, second.end) and np.array_equal(first.busy, second.busy)


def test_thick_rounds_stay_close():
    """Steps of long rings and layers taken together: what large worlds are simulated with."""
    cost = CostModel.from_shape("llama-7b", flops=400e12)
    topology = Topology(world_size=128)
    lengths = np.append(draw_lengths("byted", tokens=2_000_000, context=1 << 18, seed=3), 900_000)
    for planner in ("static", "auto"):
        made = plan(lengths, topology, cost, capacity=8192, planner=planner)
        exact = simulate(made, cost, Cluster(topology=topology), rounds=1 << 30)
        thick = simulate(made, cost, Cluster(topology=topology), rounds=1)
        assert exact.pieces == 32 and exact.most_rounds >= 100
        assert thick.pieces == 1 and thick.most_rounds == 64
        assert thick.seconds == pytest.approx(exact.seconds, rel=0.03)


@pytest.mark.parametrize("planner", ["naive", "auto"])
def test_a_step_of_12288_ranks(planner: str):
    shape = MODELS["llama-7b"]
    cost, topology = CostModel.from_shape(shape, flops=400e12), Topology(world_size=12288)
    lengths = draw_lengths("github", tokens=1 << 25, context=1 << 19, seed=0)
    made = plan(lengths, topology, cost, capacity=8192, planner=planner)
    simulation = simulate(made, cost, Cluster.of_model(shape, topology), rounds=200_000)
    assert simulation.seconds == pytest.approx(evaluate(made, cost, topology).seconds, rel=0.15)
    assert len(simulation.busy) == 12288


def test_worlds_of_one_and_of_16384():
    for size in (1, 16384):
        made = plan([1000] * size, Topology(world_size=size), COST, capacity=1000, planner="naive")
        simulation = simulate(made, COST, Cluster(topology=Topology(world_size=size)))
        assert simulation.seconds == near(3 * LAYERS * (1000 * 1e-3 + 1000**2 * 1e-6))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sharding": "zero9"}, "unknown sharding 'zero9'"),
        ({"sharding": "sharded"}, "gradient_bytes"),
        ({"stages": 3}, "4 layers do not divide into 3 stages"),
        ({"ranks_per_nic": 0}, "ranks_per_nic is 0"),
        ({"overlap": 1.5}, "overlap is 1.5"),
        ({"stage_token_bytes": -1.0}, "stage_token_bytes is -1.0"),
    ],
)
def test_refuses(fields: dict[str, object], message: str):
    with pytest.raises(PlanError, match=message):
        simulate(of([10], [(0,)], [0], 1), COST, Cluster(topology=world(1), **fields))


def test_refuses_a_plan_of_another_world():
    with pytest.raises(PlanError, match="plan is for 1 ranks, the cluster has 2"):
        simulate(of([10], [(0,)], [0], 1), COST, Cluster(topology=world(2)))
