"""Layers that run again in backward, and what leaves the device beside them: by hand, and against ``hdp.balance.clock``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fuzz import examples
from hypothesis import example, given
from hypothesis import strategies as st
from test_simulator import COST, FAST, LAYERS, SLOW, near, of, world

from hdp.balance import Link, Plan, Topology, plan
from hdp.balance.clock import evaluate
from hdp.balance.cost import TICK
from hdp.balance.simulator import Cluster, simulate
from hdp.cli import main

AGAIN = replace(COST, recompute_bytes=100.0)
"""A layer that runs again keeps a tenth of what others do."""


def as_usual(made: Plan) -> Plan:
    return replace(made, recompute=(), recompute_layers=())


@pytest.mark.parametrize("layers", [1, 2])
def test_a_layer_runs_again_without_its_attention(layers: int):
    """One more forward of each such layer's dense part, in backward, in those slots alone."""
    made = of([100, 100], [(0,), (0,)], [0, 1], 1, recompute=(1,), recompute_layers=(layers,))
    usual, again = (simulate(each, AGAIN, Cluster(topology=world(1))) for each in (as_usual(made), made))
    longer = (again.end - again.begin - (usual.end - usual.begin)) * TICK
    expected = np.where(again.is_backward & (again.slot == 1), layers * 100 * 1e-3, 0.0)
    assert longer == pytest.approx(expected, abs=1e-6)
    assert again.seconds - usual.seconds == near(layers * 100 * 1e-3)


def test_all_layers_but_those_that_keep_everything():
    made = of([100], [(0,)], [0], 1, recompute=(0,))
    usual = simulate(as_usual(made), AGAIN, Cluster(topology=world(1))).seconds
    for first, last, layers in ((1, 1, 2), (0, 1, 3), (0, 0, 4), (4, 0, 0)):
        cost = replace(AGAIN, keep_first=first, keep_last=last)
        assert simulate(made, cost, Cluster(topology=world(1))).seconds == near(usual + layers * 100 * 1e-3)


def test_no_message_comes_again():
    cost = replace(AGAIN, quadratic=1e-15)
    made = of([100], [(0, 1)], [0], 2, recompute=(0,), recompute_layers=(2,))
    usual, again = (simulate(each, cost, Cluster(topology=world(2, SLOW))) for each in (as_usual(made), made))
    assert again.messages == usual.messages > 0
    assert again.nic_busy.tolist() == usual.nic_busy.tolist()
    assert again.seconds - usual.seconds == near(2 * 50 * 1e-3)


