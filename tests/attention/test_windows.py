"""Many documents of unlike lengths under a window: pieces, the programs that they share, and what comes out of them."""

from __future__ import annotations

import random
from unittest import mock

import numpy as np
import pytest
import torch
from cases import HEAD_DIM, HEADS, SCHEDULES, SCORING, serves
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st
from virtual import Sequence_, attend_together, make_data

from hdp import _rectangles
from hdp.attention.bundle import Bundle, Pattern, bundles_of, structure_of
from hdp.attention.checker import check_sequence
from hdp.attention.layout import Ranges, make_layout
from hdp.attention.lower import Task, lower
from hdp.attention.lowered import Geometry, Lowered
from hdp.attention.mask import Mask, decompose
from hdp.attention.pieces import MANY, Pieces, extents, family_of
from hdp.attention.program import HeadCount
from hdp.attention.refine import refine
from hdp.attention.regions import SHAPES
from hdp.attention.schedules import cuts_chunks, get_schedule
from hdp.attention.schedules.sight import sees_ranges, sight_of
from hdp.attention.stripes import ranges_by_length, seen_by_length

TWO = HeadCount(query=2, key=2)
GEOMETRY = Geometry(heads=TWO, head_dim=HEAD_DIM, model_bytes=4, sum_bytes=4)
PLAIN = tuple(name for name in SCHEDULES if not name.startswith("double_ring"))


@st.composite
def ranges(draw: st.DrawFn) -> Ranges:
    """Ascending, none empty, none that touch."""
    cuts = sorted(set(draw(st.lists(st.integers(0, 60), max_size=8))))
    return tuple(zip(cuts[0::2], cuts[1::2], strict=False))


def in_rows(some: list[Ranges]) -> tuple[np.ndarray, np.ndarray]:
    """As ``csrc/rectangles.cpp`` takes them."""
    flat = [r for one in some for r in one]
    return np.cumsum([0, *map(len, some)]), np.array(flat, dtype=np.int64).reshape(-1, 2)


@examples(300)
@given(
    st.builds(Mask, causal=st.booleans(), window=st.none() | st.integers(1, 40)),
    st.lists(st.tuples(ranges(), ranges(), st.booleans()), max_size=4),
)
def test_all_documents_are_cut_as_one_is(mask: Mask, documents: list[tuple[Ranges, Ranges, bool]]) -> None:
    sides = [(q, q if own else k) for q, k, own in documents]
    found = _rectangles.cut(
        mask.causal, mask.window or 0, *in_rows([q for q, _ in sides]), *in_rows([k for _, k in sides])
    )
    for number, (queries, keys) in enumerate(sides):
        one = {(SHAPES[r[1]], *r[2:]) for r in found.tolist() if r[0] == number}
        expected = decompose(mask, queries, keys)
        assert one == {(r.shape, r.row_start, r.row_stop, r.key_start, r.key_stop) for r in expected}
    assert found[:, 0].tolist() == sorted(found[:, 0])


lengths_over = st.tuples(
    st.sampled_from(["zigzag", "contiguous"]),
    st.integers(2, 8),
    st.integers(1, 70),
    st.lists(st.integers(0, 700), min_size=1, max_size=5),
).map(lambda t: (t[0], t[1], t[2], [max(2 * t[1], t[2] + 1) + more for more in t[3]]))
"""Layout, members, window, and lengths that the window does not hold whole."""


@examples(150)
@given(lengths_over, st.booleans(), st.booleans(), st.booleans())
def test_a_piece_is_named_by_what_it_sees(
    case: tuple[str, int, int, list[int]], causal: bool, keys_together: bool, few: bool
) -> None:
    """Document by document and token by token; and cuts are those of the document's own layout."""
    layout, size, window, lengths = case
    mask, whole = Mask(causal=causal, window=window), [make_layout(layout, n, size) for n in lengths]
    shares = np.array([[one.tokens(c) for c in range(len(one.chunks))] for one in whole])
    with mock.patch("hdp.attention.pieces.MANY", 0 if few else MANY):  # families as they are in large groups
        family = family_of(layout, size, extents(shares, window), keys_together=keys_together)
    pieces, tokens = family.pieces(), family.cut(shares, window)
    sight = sight_of(pieces, mask)
    for one, row in zip(whole, tokens.tolist(), strict=True):
        ends = np.cumsum(row).tolist()
        spans = [(end - n, end) for end, n in zip(ends, row, strict=True)]
        assert ends[-1] == one.length
        for piece, span in enumerate(spans):
            at = pieces.wholes[piece]
            assert not row[piece] or (one.chunks[at][0][0] <= span[0] and span[1] <= one.chunks[at][0][1])
            for token in {span[0], span[1] - 1} if row[piece] else ():
                seeing = [c for c, (r,) in enumerate(one.chunks) if mask.sees_any(r, (token, token + 1))]
                seen = [c for c, (r,) in enumerate(one.chunks) if mask.sees_any((token, token + 1), r)]
                assert max(seeing) - at == pieces.ahead[piece]
                assert at - min(seen) == pieces.behind[piece]
        middle = (
            one.chunks[size][0][0] if layout == "zigzag" else 0
        )  # both sides of it are of one member: not cut there
        cuts = {r[0] for (r,) in refine(one, mask).chunks} | {one.length}
        mine = {end for end, n in zip(ends, row, strict=True) if n} | {0}
        assert cuts <= mine <= cuts | {middle - window + 1, middle + window - 1}
        for q, k in np.ndindex(len(spans), len(spans)):
            assert sight.sees(q, k) or not mask.sees_any(spans[q], spans[k])


