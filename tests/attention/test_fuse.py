"""Kernel calls that are joined into one of several rectangles."""

from __future__ import annotations

from hdp.attention.fuse import fuse
from hdp.attention.lower import lower
from hdp.attention.lowered import Call, Geometry, Lowered, Ref, Round
from hdp.attention.mask import Shape
from hdp.attention.program import HeadCount

NOTHING = lower([], Geometry(heads=HeadCount(query=2, key=2), head_dim=8, model_bytes=2, sum_bytes=4), False)


def call(rows: tuple[int, int], keys: tuple[int, int], shape: Shape = Shape.FULL, first: bool = True) -> Call:
    """Queries and sums in tensors 0, 3 and 4, keys and values in 1 and 2."""
    inputs, sums = (Ref(0, *rows), Ref(1, *keys), Ref(2, *keys)), (Ref(3, *rows), Ref(4, *rows))
    return Call(shape=shape, inputs=inputs, sums=sums, first=(first,), cost=(rows[1] - rows[0]) * (keys[1] - keys[0]))


def fused(*calls: Call) -> tuple[Call, ...]:
    """As the calls of a round, and as whole sequences that run behind it: the same."""
    part = Round(sends=(), receives=(), calls=calls, fillers=len(calls), merges=())
    program: Lowered = fuse(Lowered(**{**vars(NOTHING), "rounds": (part,), "fillers": calls}))
    assert program.rounds[0].calls == program.fillers and program.rounds[0].fillers == len(program.fillers)
    return program.fillers


def test_rows_and_keys_are_counted_apart() -> None:
    """What a shard of one document looks at is not as long as the shard."""
    (joined,) = fused(call((4, 7), (10, 15)), call((7, 9), (15, 16)), call((9, 10), (16, 24)))
    assert joined.cuts == ((0, 3, 5, 6), (0, 5, 6, 14))
    assert joined.inputs == (Ref(0, 4, 10), Ref(1, 10, 24), Ref(2, 10, 24))
    assert joined.sums == (Ref(3, 4, 10), Ref(4, 4, 10)) and joined.cost == 15 + 2 + 8


def test_a_call_alone_says_where_it_ends() -> None:
    (alone,) = fused(call((4, 7), (10, 15)))
    assert alone.cuts == ((0, 3), (0, 5))


def test_only_what_lies_together_and_is_alike_is_joined() -> None:
    before = call((4, 7), (10, 15))
    for after in (
        call((8, 9), (15, 16)),
        call((7, 9), (16, 17)),
        call((7, 9), (15, 16), shape=Shape.CAUSAL),
        call((7, 9), (15, 16), first=False),
    ):
        assert [c.cuts for c in fused(before, after)] == [
            (tuple((0, r.stop - r.start) for r in c.inputs[:2])) for c in (before, after)
        ]
