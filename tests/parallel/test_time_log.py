"""What is said where steps take another time than predicted, and that a loop that may measure again does, on all ranks."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from engines import make_model
from stand_in import machine_of
from tiny import make_documents

import hdp
from hdp.balance import CostModel, Evaluation, Link, Plan, Topology, evaluate, make_plan
from hdp.balance.cost import TICK
from hdp.parallel.metrics import StepResult
from hdp.parallel.time_log import STEPS, WARM, TimeLog, likely_cause

RANKS = 4
MACHINE = machine_of(RANKS, source="measured")


def predicted() -> Evaluation:
    """Of a batch of which all ranks have a share, rank 3 the smallest."""
    plan = make_plan([400, 390, 380, 200], world_size=RANKS, capacity=400, planner="naive")
    return evaluate(plan, MACHINE.cost, MACHINE.topology())


PREDICTED = predicted()


def result(busy: float = 1.0, late: float = 1.0, waiting: float = 0.0, slow: int = 1) -> StepResult:
    """A step whose ranks computed ``busy`` times as long as predicted, rank ``slow`` ``late`` times more, and all waited for a
    part of the step."""
    times = [
        ticks * TICK * busy * (late if rank == slow else 1.0) for rank, ticks in enumerate(PREDICTED.busy.tolist())
    ]
    seconds = max(times) / (1.0 - waiting)
    return StepResult(
        step=0,
        loss=1.0,
        tokens=1,
        label_tokens=1,
        seconds=seconds,
        busy_seconds=tuple(times),
        wait_seconds=tuple(seconds - each for each in times),
        predicted=PREDICTED,
    )


@pytest.mark.parametrize(
    ("step", "cause"),
    [
        (result(late=1.6), "rank 1 computed 1.60 times as long as the others"),
        (result(busy=1.4), "all ranks computed 1.40 times as long as predicted"),
        (result(busy=0.7), "all ranks computed in 0.70 of the time predicted"),
        (result(waiting=0.5), "computing took as long as predicted, but ranks waited"),
    ],
)
def test_the_likely_cause(step: StepResult, cause: str) -> None:
    assert likely_cause([step]).startswith(cause)


def test_hops_that_show_are_waits_not_work() -> None:
    """Two ranks of a ring on slow links wait while one with a whole document computes: neither is slow."""
    link = Link(bandwidth=1e6)
    topology = Topology(world_size=3, ranks_per_node=3, intra=link, inter=link)
    plan = Plan.from_groups(
        [400, 390], [(0, 1), (2,)], [0, 0], world_size=3, capacity=400, regime="step", planner="test"
    )
    said = evaluate(plan, CostModel(layers=2, quadratic=1e-9, linear=1e-6, ring_bytes=1e3), topology)
    assert said.exposed[0] > 0.1 * said.busy[0] and not said.exposed[2]
    busy = (said.busy - said.exposed) * TICK
    seconds = 1.5 * said.seconds
    step = StepResult(
        step=0, loss=1.0, tokens=1, label_tokens=1, seconds=seconds, busy_seconds=tuple(busy.tolist()),
        wait_seconds=tuple((seconds - busy).tolist()), predicted=said,
    )  # fmt: skip
    assert likely_cause([step]).startswith("computing took as long as predicted, but ranks waited")


def test_many_slow_ranks_are_counted() -> None:
    busy, seconds = [1.0] * 20, 2.0
    for rank in range(0, 18, 3):
        busy[rank] = 2.0
    said = replace(PREDICTED, busy=(PREDICTED.busy[:1] * 0 + round(1 / TICK)).repeat(20), exposed=PREDICTED.busy[0] * 0)
    step = replace(result(), busy_seconds=tuple(busy), wait_seconds=(0.0,) * 20, predicted=said, seconds=seconds)
    assert likely_cause([step]).startswith("ranks 0, 3, 6, 9 and 2 more computed 2.00 times")


def logged(steps: list[StepResult], caplog: Any, rank: int = 0, machine: Any = MACHINE) -> tuple[list[str], TimeLog]:
    caplog.clear()
    log = TimeLog(SimpleNamespace(rank=rank))  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING, "hdp"):
        for step in steps:
            log.note(step, machine)
    return [record.message for record in caplog.records], log


def test_a_drift_is_said_once_and_again_where_it_changes(caplog: Any) -> None:
    slow, slower = result(busy=1.3), result(busy=1.6)
    said, log = logged([slow] * (WARM + STEPS - 1), caplog)
    assert not said and not log.is_off  # too few
    said, log = logged([slow] * 20, caplog)
    assert len(said) == 1 and "+30 %" in said[0] and log.is_off
    said, _ = logged([slow] * 20 + [slower] * 20, caplog)
    assert [text.partition("(")[2].partition(")")[0] for text in said] == ["+30 %", "+52 %"]
    said, log = logged([slow] * 20 + [result()] * 20, caplog)
    assert len(said) == 1 and not log.is_off
    log.restart()
    assert not log.is_off


def test_what_is_small_assumed_or_unknown_is_not_said(caplog: Any) -> None:
    for steps, machine in (
        ([result(busy=1.1)] * 20, MACHINE),
        ([result(busy=2.0)] * 20, replace(MACHINE, source="assumed")),
        ([result(busy=2.0)] * 20, None),
        ([replace(result(busy=2.0), predicted=None)] * 20, MACHINE),
    ):
        said, log = logged(steps, caplog, machine=machine)
        assert not said and not log.is_off
    said, log = logged([result(busy=2.0)] * 20, caplog, rank=1)
    assert not said and log.is_off  # all ranks know, one speaks


def measuring(world: hdp.World) -> list[tuple[int, str, float]]:
    """Steps of a loop by the machine of ranks that are faster than any."""
    engine = hdp.shard(make_model(), world)
    fast = CostModel(layers=2, quadratic=1e-15, linear=1e-12)
    wrong = machine_of(world.world_size, fast, source="measured")
    loader = hdp.Loader(
        make_documents([40, 60, 30, 50] * 12),
        engine,
        tokens_per_step=180,
        capacity=64,
        seed=None,
        machine=wrong,
        remeasure=True,
    )
    found = []
    for batch in loader:
        outcome = engine.forward_backward(batch)
        assert batch.machine is not None and outcome.predicted is not None
        found.append((batch.step, batch.machine.digest, outcome.predicted.seconds))
    return found


@pytest.mark.slow
def test_a_loop_measures_again_where_it_may(ranks: Any) -> None:
    first, second = ranks(2).run(measuring)
    assert first == second
    assert [step for step, _, _ in first] == list(range(12))  # no batch is lost, none comes twice
    machines = [digest for _, digest, _ in first]
    assert machines[: WARM + STEPS] == [machines[0]] * (WARM + STEPS) and machines[WARM + STEPS] != machines[0]
    assert first[WARM + STEPS][2] > 100 * first[0][2]  # predicted by what this machine takes
