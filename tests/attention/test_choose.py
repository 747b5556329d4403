"""The choice by cost: each schedule wins where it should, and the answer is pure, stable and keeps its limits."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from cases import SCHEDULES
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st

from hdp.attention.choose import candidates, choose
from hdp.attention.counts import Sizes, count
from hdp.attention.layout import make_layout
from hdp.attention.mask import Mask
from hdp.attention.predict import Case, Links, Prediction, Rates, predict
from hdp.attention.program import HeadCount
from hdp.attention.schedules import get_pair, get_schedule, lay_out

LENGTH = 32768


def case(
    *,
    size: int = 4,
    heads: tuple[int, int] = (32, 32),
    kind: str = "nic",
    communication: float = 1.0,
    inner: float = 1.0,
    element: int = 2,
    **fields: object,
) -> Case:
    """A causal case whose ring forward computes for 1 s and sends for ``communication`` s a member."""
    count = HeadCount(query=heads[0], key=heads[1])
    block = LENGTH / size * heads[1] * 2 * 64 * element
    rate = (size - 1) * block / communication
    return Case(
        length=LENGTH,
        size=size,
        heads=count,
        sizes=Sizes(head_dim=64, model_bytes=element),
        links=Links(kind=kind, inner_rate=rate * inner, outer_rate=rate, latency=1e-3),
        rates=Rates(forward=(f := LENGTH * LENGTH / 2 / size * heads[0]), backward=f / 2.5),
        **fields,  # type: ignore[arg-type]
    )


def block_bytes(c: Case) -> float:
    return c.length / c.size * c.heads.key * c.sizes.head_dim * 2 * c.sizes.model_bytes


def nodes_of(width: int, size: int) -> tuple[int, ...]:
    return tuple(m // width for m in range(size))


MESH = ("ring", "ring_q", "token_ring", "direct")


@pytest.mark.parametrize(
    ("wanted", "given_case"),
    [
        # Grouped queries over one port: K/V are small, the ring hides them and needs no third party.
        (("ring", "ring"), case(heads=(32, 8), communication=1)),
        (("ring", "ring"), case(size=2, heads=(32, 1), communication=0.25)),
        # Multi-head attention on slow links: moving heads sends 2/size of what the ring sends.
        (("ulysses:2", "ulysses:2"), case(size=8, communication=4)),
        # The same where links keep up with computation: own pairs fill the first and the last step.
        (("ulysses_home:2", "ulysses_home:2"), case(communication=1)),
        (("ulysses_home:2", "ulysses_home:2"), case(size=2, communication=1, element=4)),
        # A mesh of links: everybody from everybody at once, in slices of heads.
        (("all_gather:2", "all_gather:4"), case(heads=(32, 4), kind="peer", communication=4)),
        # Two sizes of mesh without all-to-all schedules: queries travel for MHA, keys for GQA.
        (("token_ring", "token_ring"), case(kind="peer", communication=4, element=4, allowed=MESH, kept_limit=0)),
        (("ring", "ring"), case(heads=(32, 8), kind="peer", communication=4, allowed=("ring", "ring_q", "token_ring"))),
        # Fast nodes, slow links between them: heads inside, context across.
        (("hybrid:4", "hybrid:4"), case(size=16, heads=(32, 8), communication=4, inner=8, nodes=nodes_of(4, 16))),
        # The same with a single key/value head, which is not worth dealing out: two rings.
        (
            ("double_ring:4", "double_ring:4"),
            case(size=8, heads=(4, 1), communication=3, inner=8, nodes=nodes_of(4, 8), kept_limit=0),
        ),
        # A narrow window: ends of shards go one hop, either way round; nothing may be kept: queries return, or keys again.
        (("ring", "ring"), case(communication=1, mask=Mask(window=512))),
        (("ring", "ring_q"), case(communication=1, mask=Mask(window=512), kept_limit=0, allowed=MESH)),
        (("ring", "direct"), case(heads=(32, 4), mask=Mask(window=512), kept_limit=0, allowed=MESH)),
    ],
)
def test_each_wins_where_it_should(wanted: tuple[str, str], given_case: Case) -> None:
    assert choose(given_case).names == wanted


def test_backward_is_chosen_apart() -> None:
    """Nothing may be kept, so the ring cannot turn round: queries travel for MHA, keys for grouped queries."""
    forward, backward = choose(case(size=8, communication=1, element=4, kept_limit=0, allowed=MESH)).names
    assert (forward, backward) == ("token_ring", "ring_q")
    assert choose(case(size=8, heads=(32, 4), communication=1, kept_limit=0, allowed=MESH)).names == ("ring", "direct")


def test_a_token_ring_pays_for_mha_on_a_mesh_and_not_for_gqa() -> None:
    """Communication four times computation, 4 members, fp32."""

    def seconds(heads: tuple[int, int], kind: str) -> tuple[float, float]:
        c = case(heads=heads, kind=kind, communication=4, element=4)
        token, ring = (predict(name, c, backward=False).seconds for name in ("token_ring", "ring"))
        return token, ring

    token, ring = seconds((32, 32), "peer")
    assert ring > 1.25 * token
    token, ring = seconds((32, 8), "peer")
    assert token > 2 * ring


def test_one_rank_is_local() -> None:
    chosen = choose(case(size=2, heads=(8, 8)))
    assert chosen.seconds > 0
    assert choose(replace(case(), size=1)).names == ("local", "local")


def test_the_ring_goes_backward_only_after_itself() -> None:
    """K/V come from what forward kept: a faster forward of another kind cannot be paired with it."""
    allowed = ("ring", "token_ring")
    chosen = choose(case(size=3, communication=1, element=4, allowed=allowed))
    assert predict("token_ring", case(size=3, element=4), backward=False).seconds < chosen.forward.seconds
    assert chosen.names == ("ring", "ring")


@pytest.mark.parametrize("name", ["ring", "ring_q", "token_ring", "ulysses:3", "ulysses_home:2", "hybrid:2", "direct"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_one_direction_may_be_fixed(direction: str, name: str) -> None:
    """The other is the cheapest that goes with it; a backward that starts from what its own forward keeps brings that along."""
    for kind, heads, communication in itertools.product(("nic", "peer"), ((32, 32), (32, 4)), (0.25, 4)):
        free = case(heads=heads, kind=kind, communication=communication)
        fixed = replace(free, **{direction: name})
        chosen = choose(fixed)
        assert getattr(chosen, direction).name == name
        for forward, backward in itertools.product(candidates(fixed, False), candidates(fixed, True)):
            with contextlib.suppress(ValueError):  # pairs that do not go together
                get_pair(forward, backward)
                pair = predict(forward, free, backward=False), predict(backward, free, backward=True)
                assert chosen.seconds <= 1.031 * sum(p.seconds for p in pair)
        get_pair(*chosen.names)


def test_memory_limits_are_kept_or_refused() -> None:
    free = case(heads=(32, 8), kind="peer", communication=4)
    limit = 2.1 * block_bytes(free)
    roomy, tight = (
        choose(replace(free, allowed=("all_gather", "direct"), peak_limit=blocks * block_bytes(free)))
        for blocks in (30, 20)
    )
    assert (roomy.names, tight.names) == (("all_gather", "all_gather"), ("all_gather", "direct"))
    assert tight.backward.peak_bytes == 7 * block_bytes(free)  # and copies, which count against the limit
    none = choose(replace(free, kept_limit=0))
    assert none.backward.kept_bytes == 0
    with pytest.raises(ValueError, match=r"no schedule for about 32768 tokens over 4 ranks keeps within peak_limit"):
        choose(replace(free, peak_limit=limit / 100))


def test_kept_values_count_against_the_limit() -> None:
    c = case(heads=(32, 8), communication=1)
    assert choose(c).backward.kept_bytes == pytest.approx(block_bytes(c), rel=0.01)
    assert choose(replace(c, kept_limit=0.9 * block_bytes(c))).names[1] != "ring"


@examples(25)
@given(
    st.integers(1, 8),
    st.sampled_from([(32, 32), (32, 8), (8, 1)]),
    st.sampled_from(["nic", "peer"]),
    st.sampled_from([0.25, 1.0, 4.0]),
    st.sampled_from([None, 1000]),
    st.integers(1, 2_000_000),
)
def test_nothing_allowed_is_cheaper(
    size: int, heads: tuple[int, int], kind: str, communication: float, window: int | None, length: int
) -> None:
    c = case(size=max(size, 2), heads=heads, kind=kind, communication=communication, mask=Mask(window=window))
    c = replace(c, length=length if window is None else min(length, 60_000))
    chosen = choose(c)
    for name in candidates(c, backward=True):
        same = replace(c, length=_rounded(c.length))
        alone: Prediction = predict(name, same, backward=True)
        first = "ring" if name == "ring_q" else name
        assert chosen.seconds <= 1.031 * (alone.seconds + predict(first, same, backward=False).seconds)


def test_a_slice_more_must_be_worth_its_messages() -> None:
    """Two slices of heads send the same bytes in more messages: taken where they are shorter by more than 3 %."""
    taken = set()
    for communication in (0.01, 0.03, 0.1, 0.2, 0.4, 0.8):
        c = case(communication=communication)
        one, two = (
            sum(predict(name, c, backward=backward).seconds for backward in (False, True))
            for name in ("ulysses_home", "ulysses_home:2")
        )
        names = choose(replace(c, allowed=("ulysses_home", "ulysses_home:2"))).names
        taken.add(wanted := "ulysses_home" if one <= 1.03 * min(one, two) else "ulysses_home:2")
        assert names == (wanted, wanted), communication
    assert len(taken) == 2


def _rounded(length: int) -> int:
    shift = max(length.bit_length() - 5, 0)
    return length >> shift << shift


def test_lengths_that_are_nearly_equal_share_one_answer() -> None:
    c = case(size=8, communication=1)
    answers = {id(choose(replace(c, length=length))) for length in range(33_000, 33_700)}
    assert len(answers) == 1


def test_more_communication_never_looks_faster() -> None:
    for name, kind in itertools.product(("ring", "token_ring", "ulysses:2", "all_gather:4", "direct"), ("nic", "peer")):
        times = [predict(name, case(kind=kind, communication=c), backward=False).seconds for c in (0.1, 0.5, 1, 2, 8)]
        assert times == sorted(times)
        assert times[0] >= 0.99


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Links(kind="bus", inner_rate=1, outer_rate=1), "unknown link kind 'bus': choose one of nic, peer"),
        (lambda: Links(inner_rate=0, outer_rate=1), "link rates must be positive"),
        (lambda: Rates(forward=1, backward=0), "rates must be positive"),
        (lambda: case(nodes=(0, 0, 1)), "nodes of 3 members for a group of 4"),
        (lambda: case(allowed=("rong",)), "unknown attention schedule 'rong'"),
        (lambda: replace(case(), length=-1), "cannot choose for -1 tokens over 4 ranks"),
    ],
)
def test_nonsense_is_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("name", ["ring", "direct", "hybrid:2", "hybrid:4", "double_ring:4", "ulysses"])
def test_memory_is_that_of_the_member_that_holds_most(name: str) -> None:
    c = case(size=8, heads=(5, 1))
    layout = lay_out(make_layout("zigzag", LENGTH, 8), c.mask, name)
    for backward in (False, True):
        make = get_schedule(name).backward if backward else get_schedule(name).forward
        found = [
            count(make(layout, c.mask, c.heads, m), layout, c.mask, c.heads, m, c.sizes, backward) for m in range(8)
        ]
        predicted = predict(name, c, backward=backward)
        assert predicted.peak_bytes == max(f.peak_bytes for f in found)
        assert predicted.kept_bytes == max(f.kept_bytes for f in found)
        assert predicted.sent_bytes == max(f.sent_bytes for f in found)


@pytest.mark.parametrize(
    ("layout", "mask"),
    [
        ("zigzag", Mask(window=9000)),
        ("contiguous", Mask(window=9000)),
        ("contiguous", Mask(causal=False, window=3000)),
        ("contiguous", Mask()),
        ("striped", Mask()),
    ],
)
@pytest.mark.parametrize("name", [n for n in SCHEDULES if not n.startswith("all_gather:")])
def test_limits_hold_for_every_member_where_no_closed_form_does(name: str, layout: str, mask: Mask) -> None:
    """Windows and contiguous causal shards: members in the middle may hold, keep and send most."""
    c = replace(case(size=8, heads=(16, 8), mask=mask), layout=layout)
    laid = lay_out(make_layout(layout, LENGTH, 8), mask, name)
    for backward in (False, True):
        make = get_schedule(name).backward if backward else get_schedule(name).forward
        found = [count(make(laid, mask, c.heads, m), laid, mask, c.heads, m, c.sizes, backward) for m in range(8)]
        predicted = predict(name, c, backward=backward)
        for what in ("peak_bytes", "kept_bytes", "sent_bytes"):
            most = max(getattr(f, what) for f in found)
            assert most <= getattr(predicted, what) * 1.001, (what, backward)
            assert getattr(predicted, what) <= most * 1.01, (what, backward)


def test_a_window_longer_than_the_sequence_is_none() -> None:
    wide, none = case(mask=Mask(window=LENGTH)), case()
    assert predict("ring", wide, backward=False) == predict("ring", none, backward=False)
    assert predict("ring", case(mask=Mask(window=64)), backward=False).seconds < 1


TILES = ((64, 3e-5, 6e-5), (256, 4e-4, 8e-4), (1024, 3.7e-3, 8e-3), (4096, 3.8e-2, 8.6e-2))


def with_tiles(c: Case, **fields: Any) -> Case:
    tokens, forward, backward = TILES[-1]
    pairs = tokens * (tokens + 1) / 2
    rates = Rates(forward=pairs / forward, backward=pairs / backward)
    return replace(c, rates=replace(rates, **fields))


def test_a_square_takes_what_was_measured_and_lies_between_its_neighbours() -> None:
    rates = with_tiles(case(), tiles=TILES).rates
    for backward in (False, True):
        for tokens, *seconds in TILES:
            assert rates.square(tokens, backward) == pytest.approx(seconds[backward])
        for (low, *before), (high, *after) in pairwise(TILES):
            between = rates.square((low * high) ** 0.5, backward) / (low * high)
            assert after[backward] / high**2 < between < before[backward] / low**2
        assert rates.square(8192, backward) == pytest.approx(4 * TILES[-1][1 + backward])
        assert rates.square(32, backward) == pytest.approx(TILES[0][1 + backward] / 4)


def test_small_squares_and_results_make_schedules_in_pieces_dearer() -> None:
    """Ulysses computes a document in one call; where each member's queries go home by themselves, squares are a quarter,
    and results that are added up."""
    c = replace(case(size=4, heads=(8, 8), communication=0.01), length=4096)
    plain, squares, sums = (
        {
            name: [predict(name, with_tiles(c, **fields), backward=back).seconds for back in (False, True)]
            for name in ("ulysses", "ulysses_home")
        }
        for fields in ({}, {"tiles": TILES}, {"sum_seconds": 1e-9})
    )
    for back in (0, 1):
        for other in (squares, sums):
            more = [other[name][back] - plain[name][back] for name in ("ulysses", "ulysses_home")]
            assert more[1] > more[0] + 0.01 * plain["ulysses"][back]
