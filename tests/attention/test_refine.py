"""Layouts cut finer: a window sends what it needs and no more, a double ring sends as much in each inner step."""

from __future__ import annotations

import pytest
import torch
from cases import HEAD_DIM, HEADS, SCHEDULES, SCORING
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st
from virtual import Sequence_, attend_together, make_data

from hdp.attention.bundle import Bundle, structure_of
from hdp.attention.counts import Sizes, count
from hdp.attention.layout import LAYOUTS, Layout, make_layout
from hdp.attention.lower import Task, lower
from hdp.attention.lowered import Geometry
from hdp.attention.mask import Mask
from hdp.attention.predict import Case, Links, Rates, predict
from hdp.attention.program import HeadCount, Kind
from hdp.attention.refine import refine
from hdp.attention.schedules import get_schedule, lay_out

TWO = HeadCount(query=2, key=2)
SIZES = Sizes(head_dim=HEAD_DIM, model_bytes=2)


def needed(layout: Layout, mask: Mask, member: int) -> int:
    """Tokens of other members that a member's queries see, one by one."""
    own = [t for start, stop in layout.shard_ranges(member) for t in range(start, stop)]
    window, seen = mask.window or layout.length, set()
    for query in own:
        last = query if mask.causal else min(query + window - 1, layout.length - 1)
        seen.update(range(max(query - window + 1, 0), last + 1))
    return len(seen.difference(own))


def sent_tokens(name: str, layout: Layout, mask: Mask, kinds: tuple[Kind, ...]) -> int:
    """Tokens that all members send in forward, all heads of them."""
    programs = [get_schedule(name).forward(layout, mask, TWO, m) for m in range(layout.size)]
    transfers = [t for p in programs for s in p.steps for t in s.sends if t.kind in kinds]
    assert all(t.heads == TWO.of(t.kind) for t in transfers)
    return sum(layout.tokens(c) for t in transfers for c in t.chunks)


@given(
    st.sampled_from(LAYOUTS),
    st.integers(0, 900),
    st.integers(1, 9),
    st.builds(Mask, causal=st.booleans(), window=st.none() | st.integers(1, 500)),
    st.integers(1, 5),
)
def test_only_what_is_called_a_chunk_changes(name: str, length: int, size: int, mask: Mask, parts: int) -> None:
    plain = make_layout(name, length, size)
    cut = refine(plain, mask, parts)
    assert [cut.shard_ranges(m) for m in range(size)] == [plain.shard_ranges(m) for m in range(size)]
    assert sum(cut.chunks, ()) == tuple(sorted(sum(cut.chunks, ()))) or name == "striped"
    if size == 1 or (name == "striped" and length > 128 * size):
        assert cut is plain


@examples(60)
@given(st.sampled_from(["zigzag", "contiguous"]), st.booleans(), st.integers(2, 8), st.integers(0, 900), st.data())
def test_direct_sends_what_the_window_needs(
    layout: str, causal: bool, size: int, length: int, data: st.DataObject
) -> None:
    mask = Mask(causal=causal, window=data.draw(st.integers(1, max(length, 1))))
    laid = lay_out(make_layout(layout, length, size), mask, "direct")
    want = sum(needed(laid, mask, m) for m in range(size))
    for name in ("direct", "all_gather"):
        assert sent_tokens(name, laid, mask, (Kind.KV,)) == want


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_a_narrow_window_needs_next_to_nothing(layout: str, causal: bool) -> None:
    """8 members with 2,048 tokens each: what a window of 128 needs is sent once, by rings as well, in as few steps."""
    mask = Mask(causal=causal, window=128)
    plain = make_layout(layout, 8 * 2048 + 3, 8)
    want = sum(needed(plain, mask, m) for m in range(8))
    borders = 14 if layout == "zigzag" else 7
    assert want == borders * 127 * (1 if causal else 2)
    for name, steps in (
        ("direct", 2 if (layout, causal) == ("contiguous", True) else 3),
        ("ring", 2),
        ("all_gather", 2),
    ):
        laid = lay_out(plain, mask, name)
        assert sent_tokens(name, laid, mask, (Kind.KV,)) == want
        assert {len(get_schedule(name).forward(laid, mask, TWO, m).steps) for m in range(8)} == {steps}
    # Whole chunks were several times as much.
    assert sent_tokens("direct", plain, mask, (Kind.KV,)) >= 4 * want
    # Queries on tour: as many queries as keys would travel, and their results.
    laid = lay_out(plain, mask, "token_ring")
    assert sent_tokens("token_ring", laid, mask, (Kind.Q,)) == want
    assert sent_tokens("token_ring", laid, mask, (Kind.OUT,)) == want


@pytest.mark.parametrize("name", [name for name in SCHEDULES if not name.startswith("double_ring")])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_finer_chunks_take_no_more_calls_or_memory(layout: str, name: str) -> None:
    """What lies together is one call still, and less is held."""
    mask, size = Mask(window=40), 4
    plain = make_layout(layout, 1003, size)
    for backward in (False, True):
        found = []
        for laid in (plain, lay_out(plain, mask, name)):
            schedule = get_schedule(name)
            make = schedule.backward if backward else schedule.forward
            for member in range(size):
                counted = count(make(laid, mask, TWO, member), laid, mask, TWO, member, SIZES, backward)
                calls = sum(step.calls for step in counted.steps)
                found.append((calls, counted.peak_bytes, counted.sent_bytes))
        for before, after in zip(found[:size], found[size:], strict=True):
            assert all(a <= b for a, b in zip(after, before, strict=True)), (before, after)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("layout", "mask"), [("zigzag", Mask(window=9)), ("contiguous", Mask(causal=False, window=7))])
