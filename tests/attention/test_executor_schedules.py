"""Programs through lowering and executor: bytes, buffers, delays, real ranks. Exactness of all cases: ``test_matrix``."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import HEAD_DIM, HEADS, SCHEDULES, SCORING, mixed
from virtual import CPU, Sequence_, attend_together, make_data

from hdp.attention import AttentionRuntime, Route, RouteShard
from hdp.attention.auto import Chooser
from hdp.attention.bound import Binding
from hdp.attention.bundle import Bundle, structure_of
from hdp.attention.channel import VirtualNetwork
from hdp.attention.counts import Count, Sizes, count
from hdp.attention.executor import Executor, drive_together
from hdp.attention.layout import make_layout
from hdp.attention.lower import Task, lower
from hdp.attention.lowered import Geometry, Lowered
from hdp.attention.mask import Mask
from hdp.attention.predict import Links
from hdp.attention.program import HeadCount
from hdp.attention.route import LayerKey
from hdp.attention.schedules import get_schedule, lay_out


@pytest.mark.parametrize("forward", ["ring", "ulysses", "token_ring"])
@pytest.mark.parametrize("backward", ["ring_q", "direct", "all_gather", "token_ring"])
def test_backward_may_take_another_schedule(forward: str, backward: str) -> None:
    mask, heads = Mask(), HEADS["gqa3"]
    sequences = [Sequence_(length=61, group=(2, 0, 1), schedule=forward, backward=backward)]
    data = make_data([61], heads, HEAD_DIM, mask, SCORING, torch.float64, seed=1)
    result = attend_together(sequences, data, mask, SCORING, torch.float64, backend="reference")
    assert max(result.errors(data).values()) <= 1e-12


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_bytes_sent_are_those_of_the_program(name: str, backward: bool) -> None:
    """Closed forms equal the programs (test_costs); here the programs equal what really left each rank."""
    heads, mask, sizes = HEADS["gqa3"], Mask(), Sizes(head_dim=HEAD_DIM, model_bytes=2)
    group = (1, 3, 0, 2)
    sequences = [Sequence_(length=61, group=group, schedule=name), Sequence_(length=24, group=(0,))]
    data = make_data([61, 24], heads, HEAD_DIM, mask, SCORING, torch.bfloat16, seed=1)
    result = attend_together(sequences, data, mask, SCORING, torch.bfloat16, backend="cpu")
    layout, schedule = lay_out(make_layout("zigzag", 61, 4), mask, name), get_schedule(name)
    make = schedule.backward if backward else schedule.forward
    counts = [count(make(layout, mask, heads, m), layout, mask, heads, m, sizes, backward) for m in range(4)]
    sent = result.networks[backward].sent_bytes
    assert [sent[rank] for rank in group] == [c.sent_bytes for c in counts]
    ends = sum(step.messages for c in counts for step in c.steps)
    assert 2 * result.networks[backward].messages == ends


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("name", "slices"), [("ulysses", 1), ("ulysses:2", 2), ("ulysses_home:2", 2)])
def test_heads_travel_in_one_message_to_each_peer(name: str, slices: int, backward: bool) -> None:
    """Inputs of one slice, and results of one: each goes to a peer in one piece."""
    heads, layout = HeadCount(query=8, key=8), make_layout("zigzag", 64, 4)
    schedule = get_schedule(name)
    make = schedule.backward if backward else schedule.forward
    counted = count(
        make(layout, Mask(), heads, 1), layout, Mask(), heads, 1, Sizes(head_dim=8, model_bytes=2), backward
    )
    assert sum(step.messages for step in counted.steps) == 2 * 3 * slices * 2


@pytest.mark.parametrize(
    ("name", "size", "layout", "length"),
    [("hybrid:2", 4, "striped:1", 37), ("hybrid:3", 6, "striped:3", 100), ("hybrid:3", 6, "striped", 777)],
)
def test_stripes_of_a_node_interleave(name: str, size: int, layout: str, length: int) -> None:
    """What a hybrid's ring brings lies together, but not in the order of the sequence."""
    heads = HeadCount(query=6, key=6)
    for mask in (Mask(), Mask(causal=False), Mask(window=20)):
        sequences = [Sequence_(length=length, group=tuple(range(size)), schedule=name, layout=layout)]
        data = make_data([length], heads, HEAD_DIM, mask, SCORING, torch.float64, seed=1)
        result = attend_together(sequences, data, mask, SCORING, torch.float64, backend="reference")
        assert max(result.errors(data).values()) <= 1e-12


