"""The arena of lowered programs against what is counted without copies, and limits on it that hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st

from hdp.attention.choose import choose
from hdp.attention.costs import cost
from hdp.attention.counts import Sizes
from hdp.attention.footprint import arena_bytes
from hdp.attention.mask import Mask
from hdp.attention.predict import Case, Links, Rates
from hdp.attention.program import HeadCount

PAIRS = [
    *(("ring", "ring"), ("token_ring", "token_ring"), ("direct", "direct"), ("all_gather", "all_gather")),
    *(("all_gather:2", "all_gather:2"), ("ulysses", "ulysses"), ("ulysses:2", "ulysses:2")),
    *(("ulysses_home", "ulysses_home"), ("hybrid:2", "hybrid:2"), ("double_ring:2", "double_ring:2")),
    *(("ring", "ring_q"), ("token_ring", "direct"), ("direct", "token_ring")),
]
HEADS = [HeadCount(query=8, key=8), HeadCount(query=8, key=2)]


def needed(names: tuple[str, str], case: Case, backward: bool, members: range) -> int:
    return arena_bytes(
        names,
        backward=backward,
        layout=case.layout,
        length=case.length,
        size=case.size,
        members=members,
        heads=case.heads,
        sizes=case.sizes,
        mask=case.mask,
        widens=case.widens,
    )


def case_of(length: int, size: int, heads: HeadCount, element: int, **fields: object) -> Case:
    return Case(
        length=length,
        size=size,
        heads=heads,
        sizes=Sizes(head_dim=16, model_bytes=element),
        links=Links(inner_rate=1e9, outer_rate=1e9),
        rates=Rates(forward=1e9, backward=4e8),
        **fields,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("element", [2, 4])
@pytest.mark.parametrize("heads", HEADS, ids=["MHA", "GQA"])
@pytest.mark.parametrize("names", [p for p in PAIRS if p[0] == p[1]], ids="/".join)
def test_closed_forms_are_what_the_arena_holds_less_copies(
    names: tuple[str, str], heads: HeadCount, element: int
) -> None:
    """Never more than the arena, nor less than an eighth of it."""
    case = case_of(4 * 128, 4, heads, element)
    for backward in (False, True):
        for member in range(4):
            counted = cost(
                names[backward],
                backward=backward,
                length=case.length,
                size=4,
                member=member,
                heads=heads,
                sizes=case.sizes,
                causal=True,
            ).peak_bytes
            assert counted <= needed(names, case, backward, range(member, member + 1)) <= 8 * counted


@examples(60)
@given(
    st.sampled_from(PAIRS),
    st.integers(2, 5),
    st.integers(600, 20000),
    st.sampled_from(HEADS),
    st.sampled_from([2, 4]),
    st.booleans(),
    st.sampled_from([None, 100, 1000]),
)
def test_limits_hold_for_the_arena(
    names: tuple[str, str],
    size: int,
    length: int,
    heads: HeadCount,
    element: int,
    widens: bool,
    window: int | None,
) -> None:
    """Below what lowering makes a pair is refused; a little above it, by what lengths are rounded, it is taken."""
    size *= 2 if names[0].endswith(":2") and size % 2 else 1
    free = case_of(
        *(length, size, heads, element),
        widens=widens and element == 2,
        mask=Mask(window=window),
        forward=names[0],
        backward=names[1],
    )
    arena = max(needed(names, free, backward, range(size)) for backward in (False, True))
    with pytest.raises(ValueError, match="keeps within peak_limit"):
        choose(replace(free, peak_limit=arena - 1))
    if window is None:
        assert choose(replace(free, peak_limit=1.15 * arena)).names == names
