"""Whole steps, attention programs and collectives together: proved free of hangs, and what ranks really do."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from engines import CollectiveRecorder, make_engine, make_model, plan_batch, regime_of
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_documents
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import CPUOffloadPolicy

import hdp
from hdp.attention.auto import Chooser
from hdp.attention.exchange import Message
from hdp.attention.mask import Mask
from hdp.attention.predict import Links
from hdp.balance import Plan, make_plan
from hdp.parallel.arrangement import Arrangement, ArrangementError
from hdp.parallel.costs import assume
from hdp.parallel.schedules import chooser_of
from hdp.parallel.step_checker import (
    Attention,
    Await,
    Collectives,
    Exchange,
    Launch,
    check_step,
    run_together,
    step_actions,
)

SCHEDULES = ("ring", "token_ring", "direct", "all_gather", "ulysses")


def by_hand(
    world: int, groups: list[tuple[int, ...]], slots: list[int], regime: str = "step", lengths: list[int] | None = None,
    schedule: str = "ring",
) -> Plan:  # fmt: skip
    lengths = lengths or [20 + 3 * i for i in range(len(groups))]
    return Plan.from_groups(
        lengths, groups, slots, world_size=world, capacity=200, regime=regime, planner="by hand",
        schedule_names=("local", schedule),
    )  # fmt: skip


def engines_of(world: int) -> list[Collectives]:
    found = [
        Collectives(),
        Collectives(deferred=False),
        Collectives(engine="ddp", deferred=True),
        Collectives(layers=3),
    ]
    if world % 2 == 0 and world > 2:
        half = tuple(tuple(range(i, i + world // 2)) for i in (0, world // 2))
        found += [Collectives(shards=half, deferred=False), Collectives(shards=half, deferred=False, layers=3)]
    return found


PLANS = st.sampled_from([1, 2, 3, 4]).flatmap(
    lambda world: st.tuples(
        st.just(world),
        st.lists(
            st.tuples(st.lists(st.integers(0, world - 1), min_size=1, max_size=world, unique=True), st.integers(0, 3)),
            min_size=1, max_size=6,
        ),
    )
)  # fmt: skip


@examples(150)
@given(PLANS, st.sampled_from(["step", "slot"]), st.sampled_from(SCHEDULES))
def test_every_step_runs_through(drawn, regime, schedule):
    world, sequences = drawn
    groups, slots = [tuple(group) for group, _ in sequences], [slot for _, slot in sequences]
    plan = by_hand(world, groups, slots, regime, schedule=schedule)
    for collectives in engines_of(world):
        if regime == "step" or collectives.engine == "fsdp":
            check_step(plan, collectives)


@examples(25)
@given(
    st.sampled_from([2, 3, 4, 6]), st.lists(st.integers(1, 250), min_size=1, max_size=20),
    st.sampled_from(["naive", "static", "auto"]), st.sampled_from(["step", "slot"]),
)  # fmt: skip
def test_every_planners_step_runs_through(world, lengths, planner, regime):
    plan = make_plan(
        [min(n, 64 * world) for n in lengths], world_size=world, capacity=64, planner=planner, regime=regime
    )
    for collectives in engines_of(world):
        if regime == "step" or collectives.engine == "fsdp":
            check_step(plan, collectives)


# ---------------------------------------------------------------- refused

SHARED_LAST_FOR_ONE = ([(0, 1), (1,)], [0, 1])


def test_reductions_that_block_in_a_shared_last_micro_batch_hang():
    plan = by_hand(2, *SHARED_LAST_FOR_ONE)
    with pytest.raises(ArrangementError, match=r"rank 0 in reduction of layer 1; rank 1 in attention with ranks \[0\]"):
        check_step(plan, Collectives(deferred=False), Arrangement(closing=False))
    check_step(plan, Collectives(deferred=False), Arrangement(closing=True))


def test_reductions_over_replicas_hang_where_those_over_shards_would_not():
    """Shards (0, 1) and (2, 3); rank 2's last micro-batch is shared with rank 0, for which it is not the last."""
    plan = by_hand(4, [(0, 2), (0,), (1,), (3,)], [0, 1, 0, 0])
    shards = ((0, 1), (2, 3))
    with pytest.raises(ArrangementError, match="rank 2 in reduction of layer 1 over replicas"):
        check_step(plan, Collectives(shards=shards, deferred=False), Arrangement(closing=False))
    check_step(plan, Collectives(shards=shards, deferred=False))