@pytest.mark.parametrize("name", ["ulysses:2", "ulysses_home", "hybrid:2", "token_ring"])
def test_components_that_do_not_fit_behind_each_other_leave_a_gap(name: str) -> None:
    """bf16 heads of an odd width: an lse behind them would begin in the middle of a word."""
    heads, mask = HEADS["gqa3"], Mask()
    sequences = [Sequence_(length=61, group=(1, 3, 0, 2), schedule=name)]
    data = make_data([61], heads, 5, mask, SCORING, torch.bfloat16, seed=1)
    whole = attend_together(
        [Sequence_(length=61, group=(0,))], data, mask, SCORING, torch.bfloat16, backend="reference"
    )
    shared = attend_together(sequences, data, mask, SCORING, torch.bfloat16, backend="reference")
    alone, errors = whole.errors(data), shared.errors(data)
    assert all(errors[what] <= 1.5 * alone[what] for what in errors)


@pytest.mark.parametrize("name", ["ring", "ring_q", "token_ring", "ulysses:2", "double_ring:2", "all_gather"])
def test_narrow_inputs_on_the_wire(name: str) -> None:
    """fp32 with bf16 on the way: fewer bytes, and errors of bf16 rounding of q, k, v alone."""
    heads, mask = HEADS["gqa3"], Mask()
    sequences = [Sequence_(length=61, group=(0, 1, 2, 3), schedule=name), Sequence_(length=24, group=(2,))]
    data = make_data([61, 24], heads, HEAD_DIM, mask, SCORING, torch.float32, seed=1)
    options = {"backend": "cpu", "seed": 5}
    full = attend_together(sequences, data, mask, SCORING, torch.float32, **options)
    narrow = attend_together(sequences, data, mask, SCORING, torch.float32, wire_dtype=torch.bfloat16, **options)
    assert sum(narrow.networks[0].sent_bytes.values()) < sum(full.networks[0].sent_bytes.values())
    errors = narrow.errors(data)
    assert 1e-5 < max(errors.values()) < 2e-2
    rounded = make_data([61, 24], heads, HEAD_DIM, mask, SCORING, torch.bfloat16, seed=1)
    exact = attend_together(sequences, rounded, mask, SCORING, torch.float32, wire_dtype=torch.bfloat16, **options)
    assert max(exact.errors(rounded).values()) <= 1e-5  # what bf16 holds exactly arrives exactly


def test_any_order_of_delivery_gives_the_same_bits() -> None:
    mask, heads = Mask(), HEADS["gqa3"]
    draw = random.Random(1)
    sequences = mixed("ring", draw, 5, "zigzag") + mixed("token_ring", draw, 5, "zigzag")
    data = make_data([s.length for s in sequences], heads, HEAD_DIM, mask, SCORING, torch.float32, seed=1)
    runs = [
        attend_together(sequences, data, mask, SCORING, torch.float32, backend="cpu", seed=seed, can_ask=ask)
        for seed, ask in ((0, True), (1, True), (2, False))
    ]
    for name in ("out", "lse", "dq", "dk", "dv"):
        for other in runs[1:]:
            for a, b in zip(getattr(runs[0], name), getattr(other, name), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["ring", "token_ring", "ulysses:2", "all_gather", "hybrid:2"])
