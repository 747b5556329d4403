"""Scores to 1e5, values to 1e8, gradients from 1e-38 to 1e30: sharing a sequence makes it no less exact. And what is not finite
in one document reaches its results, and no bit of any other's.

Allowed is, for the largest error of out, lse, dq, dk and dv over a sequence, against float64:

    4 x the largest error of the same sequence on one rank  +  8 x eps x the largest result
    +  eps of fp32 x (1 + the largest score) x the largest sum of the result's terms without their signs

The last is what fp32 can say of a softmax at all; an error of one rank below it is luck. A score is known to its rounding, and
its weight by as much relatively: matrix products round by the shape of the tile (up to 1 eps of the score, aten on CPU), and
one rank has the same shape in both directions; an lse that kernels hand over is rounded likewise. Gradients of rows that see
one key, or weigh one only, are differences of equal terms.

``python tests/attention/test_extremes.py 2000`` explores that many cases and prints the largest errors, over what is allowed
and over those of one rank.
"""

from __future__ import annotations

import copy
import math
import sys
from collections import defaultdict
from dataclasses import dataclass, replace

import pytest
import torch
from cases import HEAD_DIM, HEADS, MASKS, SCHEDULES, SCORING, serves
from fuzz import examples
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from virtual import RESULTS, Data, Result, Sequence_, attend_together, dense_scores, solve

from hdp.attention.backends import Scoring
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount

BACKWARD = ("", "ring_q", "token_ring", "direct", "all_gather", "all_gather:2", "double_ring:2", "double_ring:3")
KINDS = ("plain", "offset", "exact", "heavy")
"""plain: all scores are of one scale. offset: all are about that large, and differ by about one. exact: so, and multiples of a
power of two, which every kernel has alike. heavy: keys whose values are of another scale have scores lower by that much."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One sequence, how it is shared, and its scales as powers of ten."""

    name: str
    backward: str
    size: int
    heads: str
    mask: str
    length: int
    kind: str
    scores: float
    values: float
    gradients: float
    dtype: torch.dtype
    seed: int

    @property
    def scoring(self) -> Scoring:
        return Scoring(0.25) if self.kind == "exact" else SCORING

    def data(self) -> Data:
        draw, heads = torch.Generator().manual_seed(self.seed), HEADS[self.heads]
        shapes = [(self.length, n, HEAD_DIM) for n in (heads.query, heads.key, heads.key, heads.query)]
        q, k, v, do = (torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes)
        side = math.sqrt(10.0**self.scores / self.scoring.scale)  # of q and of k, where one channel makes the score
        large = 10.0**self.values
        if self.kind == "plain":
            q, k, v = q * 10.0 ** (self.scores / 2), k * 10.0 ** (self.scores / 2), v * large
        elif self.kind == "heavy":
            heavy = torch.rand(self.length, 1, generator=draw) < 0.4
            heavy[0] = False
            q[..., 0], k[..., 0] = side, torch.where(heavy, -side, 0.0)
            v = torch.where(heavy.unsqueeze(-1), v * large, v)
        else:
            if self.kind == "exact":
                q, k, side = (2 * q).round() / 2, (2 * k).round() / 2, 2.0 ** round(math.log2(side))
            q[..., 0], k[..., 0], v = side, side, v * large
        do = do * 10.0**self.gradients
        return solve(*(t.to(self.dtype) for t in (q, k, v, do)), MASKS[self.mask][0], self.scoring)

    def run(self, data: Data) -> Result:
        mask, layout = MASKS[self.mask]
        group = tuple(range(self.size))
        sequence = Sequence_(length=self.length, group=group, schedule=self.name, backward=self.backward, layout=layout)
        return attend_together([sequence], [data], mask, self.scoring, self.dtype, backend="cpu", seed=self.seed)


def sizes(name: str) -> list[int]:
    return [n for n in range(2, 8) if serves(name, n)]


@st.composite
def cases(draw: st.DrawFn, name: str) -> Case:
    size, mask = draw(st.sampled_from(sizes(name))), draw(st.sampled_from(list(MASKS)))
    stripes = draw(st.booleans()) and MASKS[mask][1] == "striped"  # they hold 64 tokens
    return Case(
        name=name,
        size=size,
        backward=draw(st.sampled_from([b for b in BACKWARD if serves(b, size)])),
        heads=draw(st.sampled_from(list(HEADS))),
        mask=mask,
        length=draw(st.integers(1, 64)) + 64 * size * stripes,
        kind=draw(st.sampled_from(KINDS)),
        scores=draw(st.integers(0, 20)) / 4,
        values=draw(st.integers(0, 8)),
        gradients=draw(st.sampled_from((0, *range(-38, 31)))),
        dtype=draw(st.sampled_from((torch.float32, torch.bfloat16))),
        seed=draw(st.integers(0, 1 << 20)),
    )