@pytest.mark.parametrize("name", SCHEDULES)
def test_bytes_sent_under_a_window_are_those_of_the_program(name: str, layout: str, mask: Mask, backward: bool) -> None:
    heads, group = HEADS["gqa3"], (1, 3, 0, 2)
    sequences = [Sequence_(length=101, group=group, schedule=name, layout=layout)]
    data = make_data([101], heads, HEAD_DIM, mask, SCORING, torch.bfloat16, seed=1)
    result = attend_together(sequences, data, mask, SCORING, torch.bfloat16, backend="cpu")
    laid, schedule = lay_out(make_layout(layout, 101, 4), mask, name), get_schedule(name)
    make = schedule.backward if backward else schedule.forward
    counts = [count(make(laid, mask, heads, m), laid, mask, heads, m, SIZES, backward) for m in range(4)]
    sent = result.networks[backward].sent_bytes
    assert [sent[rank] for rank in group] == [c.sent_bytes for c in counts]


# ---------------------------------------------------------------- double ring


def outer_tokens(inner: int, layout: Layout, mask: Mask, member: int, kind: Kind) -> list[int]:
    """Tokens that leave the node, by step of backward."""
    steps = get_schedule(f"double_ring:{inner}").backward(layout, mask, TWO, member).steps
    away = [[t for t in s.sends if t.peer // inner != member // inner and t.kind is kind] for s in steps]
    return [sum(layout.tokens(c) for t in some for c in t.chunks) for some in away]


@pytest.mark.parametrize("inner", [2, 3, 4, 8])
@pytest.mark.parametrize(("layout", "mask"), [("zigzag", Mask()), ("contiguous", Mask(causal=False))])
def test_a_double_ring_spreads_the_slow_transfer_over_the_inner_steps(layout: str, mask: Mask, inner: int) -> None:
    """Of a block at most 1/inner in each step, rounded up to tokens; the last round's gradients have nothing to hide behind."""
    size, nodes = 3 * inner, 3
    for length in (48 * size, 50 * size + 5):
        laid = lay_out(make_layout(layout, length, size), mask, f"double_ring:{inner}")
        for member in range(size):
            block = laid.shard_tokens(member)
            # A part may be a token longer than the next; in each half.
            most = -(-block // inner) + len(make_layout(layout, length, size).owned(member))
            keys = outer_tokens(inner, laid, mask, member, Kind.KV)
            sums = outer_tokens(inner, laid, mask, member, Kind.DKV)
            assert max(keys) <= most and max(sums[: nodes * inner]) <= most
            if layout == "contiguous":
                assert all(keys[: 2 * inner]) and not any(keys[2 * inner :])
                assert all(sums[2 * inner :]) and not any(sums[: 2 * inner])
                assert sum(keys) >= 2 * (block - 1) and sum(sums) >= 2 * (block - 1)


@pytest.mark.parametrize("inner", [2, 3, 4, 8])
@pytest.mark.parametrize(("layout", "causal"), [("zigzag", True), ("contiguous", False)])
def test_a_round_hides_an_outer_transfer_that_takes_half_as_long(layout: str, causal: bool, inner: int) -> None:
    size, length = 2 * inner, 2 * inner * 4800
    block = length / size * TWO.key * 2 * 64 * 2
    area = Mask(causal=causal).area((0, length), (0, length)) * TWO.query / size / size  # of a tile
    case = Case(
        length=length,
        size=size,
        heads=TWO,
        sizes=Sizes(head_dim=64, model_bytes=2),
        links=Links(inner_rate=block / 0.1, outer_rate=2 * block / inner),
        rates=Rates(forward=area, backward=area / 2.5),
        mask=Mask(causal=causal),
        layout=layout,
        nodes=tuple(m // inner for m in range(size)),
    )
    assert predict(f"double_ring:{inner}", case, backward=False).seconds == pytest.approx(size, rel=0.02)
    # Backward: K/V behind tiles of 2.5 s; then its gradients, twice as many bytes, take as long as a round, alone.
    seconds = predict(f"double_ring:{inner}", case, backward=True).seconds
    assert seconds == pytest.approx(2.5 * size + inner, rel=0.02)


def test_parts_that_cross_to_the_next_node_are_gathered() -> None:
    """What arrives in parts is one call all the same, and goes on inside the node as one message."""
    inner, size, mask = 4, 8, Mask(causal=False)
    structure = structure_of("contiguous", 64 * size, size, mask)
    name = f"double_ring:{inner}"
    bundle = Bundle(structure, name, tuple(range(size)), 1, [0], [64 * size], [0])
    geometry = Geometry(heads=TWO, head_dim=HEAD_DIM, model_bytes=2, sum_bytes=4)
    rounds = lower([Task(bundle, (name, name))], geometry, False).rounds
    assert [len(r.calls) for r in rounds] == [1] * size
    assert all(len(r.sends) <= 2 for r in rounds)  # inside the node, and across
