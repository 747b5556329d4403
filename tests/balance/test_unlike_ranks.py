"""Plans for ranks of unlike speed: valid, never slower than the plan for equal ones, and near what the speeds allow."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st
from stand_in import machine_of

from hdp.balance import CostModel, Link, PlanError, Topology, evaluate, make_plan, plan
from hdp.balance.planners import make_problem
from hdp.balance.planners.unlike import dealt, onto_fast_ranks

COST = CostModel(layers=4, quadratic=2e-9, linear=2e-5, constant=1e-3, ring_bytes=1024.0, ring_bytes_backward=2048.0)
LINK = Link(bandwidth=250e6, latency=1e-4)
SHORT = [200 + 13 * i for i in range(48)]


def topology(speeds: tuple[float, ...], per_node: int = 1) -> Topology:
    return Topology(world_size=len(speeds), ranks_per_node=per_node, intra=LINK, inter=LINK, speeds=speeds)


def seconds(lengths: list[int], there: Topology, planned_for: Topology, **options: object) -> float:
    made = plan(lengths, planned_for, COST, capacity=1024, **options)
    made.validate()
    return evaluate(made, COST, there).seconds


def test_whole_documents_go_where_they_are_done_first():
    """Two ranks of half the speed: three ranks' work on four, against a plan that waits for the slow ones."""
    unlike = topology((1.0, 1.0, 0.5, 0.5))
    even, known = (seconds(SHORT, unlike, t) for t in (replace(unlike, speeds=()), unlike))
    assert 1.4 < even / known <= 1.51
    ideal = float(COST.quantise(SHORT, unlike).work.sum()) * 2.0**-32 / 3.0
    assert known < 1.05 * (ideal + 16 * 4 * 1e-3)


def test_equal_speeds_change_nothing():
    even = topology((1.0,) * 4)
    lengths = [3000, *SHORT]
    made, other = (plan(lengths, t, COST, capacity=1024) for t in (even, replace(even, speeds=())))
    assert evaluate(made, COST, even).makespan <= evaluate(other, COST, even).makespan


def test_shared_documents_go_to_fast_ranks_of_nodes_that_may_change_places():
    unlike = topology((0.5, 1.0, 0.5, 1.0), per_node=2)
    problem = make_problem([1500, 100], unlike, COST, capacity=1024, regime="step", planner="auto")
    made = problem.plan([(0, 1), (2,)], [0, 0], planner="auto")
    moved = onto_fast_ranks(made, problem)
    assert moved.group(0) == (0, 1) and moved.group(1) == (3,)  # the node stays, the whole one goes to its fast rank
    across = topology((0.5, 0.5, 1.0, 1.0), per_node=2)
    problem = make_problem([1500, 100], across, COST, capacity=1024, regime="step", planner="auto")
    assert onto_fast_ranks(made, problem).group(0) == (2, 3)


@examples(15)
@given(
    st.lists(st.integers(0, 2500), min_size=1, max_size=24),
    st.lists(st.sampled_from([0.25, 0.5, 0.8, 1.0, 1.3]), min_size=2, max_size=6),
    st.integers(1, 3),
)
def test_plans_are_valid_and_never_slower_than_for_equal_ranks(lengths, speeds, per_node):
    unlike = topology(tuple(speeds), per_node)
    if max(lengths) > 600 * len(speeds):
        lengths = [min(n, 600 * len(speeds)) for n in lengths]
    known, again, even = (plan(lengths, t, COST, capacity=600) for t in (unlike, unlike, replace(unlike, speeds=())))
    known.validate()
    assert known.digest == again.digest
    assert evaluate(known, COST, unlike).makespan <= evaluate(even, COST, unlike).makespan
    problem = make_problem(lengths, unlike, COST, capacity=600, regime="step", planner="auto")
    for made in (onto_fast_ranks(even, problem), dealt(even, problem)):
        made.validate()
        sizes = np.diff(made.group_offsets)
        assert np.array_equal(sizes, np.diff(even.group_offsets))
    fast = [s for s in range(len(lengths)) if len(even.group(s)) > 1]
    assert all(dealt(even, problem).group(s) == even.group(s) for s in fast)  # shared ones stay where they are


def test_a_slow_member_computes_for_longer_but_its_messages_do_not():
    slow_link = replace(topology((1.0, 1.0)), intra=Link(bandwidth=1e3), inter=Link(bandwidth=1e3))
    made = make_problem([1500], slow_link, COST, capacity=1024, regime="step", planner="auto").plan(
        [(0, 1)], [0], planner="auto"
    )
    alike, unlike = (evaluate(made, COST, replace(slow_link, speeds=s)).seconds for s in ((1.0, 1.0), (1.0, 0.5)))
    compute = 4 * (
        1500 * 2e-5 * 3 / 2 + 1e-3
    )  # linear and constant; attention hides behind messages but for a last tile
    assert unlike - alike == pytest.approx(compute + 4 * 2e-9 * 1500**2 * 3.5 / 4, rel=1e-3)


@pytest.mark.parametrize("speeds", [(1.0,), (1.0, 0.0), (1.0, float("nan"))])
def test_refuses(speeds):
    with pytest.raises(PlanError, match="speeds"):
        Topology(world_size=2, speeds=speeds)


def test_a_machine_tells_planners_of_slow_ranks_alone():
    even = machine_of(4, COST, topology((1.0,) * 4), speeds=(1.0, 0.95, 1.02, 1.0))
    assert even.slow_ranks == {} and even.topology().speeds == ()
    slow = replace(even, speeds=(1.0, 1.0, 0.5, 1.0))
    assert slow.slow_ranks == {2: 0.5} and slow.topology().speeds == slow.speeds
    assert slow.topology(world_size=8).speeds == ()
    given = {"world_size": 4, "capacity": 1024, "cost": COST}
    shares = [make_plan(SHORT, topology=m.topology(), **given) for m in (even, slow)]
    loads = [sum(SHORT[s] for s in made.sequences_of(2).tolist()) for made in shares]
    assert loads[1] < 0.7 * loads[0]