def test_gathers_inside_a_step_hang():
    """What FSDP2 would do by itself: gather in each rank's first forward pass."""
    actions = step_actions(by_hand(2, [(1,), (0, 1)], [0, 1]), Collectives())
    late = {}
    for rank, todo in actions.items():
        gathers = [a for a in todo if isinstance(a, Launch) and a.name == "all-gather of layer 1"]
        rest = [a for a in todo if a not in gathers]
        at = next(i for i, a in enumerate(rest) if a == Await(2))
        late[rank] = [*rest[:at], *gathers, *rest[at:]]
    run_together(actions)
    with pytest.raises(ArrangementError, match="all-gather of layer 1"):
        run_together(late)


def test_another_order_of_collectives_is_refused():
    def launch(*names: str) -> list[Any]:
        return [Launch(name, (0, 1)) for name in names] + [Await(0), Await(1)]

    run_together({0: launch("a", "b"), 1: launch("a", "b")})
    with pytest.raises(ArrangementError, match="rank 1 launches the b where rank 0 launches the a"):
        run_together({0: launch("a", "b"), 1: launch("b", "a")})


def test_a_collective_that_one_rank_leaves_out_is_refused():
    with pytest.raises(ArrangementError, match="do not launch the same collectives"):
        run_together({0: [Launch("a", (0, 1))], 1: []})


def test_exchanges_that_wait_in_a_circle_are_refused():
    def call(peer: int, is_send: bool) -> Exchange:
        return Exchange((Message(peer=peer, is_send=is_send, tag=0),))

    circle = {
        0: [call(1, True), call(2, False)],
        1: [call(2, True), call(0, False)],
        2: [call(0, True), call(1, False)],
    }
    with pytest.raises(ArrangementError, match="this step would hang"):
        run_together(circle)


# ---------------------------------------------------------------- what ranks do

REAL: dict[str, tuple[int, Collectives, dict[str, Any]]] = {
    "fsdp-step": (2, Collectives(), {}),
    "fsdp-step, bf16": (2, Collectives(), {"bf16": True}),
    "fsdp-step, host memory": (2, Collectives(deferred=False), {"offload": True}),
    "fsdp-step, checkpointing": (2, Collectives(), {"checkpointing": True}),  # keeps what attention gave
    "fsdp-step, torch's checkpointing": (2, Collectives(recomputes=True), {"wrapped": True}),
    "fsdp-slot": (2, Collectives(), {}),
    "fsdp-slot, checkpointing": (2, Collectives(), {"checkpointing": True}),
    "fsdp-slot, torch's checkpointing": (2, Collectives(recomputes=True), {"wrapped": True}),
    "fsdp-slot, host memory": (2, Collectives(deferred=False), {"offload": True}),
    "hsdp-step": (4, Collectives(shards=((0, 1), (2, 3)), deferred=False), {}),
    "hsdp-slot": (4, Collectives(shards=((0, 1), (2, 3)), deferred=False), {}),
    "ddp": (2, Collectives(engine="ddp"), {}),
}
GROUPS = {
    "shared in two slots": ([(0, 1), (1,), (1, 0), (0,)], [0, 1, 2, 2]),
    "a closing micro-batch": ([(0, 1), (1,)], [0, 1]),
    "a rank with nothing": ([(1,), (1,)], [0, 1]),
}


