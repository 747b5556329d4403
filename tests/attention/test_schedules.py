"""Every schedule's programs, proved by the checker over groups, heads, masks, layouts and awkward lengths."""

from __future__ import annotations

import itertools

import pytest
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st

from hdp.attention.checker import check_sequence
from hdp.attention.counts import Sizes, count
from hdp.attention.exchange import SharedSequence, check_exchange, program_rounds
from hdp.attention.layout import LAYOUTS, Layout, make_layout
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount, Kind, RankProgram
from hdp.attention.schedules import Schedule, get_pair, get_schedule, lay_out

NAMES = (
    *("ring", "ring_q", "token_ring", "direct", "all_gather", "all_gather:3", "ulysses", "ulysses:2", "ulysses:3"),
    *("ulysses_home", "ulysses_home:2", "ulysses_home:3"),
    *("hybrid:1", "hybrid:2", "hybrid:3", "hybrid:4", "double_ring:1", "double_ring:2", "double_ring:4"),
)
HEADS = {
    "mha": HeadCount(query=4, key=4),
    "gqa 3:1": HeadCount(query=6, key=2),
    "gqa 8:1": HeadCount(query=16, key=2),
    "mqa": HeadCount(query=5, key=1),
}
GROUPS = (1, 2, 3, 4, 5, 8)
MASKS = (Mask(), Mask(causal=False), Mask(window=1), Mask(window=13), Mask(causal=False, window=9), Mask(window=300))
SIZES = Sizes(head_dim=8, model_bytes=2)


def serves(name: str, size: int) -> bool:
    base, _, number = name.partition(":")
    return base not in ("hybrid", "double_ring") or size % int(number) == 0


def programs(
    schedule: Schedule, layout: Layout, mask: Mask, heads: HeadCount
) -> tuple[list[RankProgram], list[RankProgram]]:
    members = range(layout.size)
    return (
        [schedule.forward(layout, mask, heads, m) for m in members],
        [schedule.backward(layout, mask, heads, m) for m in members],
    )


def prove(schedule: Schedule, layout: Layout, mask: Mask, heads: HeadCount) -> None:
    forward, backward = programs(schedule, layout, mask, heads)
    check_sequence(layout, mask, heads, forward, backward)
    for direction in (forward, backward):
        check_exchange(program_rounds([SharedSequence(number=0, group=tuple(range(layout.size)), programs=direction)]))


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("name", NAMES)
def test_every_pair_is_computed_once(name: str, heads: HeadCount) -> None:
    """Lengths that nothing divides, down to none; each group size meets each mask, and each layout several."""
    turn = itertools.count()
    for size, mask in itertools.product(GROUPS, MASKS):
        if not serves(name, size):
            continue
        lengths = (0, 1, size - 1, size + 1, 2 * size, 37, 16 * size + 5, 401)
        for layout in LAYOUTS:
            plain = make_layout(layout, lengths[next(turn) % len(lengths)], size)
            for laid in {plain, lay_out(plain, mask, name)}:
                prove(get_schedule(name), laid, mask, heads)


@examples(150)
@given(
    st.sampled_from(NAMES),
    st.integers(1, 12),
    st.integers(0, 700),
    st.sampled_from(LAYOUTS),
    st.builds(Mask, causal=st.booleans(), window=st.none() | st.integers(1, 500)),
    st.integers(1, 5),
    st.integers(1, 8),
)
def test_any_case(name: str, size: int, length: int, layout: str, mask: Mask, key: int, group: int) -> None:
    if not serves(name, size):
        size *= int(name.partition(":")[2])
    laid = lay_out(make_layout(layout, length, size), mask, name)
    prove(get_schedule(name), laid, mask, HeadCount(query=key * group, key=key))


@examples(30)
@given(
    st.sampled_from(NAMES),
    st.sampled_from(("ring_q", "token_ring", "direct", "all_gather:2", "double_ring:1")),
    st.integers(1, 6),
    st.integers(0, 90),
)
def test_any_forward_goes_with_these_backwards(first: str, second: str, size: int, length: int) -> None:
    if not serves(first, size):
        size = int(first.partition(":")[2])
    schedule = get_pair(first, second)
    prove(schedule, make_layout("zigzag", length, size), Mask(), HeadCount(query=4, key=2))
    assert not schedule.forward(make_layout("zigzag", length, size), Mask(), HeadCount(query=4, key=2), 0).keep or (
        first == second
    )


@pytest.mark.parametrize("second", ["ring", "ulysses", "hybrid:2"])
def test_a_backward_that_would_miss_its_kept_values_is_refused(second: str) -> None:
    with pytest.raises(ValueError, match=f"backward schedule '{second}' starts from what its own forward keeps"):
        get_pair("token_ring", second)


@pytest.mark.parametrize("name", [name for name in NAMES if serves(name, 4)])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_a_window_sends_and_computes_only_what_it_touches(name: str, layout: str) -> None:
    """Straight schedules send exactly what the window asks for; no schedule computes a tile that it misses."""
    size, mask, heads = 4, Mask(window=20), HeadCount(query=2, key=2)
    cut = lay_out(make_layout(layout, 4000, size), mask, name)
    chunks = cut.chunks
    for program in programs(get_schedule(name), cut, mask, heads)[0]:
        for step in program.steps:
            for tile in step.tiles:
                for q in tile.queries:
                    assert any(mask.area_of(chunks[q], chunks[k]) for k in tile.keys)
                for k in tile.keys:
                    assert any(mask.area_of(chunks[q], chunks[k]) for q in tile.queries)
            for transfer in step.sends:
                if name == "direct":
                    reader = cut.owned(transfer.peer)
                    assert all(any(mask.area_of(chunks[q], chunks[k]) for q in reader) for k in transfer.chunks)
    if layout == "contiguous" and name in ("ring", "direct", "double_ring:1", "hybrid:1", "all_gather"):
        forward = programs(get_schedule(name), cut, mask, heads)[0]
        neighbours = sum(cut.tokens(c) for p in forward for s in p.steps for t in s.sends for c in t.chunks)
        assert neighbours == 3 * (mask.window - 1)  # the end of each block to its successor, once


