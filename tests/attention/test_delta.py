"""delta, and an out that has it: C++, plain torch and Triton over all scales against float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from moves_by_hand import in_interpreter, rebuilt_on_cpu
from torch import Tensor

from hdp.attention.delta import delta_of, delta_of_reference, out_with_delta

Rebuild = Callable[[Tensor, Tensor], Tensor]
INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALES = (0.0, 1e-45, 1e-38, 1e-30, 1e-23, 1e-8, 1.0, 1e4, 1e30)
"""Of do."""
VALUES = (0.0, 1e-30, 1.0, 1e3, 6e4, 3e38)
"""Of out, to the largest of fp16 and of fp32."""
KINDS = ("random", "one element", "one more", "aligned", "opposed")


def case(kind: str, scale: float, value: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """do [rows, heads, head_dim], delta [rows, heads] and how large the terms of delta are, in float64."""
    draw = torch.Generator().manual_seed(7)
    do, out = (torch.randn(9, 3, 40, generator=draw, dtype=torch.float64) for _ in range(2))
    do[0], out[1] = 0, 0
    if kind == "one element":
        do[..., torch.arange(40) != 5] = 0
    if kind == "one more":
        do[..., torch.arange(40) != 5] *= 1e-9
    if kind in ("aligned", "opposed"):  # as long as out can be along do: every element as large as the largest
        out = (1.0 - 0.1 * torch.rand(out.shape, generator=draw, dtype=torch.float64)) * do.sign()
        out *= -1.0 if kind == "opposed" else 1.0
    do, out = (do * scale).to(dtype).double(), (out * value).to(dtype).double().nan_to_num(0.0, 0.0, 0.0)
    terms = do * out
    return do.to(dtype), terms.sum(-1).float(), terms.abs().sum(-1)


def check_exact(
    rebuild: Rebuild, dtype: torch.dtype, cases: list[tuple[str, float, float]], slack: float = 1.0
) -> None:
    """sum(do * out) is delta to two roundings of fp32; in bf16 and fp16 no worse than the rounded true out."""
    for kind, scale, value in cases:
        do, delta, terms = case(kind, scale, value, dtype)
        kept = delta.isfinite() & do.isfinite().all(-1)
        out = rebuild(do, delta)
        assert out.dtype == dtype and out.shape == do.shape
        assert out[kept].isfinite().all(), (kind, scale, value)
        products = do.double() * out.double()
        error = (products.sum(-1) - delta.double()).abs()
        of_fp32 = 8 * torch.finfo(torch.float32).eps * products.abs().sum(-1) + 2.0**-148
        of_dtype = slack * torch.finfo(dtype).eps / 2 * terms if dtype != torch.float32 else torch.zeros_like(terms)
        assert (error <= of_fp32 + of_dtype)[kept].all(), (kind, scale, value, error[kept].max())


REBUILDS = [out_with_delta, rebuilt_on_cpu]
CASES = list(product(KINDS, SCALES, VALUES))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rebuild", REBUILDS)
def test_an_out_with_this_delta(rebuild: Rebuild, dtype: torch.dtype) -> None:
    check_exact(rebuild, dtype, CASES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rebuild", REBUILDS)
def test_what_rounding_leaves_goes_into_a_second_element(rebuild: Rebuild, dtype: torch.dtype) -> None:
    """A tenth of what one rounded element would be off by, over many rows."""
    draw = torch.Generator().manual_seed(1)
    do, delta = torch.randn(4000, 1, 64, generator=draw).to(dtype), torch.randn(4000, 1, generator=draw)
    products = do.double() * rebuild(do, delta).double()
    error = (products.sum(-1) - delta.double()).abs() / delta.double().abs()
    assert error.mean() < 0.1 * torch.finfo(dtype).eps / 4


def check_not_finite(rebuild: Rebuild, dtype: torch.dtype) -> None:
    """What is not finite in do or delta is in the sum, and in no other row's."""
    do, delta = torch.ones(9, 2, 4, dtype=dtype), torch.ones(9, 2)
    do[0, 0, 2], do[1, 0, 1] = NAN, INF
    delta[2, 0], delta[3, 0] = NAN, INF
    do[4, 0], delta[4, 0] = 0, NAN
    do[5, 0], delta[5, 0] = NAN, 0
    do[6, 0], delta[6, 0] = 0, INF
    sums = (do.float() * rebuild(do, delta).float()).sum(-1)
    assert not sums[:7, 0].isfinite().any()
    assert (sums[:, 1] == 1).all() and (sums[7:] == 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rebuild", REBUILDS)
def test_what_is_not_finite_is_not_lost(rebuild: Rebuild, dtype: torch.dtype) -> None:
    check_not_finite(rebuild, dtype)


def check_delta(delta: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, scales: tuple[float, ...]) -> None:
    """No worse than a kernel's own sum; views of heads and rows, and head dimensions that nothing divides."""
    draw = torch.Generator().manual_seed(2)
    for scale, dim in product(scales, (1, 5, 8, 40)):
        do, out = (torch.randn(6, 5, dim, generator=draw)[1:, 2:4] for _ in range(2))
        do, out = (do * scale).to(dtype), out.to(dtype)
        terms = do.double() * out.double()
        found = delta(do, out)
        assert found.dtype == torch.float32 and found.shape == do.shape[:2]
        assert ((found.double() - terms.sum(-1)).abs() <= 4e-7 * terms.abs().sum(-1) + 2.0**-148).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("delta", [delta_of, delta_of_reference])
def test_delta(delta: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
    check_delta(delta, dtype, (1e-30, 1.0, 1e4, 1e30) if dtype != torch.float16 else (1.0, 1e4))


def test_views_are_read_where_they_lie() -> None:
    do, delta = torch.randn(6, 5, 8)[1:4, 2:5], torch.randn(5, 3).T[:, 1:4]
    out = out_with_delta(do, delta)
    torch.testing.assert_close((do.double() * out.double()).sum(-1), delta.double(), rtol=1e-6, atol=0)
    assert out_with_delta(do[:0], delta[:0]).shape == (0, 3, 8)


def test_float64() -> None:
    do, out = torch.randn(5, 3, 16, dtype=torch.float64), torch.randn(5, 3, 16, dtype=torch.float64)
    delta = delta_of(do, out)
    torch.testing.assert_close((do * out_with_delta(do, delta)).sum(-1), delta, rtol=1e-14, atol=0)


TRITON = """
import torch
from hdp.attention.delta_triton import delta_of_triton
from moves_by_hand import rebuilt_on_device
from test_delta import check_delta, check_exact, check_not_finite, DTYPES, KINDS
from itertools import product
for dtype in DTYPES:
    # The interpreter truncates to bf16, where a GPU rounds, and reads bf16 below 1e-38 wrongly.
    exact = dtype != torch.bfloat16
    scales, values = ((1e-45, 1.0, 1e30), (1.0, 3e4, 3e38)) if exact else ((1e-23, 1.0), (1.0,))
    check_exact(rebuilt_on_device, dtype, list(product(KINDS, scales, values)), 1.0 if exact else 4.0)
    check_not_finite(rebuilt_on_device, dtype)
    check_delta(delta_of_triton, dtype, (1e4,))
print("exact")
"""


def test_triton_in_its_interpreter() -> None:
    in_interpreter(TRITON, "exact")


@pytest.mark.parametrize(("capability", "dtype"), [(80, torch.bfloat16), (90, torch.float32), (100, torch.float16)])
def test_the_triton_kernel_compiles_ahead_of_time(capability: int, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    from hdp.attention.delta_triton import compile_for

    ptx = compile_for(capability, dim=80, dtype=dtype)
    assert f".target sm_{capability}" in ptx and "delta_kernel" in ptx
