"""The checker refuses programs broken on purpose, and slots that would hang; it accepts all that schedules make."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st

from hdp.attention.blocks import HeadBlocks
from hdp.attention.checker import ProgramError, check_sequence
from hdp.attention.counts import Count, Sizes, count
from hdp.attention.exchange import Message, SharedSequence, check_exchange, program_rounds
from hdp.attention.layout import Layout, make_layout
from hdp.attention.mask import Mask
from hdp.attention.messages import MOST_OPERATIONS, in_calls
from hdp.attention.program import HeadCount, Kind, RankProgram, Step, Tile, Transfer, Value
from hdp.attention.schedules import get_pair, get_schedule

HEADS = HeadCount(query=4, key=2)
NAMES = (
    *("ring", "token_ring", "direct", "all_gather", "all_gather:2", "ulysses", "ulysses:2", "ulysses_home:2"),
    *("hybrid:2", "double_ring:2"),
)
Broken = Callable[[RankProgram], RankProgram]


def programs(name: str, layout: Layout, backward: bool = False) -> list[RankProgram]:
    schedule = get_schedule(name)
    make = schedule.backward if backward else schedule.forward
    return [make(layout, Mask(), HEADS, m) for m in range(layout.size)]


def change_step(program: RankProgram, number: int, **fields: object) -> RankProgram:
    steps = list(program.steps)
    steps[number] = replace(steps[number], **fields)  # type: ignore[arg-type]
    return replace(program, steps=tuple(steps))


# ---------------------------------------------------------------- one sequence, broken on purpose


def without_tile(p: RankProgram) -> RankProgram:
    return change_step(p, 1, tiles=())


def doubled_tile(p: RankProgram) -> RankProgram:
    return change_step(p, 1, tiles=p.steps[1].tiles * 2)


def tile_of_fewer_heads(p: RankProgram) -> RankProgram:
    return change_step(p, 1, tiles=tuple(replace(t, heads=(0, 3)) for t in p.steps[1].tiles))


def tile_of_fewer_keys(p: RankProgram) -> RankProgram:
    return change_step(p, 0, tiles=tuple(replace(t, keys=t.keys[:1]) for t in p.steps[0].tiles))


def tile_too_early(p: RankProgram) -> RankProgram:
    first = p.steps[0].tiles + p.steps[1].tiles
    return change_step(change_step(p, 0, tiles=first), 1, tiles=())


def without_send(p: RankProgram) -> RankProgram:
    return change_step(p, 0, sends=())


def without_receive(p: RankProgram) -> RankProgram:
    return change_step(p, 1, receives=())


def send_of_other_chunks(p: RankProgram) -> RankProgram:
    return change_step(p, 0, sends=tuple(replace(t, chunks=t.chunks[:1]) for t in p.steps[0].sends))


def send_of_fewer_heads(p: RankProgram) -> RankProgram:
    return change_step(p, 0, sends=tuple(replace(t, heads=(0, 1)) for t in p.steps[0].sends))


def send_on_the_other_lane(p: RankProgram) -> RankProgram:
    return change_step(p, 0, sends=tuple(replace(t, lane=1) for t in p.steps[0].sends))


def send_in_a_later_step(p: RankProgram) -> RankProgram:
    later = change_step(p, 1, sends=p.steps[0].sends + p.steps[1].sends)
    return change_step(later, 0, sends=())


def send_to_itself(p: RankProgram) -> RankProgram:
    return change_step(p, 0, sends=tuple(replace(t, peer=1) for t in p.steps[0].sends))


def third_lane(p: RankProgram) -> RankProgram:
    return change_step(p, 0, sends=tuple(replace(t, lane=2) for t in p.steps[0].sends))


def chunk_that_does_not_exist(p: RankProgram) -> RankProgram:
    return change_step(p, 0, sends=tuple(replace(t, chunks=(99,)) for t in p.steps[0].sends))


def chunk_named_twice(p: RankProgram) -> RankProgram:
    return change_step(p, 0, tiles=tuple(replace(t, keys=t.keys[:1] * 2) for t in p.steps[0].tiles))


def heads_that_do_not_exist(p: RankProgram) -> RankProgram:
    return change_step(p, 0, tiles=tuple(replace(t, heads=(0, 9)) for t in p.steps[0].tiles))


def keeps_what_it_never_has(p: RankProgram) -> RankProgram:
    return replace(p, keep=(*p.keep, Value(kind=Kind.Q, chunks=(0,), heads=(0, 4))))


def keeps_half_a_message(p: RankProgram) -> RankProgram:
    return replace(p, keep=tuple(replace(v, chunks=v.chunks[:1]) for v in p.keep))


FORWARD_BREAKS: list[tuple[Broken, str]] = [
    (without_tile, "never meets chunk"),
    (doubled_tile, "is computed twice"),
    (tile_of_fewer_heads, "never meets chunk"),
    (tile_of_fewer_keys, "never meets chunk"),
    (tile_too_early, "computes with KV of chunk 0, head block 0, has none"),
    (without_send, "0 sends but 1 receives"),
    (without_receive, "1 sends but 0 receives"),
    (send_of_other_chunks, "but the receiver expects"),
    (send_of_fewer_heads, "but the receiver expects"),
    (send_on_the_other_lane, "0 sends but 1 receives"),
    (send_in_a_later_step, "0 sends but 1 receives"),
    (send_to_itself, "peer 1 is not another member of a group of 4"),
    (third_lane, "lane 2 is neither 0 nor 1"),
    (chunk_that_does_not_exist, r"chunks \(99,\) are not distinct chunks"),
    (chunk_named_twice, "are not distinct chunks"),
    (heads_that_do_not_exist, r"heads \(0, 9\) of Q are not in 0..4"),
    (keeps_half_a_message, "which forward does not keep"),
    (keeps_what_it_never_has, "keeps Q of chunk 0, head block 0, which it never has"),
]


@pytest.mark.parametrize(("breaks", "message"), FORWARD_BREAKS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_broken_ring_is_refused(breaks: Broken, message: str) -> None:
    layout = make_layout("zigzag", 64, 4)
    forward, backward = programs("ring", layout), programs("ring", layout, backward=True)
    check_sequence(layout, Mask(), HEADS, forward, backward)
    forward[1] = breaks(forward[1])
    with pytest.raises(ProgramError, match=message):
        check_sequence(layout, Mask(), HEADS, forward, backward)


def test_two_sends_in_the_wrong_order_are_refused() -> None:
    layout = make_layout("zigzag", 64, 4)
    forward, backward = programs("ring_q", layout), programs("ring_q", layout, backward=True)
    backward[1] = change_step(backward[1], 0, sends=backward[1].steps[0].sends[::-1])
    with pytest.raises(ProgramError, match="but the receiver expects"):
        check_sequence(layout, Mask(), HEADS, forward, backward)


def test_a_result_left_on_the_way_is_refused() -> None:
    layout = make_layout("zigzag", 64, 4)
    forward = programs("token_ring", layout)
    stripped = [replace(p, steps=p.steps[:-1]) for p in forward]
    with pytest.raises(ProgramError, match=r"a partial OUT of chunk .* is left at"):
        check_sequence(layout, Mask(), HEADS, stripped, programs("token_ring", layout, backward=True))


def test_backward_without_its_kept_block_is_refused() -> None:
    layout = make_layout("zigzag", 64, 4)
    forward = [replace(p, keep=()) for p in programs("ring", layout)]
    with pytest.raises(ProgramError, match=r"expects KV of chunk .*, which forward does not keep"):
        check_sequence(layout, Mask(), HEADS, forward, programs("ring", layout, backward=True))


def test_only_whole_messages_are_kept() -> None:
    """They stay where they arrived: half a message would have to be copied."""
    layout = make_layout("zigzag", 64, 4)
    halves = [keeps_half_a_message(p) for p in programs("ring", layout)]
    with pytest.raises(ProgramError, match="which is not a whole message"):
        check_sequence(layout, Mask(), HEADS, halves, programs("ring_q", layout, backward=True))


def test_a_partial_sum_may_not_travel_as_final() -> None:
    layout = make_layout("zigzag", 64, 4)
    backward = programs("ring", layout, backward=True)

    def mark(step: Step) -> Step:
        sums = tuple(replace(t, final=t.kind is Kind.DKV) for t in step.sends)
        return replace(step, sends=sums, receives=tuple(replace(t, final=t.kind is Kind.DKV) for t in step.receives))

    marked = [replace(p, steps=tuple(map(mark, p.steps))) for p in backward]
    with pytest.raises(ProgramError, match="as final, but it is not complete"):
        check_sequence(layout, Mask(), HEADS, programs("ring", layout), marked)


def test_an_input_is_not_sent_to_who_has_it() -> None:
    layout = make_layout("contiguous", 8, 2)
    block = Transfer(kind=Kind.KV, chunks=(0,), heads=(0, 2), peer=1)
    tiles = tuple(Tile(queries=(1,), keys=(k,), heads=(0, 4)) for k in (0, 1))
    own = Tile(queries=(0,), keys=(0,), heads=(0, 4))
    twice = [
        RankProgram(steps=(Step(sends=(block,), tiles=(own,)), Step(sends=(block,)), Step())),
        RankProgram(
            steps=(*(Step(receives=(replace(block, peer=0),)) for _ in range(2)), Step(tiles=tiles)),
        ),
    ]
    with pytest.raises(ProgramError, match="sends KV of chunk 0, head block 0 to 1, which has it"):
        check_sequence(layout, Mask(), HEADS, twice, twice)


def test_an_owner_does_not_send_its_results_away() -> None:
    layout = make_layout("contiguous", 8, 2)
    own = [Tile(queries=(m,), keys=(m,), heads=(0, 4)) for m in (0, 1)]
    away = Transfer(kind=Kind.OUT, chunks=(0,), heads=(0, 4), peer=1)
    wrong = [
        RankProgram(steps=(Step(tiles=(own[0],)), Step(sends=(away,)))),
        RankProgram(steps=(Step(tiles=(own[1],)), Step(receives=(replace(away, peer=0),)))),
    ]
    with pytest.raises(ProgramError, match="member 0 sends away its own OUT of chunk 0"):
        check_sequence(layout, Mask(), HEADS, wrong, wrong)


def test_a_program_is_needed_for_every_member() -> None:
    layout = make_layout("zigzag", 64, 4)
    with pytest.raises(ProgramError, match="forward: 3 programs for a group of 4"):
        check_sequence(layout, Mask(), HEADS, programs("ring", layout)[:3], programs("ring", layout, backward=True))


@examples(120)
@given(st.sampled_from(NAMES), st.integers(2, 5), st.booleans(), st.randoms(use_true_random=False))
def test_any_one_thing_missing_is_noticed(name: str, size: int, backward: bool, draw: random.Random) -> None:
    """Takes one send, receive or tile out of any program: never goes unnoticed."""
    size = size + size % 2 if ":2" in name else size
    layout = make_layout("zigzag", 16 * size, size)
    both = [programs(name, layout), programs(name, layout, backward=True)]
    parts = [
        (m, i, what, n)
        for m, p in enumerate(both[backward])
        for i, step in enumerate(p.steps)
        for what in ("sends", "receives", "tiles")
        for n in range(len(getattr(step, what)))
    ]
    m, i, what, n = draw.choice(parts)
    left = getattr(both[backward][m].steps[i], what)
    both[backward][m] = change_step(both[backward][m], i, **{what: left[:n] + left[n + 1 :]})
    with pytest.raises(ProgramError):
        check_sequence(layout, Mask(), HEADS, *both)


# ---------------------------------------------------------------- a whole slot


SLOT_HEADS = tuple(
    HeadCount(query=query, key=key) for query, key in ((4, 2), (8, 8), (5, 1), (6, 2), (16, 2), (3, 3), (1, 1))
)


@st.composite
def slots(draw: st.DrawFn) -> tuple[list[SharedSequence], list[SharedSequence]]:
    """Many sequences over one world, any groups in any order, any mix of schedules, layouts and heads; both directions.

    A checker's walk grows with the square of the group: one group may be large, up to the whole world, the others are small.
    """
    world = draw(st.integers(2, 64))
    rng = draw(st.randoms(use_true_random=False))
    heads = rng.choice(SLOT_HEADS)
    forward, backward = [], []
    for number in range(draw(st.integers(1, 12))):
        name = rng.choice(NAMES)
        size = rng.randint(1, world if number == 0 else min(world, 6))
        size -= size % 2 if ":2" in name and name[0] in "hd" else 0
        if size < 1 or (name.startswith("hybrid") and heads.query < 2):
            continue
        group = tuple(rng.sample(range(world), size))
        layout = make_layout(rng.choice(["zigzag", "contiguous", "striped"]), rng.randint(0, 60 * size), size)
        mask = rng.choice([Mask(), Mask(causal=False), Mask(window=rng.randint(1, 90))])
        second = rng.choice([name, "ring_q", "token_ring", "direct"])
        pair = get_pair(name, second)
        one = [pair.forward(layout, mask, heads, m) for m in range(size)]
        other = [pair.backward(layout, mask, heads, m) for m in range(size)]
        check_sequence(layout, mask, heads, one, other)
        forward.append(SharedSequence(number=number, group=group, programs=one))
        backward.append(SharedSequence(number=number, group=group, programs=other))
    return forward, backward


@examples(40)
@given(slots())
def test_any_mix_of_sequences_in_one_slot_completes(slot: tuple[list[SharedSequence], list[SharedSequence]]) -> None:
    for direction in slot:
        check_exchange(program_rounds(direction))


def test_a_world_of_64_in_one_slot() -> None:
    """A sequence over all ranks, eight over nodes, and pairs across nodes, in shuffled ring order."""
    heads, draw = HeadCount(query=64, key=8), random.Random(1)
    groups = [("hybrid:8", tuple(range(64)))]
    groups += [("ring", tuple(range(8 * n, 8 * n + 8))) for n in range(8)]
    groups += [("token_ring", (r, (r + 9) % 64)) for r in range(0, 64, 2)]
    draw.shuffle(groups)
    sequences = []
    for number, (name, group) in enumerate(groups):
        layout = make_layout("zigzag", 100 * len(group) + number, len(group))
        schedule = get_schedule(name)
        one = [schedule.forward(layout, Mask(), heads, m) for m in range(len(group))]
        check_sequence(
            layout, Mask(), heads, one, [schedule.backward(layout, Mask(), heads, m) for m in range(len(group))]
        )
        sequences.append(SharedSequence(number=number, group=group, programs=one))
    rounds = program_rounds(sequences)
    check_exchange(rounds)
    late = {rank: [calls[-1], *calls[:-1]] if rank == 5 else calls for rank, calls in rounds.items()}
    with pytest.raises(ProgramError):
        check_exchange(late)


def test_the_checkers_work_does_not_grow_with_the_heads() -> None:
    for heads in (HeadCount(query=1, key=1), HeadCount(query=128, key=8)):
        layout = make_layout("zigzag", 640, 5)
        made = [get_schedule("ring").forward(layout, Mask(), heads, m) for m in range(5)]
        assert len(HeadBlocks(heads, made).query_cuts) == 2
        made = [get_schedule("ulysses").forward(layout, Mask(), heads, m) for m in range(5)]
        assert len(HeadBlocks(heads, made).query_cuts) <= 2 + 3 * 4


def send(peer: int, tag: object = 0, lane: int = 0) -> Message:
    return Message(peer=peer, is_send=True, tag=tag, lane=lane)


def receive(peer: int, tag: object = 0, lane: int = 0) -> Message:
    return Message(peer=peer, is_send=False, tag=tag, lane=lane)


def both(peer: int) -> list[Message]:
    return [send(peer), receive(peer)]


def test_three_grouped_exchanges_in_a_circle_are_refused() -> None:
    """They match pairwise, and hang: each waits for a peer that runs another call."""
    circle = {0: [both(1), both(2)], 1: [both(2), both(0)], 2: [both(0), both(1)]}
    with pytest.raises(ProgramError, match=r"deadlock: rank 0 waits in round 0 for its (send to|receive from) rank 1"):
        check_exchange(circle)
    check_exchange({0: [both(1), both(2)], 1: [both(0), both(2)], 2: [both(0), both(1)]})
    check_exchange({rank: [[*both((rank + 1) % 3), *both((rank + 2) % 3)]] for rank in range(3)})


def test_a_circle_over_two_lanes_is_refused() -> None:
    """A round ends when both lanes have ended, so a second lane does not open the circle."""
    rounds = {
        0: [[send(1)], [receive(1, lane=1)]],
        1: [[send(0, lane=1)], [receive(0)]],
    }
    with pytest.raises(ProgramError, match=r"deadlock.*rank 0 in round 0, rank 1 in round 0"):
        check_exchange(rounds)
    check_exchange({0: [[send(1), receive(1, lane=1)]], 1: [[send(0, lane=1), receive(0)]]})


def test_messages_of_a_pair_meet_in_order() -> None:
    with pytest.raises(ProgramError, match="rank 0 sends a to rank 1, which expects b"):
        check_exchange({0: [[send(1, "a"), send(1, "b")]], 1: [[receive(0, "b"), receive(0, "a")]]})
    check_exchange({0: [[send(1, "a"), send(1, "b")]], 1: [[receive(0, "a"), receive(0, "b")]]})


@pytest.mark.parametrize("peer", [1, 7])
def test_a_send_without_its_receive_is_refused(peer: int) -> None:
    with pytest.raises(ProgramError, match=f"deadlock: rank 0 waits in round 0 for its send to rank {peer}"):
        check_exchange({0: [[send(peer)]], 1: [[]]})


@examples(60)
@given(st.integers(3, 16), st.randoms(use_true_random=False))
def test_rotated_rounds_hang(size: int, draw: random.Random) -> None:
    """A global order completes; the same exchanges with each rank beginning at itself do not."""
    ring = list(range(size))
    draw.shuffle(ring)
    edges = [(ring[i], ring[(i + 1) % size]) for i in range(size)]
    ordered = {r: [both(b if r == a else a) for a, b in edges if r in (a, b)] for r in ring}
    check_exchange(ordered)
    rotated = {r: [both(ring[(i + 1) % size]), both(ring[i - 1])] for i, r in enumerate(ring)}
    with pytest.raises(ProgramError, match="deadlock"):
        check_exchange(rotated)


# ---------------------------------------------------------------- counts


def counts(name: str, layout: Layout, backward: bool, mask: Mask) -> list[Count]:
    schedule, sizes = get_schedule(name), Sizes(head_dim=8, model_bytes=2)
    made = [(schedule.backward if backward else schedule.forward)(layout, mask, HEADS, m) for m in range(layout.size)]
    return [count(p, layout, mask, HEADS, m, sizes, backward) for m, p in enumerate(made)]


@examples(60)
@given(
    st.sampled_from((*NAMES, "ring_q")),
    st.integers(2, 6),
    st.integers(0, 300),
    st.booleans(),
    st.sampled_from([Mask(), Mask(causal=False), Mask(window=17)]),
)
def test_what_is_sent_arrives_and_all_area_is_counted(
    name: str, size: int, length: int, backward: bool, mask: Mask
) -> None:
    size = size + size % 2 if ":2" in name else size
    layout = make_layout("zigzag", length, size)
    found = counts(name, layout, backward, mask)
    assert sum(c.sent_bytes for c in found) == sum(c.received_bytes for c in found)
    assert sum(c.area for c in found) == mask.area((0, length), (0, length)) * HEADS.query
    for c in found:
        assert all(step.buffer_bytes >= 0 for step in c.steps)
        held = sum(sum(s.received.values()) for s in c.steps) + c.kept_bytes
        assert c.peak_bytes <= held + 2 * c.sent_bytes  # sums are fp32 here, and may leave in 2 bytes


def test_buffers_of_a_small_ring_by_hand() -> None:
    """3 members, bidirectional, 10 tokens each: a KV block is 10 x 2 heads x 2 x 8 elements."""
    layout = make_layout("contiguous", 30, 3)
    block, sums = 10 * 2 * 2 * 8 * 2, 10 * 2 * 2 * 8 * 4
    forward = counts("ring", layout, False, Mask(causal=False))[0]
    assert [s.buffer_bytes for s in forward.steps] == [block, block, 0]  # the second block is kept
    assert forward.kept_bytes == block
    backward = counts("ring", layout, True, Mask(causal=False))[0]
    # kept block, next block, its sum; next block, its sum, what arrives for it, what leaves; own sum arrives, one leaves
    assert [s.buffer_bytes for s in backward.steps] == [2 * block + sums, block + 3 * sums, 2 * sums]


def split_calls(rounds: dict[int, list[list[Message]]]) -> dict[int, list[list[Message]]]:
    """Each round in the grouped calls in which a channel posts it."""
    world = len(rounds)
    return {
        rank: [[c[i] for i in places] for c in calls for places in in_calls([m.peer for m in c], rank, world)]
        for rank, calls in rounds.items()
    }


@pytest.mark.parametrize(("world", "rounds"), [(16, 3), (400, 2)])
def test_rounds_of_many_operations_are_several_calls_in_one_order(world: int, rounds: int) -> None:
    """All-to-all of inputs and sums, every round: no call is too large, and none waits for another in a circle."""
    tags = ("inputs", "sums")
    whole = {
        rank: [
            [
                Message(peer=peer, is_send=is_send, tag=(number, tag))
                for peer in range(world)
                for is_send in (True, False)
                for tag in tags
                if peer != rank
            ]
            for number in range(rounds)
        ]
        for rank in range(world)
    }
    split = split_calls(whole)
    assert max(len(call) for calls in split.values() for call in calls) <= MOST_OPERATIONS
    assert (len(split[0]) == rounds) == (world == 16)
    check_exchange(split)


def test_groups_far_and_near_meet_in_the_same_calls() -> None:
    """Ranks that skip the calls of some distances, in rounds of their own number."""
    world, draw = 300, random.Random(3)
    whole: dict[int, list[list[Message]]] = {rank: [[] for _ in range(4)] for rank in range(world)}
    for _ in range(900):
        a, b = draw.sample(range(world), 2)
        number = draw.randrange(4)
        whole[a][number].append(Message(peer=b, is_send=True, tag=number))
        whole[b][number].append(Message(peer=a, is_send=False, tag=number))
    check_exchange(split_calls(whole))