def _windowed(reach: int | None, module: Any, arguments: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return arguments, {**keywords, "sliding_window": reach}


def record(world: hdp.World, name: str, plan: Plan, options: dict[str, Any]) -> list[Any]:
    """Launches and grouped calls of this rank in one step, in order."""
    name, model = name.partition(",")[0], make_model()
    world.runtime.schedule = options.pop("schedule", None)
    if window := options.pop("window", None):
        for layer, reach in zip(model.model.layers, window, strict=True):
            layer.self_attn.register_forward_pre_hook(partial(_windowed, reach), with_kwargs=True)
    if options.pop("checkpointing", False):
        model.gradient_checkpointing_enable()
    if options.pop("wrapped", False):
        apply_activation_checkpointing(model, check_fn=lambda module: module in set(model.model.layers))
    if options.pop("offload", False):
        policy = CPUOffloadPolicy(pin_memory=False)
        engine = hdp.shard(model, world, regime=regime_of(name), offload_policy=policy)
    else:
        engine = make_engine(world, name, model, **options)
    documents = make_documents(plan.lengths.tolist())
    batch = plan_batch(world, engine, documents, 2000, planner=lambda *_, **__: plan)
    with CollectiveRecorder() as recorder:
        post = world.channel.post

        def noted(sends: Any, receives: Any, tag: int) -> Any:
            ends = {(p.peer, True) for p, _ in sends} | {(p.peer, False) for p, _ in receives}
            recorder.calls.append(("exchange", str(sorted(ends)), 0))
            return post(sends, receives, tag)

        world.channel.post = noted  # type: ignore[method-assign]
        try:
            engine.forward_backward(batch)
        finally:
            del world.channel.post
    control = recorder.calls[-1][1]  # the group of what a step reports
    kinds = {"allgather_base": "all-gather", "reduce_scatter_base": "reduction", "allreduce": "reduction over replicas"}
    found = []
    for call, group, _ in recorder.calls:
        if call == "exchange":
            found.append(("exchange", group))
        elif group != control:
            found.append(("launch", kinds[call.removeprefix("c10d::").strip("_")]))
    return found


def predicted(plan: Plan, collectives: Collectives, attention: Attention) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = {}
    for rank, actions in step_actions(plan, collectives, attention=attention).items():
        found[rank] = []
        for action in actions:
            if isinstance(action, Exchange):
                found[rank].append(("exchange", str(sorted({(m.peer, m.is_send) for m in action.messages}))))
            elif isinstance(action, Launch):
                over = " over replicas" if action.name.endswith("over replicas") else ""
                found[rank].append(("launch", action.name.partition(" of ")[0] + over))
    return found


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("case", REAL)
def test_ranks_do_what_was_checked(ranks, case, groups):
    world, collectives, options = REAL[case]
    name = case.partition(",")[0]
    plan = by_hand(world, *GROUPS[groups], regime=regime_of(name))
    check_step(plan, collectives)
    wanted = predicted(plan, collectives, Attention())
    for rank, found in enumerate(ranks(world).run(record, case, plan, options)):
        if name == "ddp":  # its buckets are not its layers
            assert [f for f in found if f[0] == "exchange"] == [w for w in wanted[rank] if w[0] == "exchange"]
            assert found[-1] == ("launch", "reduction over replicas")
        else:
            assert found == wanted[rank], rank


CHOOSER = Chooser(links=Links(inner_rate=1e9, outer_rate=1e9), flops=1e11)


@pytest.mark.parametrize("schedule", ["ulysses", "direct", "ring/ring_q", "auto", "auto/token_ring"])
def test_ranks_do_what_was_checked_with_a_schedule_of_their_own(ranks, schedule):
    """A schedule for all sequences, whatever the plan says, resolved by the chooser that the engine set."""
    plan = by_hand(3, [(0, 1, 2), (1,), (1, 0), (0,)], [0, 1, 2, 2], schedule="all_gather")
    known = assume(make_model(attention="sdpa"), torch.device("cpu"), 3, torch.float32)
    chooser = chooser_of(known)
    attention = Attention(head_dim=16, schedule=schedule, chooser=chooser)
    check_step(plan, Collectives(), attention=attention)
    wanted = predicted(plan, Collectives(), attention)
    assert wanted != predicted(plan, Collectives(), Attention())  # or this test would show nothing
    for rank, found in enumerate(ranks(3).run(record, "fsdp-step", plan, {"schedule": schedule})):
        assert found == wanted[rank], rank


def test_ranks_do_what_was_checked_under_windows(ranks):
    """Layers with and without a window send different things: a narrow one looks at neighbours alone."""
    plan = by_hand(3, [(0, 1, 2), (1,)], [0, 1], lengths=[120, 9], schedule="direct")
    attention = Attention(head_dim=16, masks=(Mask(window=5), Mask()))
    check_step(plan, Collectives(), attention=attention)
    wanted = predicted(plan, Collectives(), attention)
    assert wanted != predicted(plan, Collectives(), Attention(masks=(Mask(), Mask(window=5))))
    for rank, found in enumerate(ranks(3).run(record, "fsdp-step", plan, {"window": (5, None)})):
        assert found == wanted[rank], rank


def test_a_plan_that_leaves_the_choice_is_checked_with_a_chooser():
    plan = by_hand(3, [(0, 1, 2), (1, 2), (0,)], [0, 1, 1], schedule="auto")
    with pytest.raises(ValueError, match="schedule 'auto' needs to know links and rates"):
        check_step(plan, Collectives())
    check_step(plan, Collectives(), attention=Attention(chooser=CHOOSER))