def terms_of(data: Data, heads: HeadCount, mask: Mask, scoring: Scoring) -> dict[str, Tensor]:
    """Of each result the sum of its terms without their signs."""
    group = heads.query // heads.key
    k, v = (t.abs().repeat_interleave(group, 1) for t in (data.k, data.v))
    scores = dense_scores(data.q, data.k, mask, scoring)
    weights = scores.softmax(-1)
    dp = torch.einsum("qhd,khd->hqk", data.do.abs(), v)
    ds = weights * (dp + (weights * dp).sum(-1, keepdim=True)) * scoring.scale
    dk, dv = (torch.einsum("hqk,qhd->khd", w, t.abs()) for w, t in ((ds, data.q), (weights, data.do)))
    return {
        "out": torch.einsum("hqk,khd->qhd", weights, v),
        "lse": torch.ones(1),
        "dq": torch.einsum("hqk,khd->qhd", ds, k),
        "dk": dk.unflatten(1, (heads.key, group)).sum(2),
        "dv": dv.unflatten(1, (heads.key, group)).sum(2),
    }


@dataclass(frozen=True)
class Error:
    """Of one result: the largest error where the sequence is shared, and on one rank; what is allowed; the sum of its terms."""

    shared: float
    single: float
    allowed: float
    terms: float


def errors_of(case: Case) -> dict[str, Error] | None:
    """None where fp32 on one rank is not finite."""
    data = case.data()
    mask, exact = MASKS[case.mask][0], torch.finfo(torch.float32).eps
    single = replace(case, name="local", backward="", size=1).run(data)
    if not all(getattr(single, name)[0].isfinite().all() for name in RESULTS):
        return None
    shared = case.run(data)
    scores = dense_scores(data.q, data.k, mask, case.scoring)
    largest = scores[scores.isfinite()].abs().max()
    found = {}
    for name, terms in terms_of(data, HEADS[case.heads], mask, case.scoring).items():
        want = getattr(data, name)
        mine, theirs = ((getattr(r, name)[0] - want).abs().max() for r in (shared, single))
        eps = exact if name == "lse" else torch.finfo(case.dtype).eps
        allowed = 4 * theirs + 8 * eps * want.abs().max() + exact * (1 + largest) * terms.max()
        found[name] = Error(*(float(x) for x in (mine, theirs, allowed + 2.0**-146, terms.max() + 2.0**-140)))
    return found


@pytest.mark.hypothesis  # by hand: hypothesis marks what has @given itself
@pytest.mark.parametrize("name", SCHEDULES)
def test_sharing_is_exact_at_every_scale(name: str) -> None:
    @examples(18)
    @given(case=cases(name))
    def check(case: Case) -> None:
        errors = errors_of(case)
        assume(errors is not None)
        for what, error in errors.items():
            assert error.shared <= error.allowed, f"{what}: {error}"  # NaN is not

    check()


LENGTHS = (13, 29, 5, 31, 1, 17)
VICTIMS = (1, 4, 5)
"""Shared; one token; whole, beside shared ones."""


@dataclass(frozen=True, kw_only=True)
class Poison:
    """What is not finite, and where."""

    tensor: str
    value: float
    victim: int
    token: int
    head: int
    channel: int


@st.composite
def poisons(draw: st.DrawFn) -> Poison:
    victim = draw(st.sampled_from(VICTIMS))
    return Poison(
        tensor=draw(st.sampled_from(("q", "k", "v", "do"))),
        value=draw(st.sampled_from((math.nan, math.nan, math.inf, -math.inf))),
        victim=victim,
        token=draw(st.integers(0, LENGTHS[victim] - 1)),
        head=draw(st.integers(0, 15)),
        channel=draw(st.integers(0, HEAD_DIM - 1)),
    )


def reached(poison: Poison, head: int, heads: HeadCount, mask: Mask) -> dict[str, Tensor]:
    """Which elements of each result a NaN must reach: whatever is computed from it over pairs that the mask allows."""
    length, group = LENGTHS[poison.victim], heads.query // heads.key
    one = torch.zeros(length, 1, HEAD_DIM, dtype=torch.float64)
    sees = dense_scores(one, one, mask, SCORING)[0].isfinite()
    of_key = poison.tensor in ("k", "v")
    key_head = head if of_key else head // group
    query_heads = slice(head * group, (head + 1) * group) if of_key else slice(head, head + 1)
    rows = sees[:, poison.token] if of_key else torch.arange(length) == poison.token
    keys = sees[rows].any(0)
    found = {
        name: torch.zeros(length, n, HEAD_DIM, dtype=torch.bool)
        for name, n in (("out", heads.query), ("dq", heads.query), ("dk", heads.key), ("dv", heads.key))
    }
    found["lse"] = torch.zeros(length, heads.query, dtype=torch.bool)
    found["dq"][rows, query_heads] = True
    found["dk"][keys, key_head] = True
    if poison.tensor in ("q", "k"):
        found["out"][rows, query_heads] = found["lse"][rows, query_heads] = True
        found["dv"][keys, key_head] = True
    elif poison.tensor == "v":
        found["out"][rows, query_heads, poison.channel] = True
    else:
        found["dv"][keys, key_head, poison.channel] = True
    return found


