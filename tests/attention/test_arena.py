"""Places of buffers in the arena, and which rows of an accumulator hold something, against what is plain to see."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hdp.attention.arena import ALIGNMENT, Filled, pack_arena

LIVES = st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(0, 4000))


def room(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


@given(st.lists(LIVES, max_size=40))
def test_what_lives_at_one_time_lies_apart(drawn: list[tuple[int, int, int]]) -> None:
    lives = [(born, born + more, size) for born, more, size in drawn]
    offsets, total = pack_arena(lives)
    assert total == max((o + room(size) for o, (_, _, size) in zip(offsets, lives, strict=True) if size), default=0)
    at_once = [sum(room(size) for born, died, size in lives if born <= step <= died) for step in range(14)]
    assert max(at_once) <= total <= sum(room(size) for _, _, size in lives)
    for i, a in enumerate(lives):
        for j, b in enumerate(lives[:i]):
            if a[0] <= b[1] and b[0] <= a[1] and a[2] and b[2]:
                assert offsets[i] + room(a[2]) <= offsets[j] or offsets[j] + room(b[2]) <= offsets[i]


def test_dead_buffers_leave_their_bytes() -> None:
    assert pack_arena([(0, 1, 256), (1, 2, 256), (2, 3, 256)]) == ([0, 256, 0], 512)


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
