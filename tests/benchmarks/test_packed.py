"""What ``benchmarks/`` compares with is exact, too: packed rivals on real ranks against float64."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

DIM = 8
HEADS = {"multi-head": (4, 4), "grouped": (8, 2), "one key head": (4, 1)}


def rivals() -> Any:
    """``benchmarks/packed.py``."""
    folder = str(Path(__file__).parents[2] / "benchmarks")
    if folder not in sys.path:
        sys.path.append(folder)
    import packed

    return packed


def whole_documents(lengths: list[int], heads: tuple[int, int]) -> list[list[Tensor]]:
    """Of each document q, k, v, do in float64; the same on all ranks."""
    draw = torch.Generator().manual_seed(5)
    counts = (heads[0], heads[1], heads[1], heads[0])
    return [[torch.randn(n, h, DIM, dtype=torch.float64, generator=draw) for h in counts] for n in lengths]


def exact(q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> list[Tensor]:
    """out, dq, dk, dv of one document."""
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    first = [t.transpose(0, 1).unsqueeze(0) for t in leaves]
    out = F.scaled_dot_product_attention(*first, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    out = out[0].transpose(0, 1)
    out.backward(do)
    return [out.detach(), *[t.grad for t in leaves]]


def errors(world: Any, name: str, heads: tuple[int, int], lengths: list[int]) -> list[float]:
    """Largest relative error of out, dq, dk, dv among this rank's rows."""
    documents = whole_documents(lengths, heads)
    attention = rivals().RIVALS[name](lengths, dist.group.WORLD)
    cut = [torch.cat(list(parts)) for parts in zip(*rows(documents, attention.positions), strict=True)]
    q, k, v = (t.float().requires_grad_() for t in cut[:3])
    out = attention(q, k, v, DIM**-0.5)
    out.backward(cut[3].float())
    expected = [
        torch.cat(list(p)) for p in zip(*rows([exact(*d) for d in documents], attention.positions), strict=True)
    ]
    found = [out.detach(), q.grad, k.grad, v.grad]
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]


def rows(documents: list[list[Tensor]], positions: list[Tensor]) -> list[list[Tensor]]:
    return [[t[at] for t in d] for d, at in zip(documents, positions, strict=True)]


@pytest.mark.parametrize("lengths", [[64], [24, 8, 120, 16]], ids=["one document", "four"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["ulysses", "all_gather", "ring"])
def test_packed_rivals_are_exact(
    ranks: Callable[[int], Any], name: str, size: int, heads: tuple[int, int], lengths: list[int]
) -> None:
    for found in ranks(size).run(errors, name, heads, lengths):
        assert max(found) < 1e-5, found


def test_long_chunks_are_exact(ranks: Callable[[int], Any]) -> None:
    """Beyond the rows for which a mask is made, two calls are merged."""
    unit = 2 * 2 * rivals().MASKED_ROWS
    for found in ranks(2).run(errors, "all_gather", (2, 1), [2 * unit, 8]):
        assert max(found) < 1e-5, found


def refused(world: Any) -> str:
    with pytest.raises(ValueError) as caught:
        rivals().Ring([12], dist.group.WORLD)
    return str(caught.value)


def test_lengths_that_are_not_padded_are_refused(ranks: Callable[[int], Any]) -> None:
    assert ranks(4).run(refused) == ["documents have [12] tokens: pad each to a multiple of 8"] * 4