@pytest.mark.hypothesis
@pytest.mark.parametrize("name", SCHEDULES)
def test_what_is_not_finite_stays_in_its_document_and_is_seen_there(name: str) -> None:
    size = next(n for n in (3, 4) if serves(name, n))

    @examples(8)
    @given(
        poison=poisons(),
        heads_name=st.sampled_from(list(HEADS)),
        mask_name=st.sampled_from(list(MASKS)),
        backward=st.sampled_from([b for b in BACKWARD if serves(b, size)]),
        dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    )
    def check(poison: Poison, heads_name: str, mask_name: str, backward: str, dtype: torch.dtype) -> None:
        heads, (mask, layout) = HEADS[heads_name], MASKS[mask_name]
        groups = ((0,), (0, 1, 2, 3)[:size], (0,), (3, 2, 1, 0)[:size], (1,), (1,))
        sequences = [
            Sequence_(
                length=n,
                group=g,
                schedule=name if len(g) > 1 else "local",
                backward=backward * (len(g) > 1),
                layout=layout,
            )
            for n, g in zip(LENGTHS, groups, strict=True)
        ]
        draw = torch.Generator().manual_seed(poison.channel)
        data = []
        for n in LENGTHS:
            shapes = [(n, h, HEAD_DIM) for h in (heads.query, heads.key, heads.key, heads.query)]
            data.append(solve(*(torch.randn(s, generator=draw).to(dtype) for s in shapes), mask, SCORING))
        clean = attend_together(sequences, data, mask, SCORING, dtype, backend="cpu")
        changed = copy.deepcopy(data)
        tensor = getattr(changed[poison.victim], poison.tensor)
        head = poison.head % tensor.shape[1]
        tensor[poison.token, head, poison.channel] = poison.value
        result = attend_together(sequences, changed, mask, SCORING, dtype, backend="cpu")
        for number in (n for n in range(len(LENGTHS)) if n != poison.victim):
            for what in RESULTS:
                assert torch.equal(getattr(result, what)[number], getattr(clean, what)[number]), f"{what} of {number}"
        lost = {what: getattr(result, what)[poison.victim].isfinite() for what in RESULTS}
        if math.isnan(poison.value):
            for what, must in reached(poison, head, heads, mask).items():
                assert not (must & lost[what]).any(), what
        else:  # a score of -inf has no weight, and leaves its trace in the gradients
            assert not all(lost[what].all() for what in ("dq", "dk", "dv"))
            assert poison.tensor != "v" or not lost["out"].all()

    check()


def explore(number: int) -> None:
    """Prints, for each kind, dtype and power of ten of scores, values and gradients, the largest error over what is allowed,
    and the largest error, over the terms of its result, over that of the same sequences on one rank."""
    found: dict[tuple[str, str], dict[str, list[Error]]] = defaultdict(lambda: defaultdict(list))

    @given(case=st.sampled_from(SCHEDULES).flatmap(cases))
    @settings(max_examples=number, deadline=None, database=None, derandomize=True)
    def look(case: Case) -> None:
        errors = errors_of(case)
        if errors is None:
            return
        scales = {"scores": round(case.scores), "values": case.values, "gradients": 10 * round(case.gradients / 10)}
        rows = [("", case.kind), ("", str(case.dtype)), *((name, f"1e{scale}") for name, scale in scales.items())]
        for row in rows:
            for what, error in errors.items():
                found[row][what].append(error)

    look()
    print(f"{'':20}" + "".join(f"{what:>16}" for what in RESULTS))
    for row, results in sorted(found.items(), key=lambda item: (item[0][0], float(item[0][1]) if item[0][0] else 0)):
        cells = []
        for errors in results.values():
            share = max(e.shared / e.allowed for e in errors)
            shared, single = (max(getattr(e, which) / e.terms for e in errors) for which in ("shared", "single"))
            cells.append(f"{share:9.2g}{shared / max(single, 2.0**-140):7.2f}")
        print(f"{' '.join(row):20}" + "".join(cells))


if __name__ == "__main__":
    explore(int(sys.argv[1]))
