"""The merge of partials: plain torch is the reference, C++ and Triton are held to it and to float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from moves_by_hand import in_interpreter, merged_on_cpu
from torch import Tensor

from hdp.attention.merge import merge_partial

INF = float("inf")
Merge = Callable[[Tensor, Tensor, Tensor, Tensor], None]
MERGES = [merge_partial, merged_on_cpu]


def partials(rows: int, heads: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, partial, its lse), with rows that no key has reached on either side, or on both."""
    draw = torch.Generator().manual_seed(seed)
    out, partial = (torch.randn(rows, heads, dim, generator=draw) for _ in range(2))
    lse, partial_lse = (30 * torch.randn(rows, heads, generator=draw) for _ in range(2))
    out[0], lse[0] = 0, -INF
    partial[1], partial_lse[1] = 0, -INF
    out[2], lse[2], partial[2], partial_lse[2] = 0, -INF, 0, -INF
    lse[3], partial_lse[3] = 200.0, -200.0  # one side has no weight left
    return out, lse, partial, partial_lse


def exact(out: Tensor, lse: Tensor, partial: Tensor, partial_lse: Tensor) -> tuple[Tensor, Tensor]:
    """The naive formula in float64."""
    wide, other = lse.double(), partial_lse.double()
    total = torch.logaddexp(wide, other)
    safe = torch.where(torch.isneginf(total), torch.zeros_like(total), total)
    weights = [(x - safe).exp().unsqueeze(-1) for x in (wide, other)]
    return weights[0] * out.double() + weights[1] * partial.double(), total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("merge", MERGES)
def test_merges_are_exact(merge: Merge, dtype: torch.dtype) -> None:
    out, lse, partial, partial_lse = partials(9, 3, 20)
    partial = partial.to(dtype)
    want, want_lse = exact(out, lse, partial, partial_lse)
    merge(out, lse, partial, partial_lse)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=1e-5)


LARGE = (1.0, 1e5, 1e8, 1e30)
"""Scales of the values on one side."""


def large_partials(scale: float, rows: int = 64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A side whose values are larger by ``scale``, and weigh from everything to nothing; each side in turn."""
    draw = torch.Generator().manual_seed(3)
    small, large = torch.randn(rows, 2, 20, generator=draw), scale * torch.randn(rows, 2, 20, generator=draw)
    lse = torch.zeros(rows, 2)
    other_lse = torch.linspace(100, -100, rows).unsqueeze(-1).expand(rows, 2).contiguous()
    turn = torch.arange(rows) % 2 == 0
    out, partial = (torch.where(turn[:, None, None], *pair) for pair in ((small, large), (large, small)))
    lse, other_lse = (torch.where(turn[:, None], *pair) for pair in ((lse, other_lse), (other_lse, lse)))
    return out, lse, partial, other_lse


def check_large(merge: Merge, scale: float) -> None:
    """Each element to some roundings of its own two terms, and what weighs nothing is no term."""
    out, lse, partial, partial_lse = large_partials(scale)
    want, want_lse = exact(out, lse, partial, partial_lse)
    terms, _ = exact(out.abs(), lse, partial.abs(), partial_lse)
    merge(out, lse, partial, partial_lse)
    assert ((out.double() - want).abs() <= 2e-5 * terms).all()  # exp(-100) is known to 100 roundings
    torch.testing.assert_close(lse.double(), want_lse, rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize("scale", LARGE)
@pytest.mark.parametrize("merge", MERGES)
def test_large_values_that_weigh_nothing_leave_nothing(merge: Merge, scale: float) -> None:
    check_large(merge, scale)


@pytest.mark.parametrize("merge", MERGES)
def test_strided_views_are_merged_in_place(merge: Merge) -> None:
    wide = [torch.zeros(8, 6, 20), torch.full((8, 6), -INF), torch.randn(8, 6, 20), torch.randn(8, 6)]
    views = [t[1:5, 2:4] for t in wide]
    want, want_lse = exact(*views)
    merge(*views)
    torch.testing.assert_close(views[0].double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(views[1].double(), want_lse, rtol=1e-6, atol=1e-5)
    outside = wide[0].clone()
    outside[1:5, 2:4] = 0
    assert not outside.any()


@pytest.mark.parametrize("merge", MERGES)
def test_merging_in_any_order_and_number(merge: Merge) -> None:
    """32 partials of one softmax: fp32 error does not grow with their number."""
    draw = torch.Generator().manual_seed(1)
    scores, values = torch.randn(4, 2, 32 * 8, generator=draw) * 3, torch.randn(32 * 8, 2, 16, generator=draw)
    want = torch.einsum("qhk,khd->qhd", scores.double().softmax(-1), values.double())
    out, lse = torch.zeros(4, 2, 16), torch.full((4, 2), -INF)
    for part in torch.randperm(32, generator=draw).tolist():
        s, v = scores[..., part * 8 : part * 8 + 8], values[part * 8 : part * 8 + 8]
        merge(out, lse, torch.einsum("qhk,khd->qhd", s.softmax(-1), v), s.logsumexp(-1))
    torch.testing.assert_close(out.double(), want, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(lse.double(), scores.double().logsumexp(-1), rtol=1e-6, atol=1e-6)


TRITON = """
import torch
from moves_by_hand import merged_on_device
from test_merge import LARGE, check_large, exact, partials
for scale in LARGE:
    check_large(merged_on_device, scale)
for rows, heads, dim in ((9, 3, 20), (33, 2, 64), (4, 1, 128)):
    for dtype in (torch.float32, torch.bfloat16):
        out, lse, partial, partial_lse = partials(rows, heads, dim)
        out[0] = float("nan")  # memory that nobody has filled
        partial = partial.to(dtype)
        want, want_lse = exact(out.nan_to_num(), lse, partial, partial_lse)
        merged_on_device(out, lse, partial, partial_lse)
        out[2] = out[2].nan_to_num()
        torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=1e-5)
print("merged")
"""


def test_triton_in_its_interpreter() -> None:
    in_interpreter(TRITON, "merged")
