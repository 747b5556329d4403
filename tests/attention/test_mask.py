"""Masks cut into rectangles, and their areas, against every pair written out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hdp.attention.layout import Ranges
from hdp.attention.mask import Mask, Rectangle, Shape, decompose
from hdp.attention.schedules.sight import sees_ranges

masks = st.builds(Mask, causal=st.booleans(), window=st.none() | st.integers(1, 40))


@st.composite
def ranges(draw: st.DrawFn) -> Ranges:
    """Ascending, disjoint, some empty."""
    cuts = sorted(draw(st.lists(st.integers(0, 60), min_size=2, max_size=8)))
    return tuple(zip(cuts[0::2], cuts[1::2], strict=False))


def positions(some: Ranges) -> NDArray[np.int64]:
    return np.array([t for start, stop in some for t in range(start, stop)], dtype=np.int64)


def allowed(mask: Mask, queries: Ranges, keys: Ranges) -> NDArray[np.bool_]:
    """The definition, pair by pair."""
    q, k = positions(queries)[:, None], positions(keys)[None, :]
    reach = 10**9 if mask.window is None else mask.window
    return ((k <= q) if mask.causal else (k - q < reach)) & (q - k < reach)


def cells(r: Rectangle) -> NDArray[np.bool_]:
    rows, columns = np.arange(r.row_stop - r.row_start)[:, None], np.arange(r.key_stop - r.key_start)[None, :]
    shapes = {Shape.FULL: rows >= 0, Shape.CAUSAL: columns <= rows, Shape.ANTICAUSAL: columns >= rows}
    return np.broadcast_to(shapes[r.shape], (rows.size, columns.size))


@given(masks, ranges(), ranges())
def test_rectangles_are_disjoint_and_cover_the_mask(mask: Mask, queries: Ranges, keys: Ranges) -> None:
    expected = allowed(mask, queries, keys)
    found = np.zeros(expected.shape, dtype=np.int64)
    for r in decompose(mask, queries, keys):
        if r.shape is not Shape.FULL:
            assert r.row_stop - r.row_start == r.key_stop - r.key_start, "triangles are squares"
        assert r.area == cells(r).sum() > 0
        found[r.row_start : r.row_stop, r.key_start : r.key_stop] += cells(r)
    assert (found == expected).all()


@given(masks, ranges(), ranges())
def test_areas_and_sight_are_those_of_the_pairs(mask: Mask, queries: Ranges, keys: Ranges) -> None:
    full = tuple(tuple(r for r in some if r[0] < r[1]) for some in (queries, keys))
    expected = allowed(mask, queries, keys)
    assert mask.area_of(*full) == expected.sum()
    assert sees_ranges(mask, queries, keys) == expected.any()
    for q in queries:
        for k in keys:
            pairs = allowed(mask, (q,), (k,))
            assert mask.area(q, k) == pairs.sum()
            assert mask.sees_any(q, k) == pairs.any()
            if pairs.size:
                assert mask.sees_all(q, k) == pairs.all()


def test_common_pieces_are_one_rectangle() -> None:
    own = ((0, 4), (12, 16))  # a zigzag shard with itself: causal in packed rows as well
    assert [r.shape for r in decompose(Mask(), own, own)] == [Shape.CAUSAL]
    assert [r.shape for r in decompose(Mask(), ((4, 8), (8, 12)), ((0, 4),))] == [Shape.FULL]
    assert len(decompose(Mask(causal=False), own, ((4, 12),))) == 1
    assert decompose(Mask(window=3), ((100, 110),), ((0, 50),)) == ()


def test_a_narrow_window_costs_rectangles_in_proportion_to_its_length() -> None:
    pieces = decompose(Mask(window=16), ((0, 1600),), ((0, 1600),))
    assert sum(r.area for r in pieces) == Mask(window=16).area((0, 1600), (0, 1600))
    assert len(pieces) <= 2 * 1600 // 16


def test_an_empty_window_is_refused() -> None:
    with pytest.raises(ValueError, match="sliding window is 0"):
        Mask(window=0)
