"""Closed forms against programs walked step by step: bytes, areas, steps, buffers, kept values, for every member."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st

from hdp.attention.costs import Cost, cost
from hdp.attention.counts import Sizes, count
from hdp.attention.layout import make_layout
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount
from hdp.attention.schedules import get_schedule, lay_out

NAMES = (
    *("ring", "ring_q", "token_ring", "direct", "all_gather", "all_gather:3", "ulysses", "ulysses:2", "ulysses:3"),
    *("ulysses_home", "ulysses_home:2", "ulysses_home:3"),
    *("hybrid:1", "hybrid:2", "hybrid:3", "hybrid:4"),
    *("double_ring:1", "double_ring:2", "double_ring:3", "double_ring:4"),
)
HEADS = (
    HeadCount(query=4, key=4),
    HeadCount(query=6, key=2),
    HeadCount(query=16, key=2),
    HeadCount(query=20, key=4),
    HeadCount(query=5, key=1),
)


def serves(name: str, size: int) -> bool:
    base, _, number = name.partition(":")
    return base not in ("hybrid", "double_ring") or size % int(number) == 0


def walked(name: str, backward: bool, length: int, size: int, member: int, heads: HeadCount, causal: bool) -> Cost:
    sizes, mask = Sizes(head_dim=8, model_bytes=2), Mask(causal=causal)
    layout = lay_out(make_layout("zigzag" if causal else "contiguous", length, size), mask, name)
    schedule = get_schedule(name)
    program = (schedule.backward if backward else schedule.forward)(layout, mask, heads, member)
    found = count(program, layout, mask, heads, member, sizes, backward)
    return Cost(
        sent_bytes=found.sent_bytes,
        area=found.area,
        steps=len(program.steps),
        peak_bytes=found.peak_bytes,
        kept_bytes=found.kept_bytes,
    )


def in_closed_form(
    name: str, backward: bool, length: int, size: int, member: int, heads: HeadCount, causal: bool
) -> Cost:
    sizes = Sizes(head_dim=8, model_bytes=2)
    return cost(
        name, backward=backward, length=length, size=size, member=member, heads=heads, sizes=sizes, causal=causal
    )


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("name", NAMES)
def test_closed_forms_equal_the_programs(name: str, causal: bool) -> None:
    for size in (1, 2, 3, 4, 5, 6, 8):
        if not serves(name, size):
            continue
        for heads in HEADS:
            for member in range(size):
                for backward in (False, True):
                    case = (name, backward, 12 * size, size, member, heads, causal)
                    assert in_closed_form(*case) == walked(*case), case


@examples(80)
@given(st.sampled_from(NAMES), st.booleans(), st.integers(2, 24), st.integers(1, 40), st.booleans(), st.data())
def test_closed_forms_hold_at_any_size(
    name: str, backward: bool, size: int, tokens: int, causal: bool, data: st.DataObject
) -> None:
    size *= 1 if serves(name, size) else int(name.partition(":")[2])
    heads = data.draw(st.sampled_from(HEADS))
    tokens *= int(name.partition(":")[2]) if name.startswith("double_ring") else 1  # it cuts halves into equal parts
    case = (name, backward, 2 * size * tokens, size, data.draw(st.integers(0, size - 1)), heads, causal)
    assert in_closed_form(*case) == walked(*case)


@examples(80)
@given(st.sampled_from(NAMES), st.booleans(), st.integers(2, 12), st.integers(500, 3000), st.booleans())
def test_closed_forms_are_a_few_tokens_off_at_odd_lengths(
    name: str, backward: bool, size: int, length: int, causal: bool
) -> None:
    size *= 1 if serves(name, size) else int(name.partition(":")[2])
    heads = HeadCount(query=4, key=2)
    case = (name, backward, length, size, size - 1, heads, causal)
    formula, found = in_closed_form(*case), walked(*case)
    # Each block that is sent or held may be a token longer or shorter, in each half; 20 values a token, head and step.
    slack = 2 * (size + 2) * 4 * heads.query * 2 * 8 * 4
    assert formula.steps == found.steps
    assert abs(formula.sent_bytes - found.sent_bytes) <= slack
    assert abs(formula.peak_bytes - found.peak_bytes) <= slack
    assert abs(formula.area - found.area) <= 4 * length * heads.query * size


def test_what_the_papers_say() -> None:
    """Blocks sent by all members together, for multi-head attention in fp32."""
    size, heads, sizes = 8, HeadCount(query=4, key=4), Sizes(head_dim=64, model_bytes=4)
    length = 64 * size
    query = length * 4 * 64 * 4  # bytes of all queries

    def sent(name: str, backward: bool, causal: bool) -> float:
        members = range(size)
        made = (
            cost(name, backward=backward, length=length, size=size, member=m, heads=heads, sizes=sizes, causal=causal)
            for m in members
        )
        return sum(c.sent_bytes for c in made) / query

    per_head = 1 / 64  # lse, or delta: one number for 64
    assert sent("ring", False, False) == 2 * (size - 1)
    assert sent("ring", True, False) == 2 * (size - 2) + 2 * (size - 1)  # N - 1 hops for the gradients
    assert sent("all_gather", False, False) == 2 * (size - 1)
    assert sent("all_gather", True, False) == 4 * (size - 1)
    assert sent("token_ring", False, False) == pytest.approx((2 + per_head) * (size - 1))
    assert sent("token_ring", False, True) == pytest.approx(0.75 * (2 + per_head) * (size - 1))
    assert sent("ring_q", True, False) == pytest.approx((3 + 2 * per_head) * (size - 1))  # 3 units for 4
    assert sent("ulysses", False, True) == pytest.approx((4 + per_head) * (size - 1) / size)
    assert sent("direct", False, True) == 0.75 * 2 * (size - 1)
    assert sent("direct", True, True) == 0.75 * 4 * (size - 1)


def test_direct_backward_is_even_in_fp32() -> None:
    heads, sizes = HeadCount(query=8, key=2), Sizes(head_dim=64, model_bytes=4)

    def sent(member: int) -> float:
        made = cost("direct", backward=True, length=640, size=5, member=member, heads=heads, sizes=sizes, causal=True)
        return made.sent_bytes

    assert len({sent(m) for m in range(5)}) == 1


def test_unknown_schedules_and_impossible_groups_are_refused() -> None:
    heads, sizes = HeadCount(query=8, key=2), Sizes(head_dim=64, model_bytes=4)
    with pytest.raises(ValueError, match="unknown attention schedule 'rong'"):
        cost("rong", backward=False, length=64, size=2, member=0, heads=heads, sizes=sizes, causal=True)
    with pytest.raises(ValueError, match="'local' does not serve a group of 2 ranks"):
        cost("local", backward=False, length=64, size=2, member=0, heads=heads, sizes=sizes, causal=True)
    with pytest.raises(ValueError, match="'hybrid:3' does not serve a group of 4 ranks"):
        cost("hybrid:3", backward=False, length=64, size=4, member=0, heads=heads, sizes=sizes, causal=True)


def test_the_documented_table_is_what_the_forms_say() -> None:
    """docs/attention.md: blocks sent by all of 8 members together, in units of all queries' bytes."""
    text = (Path(__file__).parents[2] / "docs" / "attention.md").read_text(encoding="utf-8")
    table = text.partition("| | bidirectional, forward |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(table) >= 10
    # A large head_dim leaves lse and delta out of account.
    heads, sizes, length = HeadCount(query=8, key=8), Sizes(head_dim=4096, model_bytes=4), 512
    for line in table:
        name, *figures = (cell.strip(" `") for cell in line.strip("|").split("|"))
        columns = [(causal, backward) for causal in (False, True) for backward in (False, True)]
        for figure, (causal, backward) in zip(figures, columns, strict=True):
            sent = sum(
                cost(
                    name, backward=backward, length=length, size=8, member=m, heads=heads, sizes=sizes, causal=causal
                ).sent_bytes
                for m in range(8)
            )
            assert float(figure) == pytest.approx(sent / (length * 8 * 4096 * 4), abs=0.006), name