def test_queries_on_tour_save_a_quarter_of_a_causal_zigzag() -> None:
    size, heads = 8, HeadCount(query=2, key=2)
    layout = make_layout("zigzag", 32 * size, size)
    for name, kinds in (("token_ring", (Kind.Q, Kind.OUT)), ("direct", (Kind.KV,))):
        forward = programs(get_schedule(name), layout, Mask(), heads)[0]
        for kind in kinds:
            sent = [t for p in forward for s in p.steps for t in s.sends if t.kind is kind]
            tokens = sum(layout.tokens(c) for t in sent for c in t.chunks)
            assert tokens == 0.75 * (size - 1) * layout.length


def test_token_ring_uses_both_ways() -> None:
    layout, heads = make_layout("zigzag", 400, 5), HeadCount(query=2, key=2)
    for direction, kind in (("forward", Kind.OUT), ("backward", Kind.DQ)):
        program = getattr(get_schedule("token_ring"), direction)(layout, Mask(), heads, 2)
        for number, step in enumerate(program.steps):
            for t in step.sends:
                is_result = t.kind is kind
                assert t.lane == int(is_result)
                assert t.peer == ((2 + number - 1) % 5 if is_result else 1)


def test_ulysses_splits_one_key_head_over_many_ranks() -> None:
    """More ranks than key/value heads: each K/V head goes to several, its gradient comes back in parts."""
    layout, heads = make_layout("zigzag", 160, 8), HeadCount(query=16, key=2)
    forward, backward = programs(get_schedule("ulysses"), layout, Mask(), heads)
    tiles = [[t.heads for s in p.steps for t in s.tiles] for p in forward]
    assert tiles == [[(2 * m, 2 * m + 2)] for m in range(8)]
    gradients = {t.final for p in backward for s in p.steps for t in s.sends if t.kind is Kind.DKV}
    assert gradients == {False}
    heads = HeadCount(query=16, key=16)
    backward = programs(get_schedule("ulysses"), layout, Mask(), heads)[1]
    assert all(t.final for p in backward for s in p.steps for t in s.sends if t.kind.is_accumulator)


def test_double_ring_spreads_the_slow_transfer_over_the_inner_turns() -> None:
    layout, heads = make_layout("zigzag", 640, 4), HeadCount(query=2, key=2)
    program = get_schedule("double_ring:2").forward(layout, Mask(causal=False), heads, 1)
    across = [[t.chunks for t in s.sends if t.lane == 1] for s in program.steps]
    assert [len(c) for c in across] == [1, 1, 0, 0]
    assert {t.peer for s in program.steps for t in s.sends if t.lane == 1} == {3}


def test_slices_bound_what_an_all_gather_holds() -> None:
    layout, heads = make_layout("contiguous", 640, 8), HeadCount(query=8, key=8)
    mask = Mask(causal=False)

    def peak(name: str) -> int:
        program = get_schedule(name).forward(layout, mask, heads, 0)
        return count(program, layout, mask, heads, 0, SIZES, backward=False).peak_bytes

    assert peak("all_gather:8") * 4 == peak("all_gather")


@pytest.mark.parametrize("name", ["ring", "ring_q", "token_ring", "direct", "all_gather", "ulysses", "hybrid:4"])
def test_a_program_is_as_long_as_its_group(name: str) -> None:
    """Steps and messages of one member grow at most linearly."""
    heads = HeadCount(query=4, key=2)

    def parts(size: int) -> int:
        layout = make_layout("zigzag", 64 * size, size)
        program = get_schedule(name).forward(layout, Mask(), heads, 1)
        return sum(1 + len(s.sends) + len(s.receives) + len(s.tiles) for s in program.steps)

    assert parts(64) <= 2.2 * parts(32) <= 4.9 * parts(16)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rung", "unknown attention schedule 'rung': choose one of local, ring"),
        ("ring:2", "unknown attention schedule 'ring:2'"),
        ("hybrid", "'hybrid' needs a whole number after the colon"),
        ("hybrid:x", "'hybrid:x' needs a whole number"),
        ("hybrid:0", "hybrid:0: the degree is at least 1"),
        ("double_ring:0", "the inner ring has at least 1 member"),
        ("ulysses:0", "the number of slices is at least 1"),
        ("all_gather:0", "the number of slices is at least 1"),
    ],
)
def test_unknown_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_schedule(name)


@pytest.mark.parametrize("name", ["hybrid:3", "double_ring:3"])
def test_nodes_that_do_not_divide_the_group_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' cannot serve a group of 4 ranks: choose a divisor"):
        get_schedule(name).forward(make_layout("zigzag", 64, 4), Mask(), HeadCount(query=4, key=4), 0)


def test_local_is_for_one_rank() -> None:
    with pytest.raises(ValueError, match="'local' serves groups of 1 rank, not 2"):
        get_schedule("local").forward(make_layout("zigzag", 64, 2), Mask(), HeadCount(query=4, key=4), 0)
    prove(get_schedule("local"), make_layout("zigzag", 64, 1), Mask(), HeadCount(query=4, key=4))
