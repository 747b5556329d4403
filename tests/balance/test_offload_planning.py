"""Plans that offload: what copies cost, fewer ranks, fewer slots, and what host memory holds."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st

from hdp.balance import CostModel, Link, Plan, PlanError, Topology, evaluate, plan
from hdp.balance.bounds import step_bound
from hdp.balance.cost import TICK
from hdp.balance.distributions import draw_lengths
from hdp.balance.memory import capacity_with, eq3, fewest_ranks, hidden_ratio, most_moved
from hdp.balance.planners import PLANNERS, STOPPED_BY_TIME, make_problem
from hdp.cli import main

LAYERS, CAPACITY, RANKS = 18, 1000, 4
COST = CostModel(
    layers=LAYERS,
    quadratic=1e-9,
    linear=1e-5,
    constant=0.01,
    ring_bytes=1e3,
    ring_bytes_backward=2e3,
    activation_bytes=1e4,
    copy_bandwidth=5e9,
)
TOPOLOGY = Topology(
    world_size=RANKS,
    ranks_per_node=1,
    intra=Link(bandwidth=1e9, latency=1e-5),
    inter=Link(bandwidth=1e8, latency=1e-4),
)


def test_copies_that_do_not_hide_count() -> None:
    """One document of 2,000 tokens on a rank of 1,000: by hand, a disk so slow that copying outlasts computing."""
    slow = replace(COST, copy_bandwidth=1e8)
    made = Plan.from_groups(
        [2000], [(0,)], [0], world_size=RANKS, capacity=CAPACITY, regime="step", planner="hand", offload=((0, 0, 1.0),)
    )
    forward = LAYERS * (1e-9 * 2000**2 + 1e-5 * 2000)
    backward = LAYERS * (2.5e-9 * 2000**2 + 2e-5 * 2000)
    copy = (LAYERS - 2) * 1e4 * 2000 / 1e8
    result = evaluate(made, slow, TOPOLOGY)
    assert result.copying[0] * TICK == pytest.approx(max(copy - forward, 0) + max(copy - backward, 0), rel=1e-6)
    assert result.seconds == pytest.approx(max(copy, forward) + max(copy, backward) + LAYERS * 0.01, rel=1e-6)
    assert evaluate(made, COST, TOPOLOGY).copying.max() == 0


def test_offload_spares_slots() -> None:
    """Regime slot: with twice the room half of the slots are enough, and half of what each slot costs."""
    lengths = [900, 950, 800, 990] * 8
    without = plan(lengths, TOPOLOGY, COST, capacity=CAPACITY, regime="slot")
    made = plan(lengths, TOPOLOGY, COST, capacity=CAPACITY, regime="slot", offload="auto")
    made.validate()
    assert without.slot_count == 8 and made.slot_count <= 4
    result = evaluate(made, COST, TOPOLOGY)
    assert result.makespan < evaluate(without, COST, TOPOLOGY).makespan
    assert result.copying.max() == 0


def test_copies_that_show_are_taken_only_if_nothing_else_fits() -> None:
    slow = replace(COST, copy_bandwidth=1e7)
    for regime in ("step", "slot"):
        made = plan([900, 3500, 50], TOPOLOGY, slow, capacity=CAPACITY, regime=regime, offload="auto")
        assert not made.offload
        made = plan([900, 4500, 50], TOPOLOGY, slow, capacity=CAPACITY, regime=regime, offload="auto")
        assert made.offload and evaluate(made, slow, TOPOLOGY).copying.max() > 0


@pytest.mark.parametrize("regime", ["step", "slot"])
def test_only_the_longest_document_leaves_where_copies_show(regime: str) -> None:
    """One document that needs offload, 2,556 that do not: their micro-batches are not filled to the room that it needs."""
    cost = replace(CostModel.from_shape("llama-7b", flops=400e12), copy_bandwidth=5e9)
    topology = Topology(world_size=16)
    lengths = [*draw_lengths("github", tokens=8_000_000, context=1 << 18, seed=1).tolist(), 170_000]
    problem = make_problem(lengths, topology, cost, capacity=8192, regime=regime, planner="auto", offload="auto")
    made = plan(lengths, topology, cost, capacity=8192, regime=regime, offload="auto")
    made.validate()
    assert evaluate(made, cost, topology).makespan <= 1.06 * step_bound(problem)


@pytest.mark.parametrize("regime", ["step", "slot"])
@given(data=st.data())
@examples(25)
def test_small_batches_that_offload_are_not_behind_the_others(regime: str, data: st.DataObject) -> None:
    topology = Topology(world_size=data.draw(st.sampled_from([1, 2, 5, 8, 16])), ranks_per_node=4)
    capacity = data.draw(st.sampled_from([7, 300, 4000]))
    lengths = data.draw(st.lists(st.integers(1, 2 * capacity), min_size=1, max_size=20))
    lengths.append(int(topology.world_size * capacity * data.draw(st.floats(0.5, 5.0))))
    cost = replace(
        CostModel.from_shape("llama-7b", flops=400e12, copy_bandwidth=data.draw(st.sampled_from([2e9, 20e9]))),
        constant=data.draw(st.sampled_from([0.0, 1e-5, 1e-3])),
    )
    made = {}
    for planner in ("auto", "static", "naive", "bytescale"):
        one = plan(lengths, topology, cost, capacity=capacity, regime=regime, planner=planner, offload=1.0)
        made[planner] = evaluate(one, cost, topology).makespan
    assert made["auto"] <= 1 + 1.001 * min(made.values())


def test_fewer_ranks_where_the_ring_would_show() -> None:
    """Eq. 3 and the links together: across slow links one rank that offloads beats a ring of two."""
    slow = replace(TOPOLOGY, inter=Link(bandwidth=1e6, latency=1e-4))
    without = plan([1900, 100], slow, COST, capacity=CAPACITY)
    made = plan([1900, 100], slow, COST, capacity=CAPACITY, offload="auto")
    assert len(without.group(0)) >= 2 and len(made.group(0)) == 1
    assert evaluate(made, COST, slow).makespan < evaluate(without, COST, slow).makespan


def test_host_memory_bounds_what_leaves() -> None:
    lengths = [900, 950, 800, 990] * 8
    free = plan(lengths, TOPOLOGY, COST, capacity=CAPACITY, regime="slot", offload="auto")
    little = replace(COST, host_memory=most_moved(free, COST) / 3)
    made = plan(lengths, TOPOLOGY, little, capacity=CAPACITY, regime="slot", offload="auto")
    assert most_moved(made, little) <= little.host_memory < most_moved(free, COST)
    more = replace(little, disk_memory=most_moved(free, COST))
    assert plan(lengths, TOPOLOGY, more, capacity=CAPACITY, regime="slot", offload="auto").digest == free.digest
    with pytest.raises(PlanError, match="do not hold what the batch must offload"):
        plan([7900], TOPOLOGY, replace(COST, host_memory=1.0), capacity=CAPACITY, offload=1.0)


@pytest.mark.parametrize("planner", [name for name in PLANNERS if name not in STOPPED_BY_TIME])
@pytest.mark.parametrize("allowed", ["auto", 0.6])
def test_every_planner_keeps_to_host_memory(planner: str, allowed: str | float) -> None:
    """One rank would hold the document with offload; a third of the room is enough for two."""
    lengths = [1900, 100, 200]
    free = plan(lengths, TOPOLOGY, COST, capacity=CAPACITY, planner=planner, offload=0.6)
    needs = most_moved(free, COST)
    tight = replace(COST, host_memory=needs / 3 if needs else 1.0)
    made = plan(lengths, TOPOLOGY, tight, capacity=CAPACITY, planner=planner, offload=allowed)
    made.validate()
    assert most_moved(made, tight) <= tight.host_memory
    if planner in ("naive", "bytescale", "bytescale-pp"):  # the others take more ranks anyway
        assert len(free.group(0)) == 1 < len(made.group(0))
    with pytest.raises(PlanError, match="do not hold what the batch must offload"):
        plan([7900], TOPOLOGY, replace(COST, host_memory=1.0), capacity=CAPACITY, planner=planner, offload=1.0)


@given(
    length=st.integers(1, 100_000),
    layers=st.integers(1, 60),
    most=st.integers(0, 64),
    host=st.one_of(st.just(0.0), st.floats(1e6, 1e10)),
    bandwidth=st.floats(1e8, 1e12),
)
@examples(200)
def test_fewest_ranks_against_brute_force_and_eq3(
    length: int, layers: int, most: int, host: float, bandwidth: float
) -> None:
    """All ratios for all numbers of ranks; and never more ranks than Eq. 3 takes at the ratios that hide."""
    cost = replace(COST, layers=layers, host_memory=host, copy_bandwidth=bandwidth)

    def fits(ranks: int, step: int) -> bool:
        share = -(-length // ranks)
        kept = 2 + (1 - Fraction(step, 64)) * (layers - 2) if layers > 2 else layers
        moved = step / 64 * max(layers - 2, 0) * cost.activation_bytes * share
        return kept * share <= layers * CAPACITY and (not host or not step or moved <= host)

    ranks, ratio = fewest_ranks(length, CAPACITY, cost, most / 64)
    assert ratio <= most / 64 and fits(ranks, round(ratio * 64))
    assert ranks == 1 or not any(fits(ranks - 1, step) for step in range(most + 1))
    assert ratio == 0 or not any(fits(ranks, step) for step in range(round(ratio * 64)))
    _, paper = eq3(length, CAPACITY, cost)
    ours, _ = fewest_ranks(length, CAPACITY, cost, hidden_ratio(length, cost))
    # Shares of a host bound are rounded up to whole tokens here, averages in Eq. 3.
    assert ours <= paper + bool(host)


@given(
    lengths=st.lists(st.integers(0, 4000), min_size=1, max_size=30),
    allowed=st.sampled_from(["auto", 0.3, 0.5, 1.0]),
    regime=st.sampled_from(["step", "slot"]),
    bandwidth=st.sampled_from([1e7, 1e9, 1e12]),
)
@examples(80)
def test_offload_never_makes_it_slower(lengths: list[int], allowed: object, regime: str, bandwidth: float) -> None:
    cost = replace(COST, copy_bandwidth=bandwidth)
    made = plan(lengths, TOPOLOGY, cost, capacity=CAPACITY, regime=regime, offload=allowed)
    made.validate()
    without = plan(lengths, TOPOLOGY, cost, capacity=CAPACITY, regime=regime)
    assert evaluate(made, cost, TOPOLOGY).makespan <= evaluate(without, cost, TOPOLOGY).makespan
    largest = 1.0 if allowed == "auto" else allowed
    most = capacity_with(CAPACITY, LAYERS, largest)
    assert (made.held()[2] <= most).all()
    assert all(0 < ratio <= largest + 1 / 64 for _, _, ratio in made.offload)


def test_the_command_says_what_leaves(tmp_path, capsys) -> None:
    lengths = tmp_path / "lengths"
    lengths.write_text("40000\n9000\n9000\n")
    out = tmp_path / "plan.json"
    common = ["plan", "--lengths", str(lengths), "--world-size", "4", "--capacity", "8192", "--offload", "1"]
    assert main([*common, "--regime", "step", "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert "GB a rank in host memory" in text and "copies show for" in text
    shown = re.search(r"document 0 of 40000 tokens: ([1-4]) ranks instead of 5, ratio (0\.\d+|1\.000)\n", text)
    assert shown is not None and float(shown[2]) > 0
    ratios = [mb["offload_ratio"] for mb in json.loads(out.read_text())["micro_batches"]]
    assert max(ratios) > 0
    assert main([*common, "--host-memory", "1e9"]) == 3
    assert "host memory" in capsys.readouterr().err


def test_evaluation_without_offload_is_what_it_was() -> None:
    """Forward and backward apart add up to the whole."""
    lengths = [900, 3500, 50, 2200]
    made = plan(lengths, TOPOLOGY, COST, capacity=CAPACITY)
    costs = COST.quantise(lengths, TOPOLOGY)
    alone = Plan.from_groups(
        lengths, [(i,) for i in range(4)], [0] * 4, world_size=4, capacity=4000, regime="step", planner="x"
    )
    assert evaluate(alone, COST, TOPOLOGY).busy.tolist() == (costs.work + costs.constant).tolist()
    assert evaluate(made, COST, TOPOLOGY).makespan >= int(np.ceil(costs.work.sum() / RANKS))
