"""Plans that recompute: where nothing else fits, as few layers as fit, what that costs; and layers that keep everything."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from fuzz import examples
from hypothesis import example, given
from hypothesis import strategies as st

from hdp.balance import CostModel, DoesNotFit, Link, Plan, PlanError, Topology, evaluate, plan
from hdp.balance.clock import recompute_ticks
from hdp.balance.cost import TICK
from hdp.balance.evaluate import evaluate as evaluate_without
from hdp.balance.memory import (
    activation_peak,
    capacity_with,
    fewest_ranks,
    kept_fraction,
    most_moved,
    ratio_for,
    recomputed_room,
)
from hdp.balance.planners import PLANNERS, STOPPED_BY_TIME, auto, make_problem
from hdp.balance.planners.problem import Problem
from hdp.balance.planners.recompute import _lightest
from hdp.balance.timeline import timeline
from hdp.cli import main
from hdp.offload.model import LayerBytes, tier_bytes
from hdp.offload.policy import layer_actions

LAYERS, CAPACITY, RANKS = 18, 1000, 4
ACT, AGAIN = 10_000, 2_500
COST = CostModel(
    layers=LAYERS,
    quadratic=1e-9,
    linear=1e-5,
    constant=0.01,
    ring_bytes=1e3,
    ring_bytes_backward=2e3,
    activation_bytes=ACT,
    recompute_bytes=AGAIN,
    copy_bandwidth=5e9,
)
TOPOLOGY = Topology(
    world_size=RANKS,
    ranks_per_node=2,
    intra=Link(bandwidth=1e9, latency=1e-5),
    inter=Link(bandwidth=1e8, latency=1e-4),
)
BY_RANK = [name for name in PLANNERS if name not in STOPPED_BY_TIME]


def make(lengths: Any, cost: CostModel = COST, **options: Any) -> Plan:
    made = plan(lengths, TOPOLOGY, cost, capacity=CAPACITY, **options)
    made.validate()
    return made


def problem_of(lengths: Any, cost: CostModel = COST, topology: Topology = TOPOLOGY, **options: Any) -> Problem:
    return make_problem(
        lengths, topology, cost, **{"capacity": CAPACITY, "regime": "step", "planner": "auto", **options}
    )


def device_tokens(micro_batch: Any, cost: CostModel) -> float:
    """What a micro-batch has on the device at the end of forward, layer by layer, in tokens that keep everything."""
    actions = actions_of(micro_batch, cost)
    kept = [(AGAIN if action.recompute else ACT) * (1.0 - action.ratio) for action in actions]
    return micro_batch.tokens * sum(kept) / (LAYERS * ACT)


def actions_of(micro_batch: Any, cost: CostModel) -> Any:
    return layer_actions(
        LAYERS,
        policy="recompute" if micro_batch.recompute else "offload",
        ratio=micro_batch.offload_ratio,
        recompute_layers=micro_batch.recompute_layers,
        keep_first=cost.keep_first,
        keep_last=cost.keep_last,
    )


# ---------------------------------------------------------------- the fallback


@pytest.mark.parametrize("planner", list(PLANNERS))
@pytest.mark.parametrize("regime", ["step", "slot"])
def test_what_fits_no_other_way_recomputes(planner: str, regime: str) -> None:
    """5,000 tokens on 4 ranks of 1,000; the others are planned as before."""
    lengths = [900, 5000, 50, 2200]
    with pytest.raises(DoesNotFit, match="so would computing 5 of 18 layers again in backward"):
        make(lengths, planner=planner, regime=regime)
    made = make(lengths, planner=planner, regime=regime, recompute="auto")
    assert (made.recompute, made.recompute_layers, made.offload) == ((0,), (5,), ())
    assert made.group(1) == (0, 1, 2, 3) and made.slots[1] == 0
    others = make([900, 0, 50, 2200], planner=planner, regime=regime)
    for i in (0, 2, 3):
        assert made.group(i) == others.group(i) and made.slots[i] == others.slots[i] + 1
    assert evaluate(made, COST, TOPOLOGY).makespan > evaluate_without(made, COST, TOPOLOGY).makespan
    assert made.slot_count == others.slot_count + 1


@given(
    lengths=st.lists(st.integers(0, 1500) | st.integers(3800, 9000), min_size=1, max_size=8),
    regime=st.sampled_from(["step", "slot"]),
    planner=st.sampled_from(BY_RANK),
    offload=st.sampled_from(["off", "auto", 0.4, 1.0]),
    host=st.sampled_from([0.0, 1e6, 3e7, 1e8]),
    bandwidth=st.sampled_from([1e7, 1e9, 1e12]),
    kept=st.sampled_from([(1, 1), (0, 1), (3, 2)]),
)
@example(  # fits with three layers by less than a token
    lengths=[7041], regime="step", planner="auto", offload="auto", host=1e8, bandwidth=1e12, kept=(0, 1)
)
@examples(200)
def test_every_plan_fits_and_only_what_cannot_fit_is_refused(
    lengths: list[int], regime: str, planner: str, offload: Any, host: float, bandwidth: float, kept: tuple[int, int]
) -> None:
    cost = replace(COST, host_memory=host, copy_bandwidth=bandwidth, keep_first=kept[0], keep_last=kept[1])
    most = {"off": 0.0, "auto": 1.0}.get(offload, offload)

    def fits(length: int, layers: int, step: int) -> bool:
        """A share of a sequence on all ranks, by hand."""
        share, movable = -(-length // RANKS), LAYERS - sum(kept)
        moved = Fraction(step, 64) * ((movable - layers) * ACT + layers * AGAIN)
        saved = (LAYERS - layers) * ACT + layers * AGAIN
        within = share * moved <= host if host else True
        return step / 64 <= most and within and share * max(saved - moved, 2 * ACT) <= CAPACITY * LAYERS * ACT

    def possible(length: int, layers: int) -> bool:
        return any(fits(length, layers, step) for step in range(65))

    movable = LAYERS - sum(kept)
    try:
        made = make(lengths, cost, regime=regime, planner=planner, offload=offload, recompute="auto")
    except DoesNotFit:
        assert not all(any(possible(length, layers) for layers in range(movable + 1)) for length in lengths)
        return
    for rank in range(RANKS):
        for micro_batch in made.micro_batches(rank):
            assert device_tokens(micro_batch, cost) <= CAPACITY * (1 + 1e-9)
            moved = tier_bytes([LayerBytes(all=ACT, kept=AGAIN)] * LAYERS, actions_of(micro_batch, cost))
            assert not host or micro_batch.tokens * moved <= host * (1 + 1e-3)
    for i in np.flatnonzero(np.isin(made.slots, made.recompute)).tolist():
        assert made.group(i) == tuple(range(RANKS))
        layers = made.layers_again[int(made.slots[i])]
        if (
            bandwidth == 1e12
        ):  # copies hide: recomputation is for what fits no other way, and with one layer less does not
            assert not possible(lengths[i], layers - 1)
    if not made.recompute:
        return
    shuffled = make(lengths[::-1], cost, regime=regime, planner=planner, offload=offload, recompute="auto")
    assert sorted(shuffled.recompute_layers) == sorted(made.recompute_layers)


@pytest.mark.parametrize("planner", BY_RANK)
def test_what_fits_is_planned_as_ever(planner: str) -> None:
    for offload in ("off", "auto", 0.5):
        for lengths in ([900, 3500, 50, 2200], [7000, 100] if offload == "auto" else [10]):
            plain = make(lengths, planner=planner, offload=offload)
            assert make(lengths, planner=planner, offload=offload, recompute="auto").digest == plain.digest


def test_recomputation_instead_of_copies_that_show() -> None:
    """A disk on which copies outlast everything: layers run again. A fast one: they leave."""
    lengths = [900, 4500, 50]
    slow = replace(COST, copy_bandwidth=1e7)
    made = make(lengths, slow, offload="auto", recompute="auto")
    assert made.recompute == (0,) and evaluate(made, slow, TOPOLOGY).copying.max() == 0
    copies = make(lengths, slow, offload="auto")
    assert copies.offload and evaluate(made, slow, TOPOLOGY).makespan < evaluate(copies, slow, TOPOLOGY).makespan
    assert not make(lengths, offload="auto", recompute="auto").recompute


def test_host_memory_that_is_too_small() -> None:
    """Too little room outside for all that must leave: the rest runs again, and no more than that."""
    lengths = [7000, 900]
    ratio = ratio_for(1750, CAPACITY, COST)
    assert ratio is not None
    little = replace(COST, host_memory=0.9 * 1750 * ratio * COST.movable_bytes)
    with pytest.raises(DoesNotFit, match='or allow recomputation \\(recompute="auto"\\)'):
        make(lengths, little, offload=1.0)
    made = make(lengths, little, offload=1.0, recompute="auto")
    assert made.recompute == (0,) and 0 < made.recompute_layers[0] < 10
    assert 0 < most_moved(made, little) <= little.host_memory


def test_on_all_ranks_a_document_needs_the_least_room_outside() -> None:
    """A bound at which ``auto``, whose groups may hold all that a quarter of the ratio makes room for, finds no plan."""
    cost = replace(COST, host_memory=1.0035e8)
    with pytest.raises(DoesNotFit, match="do not hold what the batch must offload"):
        auto.make(problem_of([1242, 5299], cost, offload=1.0), "auto")
    everywhere = problem_of([20_000], offload=1.0, recompute="all")
    found = _lightest(everywhere, 0, False)
    assert (found.layers, found.ratio) == (16, ratio_for(5000, 3000, COST.recomputing(16)))
    for recompute in ("off", "auto"):
        made = make([1242, 5299], cost, offload=1.0, recompute=recompute)
        assert made.group(1) == (0, 1, 2, 3) and not made.recompute
        assert 0 < most_moved(made, cost) <= cost.host_memory


def test_what_does_not_fit_at_all_says_so() -> None:
    """By hand: 16 layers at a quarter are 6 of 18 layers, so that three capacities fit a rank."""
    assert make([12_000], recompute="auto").recompute_layers == (16,)
    with pytest.raises(
        DoesNotFit, match=r"even when 16 of 18 layers run again in backward: .* at least 5 ranks, a capacity of"
    ):
        make([12_004], recompute="auto")
    with pytest.raises(DoesNotFit, match=r"even when 16 of 18 .*5e\+06 bytes of host memory and disk a rank"):
        make([40_000], replace(COST, host_memory=5e6), offload=1.0, recompute="auto")
    unknown = replace(COST, recompute_bytes=0.0)
    with pytest.raises(DoesNotFit, match="recompute_bytes is 0"):
        make([5000], unknown, recompute="auto")
    with pytest.raises(PlanError, match='recompute "all" needs the cost model'):
        make([500], unknown, recompute="all")
    with pytest.raises(PlanError, match="5 layers run again: which do is the planner's to say"):
        make([500], COST.recomputing(5))
    with pytest.raises(PlanError, match="unknown recompute 'maybe'"):
        make([500], recompute="maybe")


# ---------------------------------------------------------------- what it costs


def test_the_extra_forward_is_counted() -> None:
    """One sequence on all ranks, by hand: five forwards of all but attention."""
    made = make([5000], recompute="auto")
    share = 5000 / RANKS
    extra = 5 * (share * COST.linear + COST.constant / 3)
    assert recompute_ticks(made, COST, TOPOLOGY) * TICK == pytest.approx(extra, rel=1e-6)
    result = evaluate(made, COST, TOPOLOGY)
    assert result.seconds == pytest.approx(evaluate_without(made, COST, TOPOLOGY).seconds + extra, rel=1e-6)
    assert timeline(made, COST, TOPOLOGY).makespan == result.makespan == result.slot_ends[-1]


@given(lengths=st.lists(st.integers(0, 8000), min_size=1, max_size=8), regime=st.sampled_from(["step", "slot"]))
@examples(60)
def test_one_clock(lengths: list[int], regime: str) -> None:
    """The loop over slots is that of ``evaluate``, with and without recomputation; timelines agree."""
    made = make(lengths, regime=regime, recompute="auto")
    again = replace(made, recompute=(), recompute_layers=())
    ours, theirs = (
        evaluate(replace(made, recompute=(99,), recompute_layers=(0,)), COST, TOPOLOGY),
        evaluate_without(again, COST, TOPOLOGY),
    )
    assert ours.makespan == theirs.makespan and ours.seconds == theirs.seconds
    for field in ("busy", "finish", "slot_ends", "copying"):
        assert np.array_equal(getattr(ours, field), getattr(theirs, field))
    assert timeline(made, COST, TOPOLOGY).makespan == evaluate(made, COST, TOPOLOGY).makespan


@given(length=st.integers(4001, 12_000), bandwidth=st.sampled_from([1e7, 1e8, 1e9]), world=st.sampled_from([1, 2, 4]))
@examples(60)
def test_the_choice_is_by_the_clock_of_plans(length: int, bandwidth: float, world: int) -> None:
    """Of all layers and their smallest ratios the one whose plan is evaluated shortest."""
    cost = replace(COST, copy_bandwidth=bandwidth)
    topology = replace(TOPOLOGY, world_size=world)
    length = length * world // 4
    problem = problem_of([length], cost, topology, offload=1.0, recompute="auto")
    found = _lightest(problem, 0, True)

    def seconds(layers: int, ratio: float) -> int:
        group = tuple(range(world))
        entries = tuple((rank, 0, ratio) for rank in group) if ratio else ()
        made = Plan.from_groups(
            [length], [group], [0], world_size=world, capacity=CAPACITY, regime="step", planner="hand", offload=entries,
            recompute=(0,), recompute_layers=(layers,),
        )  # fmt: skip
        return evaluate(made, cost, topology).makespan

    share = -(-length // world)
    choices = []
    for layers in range(LAYERS - 1):
        model = cost.recomputing(layers)
        ratio = ratio_for(share, recomputed_room(CAPACITY, model), model)
        if ratio is not None:
            choices.append((seconds(layers, ratio), layers, ratio))
    assert min(choices)[0] == pytest.approx(seconds(found.layers, found.ratio), rel=1e-9)


# ---------------------------------------------------------------- everywhere


@pytest.mark.parametrize("planner", BY_RANK)
def test_everywhere_makes_room(planner: str) -> None:
    """Regime slot: micro-batches of three capacities, so a third of the slots; every one of them runs again."""
    lengths = [900, 950, 800, 990] * 12
    plain = make(lengths, planner=planner, regime="slot")
    made = make(lengths, planner=planner, regime="slot", recompute="all")
    assert made.capacity == CAPACITY and made.recompute == tuple(range(made.slot_count))
    assert set(made.recompute_layers) == {16}
    assert made.slot_count <= -(-plain.slot_count // 3) + 1
    assert all(device_tokens(mb, COST) <= CAPACITY for rank in range(RANKS) for mb in made.micro_batches(rank))
    assert all(mb.recompute for rank in range(RANKS) for mb in made.micro_batches(rank)), "dummies too"


def test_everywhere_with_offload() -> None:
    made = make([20_000, 100], offload=1.0, recompute="all")
    assert made.offload
    for rank in range(RANKS):
        for micro_batch in made.micro_batches(rank):
            assert device_tokens(micro_batch, COST) <= CAPACITY


# ---------------------------------------------------------------- layers that keep everything


@given(
    layers=st.integers(1, 100), step=st.integers(0, 64), capacity=st.integers(1, 100_000), tokens=st.integers(1, 10**6)
)
@examples(200)
def test_two_layers_are_the_default(layers: int, step: int, capacity: int, tokens: int) -> None:
    """A cost model says the same as a number of layers, to the bit."""
    cost = replace(COST, layers=layers)
    assert kept_fraction(cost, step / 64) == kept_fraction(layers, step / 64)
    assert capacity_with(capacity, cost, step / 64) == capacity_with(capacity, layers, step / 64)
    assert ratio_for(tokens, capacity, cost) == ratio_for(tokens, capacity, layers)
    assert cost.quantise([1], TOPOLOGY).copy == max(layers - 2, 0) * COST.activation_bytes / COST.copy_bandwidth / TICK


@given(
    lengths=st.lists(st.integers(0, 6000), min_size=1, max_size=8),
    regime=st.sampled_from(["step", "slot"]),
    planner=st.sampled_from(BY_RANK),
)
@examples(60)
def test_ratios_of_the_default_are_the_planners_own(lengths: list[int], regime: str, planner: str) -> None:
    made = make(lengths, regime=regime, planner=planner, offload=1.0)
    problem = problem_of(lengths, regime=regime, planner=planner, offload=1.0)
    assert Problem.with_offload(problem, made).offload == made.offload


@given(
    first=st.integers(0, 9),
    last=st.integers(0, 9),
    length=st.integers(1, 20_000),
    most=st.integers(0, 64),
)
@examples(200)
def test_capacity_follows_the_layers_kept(first: int, last: int, length: int, most: int) -> None:
    """Against the layers one by one, as the engine treats them; two at least are on the device."""
    cost = replace(COST, keep_first=first, keep_last=last)

    def on_device(step: int) -> Fraction:
        actions = layer_actions(LAYERS, policy="offload", ratio=step / 64, keep_first=first, keep_last=last)
        return max(sum((1 - Fraction(action.ratio) for action in actions), Fraction(0)), Fraction(2))

    ranks, ratio = fewest_ranks(length, CAPACITY, cost, most / 64)
    share = -(-length // ranks)
    assert share * on_device(round(ratio * 64)) <= LAYERS * CAPACITY
    assert ranks == 1 or all(-(-length // (ranks - 1)) * on_device(s) > LAYERS * CAPACITY for s in range(most + 1))


def test_plans_follow_the_layers_kept() -> None:
    """Six layers stay: a document that one rank holds with two kept needs a larger ratio, or more ranks."""
    lengths = [2900, 100]
    for planner in ("auto", "naive", "static"):
        for kept in ((1, 1), (3, 3), (0, 1)):
            cost = replace(COST, keep_first=kept[0], keep_last=kept[1])
            made = make(lengths, cost, planner=planner, offload=1.0)
            assert all(device_tokens(mb, cost) <= CAPACITY for r in range(RANKS) for mb in made.micro_batches(r))
    usual = make(lengths, planner="naive", offload=1.0)
    more = make(lengths, replace(COST, keep_first=3, keep_last=3), planner="naive", offload=1.0)
    assert len(usual.group(0)) == len(more.group(0)) == 1 and more.offload[0][2] > usual.offload[0][2]
    assert activation_peak(more, replace(COST, keep_first=3, keep_last=3)) <= CAPACITY * LAYERS * ACT
    with pytest.raises(PlanError, match="3 layers are computed again, 2 can be"):
        replace(COST, layers=4).recomputing(3)


# ---------------------------------------------------------------- plans


def test_the_digest_tells_layers_apart() -> None:
    made = make([5000], recompute="auto")
    assert (
        replace(made, recompute_layers=(6,)).digest
        != made.digest
        != replace(made, recompute=(), recompute_layers=()).digest
    )
    with pytest.raises(PlanError, match="recompute_layers has 2 numbers for 1 slots"):
        replace(made, recompute_layers=(6, 7))


def test_the_command(tmp_path, capsys) -> None:
    lengths = tmp_path / "lengths"
    lengths.write_text("100000\n9000\n9000\n")
    out = tmp_path / "plan.json"
    common = ["plan", "--lengths", str(lengths), "--world-size", "4", "--capacity", "8192", "--json", str(out)]
    assert main(common) == 3
    text = capsys.readouterr().err
    assert "an offload ratio of" in text and "of 32 layers again in backward" in text
    assert main([*common, "--recompute", "auto"]) == 0
    text = capsys.readouterr().out
    assert "recompute: 1 of " in text and "% of the step), no message" in text
    assert "document 0 of 100000 tokens: more than all ranks hold as usual;" in text
    found = json.loads(out.read_text())
    first = [mb for mb in found["micro_batches"] if mb["slot"] == 0]
    layers = {mb["recompute_layers"] for mb in first}
    assert len(first) == 4 and all(mb["recompute"] for mb in first) and len(layers) == 1 and 0 < layers.pop() < 30
    others = [mb for mb in found["micro_batches"] if mb["slot"] > 0]
    assert others and not any(mb["recompute"] or mb["recompute_layers"] for mb in others)
    seconds = found["predicted_seconds"]
    assert main([*common, "--offload", "auto"]) == 0
    assert json.loads(out.read_text())["predicted_seconds"] < seconds
    capsys.readouterr()
    assert main([*common, "--offload", "1", "--keep-first", "12", "--keep-last", "12"]) == 3
    assert main([*common, "--offload", "1", "--keep-first", "2"]) == 0
    assert main([*common, "--recompute", "all"]) == 0
    assert all(mb["recompute"] for mb in json.loads(out.read_text())["micro_batches"])
