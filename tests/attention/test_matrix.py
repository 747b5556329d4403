"""Schedules x heads x masks x group sizes x awkward lengths, through lowering and executor, against float64.

One micro-batch holds all group sizes at once, on virtual ranks, in an order of delivery that is drawn. Each sequence is held
to its limit by itself. ``make test`` runs a part of the matrix in which each schedule meets each mask and each number of heads;
``make matrix`` runs the whole.
"""

from __future__ import annotations

import os
import random

import pytest
import torch
from cases import GROUPS, HEAD_DIM, HEADS, MASKS, SCHEDULES, SCORING, mixed, serves
from virtual import RESULTS, Result, Sequence_, attend_together, make_data

pytestmark = pytest.mark.slow

WORLD = max(GROUPS)
WHOLE = "HDP_WHOLE_MATRIX" in os.environ
FEW = 32
"""Tokens below which the roundings of a sequence are too few for a ratio of two errors to mean anything: judged together."""


def case(name: str, heads_name: str, mask_name: str) -> tuple[list[Sequence_], random.Random]:
    draw = random.Random(f"{name} {heads_name} {mask_name}")
    return mixed(name, draw, WORLD, MASKS[mask_name][1]), draw


def test_the_cases_are_all_there() -> None:
    for name in SCHEDULES:
        for mask_name in MASKS:
            sequences, _ = case(name, "mha", mask_name)
            shared = [s for s in sequences if s.schedule == name]
            for size in (s for s in GROUPS if s > 1 and serves(name, s)):
                found = [s.length for s in shared if len(s.group) == size]
                assert any(length < size for length in found) and any(length >= 37 for length in found)
                assert all(length % size for length in found if length < size)


def turn(name: str, mask_name: str) -> int:
    """Numbers of heads take turns: each schedule meets all of them, and so does each mask."""
    return list(SCHEDULES).index(name) + list(MASKS).index(mask_name)


@pytest.mark.parametrize("other", range(4) if WHOLE else [0])
@pytest.mark.parametrize("mask_name", MASKS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_float32(name: str, mask_name: str, other: int) -> None:
    """Within 1e-5 of float64, for out, lse, dq, dk, dv of every sequence."""
    heads_name = list(HEADS)[(turn(name, mask_name) + other) % len(HEADS)]
    check(name, heads_name, mask_name, torch.float32, "cpu", 1e-5)


@pytest.mark.parametrize("heads_name", HEADS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_float64(name: str, heads_name: str) -> None:
    """To rounding: what fp32 cannot tell from a pair that is missing shows here. Each pair of these meets one mask."""
    mask_name = list(MASKS)[(list(SCHEDULES).index(name) + list(HEADS).index(heads_name)) % len(MASKS)]
    check(name, heads_name, mask_name, torch.float64, "reference", 1e-12)


def check(name: str, heads_name: str, mask_name: str, dtype: torch.dtype, backend: str, limit: float) -> None:
    sequences, draw = case(name, heads_name, mask_name)
    mask = MASKS[mask_name][0]
    data = make_data([s.length for s in sequences], HEADS[heads_name], HEAD_DIM, mask, SCORING, torch.float32, seed=1)
    options = {"seed": draw.randrange(1000), "can_ask": draw.random() < 0.5}
    result = attend_together(sequences, data, mask, SCORING, dtype, backend=backend, **options)
    for what, error in result.errors(data).items():
        assert error <= limit, f"{what}: {error}"


PAIRS = [(name, mask) for name in SCHEDULES for mask in MASKS]


@pytest.mark.parametrize(("name", "mask_name"), PAIRS if WHOLE else PAIRS[::2])
def test_bfloat16(name: str, mask_name: str) -> None:
    """At most 1.5 x the error of the same sequence on one rank in bf16; what is fp32 in both (lse) within fp32's 1e-5.

    Each pair of these meets one number of heads: what bf16 adds to the cases of fp32 are casts, which all heads pass alike.
    """
    heads_name = list(HEADS)[turn(name, mask_name) // 2 % len(HEADS)]
    sequences, draw = case(name, heads_name, mask_name)
    mask, layout = MASKS[mask_name]
    data = make_data([s.length for s in sequences], HEADS[heads_name], HEAD_DIM, mask, SCORING, torch.bfloat16, seed=2)

    def run(some: list[Sequence_]) -> Result:
        return attend_together(some, data, mask, SCORING, torch.bfloat16, backend="cpu", seed=draw.randrange(1000))

    shared = run(sequences)
    single = run([Sequence_(length=s.length, group=(0,), layout=layout) for s in sequences])
    few = [i for i, s in enumerate(sequences) if s.length < FEW]
    for numbers in (few, *([i] for i in range(len(sequences)) if i not in few)):
        mine, theirs = shared.errors_of(data, numbers), single.errors_of(data, numbers)
        for what in RESULTS:
            text = f"{what} of {[sequences[i] for i in numbers]}: {mine[what]} against {theirs[what]} on one rank"
            assert mine[what] <= max(1.5 * theirs[what], 1e-5), text


@pytest.mark.parametrize("name", ["ring", "token_ring", "ulysses", "all_gather"])
def test_partials_of_bfloat16_are_not_rounded(name: str) -> None:
    """The CPU computes them in fp32, so a sequence over 8 ranks is nearer to float64 than on one (rounded partials: 1.1 x)."""
    mask, heads = MASKS["causal"][0], HEADS["mha"]
    data = make_data([301], heads, HEAD_DIM, mask, SCORING, torch.bfloat16, seed=2)

    def errors(group: tuple[int, ...], schedule: str) -> dict[str, float]:
        sequences = [Sequence_(length=301, group=group, schedule=schedule)]
        return attend_together(sequences, data, mask, SCORING, torch.bfloat16, backend="cpu").errors(data)

    shared, single = errors(tuple(range(8)), name), errors((0,), "local")
    for what in RESULTS:
        assert shared[what] <= 0.95 * single[what], what