@examples(300)
@given(
    st.integers(1, 9),
    st.integers(2, 6),
    st.lists(st.integers(0, 120), min_size=1, max_size=5),
    st.builds(Mask, causal=st.booleans(), window=st.none() | st.integers(1, 60)),
)
def test_stripes_of_many_lengths_are_those_of_each(stripe: int, size: int, more: list[int], mask: Mask) -> None:
    lengths = [stripe * size + n for n in more]
    whole = [make_layout(f"striped:{stripe}", n, size) for n in lengths]
    seen = seen_by_length(np.array(lengths), size, stripe, mask)
    for one, found in zip(whole, seen, strict=True):
        for q, k in np.ndindex(size, size):
            assert found[q, k] == sees_ranges(mask, one.chunks[q], one.chunks[k])
    for member in range(size):
        bounds, rows = ranges_by_length(np.array(lengths), size, stripe, member)
        for number, one in enumerate(whole):
            of_one = rows[bounds[number] : bounds[number + 1]].tolist()
            assert tuple((a, b) for a, b in of_one if a < b) == one.chunks[member]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("name", PLAIN)
def test_programs_of_pieces_are_right_for_all_lengths(name: str, causal: bool) -> None:
    """Every pair of pieces that may see each other in some document is computed once, and nothing hangs."""
    layout = "zigzag" if causal else "contiguous"
    draw, seen = random.Random(name), set()
    for size in (s for s in (2, 3, 4, 6) if serves(name, s)):
        for _ in range(6):
            window = draw.randint(1, 60)
            lengths = [max(2 * size, window + 1) + draw.randrange(400) for _ in range(draw.choice((1, 4)))]
            structure = structure_of(layout, lengths[0], size, Mask(causal=causal, window=window))
            for bundle in bundles_of(structure, name, tuple(range(size)), 0, range(len(lengths)), lengths, [0] * 4):
                seen.add(bundle.pattern)
    for pattern in seen:
        assert (pattern.family is not None) == cuts_chunks(name)
        check(pattern)
    assert len(seen) > 1


def check(pattern: Pattern) -> None:
    schedule, layout = get_schedule(pattern.schedule), pattern.nominal
    forward = [schedule.forward(layout, pattern.mask, TWO, m) for m in range(pattern.size)]
    check_sequence(
        layout,
        pattern.mask,
        TWO,
        forward,
        [schedule.backward(layout, pattern.mask, TWO, m) for m in range(pattern.size)],
    )


