"""Places of buffers in the arena, and which rows of an accumulator hold something, against what is plain to see."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hdp.attention.arena import ALIGNMENT, Draft, Filled, pack_arena
from hdp.attention.lowered import Geometry
from hdp.attention.program import HeadCount

GEOMETRY = Geometry(heads=HeadCount(query=2, key=2), head_dim=8, model_bytes=4, sum_bytes=4)
LIVES = st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(0, 40))


def bytes_of(draft: Draft) -> int:
    return draft.bytes(GEOMETRY)


@given(st.lists(LIVES, max_size=40))
def test_what_lives_at_one_time_lies_apart(lives: list[tuple[int, int, int]]) -> None:
    drafts = [Draft(rows, 2, True, "model", born, born + more) for born, more, rows in lives]
    offsets, size = pack_arena(drafts, GEOMETRY)
    assert size == max((o + bytes_of(d) for o, d in zip(offsets, drafts, strict=True) if d.rows), default=0)
    steps = range(14)
    at_once = [sum(bytes_of(d) for d in drafts if d.born <= step <= d.died) for step in steps]
    assert max(at_once) <= size <= sum(map(bytes_of, drafts))
    for i, a in enumerate(drafts):
        for j, b in enumerate(drafts[:i]):
            if a.born <= b.died and b.born <= a.died and a.rows and b.rows:
                assert offsets[i] + bytes_of(a) <= offsets[j] or offsets[j] + bytes_of(b) <= offsets[i]


def test_dead_buffers_leave_their_bytes_and_parts_lie_inside_their_root() -> None:
    first, second, third = (Draft(4, 2, True, "model", step, step + 1) for step in (0, 1, 2))
    part = Draft(1, 2, True, "model", 1, 2, root=1, root_offset=ALIGNMENT)
    kept = Draft(4, 2, True, "model", 0, 2, kept_offset=640)
    offsets, size = pack_arena([first, second, third, part, kept], GEOMETRY)
    own = bytes_of(first)
    assert offsets == [0, own, 0, own + ALIGNMENT, 640] and size == 2 * own


HEADS = st.sampled_from([(0, 8), (0, 4), (4, 8), (2, 6), (0, 1)])
AREAS = st.tuples(st.integers(0, 30), st.integers(0, 8), HEADS)


def cells(start: int, stop: int, heads: tuple[int, int]) -> set[tuple[int, int]]:
    return {(row, head) for row in range(start, stop) for head in range(*heads)}


@given(st.lists(st.tuples(AREAS, st.booleans()), max_size=30))
def test_what_is_missing_is_what_was_never_added(areas: list[tuple[tuple[int, int, tuple[int, int]], bool]]) -> None:
    filled, held = Filled(), set[tuple[int, int]]()
    for (start, rows, heads), is_added in areas:
        asked = start, start + rows, heads
        missing = filled.missing(*asked)
        parts = [cells(*part) for part in missing]
        assert set().union(*parts) == cells(*asked) - held and sum(map(len, parts)) == len(cells(*asked) - held)
        if rows and not cells(*asked) & held:
            assert missing == [asked]  # in one piece: it can be written at once
        if is_added:
            filled.add(*asked)
            held |= cells(*asked)