@example(lengths=[1, 1, 6, 1], size=3, layers={1: None})  # what runs again is on a rank that ends early all the same
@examples(40)
@given(
    st.lists(st.integers(1, 5000), min_size=1, max_size=30),
    st.integers(1, 4),
    st.dictionaries(st.integers(0, 3), st.sampled_from([None, 1, 2]), max_size=4),
)
def test_equals_evaluate_without_links(lengths: list[int], size: int, layers: dict[int, int | None]):
    """Whole documents: sums of the same ticks, rounded once a document and pass in one and once in the other."""
    groups = [(i % size,) for i in range(len(lengths))]
    slots = [i // size % 4 for i in range(len(lengths))]
    again = {slot: n for slot, n in sorted(layers.items()) if slot in slots}
    if None in again.values():
        again = dict.fromkeys(again)
    counts = () if None in again.values() else tuple(again.values())
    made = of(lengths, groups, slots, size, recompute=tuple(again), recompute_layers=counts)
    cost = replace(AGAIN, constant=0.01, head=1e-4)
    said = evaluate(made, cost, world(size))
    busy = simulate(made, cost, Cluster(topology=world(size))).busy
    active = np.isin(np.arange(size), made.group_ranks)
    apart = np.abs(busy - said.busy)[active]  # a rank without a document runs a dummy
    assert apart.max() <= 2 * len(lengths) + 8
    plain = evaluate(as_usual(made), cost, world(size))
    assert said.makespan >= plain.makespan
    longer = {rank for (rank,), slot in zip(groups, slots, strict=True) if slot in again}
    assert np.flatnonzero(said.busy > plain.busy).tolist() == sorted(longer)


@pytest.mark.parametrize(("regime", "recompute"), [("step", "auto"), ("slot", "auto"), ("step", "all")])
def test_a_planned_batch(regime: str, recompute: str):
    """A document longer than world x capacity, planned to run again: as long as planners think, where links hide."""
    topology = Topology(world_size=4, ranks_per_node=4, intra=Link(bandwidth=1e15), inter=Link(bandwidth=1e15))
    lengths = [5000, 900, 800, 700, 600, 300, 200]
    made = plan(lengths, topology, AGAIN, capacity=1000, regime=regime, recompute=recompute)
    assert made.recompute
    said = evaluate(made, AGAIN, topology)
    assert simulate(made, AGAIN, Cluster(topology=topology)).seconds == pytest.approx(said.seconds, rel=1e-4)
    plain = simulate(as_usual(made), AGAIN, Cluster(topology=topology)).seconds
    assert plain < 0.99 * said.seconds


@pytest.mark.parametrize(
    ("fields", "layers", "moved"),
    [
        ({}, 0, 2 * 1000.0),
        ({"keep_first": 0}, 0, 3 * 1000.0),
        ({"keep_first": 0, "keep_last": 0}, 0, 4 * 1000.0),
        ({"keep_last": 2}, 0, 1 * 1000.0),
        ({}, 1, 1000.0 + 100.0),
        ({"keep_first": 0}, 3, 3 * 100.0),
        ({"keep_last": 0, "recompute_bytes": 0.0}, 2, 3 * 1000.0),
    ],
)
def test_copies_are_of_the_layers_that_may_leave(fields: dict[str, int], layers: int, moved: float):
    """Backward takes as long as they come back where that is longer than computing; half of each token's bytes."""
    cost = replace(AGAIN, copy_bandwidth=100.0, linear=1e-9, quadratic=1e-15, **fields)
    again = {"recompute": (0,), "recompute_layers": (layers,)} if layers else {}
    simulation = simulate(of([10], [(0,)], [0], 1, offload=((0, 0, 0.5),), **again), cost, Cluster(topology=world(1)))
    backward = np.flatnonzero(simulation.is_backward)[0]
    taken = int(simulation.end[backward] - simulation.begin[backward]) * TICK
    assert taken == near(0.5 * 10 * moved / 100.0)


@pytest.mark.parametrize(("in_flight", "leaving"), [(0, 2), (1, 0), (2, 1), (3, 2), (9, 8)])
def test_forward_waits_for_layers_on_their_way(in_flight: int, leaving: int):
    cost = replace(AGAIN, copy_bandwidth=100.0, linear=1e-3, quadratic=1e-15, in_flight=in_flight)
    made = of([10], [(0,)], [0], 1, offload=((0, 0, 1.0),))
    simulation = simulate(made, cost, Cluster(topology=world(1)))
    forward = int(simulation.end[~simulation.is_backward][0]) * TICK
    piece = 10 * 2 * 1000.0 / 100.0 / LAYERS
    # The last layer begins when all but `leaving` of those before it have left.
    expected = (LAYERS - 1 - leaving) * piece + 10 * 1e-3 if leaving < LAYERS - 1 else LAYERS * 10 * 1e-3
    assert forward == near(expected)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("40000\n500\n500\n1000\n")
    base = [
        "simulate",
        "--lengths",
        str(lengths),
        "--world-size",
        "4",
        "--capacity",
        "8192",
        "--planners",
        "auto,naive",
    ]
    assert main(base) == 3
    assert "so would computing" in capsys.readouterr().err
    for recompute in ("auto", "all"):
        assert main([*base, "--recompute", recompute]) == 0
        assert [line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["auto"]]


def test_stages_share_what_runs_again():
    made = of([100] * 3, [(0,)] * 3, [0, 1, 2], 1, recompute=(0, 1, 2))
    one = simulate(made, AGAIN, Cluster(topology=world(1))).seconds / 3
    assert simulate(made, AGAIN, Cluster(topology=world(1), stages=2)).seconds == pytest.approx(one / 2 * 4, rel=1e-6)


def test_a_model_that_runs_again_everywhere():
    """``CostModel.recomputing`` without a plan that says so: all slots, as in ``evaluate``."""
    made, cost = of([300, 200], [(0,), (0,)], [0, 1], 1), AGAIN.recomputing(2)
    assert simulate(made, cost, Cluster(topology=world(1, FAST))).seconds == near(
        evaluate(made, cost, world(1)).seconds
    )