KINDS = {
    "causal": (True, "zigzag"),
    "bidirectional": (False, "contiguous"),
    "stripes": (True, "striped:5"),
    "stripes_both_ways": (False, "striped:3"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_many_documents_of_unlike_lengths_are_exact(name: str, kind: str) -> None:
    """Shared ones of two groups and whole ones, some of which fit into the window, some with fewer tokens than ranks."""
    draw, (causal, layout) = random.Random(name + kind), KINDS[kind]
    for heads in (HEADS["gqa3"], HEADS["mqa"]):
        mask = Mask(causal=causal, window=draw.choice((draw.randint(1, 40), draw.randint(1, 12))))
        sequences = []
        for _ in range(14):
            size = draw.choice([s for s in (1, 2, 4) if s == 1 or serves(name, s)])
            group = {1: (draw.randrange(4),), 2: (2, 1), 4: (3, 1, 0, 2)}[size]
            length = draw.choice((draw.randint(1, 12), draw.randint(13, 60), draw.randint(61, 200)))
            sequences.append(
                Sequence_(length=length, group=group, schedule=name if size > 1 else "local", layout=layout)
            )
        data = make_data([s.length for s in sequences], heads, HEAD_DIM, mask, SCORING, torch.float64, seed=1)
        result = attend_together(sequences, data, mask, SCORING, torch.float64, backend="reference", can_ask=False)
        assert max(result.errors(data).values()) <= 1e-12


@examples(40)
@given(
    lengths_over, st.sampled_from(("ring", "token_ring", "all_gather", "ulysses", "ulysses_home", "direct", "ring_q"))
)
def test_any_lengths_are_exact(case: tuple[str, int, int, list[int]], name: str) -> None:
    layout, size, window, lengths = case
    mask = Mask(causal=layout == "zigzag", window=window)
    group = tuple(range(size))
    sequences = [Sequence_(length=n, group=group, schedule=name, layout=layout) for n in lengths]
    data = make_data(lengths, TWO, 4, mask, SCORING, torch.float64, seed=1)
    result = attend_together(sequences, data, mask, SCORING, torch.float64, backend="reference")
    assert max(result.errors(data).values()) <= 1e-12


def lowered(name: str, size: int, window: int, lengths: list[int], backward: bool, packs: bool = False) -> Lowered:
    """Member 1's program of causal documents under a window."""
    bundles: list[Bundle] = []
    mask, group = Mask(window=window), tuple(range(size))
    by_structure: dict[object, list[int]] = {}
    for number, length in enumerate(lengths):
        by_structure.setdefault(structure_of("zigzag", length, size, mask), []).append(number)
    rows = np.cumsum([0, *(make_layout("zigzag", n, size).shard_tokens(1) for n in lengths)])
    for structure, some in by_structure.items():
        members = some, [lengths[n] for n in some], [int(rows[n]) for n in some]
        bundles += bundles_of(structure, name, group, 1, *members)
    return lower([Task(bundle, (name, name)) for bundle in bundles], GEOMETRY, backward, packs=packs)


def launches(one: Lowered) -> int:
    return sum(call.launches for part in one.rounds for call in part.calls)


def sent(one: Lowered) -> int:
    row = TWO.query * HEAD_DIM * GEOMETRY.model_bytes
    return sum((s.stop - s.start) * (1 if s.tensor < 0 else row) for part in one.rounds for _, s in part.sends)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", ["ring", "all_gather", "ulysses", "token_ring", "direct", "ulysses_home"])
def test_documents_share_messages_and_send_no_more_than_each_by_itself(name: str, backward: bool) -> None:
    draw = random.Random(name)
    for size, window in ((2, 30), (4, 50), (8, 100)):
        lengths = [draw.randint(window // 2, 12 * window) for _ in range(60)]
        many, each = (
            lowered(name, size, window, lengths, backward),
            [lowered(name, size, window, [n], backward) for n in lengths],
        )
        assert sent(many) == sum(map(sent, each))
        assert launches(many) <= 1.05 * sum(map(launches, each))
        # Twice as many documents: the same messages, each twice as large.
        twice = lowered(name, size, window, lengths * 2, backward)
        assert [len(part.sends) for part in twice.rounds] == [len(part.sends) for part in many.rounds]
        assert (sent(twice), launches(twice)) == (2 * sent(many), 2 * launches(many))
        # One for each peer and lane, but inputs and sums apart.
        for part in many.rounds:
            ends = [(packet.peer, packet.lane) for packet, _ in part.sends]
            assert all(ends.count(end) <= 2 for end in ends)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_squares_that_lie_together_are_one_launch_where_the_backend_packs(backward: bool) -> None:
    """A window of 8 over 50 tokens: seven squares on the diagonal, six behind them, a row apart, and one rectangle between the
    last two.
    """
    apart, packed = (lowered("ulysses", 2, 8, [50, 41, 33], backward, packs) for packs in (False, True))
    assert launches(apart) == (7 + 6 + 5) + (6 + 5 + 4) + 3
    assert launches(packed) == 1 + (6 + 5 + 4) + 3
    assert sum(int(c.costs.sum()) for r in packed.rounds for c in r.calls) == sum(
        int(c.costs.sum()) for r in apart.rounds for c in r.calls
    )


def test_families_are_few() -> None:
    """So that programs made for one micro-batch serve the next."""
    draw, families = random.Random(1), set()
    for _ in range(300):
        window = draw.choice((128, 512, 4096))
        lengths = np.array([[draw.randint(window + 1, 32 * window)] for _ in range(draw.randint(1, 20))])
        shares = np.concatenate([(lengths + n) // 16 for n in range(16)], axis=1)
        family = family_of("zigzag", 8, extents(shares, window), keys_together=False)
        pieces = family.pieces()
        assert isinstance(pieces, Pieces) and pieces.length < 2 * 450
        families.add(family)
    assert len(families) <= 10


def test_documents_of_large_groups_are_parted_before_families_grow() -> None:
    draw = random.Random(1)
    for size, window in ((16, 512), (32, 4096), (64, 4096)):
        lengths = [draw.randint(window + 1, 40 * window) for _ in range(40)]
        structure = structure_of("zigzag", lengths[0], size, Mask(window=window))
        bundles = bundles_of(structure, "all_gather", tuple(range(size)), 1, range(40), lengths, [0] * 40)
        assert sorted(n for b in bundles for n in b.lengths.tolist()) == sorted(lengths)
        for bundle in bundles:
            whole = make_layout("zigzag", int(bundle.lengths[0]), size)
            alone = len(refine(whole, Mask(window=window)).chunks)
            assert len(bundle.layout.chunks) <= max(MANY, 3 * alone)
        assert len(bundles) < 40
