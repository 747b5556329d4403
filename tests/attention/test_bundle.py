"""Documents that run as one: their rows, and launches of several of them."""

from __future__ import annotations

import numpy as np
import pytest
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st

from hdp.attention.bundle import Bundle, structure_of
from hdp.attention.layout import make_layout
from hdp.attention.lower import Task, lower
from hdp.attention.lowered import Geometry
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount
from hdp.attention.schedules import lay_out

GEOMETRY = Geometry(heads=HeadCount(query=2, key=2), head_dim=8, model_bytes=2, sum_bytes=4)


@examples(60)
@given(
    st.sampled_from(["zigzag", "contiguous"]), st.integers(1, 7), st.lists(st.integers(0, 90), min_size=1, max_size=9)
)
def test_a_bundle_cuts_its_documents_as_their_layouts_do(layout: str, size: int, more: list[int]) -> None:
    lengths = [2 * size + n for n in more]
    mask = Mask(causal=layout == "zigzag")
    structure = structure_of(layout, lengths[0], size, mask)
    assert {structure_of(layout, n, size, mask) for n in lengths} == {structure}
    bundle = Bundle(structure, "ring", tuple(range(size)), 0, range(len(lengths)), lengths, [0] * len(lengths))
    for row, length in zip(bundle.tokens, lengths, strict=True):
        exact = lay_out(make_layout(structure.layout, length, size), mask, "ring")
        assert row.tolist() == [exact.tokens(c) for c in range(len(exact.chunks))]
        assert bundle.layout.owners == exact.owners
    chunks = bundle.layout.owned(0)
    starts, at = bundle.rows(chunks, 0), 0
    for start, row in zip(starts, bundle.tokens, strict=True):  # document after document
        assert start == at
        at += int(row[list(chunks)].sum())
    assert bundle.count(chunks) == at


def test_what_depends_on_the_length_goes_by_it() -> None:
    """Documents of fewer tokens than chunks: neither windows nor stripes do."""
    assert structure_of("zigzag", 50, 2, Mask(window=9)) == structure_of("zigzag", 51, 2, Mask(window=9))
    assert structure_of("zigzag", 50, 2, Mask(window=50)) == structure_of("zigzag", 90, 2, Mask(window=90))
    assert structure_of("striped:4", 50, 2, Mask()) == structure_of("striped:4", 51, 2, Mask())
    assert structure_of("striped:64", 50, 2, Mask()) == structure_of("contiguous", 50, 2, Mask())
    assert structure_of("zigzag", 3, 2, Mask()) != structure_of("zigzag", 4, 2, Mask())
    assert structure_of("zigzag", 1, 1, Mask()) == structure_of("zigzag", 1000, 1, Mask())


def local(lengths: list[int], rows: list[int]) -> Bundle:
    return Bundle(structure_of("zigzag", 9, 1, Mask()), "local", (0,), 0, range(len(rows)), lengths, rows)


@pytest.mark.parametrize("packs", [False, True])
def test_documents_that_lie_together_share_a_launch_where_the_backend_packs(packs: bool) -> None:
    bundle = local([3, 2, 1, 4], [4, 7, 9, 20])
    (call,) = lower([Task(bundle, ("local", "local"))], GEOMETRY, False, packs=packs).fillers
    ranges = list(zip(call.inputs[0].starts.tolist(), call.inputs[0].stops.tolist(), strict=True))
    assert ranges == ([(4, 10), (20, 24)] if packs else [(4, 7), (7, 9), (9, 10), (20, 24)])
    if packs:
        assert [tuple(c.tolist() for c in cuts) for cuts in call.cuts] == [([0, 3, 5, 6],) * 2, ([0, 4],) * 2]
    # What a launch returns goes where it belongs in as few moves as launches and tensors.
    assert len(call.results) == 2 * call.launches
    assert call.bounds.tolist() == [2 * i for i in range(call.launches + 1)]


def test_many_small_documents_are_one_call() -> None:
    count = 5000
    lowered = lower([Task(local([3] * count, [3 * i for i in range(count)]), ("local", "local"))], GEOMETRY, True)
    (call,) = lowered.fillers
    assert call.launches == count and np.array_equal(call.costs, np.full(count, 6 * 2))
    assert not lowered.arena_bytes and not lowered.kept_bytes
