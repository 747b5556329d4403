"""Layouts cover every token once, divide as evenly as integers can, and refuse what makes no sense."""

from __future__ import annotations

import gc
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdp.attention.layout import LAYOUTS, make_layout, striped
from hdp.attention.mask import Mask
from hdp.attention.schedules import lay_out


@given(st.sampled_from(LAYOUTS), st.integers(0, 3000), st.integers(1, 70))
def test_every_token_has_one_owner(name: str, length: int, size: int) -> None:
    layout = make_layout(name, length, size)
    tokens = [t for ranges in layout.chunks for start, stop in ranges for t in range(start, stop)]
    assert sorted(tokens) == list(range(length))
    for member in range(size):
        owned = sum(layout.tokens(chunk) for chunk in layout.owned(member))
        ranges = layout.shard_ranges(member)
        assert owned == layout.shard_tokens(member) == sum(b - a for a, b in ranges)
        assert owned in (length // size, -(-length // size))
        assert list(ranges) == sorted(ranges)


@given(st.integers(1, 400), st.integers(1, 9), st.integers(1, 40))
def test_stripes_of_any_width_cover_every_token(length: int, size: int, stripe: int) -> None:
    layout = striped(length, size, stripe)
    tokens = sorted(t for ranges in layout.chunks for start, stop in ranges for t in range(start, stop))
    assert tokens == list(range(length))
    shares = [sum(map(layout.tokens, layout.owned(m))) for m in range(size)]
    assert shares == [layout.shard_tokens(m) for m in range(size)]


def test_a_stripe_is_part_of_the_name() -> None:
    layout = make_layout("striped:7", 100, 3)
    assert layout == striped(100, 3, 7) and layout.chunks[1][0] == (7, 14)
    assert make_layout(layout.name, 100, 3) == layout  # a layout can be made again from its name
    assert make_layout("striped", 1000, 3) == make_layout("striped:64", 1000, 3) == striped(1000, 3)


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_zigzag_gives_equal_causal_work_and_contiguous_does_not(size: int) -> None:
    length, whole = 48 * size, Mask().area((0, 48 * size), (0, 48 * size))

    def work(name: str) -> list[int]:
        layout = make_layout(name, length, size)
        return [Mask().area_of(layout.shard_ranges(m), ((0, length),)) for m in range(size)]

    assert work("zigzag") == [whole // size] * size
    assert max(work("contiguous")) > 1.4 * whole / size


@given(st.integers(0, 500), st.integers(1, 20))
def test_a_members_halves_differ_by_one_token_at_most(length: int, size: int) -> None:
    layout = make_layout("zigzag", length, size)
    for member in range(size):
        front, back = layout.owned(member)
        assert 0 <= layout.tokens(front) - layout.tokens(back) <= 1


def test_unknown_and_impossible_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown layout 'spiral': choose one of zigzag"):
        make_layout("spiral", 8, 2)
    with pytest.raises(ValueError, match="cannot lay -1 tokens over 2 ranks"):
        make_layout("zigzag", -1, 2)
    with pytest.raises(ValueError, match="over 0 ranks"):
        make_layout("zigzag", 8, 0)
    with pytest.raises(ValueError, match="stripe is 0"):
        striped(8, 2, 0)
    for name in ("zigzag:4", "spiral:4"):
        with pytest.raises(
            ValueError, match=f"unknown layout '{name}': choose one of zigzag, contiguous, striped, or striped:16"
        ):
            make_layout(name, 8, 2)
    for name in ("striped:", "striped:0", "striped:-3", "striped:2.5", "striped:x"):
        with pytest.raises(ValueError, match=f"layout '{name}': a stripe holds at least 1 token"):
            make_layout(name, 8, 2)


def test_few_striped_layouts_are_kept() -> None:
    """Each holds a range for every stripe: megabytes for a long document, and every document has a length of its own."""
    seen = weakref.WeakSet()
    for length in range(10_000, 10_200):
        layout = make_layout("striped:8", length, 4)
        assert make_layout("striped:8", length, 4) is layout  # members ask one after the other
        seen.add(lay_out(layout, Mask(window=5), "ring"))
    del layout
    gc.collect()
    assert len(seen) <= 10