def test_moves_run_by_torch_do_as_those_in_cpp(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on other devices than CPUs: the same values, move by move."""
    mask, heads = Mask(), HEADS["gqa3"]
    sequences = mixed(name, random.Random(4), 4, "zigzag")
    data = make_data([s.length for s in sequences], heads, HEAD_DIM, mask, SCORING, torch.bfloat16, seed=1)
    fused = attend_together(sequences, data, mask, SCORING, dtype, backend="reference")
    made = Binding.__init__

    def elsewhere(self: Binding, *arguments: Any) -> None:
        made(self, *arguments)
        self.is_on_cpu = False

    monkeypatch.setattr(Binding, "__init__", elsewhere)
    plain = attend_together(sequences, data, mask, SCORING, dtype, backend="reference")
    for what in ("out", "lse", "dq", "dk", "dv"):
        for a, b in zip(getattr(fused, what), getattr(plain, what), strict=True):
            torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_one_document_changes_no_other() -> None:
    mask, heads = Mask(), HEADS["mha"]
    sequences = mixed("ring", random.Random(2), 4, "zigzag")
    data = make_data([s.length for s in sequences], heads, HEAD_DIM, mask, SCORING, torch.float32, seed=1)
    before = attend_together(sequences, data, mask, SCORING, torch.float32, backend="cpu")
    changed = 2
    for name in ("q", "k", "v", "do"):
        setattr(data[changed], name, getattr(data[changed], name) + 1)
    after = attend_together(sequences, data, mask, SCORING, torch.float32, backend="cpu")
    for name in ("out", "dq", "dk", "dv"):
        for number, (a, b) in enumerate(zip(getattr(before, name), getattr(after, name), strict=True)):
            assert torch.equal(a, b) == (number != changed), f"{name} of sequence {number}"


def lowered_member(
    name: str,
    size: int,
    heads: HeadCount,
    mask: Mask,
    member: int,
    backward: bool,
    documents: int = 1,
    model_bytes: int = 2,
) -> tuple[Lowered, Count]:
    """One member's program of sequences of 128 tokens a rank, lowered, and the counts of one of them."""
    length, kind = 128 * size, "zigzag" if mask.causal else "contiguous"
    layout = lay_out(make_layout(kind, length, size), mask, name)
    schedule = get_schedule(name)
    program = (schedule.backward if backward else schedule.forward)(layout, mask, heads, member)
    rows = [128 * i for i in range(documents)]
    structure = structure_of(kind, length, size, mask)
    bundle = Bundle(structure, name, tuple(range(size)), member, range(documents), [length] * documents, rows)
    geometry = Geometry(heads=heads, head_dim=HEAD_DIM, model_bytes=model_bytes, sum_bytes=4)
    counted = count(program, layout, mask, heads, member, Sizes(head_dim=HEAD_DIM, model_bytes=model_bytes), backward)
    return lower([Task(bundle, ("ring" if name == "ring_q" else name, name))], geometry, backward), counted


def launches(lowered: Lowered) -> list[int]:
    """Kernel launches of each round."""
    return [sum(c.launches for c in r.calls) for r in lowered.rounds]


@pytest.mark.parametrize("mask", [Mask(), Mask(causal=False)], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_calls_and_messages_are_as_many_as_counted(name: str, mask: Mask) -> None:
    """The choice by cost counts them without lowering; more documents take as many messages, and calls of their own."""
    for heads in (HeadCount(query=8, key=8), HeadCount(query=8, key=2)):
        for backward in (False, True) if name != "ring_q" else (True,):
            for member in range(4):
                lowered, counted = lowered_member(name, 4, heads, mask, member, backward)
                assert [len(r.sends) + len(r.receives) for r in lowered.rounds] == [s.messages for s in counted.steps]
                assert launches(lowered) == [s.calls for s in counted.steps]
                many, _ = lowered_member(name, 4, heads, mask, member, backward, documents=5)
                assert [len(r.sends) + len(r.receives) for r in many.rounds] == [s.messages for s in counted.steps]
                assert launches(many) == [5 * s.calls for s in counted.steps]


@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize("name", ["ulysses", "ring", "all_gather"])
def test_messages_do_not_grow_with_documents(name: str, size: int) -> None:
    for backward in (False, True):
        one, many = (
            [len(r.sends) for r in lowered_member(name, size, HEADS["gqa8"], Mask(), 1, backward, n)[0].rounds]
            for n in (1, 128)
        )
        assert one == many


def test_a_holder_of_heads_calls_its_kernel_once_for_a_document() -> None:
    """What all members sent is gathered in the order of its tokens, and backward finds it so."""
    for backward in (False, True):
        heads = HeadCount(query=8, key=8)
        lowered, _ = lowered_member("ulysses", 4, heads, Mask(), 1, backward, documents=7, model_bytes=4)
        assert launches(lowered) == [0, 7, 0]
        # Results go straight into the messages that they leave in: nothing is packed for them.
        assert not len(lowered.rounds[2].gathers)


def test_a_block_that_goes_on_is_sent_as_it_came() -> None:
    """A ring packs its own block once; what it passes on it sends from where it was received."""
    lowered, _ = lowered_member("ring", 4, HeadCount(query=8, key=2), Mask(), 2, False, documents=3)
    assert [len(r.gathers) > 0 for r in lowered.rounds] == [True, False, False, False]
    assert [len(r.sends) for r in lowered.rounds] == [1, 1, 1, 0]


def test_groups_that_meet_in_a_round_share_its_messages() -> None:
    """2,000 documents in 200 nested groups: between two ranks one message a round and sort."""
    world, draw = 16, random.Random(1)
    groups = [tuple(draw.sample(range(world), draw.choice((2, 4, 8, 16)))) for _ in range(200)]
    mine = [g for g in groups if 0 in g]
    shards = [
        RouteShard(sequence=i, length=draw.randrange(40, 90), group=mine[i % len(mine)], schedule="ring")
        for i in range(2000 * len(mine) // 200)
    ]
    shards.sort(key=lambda s: s.sequence)
    runtime = AttentionRuntime(0, VirtualNetwork().channel(0), CPU)
    for backward in (False, True):
        for part in Route(runtime, shards).lowered(key_of(HEADS["mha"]), backward).rounds:
            for packets in (part.sends, part.receives):
                ends = [(p.peer, p.lane, p.what.partition(" ")[0]) for p, _ in packets]
                assert len(set(ends)) == len(ends) <= 2 * (world - 1)


def test_sequences_over_several_nodes_come_first() -> None:
    """In each round: the slow links get their bytes before those inside the node, and whole sequences fill the waits."""
    shards = [
        RouteShard(sequence=0, length=8, group=(1,)),
        RouteShard(sequence=1, length=64, group=(0, 1), schedule="ring", schedule_backward="ring"),
        RouteShard(sequence=2, length=64, group=(1, 0, 3), schedule="ring", schedule_backward="ring"),
        RouteShard(sequence=3, length=64, group=(1, 2), schedule="ring", schedule_backward="ring"),
    ]
    runtime = AttentionRuntime(1, VirtualNetwork().channel(1), CPU)
    for per_node, expected in ((None, [1, 2, 3]), (2, [2, 3, 1])):
        runtime.ranks_per_node = per_node
        rounds = [Route(runtime, shards).lowered(key_of(HEADS["mha"]), backward).rounds for backward in (False, True)]
        found = [[p.sequence for p, _ in r.receives] for r in sum(rounds, ())]
        assert list(dict.fromkeys(found[0])) == expected
        assert all(list(dict.fromkeys(some)) == [n for n in expected if n in some] for some in found)


def test_lowering_is_linear_and_buffers_are_reused() -> None:
    """A ring of 128 needs the arena of a ring of 32, and as many operations a step."""
    for backward in (False, True):
        small, large = (lowered_member("ring", size, HEADS["gqa3"], Mask(), 3, backward)[0] for size in (32, 128))
        assert large.arena_bytes <= 1.01 * small.arena_bytes
        operations = [sum(len(r.calls) + len(r.sends) + len(r.merges) for r in p.rounds) for p in (small, large)]
        assert operations[1] <= 4.5 * operations[0]


# ---------------------------------------------------------------- order


class Recorder:
    """A channel, and a backend, that note what the executor does."""

    def __init__(self, channel: Any, backend: Any, notes: list[str]) -> None:
        self._channel, self._backend, self._notes = channel, backend, notes

    def __getattr__(self, name: str) -> Any:
        if name == "launch":
            self._notes.append("tile")
        return getattr(self._channel if hasattr(self._channel, name) else self._backend, name)

    def post(self, sends: Any, receives: Any, tag: int) -> Any:
        self._notes.append(f"post {len(receives)}")
        return self._channel.post(sends, receives, tag)


@pytest.mark.parametrize("name", ["ring", "token_ring", "direct", "ulysses:2", "double_ring:2"])
def test_receives_of_the_next_step_are_posted_before_tiles(name: str) -> None:
    """One post a step, and before any of its tiles: what the next step computes with is under way by then."""
    group, heads = (0, 1, 2, 3), HEADS["mha"]
    shard = RouteShard(sequence=0, length=64, group=group, schedule=name, schedule_backward=name)
    key = LayerKey(heads=heads, head_dim=HEAD_DIM, dtype=torch.float32, mask=Mask())
    network, runs, noted, rounds = VirtualNetwork(3), {}, {}, {}
    for rank in group:
        notes = noted[rank] = []
        runtime = AttentionRuntime(rank, network.channel(rank), CPU, "cpu")
        recorder: Any = Recorder(runtime.channel, runtime.backend(torch.float32), notes)
        program = Route(runtime, [shard]).program(key, False)
        rounds[rank] = program.lowered.rounds
        tensors = [torch.randn(16, n, HEAD_DIM) for n in (4, 4, 4, 4)] + [torch.empty(16, 4)]
        views = program.bind(tensors, torch.empty(program.lowered.kept_bytes, dtype=torch.uint8))
        runs[rank] = Executor(recorder, recorder).run(program, views, SCORING, (0,))
    drive_together(runs, network, seed=5)
    for rank, notes in noted.items():
        expected: list[str] = []
        for part in rounds[rank]:
            if part.sends or part.receives:
                expected.append(f"post {len(part.receives)}")
            expected += ["tile"] * len(part.calls)
        assert notes == expected


# ---------------------------------------------------------------- auto


def key_of(heads: HeadCount) -> LayerKey:
    return LayerKey(heads=heads, head_dim=64, dtype=torch.bfloat16, mask=Mask())


def test_auto_takes_what_the_choice_says_and_a_fixed_name_wins() -> None:
    chooser = Chooser(links=Links(kind="peer", inner_rate=1e9, outer_rate=1e9), flops=1e14)
    runtime = AttentionRuntime(0, VirtualNetwork().channel(0), CPU, chooser=chooser)
    auto = RouteShard(sequence=0, length=4096, group=(0, 1, 2, 3), schedule="auto", schedule_backward="auto")
    route = Route(runtime, [auto])
    mha, gqa = (route.schedules(auto, key_of(h)) for h in (HeadCount(query=32, key=32), HeadCount(query=32, key=2)))
    geometry = key_of(HeadCount(query=32, key=32)).geometry()
    assert mha == chooser.names(4096, auto.group, "zigzag", geometry, Mask())
    assert mha != gqa and "auto" not in (*mha, *gqa)
    runtime.schedule = "ring/ring_q"
    assert route.schedules(auto, key_of(HEADS["mha"])) == ("ring", "ring_q")
    whole = RouteShard(sequence=0, length=4096, group=(0,), schedule="auto", schedule_backward="auto")
    assert route.schedules(whole, key_of(HEADS["mha"])) == ("local", "local")


def test_what_may_be_kept_counts_by_token_and_where_both_are_chosen() -> None:
    free = Chooser(links=Links(kind="nic", inner_rate=1e7, outer_rate=1e7), flops=1e11)
    group, geometry = (0, 1, 2, 3), key_of(HeadCount(query=8, key=8)).geometry()

    def names(chooser: Chooser, length: int = 4096, **wanted: Any) -> tuple[str, str]:
        return chooser.names(length, group, "zigzag", geometry, Mask(), **wanted)

    whole = 3 * 8 * 64 * 2  # bytes of a token's queries, keys and values
    assert names(free)[0].startswith("ulysses")
    for length in (1024, 4096, 65536):
        assert names(replace(free, kept_per_token=2.0 * whole), length) == names(free, length)
        assert not names(replace(free, kept_per_token=0.5 * whole), length)[1].startswith("ulysses")
    limit = replace(free, kept_limit=0.5 * whole * 1024)
    assert names(replace(free, kept_per_token=0.5 * whole)) == names(limit)
    assert names(replace(limit, kept_per_token=2.0 * whole)) == names(limit)
    named = replace(free, kept_per_token=0.0)
    assert names(named, wanted=("auto", "ulysses")) == names(free, wanted=("auto", "ulysses"))


@pytest.mark.parametrize("schedule", ["auto/ring", "auto/ulysses", "ulysses/auto", "token_ring/auto", "auto/ring_q"])
def test_half_of_a_pair_may_be_auto(schedule: str) -> None:
    """Slow links, for which the free choice is Ulysses both ways: what is named stays, and the other goes with it."""
    chooser = Chooser(links=Links(kind="nic", inner_rate=1e7, outer_rate=1e7), flops=1e11)
    runtime = AttentionRuntime(0, VirtualNetwork().channel(0), CPU, chooser=chooser, schedule=schedule)
    shared = RouteShard(sequence=0, length=4096, group=(0, 1, 2, 3))
    route, key = Route(runtime, [shared]), key_of(HeadCount(query=8, key=8))
    assert chooser.names(4096, shared.group, "zigzag", key.geometry(), Mask())[0].startswith("ulysses")
    found = route.schedules(shared, key)
    for name, wanted in zip(found, schedule.split("/"), strict=True):
        assert name != "auto" and wanted in (name, "auto")
    for backward in (False, True):
        route.lowered(key, backward)


def test_auto_without_a_chooser_is_refused() -> None:
    auto = RouteShard(sequence=7, length=64, group=(0, 1), schedule="auto", schedule_backward="auto")
    route = Route(AttentionRuntime(0, VirtualNetwork().channel(0), CPU), [auto])
    with pytest.raises(ValueError, match="sequence 7: schedule 'auto' needs to know links and rates"):
        route.program(key_of(HEADS["mha"]), False)


def test_every_rank_resolves_auto_alike() -> None:
    """What is chosen runs: the ranks' programs meet, and the result is exact."""
    mask, heads = Mask(), HEADS["gqa3"]
    group = (2, 0, 3, 1)
    sequences = [Sequence_(length=61, group=group, schedule="auto"), Sequence_(length=9, group=(1, 2), schedule="auto")]
    data = make_data([61, 9], heads, HEAD_DIM, mask, SCORING, torch.float64, seed=1)
    for kind, per_node in (("peer", None), ("nic", 2)):
        chooser = Chooser(links=Links(kind=kind, inner_rate=1e9, outer_rate=1e8), flops=1e12, ranks_per_node=per_node)
        result = attend_together(sequences, data, mask, SCORING, torch.float64, backend="reference", chooser=chooser)
        assert max(result.errors(data).values()) <= 1e-12


def test_results_that_come_home_hold_nobody_up() -> None:
    """TokenRing's returning partials are all late, so its queries never wait for them; a ring's traffic is all urgent."""
    shard = RouteShard(sequence=0, length=64, group=(0, 1, 2, 3), schedule="token_ring", schedule_backward="token_ring")
    route = Route(AttentionRuntime(1, VirtualNetwork().channel(1), CPU), [shard])
    for backward, kinds in ((False, {"out+lse"}), (True, {"dq"})):
        received = [p for r in route.lowered(key_of(HEADS["mha"]), backward).rounds for p, _ in r.receives]
        assert {p.what for p in received if p.late} == kinds
        assert {p.what for p in received if not p.late}.isdisjoint(kinds)
    ring = RouteShard(sequence=0, length=64, group=(0, 1, 2, 3), schedule="ring", schedule_backward="ring")
    forward = Route(route.runtime, [ring]).lowered(key_of(HEADS["mha"]), False)
    assert not any(p.late for r in forward.rounds for p, _ in r.receives)
