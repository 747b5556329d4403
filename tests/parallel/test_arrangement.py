"""Where gradients are reduced, and the proof that a step's order of work cannot hang."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st

from hdp.balance import Plan, make_plan
from hdp.parallel.arrangement import ArrangementError, Work, arrange, check_arrangement, works


def by_hand(world: int, groups: list[tuple[int, ...]], slots: list[int], regime: str = "step") -> Plan:
    return Plan.from_groups(
        [10] * len(groups), groups, slots, world_size=world, capacity=100, regime=regime, planner="by hand"
    )


def all_works(plan: Plan) -> dict[int, list[Work]]:
    return {rank: works(plan, rank, arrange(plan)) for rank in range(plan.world_size)}


def reducing_in_the_last(plan: Plan) -> dict[int, list[Work]]:
    """What a naive engine would do: every rank reduces in its last micro-batch, whatever it shares there."""
    found = {}
    for rank in range(plan.world_size):
        micro_batches = plan.micro_batches(rank)
        last = len(micro_batches) - 1
        found[rank] = [Work(micro_batch=mb, reduces=i == last) for i, mb in enumerate(micro_batches)]
    return found


SHARED_LAST_FOR_ONE = by_hand(2, [(0, 1), (1,)], [0, 1])
SHARED_FIRST_FOR_ONE = by_hand(2, [(1,), (0, 1)], [0, 1])


def test_a_shared_micro_batch_that_is_the_last_for_one_rank_only_is_refused():
    with pytest.raises(ArrangementError, match=r"rank 0 in reduce-scatter .* rank 1 in attention of sequence 0"):
        check_arrangement(reducing_in_the_last(SHARED_LAST_FOR_ONE))
    assert arrange(SHARED_LAST_FOR_ONE).closing
    check_arrangement(all_works(SHARED_LAST_FOR_ONE))


def test_gathering_in_a_shared_micro_batch_after_others_is_refused():
    works_of = all_works(SHARED_FIRST_FOR_ONE)
    check_arrangement(works_of)
    late = {rank: [replace(w, gathers=i == 0) for i, w in enumerate(ws)] for rank, ws in works_of.items()}
    # Both gather in their first micro-batch; layer 1's gather of rank 0 waits for attention that rank 1 has not reached.
    with pytest.raises(ArrangementError, match="all-gather"):
        check_arrangement(late)


def test_a_rank_without_a_micro_batch_is_refused_and_gets_a_dummy():
    plan = by_hand(3, [(0, 1)], [0])
    with pytest.raises(
        ArrangementError, match="rank 0 in reduce-scatter of layer 1; rank 1 in reduce-scatter of layer 1"
    ):
        check_arrangement(reducing_in_the_last(plan))
    assert [w.micro_batch for w in all_works(plan)[2]] == [None]
    check_arrangement(all_works(plan))


def test_reducing_twice_on_one_rank_is_refused():
    works_of = all_works(by_hand(2, [(0,), (0,), (1,), (1,)], [0, 1, 0, 1]))
    works_of[0] = [replace(w, reduces=True) for w in works_of[0]]
    with pytest.raises(ArrangementError, match="rank 0 in reduce-scatter"):
        check_arrangement(works_of)


def test_sharers_in_different_order_are_refused():
    plan = by_hand(2, [(0, 1), (0, 1)], [0, 1])
    works_of = all_works(plan)
    first, second = works_of[1]
    works_of[1] = [replace(second, reduces=False), replace(first, reduces=True)]
    with pytest.raises(ArrangementError, match=r"attention of sequence 0.*attention of sequence 1"):
        check_arrangement(works_of)


def test_no_closing_micro_batch_where_none_is_needed():
    assert not arrange(by_hand(2, [(0, 1), (0,)], [1, 0])).closing  # shared, and the last of both
    assert not arrange(by_hand(3, [(0,), (0,), (1,)], [0, 1, 0])).closing  # nothing is shared
    assert not arrange(by_hand(2, [(0, 1), (0,), (1,)], [0, 1, 5])).closing  # shared, and the last of neither


SEQUENCES = st.integers(1, 5).flatmap(
    lambda world: st.tuples(
        st.just(world),
        st.lists(
            st.tuples(st.lists(st.integers(0, world - 1), min_size=1, max_size=world, unique=True), st.integers(0, 5)),
            max_size=9,
        ),
    )
)


@examples(300)
@given(SEQUENCES, st.sampled_from(["step", "slot"]))
def test_every_plan_runs_through(drawn, regime):
    world, sequences = drawn
    plan = by_hand(world, [tuple(group) for group, _ in sequences], [slot for _, slot in sequences], regime)
    works_of = all_works(plan)
    check_arrangement(works_of)
    run = [
        (rank, shard.sequence)
        for rank in works_of
        for work in works_of[rank]
        if work.micro_batch
        for shard in work.micro_batch.shards
    ]
    owned = [(rank, sequence) for sequence, (group, _) in enumerate(sequences) for rank in group]
    assert sorted(run) == sorted(owned)  # each share is run exactly once
    if regime == "step":
        assert all([w.reduces for w in ws] == [False] * (len(ws) - 1) + [True] for ws in works_of.values())


@examples(200)
@given(SEQUENCES)
def test_a_closing_micro_batch_is_added_only_if_the_step_would_hang_without(drawn):
    world, sequences = drawn
    plan = by_hand(world, [tuple(group) for group, _ in sequences], [slot for _, slot in sequences])
    without = {rank: ws or [Work(micro_batch=None, reduces=True)] for rank, ws in reducing_in_the_last(plan).items()}
    if arrange(plan).closing:
        with pytest.raises(ArrangementError):
            check_arrangement(without)
    else:
        check_arrangement(without)


@examples(40)
@given(
    st.integers(1, 9),
    st.lists(st.integers(0, 300), min_size=1, max_size=40),
    st.sampled_from(["naive", "static", "auto"]),
)
def test_every_planners_plan_runs_through(world, lengths, planner):
    plan = make_plan([min(n, 64 * world) for n in lengths], world_size=world, capacity=64, planner=planner)
    check_arrangement(all_works(plan))
