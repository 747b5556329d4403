"""Backends: one body over every one that runs here, and the GPU ones over stand-ins with their packages' signatures."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import virtual
from torch import Tensor
from virtual import Sequence_, attend_together, make_data

from hdp.attention import backends
from hdp.attention.backends import Scoring, backend_names, flash, resolve_backend
from hdp.attention.backends.protocol import Backend
from hdp.attention.backends.reference import ReferenceBackend
from hdp.attention.delta import out_with_delta
from hdp.attention.mask import Mask, Shape

CPU, GPU = torch.device("cpu"), torch.device("cuda")
EXACT = ReferenceBackend()


def tensors(rows: int, keys: int, heads: int, key_heads: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """q, k, v, do."""
    draw = torch.Generator().manual_seed(seed)
    shapes = ((rows, heads, 16), (keys, key_heads, 16), (keys, key_heads, 16), (rows, heads, 16))
    return [torch.randn(s, generator=draw).to(dtype) for s in shapes]


@pytest.mark.parametrize("shape", Shape)
@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("use_delta", [False, True], ids=["out", "delta"])
def test_a_rectangle(name: str, shape: Shape, use_delta: bool) -> None:
    """fp32 against float64, with a global lse and out as in the middle of a ring."""
    backend, scoring = resolve_backend(name, CPU, torch.float32), Scoring(0.3)
    rows, keys = (19, 19) if shape is not Shape.FULL else (19, 33)
    q, k, v, do = tensors(rows, keys, 6, 2, torch.float32)
    wide = [t.double() for t in (q, k, v, do)]
    want, want_lse = EXACT.forward(*wide[:3], shape, scoring)
    out, lse = backend.forward(q, k, v, shape, scoring)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-6)
    whole_lse, whole_out = want_lse + 0.7, want * 0.5  # as if other keys had been seen as well
    wants = EXACT.backward(wide[3], *wide[:3], whole_lse, whole_out, shape, scoring)
    delta = (wide[3] * whole_out).sum(-1).float()
    given = out_with_delta(do, delta) if use_delta else whole_out.float()
    grads = backend.backward(do, q, k, v, whole_lse.float(), given, shape, scoring)
    for grad, exact in zip(grads, wants, strict=True):
        torch.testing.assert_close(grad.double(), exact, rtol=2e-5, atol=2e-6)


def test_the_reference_is_autograd() -> None:
    scoring = Scoring(0.3, softcap=2.0)
    q, k, v, do = tensors(7, 7, 4, 2, torch.float64)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    want = virtual.dense(*leaves, Mask(), scoring)
    grads = torch.autograd.grad(want, leaves, do)
    q, k, v = (t.detach() for t in leaves)
    out, lse = EXACT.forward(q, k, v, Shape.CAUSAL, scoring)
    torch.testing.assert_close(out, want.detach())
    for mine, theirs in zip(EXACT.backward(do, q, k, v, lse, out, Shape.CAUSAL, scoring), grads, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", Shape)
@pytest.mark.parametrize("keys", [1, 3, 8, 16, 17, 40])
def test_scores_that_are_not_finite_are_seen(keys: int, shape: Shape, dtype: torch.dtype) -> None:
    """However few the keys are: as in plain torch, and other rows keep their bits."""
    backend, scoring = resolve_backend("cpu", CPU, dtype), Scoring(0.3)
    clean = tensors(keys, keys, 4, 2, dtype)[:3]
    want = backend.forward(*clean, shape, scoring)
    for which, value in ((0, "nan"), (1, "nan"), (0, "inf"), (1, "inf"), (1, "-inf")):
        poisoned = [t.clone() for t in clean]
        poisoned[which][keys // 2, 1, 3] = float(value)
        out, lse = backend.forward(*poisoned, shape, scoring)
        exact, exact_lse = EXACT.forward(*poisoned, shape, scoring)
        hidden = ~exact_lse.isfinite()
        assert hidden.any() and torch.equal(~lse.isfinite(), hidden)
        assert torch.equal(~out.isfinite().all(-1), ~exact.isfinite().all(-1))
        touched = hidden if which == 0 else hidden | torch.arange(4).ge(2)
        assert torch.equal(out[~touched], want[0][~touched]) and torch.equal(lse[~touched], want[1][~touched])
    zeros = [torch.zeros_like(t) for t in clean]  # lse is 0 here, where one key is seen
    out, lse = backend.forward(*zeros, shape, scoring)
    torch.testing.assert_close(lse, EXACT.forward(*zeros, shape, scoring)[1], rtol=0, atol=1e-3)
    assert not out.any()


@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_2", "flash_attn_3", "flash_attn_4", "torch_varlen"])
def test_gpu_backends_are_refused_on_the_cpu(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' cannot run .* on cpu .*CUDA devices only"):
        resolve_backend(name, CPU, torch.bfloat16)


def test_unknown_and_unusable_names() -> None:
    with pytest.raises(ValueError, match=r"unknown attention backend 'fash'.*choose one of auto"):
        resolve_backend("fash", CPU, torch.float32)
    with pytest.raises(ValueError, match=r"'cpu' cannot run torch\.float64"):
        resolve_backend("cpu", CPU, torch.float64)
    assert resolve_backend("auto", CPU, torch.float64).name == "reference"
    assert resolve_backend("auto", CPU, torch.bfloat16).name == "cpu"


def test_the_table_names_every_backend() -> None:
    import hdp.attention.backends as package

    assert package.__doc__ is not None
    for name in backend_names():
        if name not in ("auto", *package.FAMILIES):
            assert f"``{name}``" in package.__doc__


def test_a_soft_cap_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'cpu' has no logit soft-cap \(this layer asks for 50\.0\)"):
        resolve_backend("cpu", CPU, torch.float32).check(Scoring(1.0, 50.0), 64)
    EXACT.check(Scoring(1.0, 50.0), 64)


# ---------------------------------------------------------------- stand-ins for the GPU packages


def _shape(causal: bool, left: int | None, right: int | None) -> Shape:
    left, right = (-1 if side is None else side for side in (left, right))
    assert right in (-1, 0)
    if causal or right == 0:
        assert left == -1
        return Shape.CAUSAL
    assert left in (-1, 0)
    return Shape.ANTICAUSAL if left == 0 else Shape.FULL


def _cuts(cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int):
    for cu, longest in ((cu_q, max_q), (cu_k, max_k)):
        assert cu.dtype == torch.int32 and cu[0] == 0
        assert max(b - a for a, b in pairwise(cu.tolist())) == longest
    return cu_q, cu_k, max_q, max_k


calls: list[int] = []
"""Rectangles of every call that a stand-in got."""


def _forward(q, k, v, cuts, causal, left, right, scoring):
    calls.append(len(cuts[0]) - 1)
    out, lse = EXACT.forward(q, k, v, _shape(causal, left, right), scoring, cuts)
    return out.to(q.dtype), lse.transpose(0, 1).contiguous()


def _backward(do, q, k, v, out, lse, cuts, causal, left, right, scoring):
    assert lse.shape == (q.shape[1], q.shape[0]) and lse.is_contiguous() and lse.dtype == torch.float32
    shape = _shape(causal, left, right)
    grads = EXACT.backward(do, q, k, v, lse.transpose(0, 1), out, shape, scoring, cuts)
    return [g.to(q.dtype) for g in grads]


def fake_2() -> types.ModuleType:
    module = types.ModuleType("flash_attn.flash_attn_interface")

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
    ):  # fmt: skip
        cuts = _cuts(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        scoring = Scoring(softmax_scale, softcap)
        return *_forward(q, k, v, cuts, causal, window_size_left, window_size_right, scoring), None, None

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        cuts = _cuts(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        scoring = Scoring(softmax_scale, softcap)
        window = window_size_left, window_size_right
        grads = _backward(dout, q, k, v, out, softmax_lse, cuts, causal, *window, scoring)
        for target, grad in zip((dq, dk, dv), grads, strict=True):
            assert target.is_contiguous()
            target.copy_(grad)

    module._flash_attn_varlen_forward = _flash_attn_varlen_forward  # type: ignore[attr-defined]
    module._flash_attn_varlen_backward = _flash_attn_varlen_backward  # type: ignore[attr-defined]
    return module


def fake_3() -> types.ModuleType:
    module = types.ModuleType("flash_attn_interface")

    def _flash_attn_forward(
        q, k, v, k_new=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0,
    ):  # fmt: skip
        cuts = _cuts(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        scoring = Scoring(softmax_scale, softcap)
        return *_forward(q, k, v, cuts, causal, window_size_left, window_size_right, scoring), None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False,
    ):  # fmt: skip
        cuts = _cuts(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        scoring, window = Scoring(softmax_scale, softcap), (window_size_left, window_size_right)
        grads = _backward(dout, q, k, v, out, softmax_lse, cuts, is_causal, *window, scoring)
        for target, grad in zip((dq, dk, dv), grads, strict=True):
            target.copy_(grad)

    module._flash_attn_forward = _flash_attn_forward  # type: ignore[attr-defined]
    module._flash_attn_backward = _flash_attn_backward  # type: ignore[attr-defined]
    return module


def fake_4() -> types.ModuleType:
    module = types.ModuleType("flash_attn.cute.interface")

    def _flash_attn_fwd(
        q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, softmax_scale=None,
        causal=False, softcap=None, window_size_left=None, window_size_right=None, return_lse=False,
    ):  # fmt: skip
        assert return_lse
        cuts = _cuts(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return _forward(q, k, v, cuts, causal, window_size_left, window_size_right, Scoring(softmax_scale))

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, deterministic=False,
    ):  # fmt: skip
        cuts = cu_seqlens_q, cu_seqlens_k, 0, 0
        window = window_size_left, window_size_right
        return _backward(dout, q, k, v, out, lse, cuts, causal, *window, Scoring(softmax_scale))

    module._flash_attn_fwd, module._flash_attn_bwd = _flash_attn_fwd, _flash_attn_bwd  # type: ignore[attr-defined]
    return module


class FakeOps:
    """torch's private ops: their real schemas, computed by the reference."""

    class Forward:
        _schema = torch.ops.aten._flash_attention_forward.default._schema

        def __call__(self, q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, **options):
            window = options["window_size_left"], options["window_size_right"]
            cuts = _cuts(cu_q, cu_k, max_q, max_k)
            return *_forward(q, k, v, cuts, causal, *window, Scoring(options["scale"])), None, None, None

    class Backward:
        _schema = torch.ops.aten._flash_attention_backward.default._schema

        def __call__(
            self,
            do,
            q,
            k,
            v,
            out,
            lse,
            cu_q,
            cu_k,
            max_q,
            max_k,
            dropout,
            causal,
            state,
            unused,
            **options,
        ):
            window = options["window_size_left"], options["window_size_right"]
            cuts = _cuts(cu_q, cu_k, max_q, max_k)
            return _backward(do, q, k, v, out, lse, cuts, causal, *window, Scoring(options["scale"]))


@pytest.fixture(params=["flash_attn_2", "flash_attn_3", "flash_attn_4", "torch_varlen"])
def gpu_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """A GPU backend whose package is a stand-in."""
    monkeypatch.setattr(flash, "require_gpu", lambda *_: None)
    calls.clear()
    if request.param == "torch_varlen":
        yield flash.VarlenBackend(
            "torch_varlen", flash.TorchVarlen(FakeOps.Forward(), FakeOps.Backward()), "stand-in", softcaps=False
        )
        return
    module = {"flash_attn_2": fake_2, "flash_attn_3": fake_3, "flash_attn_4": fake_4}[request.param]()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for parent in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    yield resolve_backend.__wrapped__(request.param, GPU, torch.bfloat16)


def test_a_micro_batch_on_a_gpu_backend(gpu_backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags, cu_seqlens and the layout of lse, through fused calls of a mixed and windowed micro-batch."""
    monkeypatch.setattr("hdp.attention.route.resolve_backend", lambda *_: gpu_backend)
    sequences = [Sequence_(length=n, group=(0,)) for n in (9, 30, 5, 8, 20, 3, 11, 17, 2, 4, 6, 13)]
    sequences += [Sequence_(length=301, group=(0, 1, 2), schedule="ring"), Sequence_(length=7, group=(1,))]
    sequences += [Sequence_(length=26, group=(2, 0), schedule="token_ring")]
    heads, scoring = virtual.HeadCount(query=6, key=2), Scoring(0.3)
    for mask in (Mask(), Mask(window=6), Mask(causal=False)):
        data = make_data([s.length for s in sequences], heads, 16, mask, scoring, torch.bfloat16, seed=1)
        result = attend_together(sequences, data, mask, scoring, torch.bfloat16, backend="auto")
        assert max(result.errors(data).values()) < 2e-2
    assert max(calls) >= 3  # packed local sequences were one call


def test_fused_calls_change_nothing() -> None:
    sequences = [Sequence_(length=n, group=(0,)) for n in (9, 30, 5, 1)]
    sequences.append(Sequence_(length=41, group=(0, 1), schedule="ring"))
    heads, scoring = virtual.HeadCount(query=4, key=2), Scoring(0.3)
    data = make_data([s.length for s in sequences], heads, 16, Mask(), scoring, torch.float64, seed=1)
    result = attend_together(sequences, data, Mask(), scoring, torch.float64, backend="reference")  # fuses
    assert max(result.errors(data).values()) < 1e-12


def test_every_call_of_a_gpu_program_knows_where_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of lengths are made with the program, one for all that are alike, not at every call of every layer."""
    backend = resolve_backend("reference", torch.device("cpu"), torch.float64)
    given = []
    for name in ("forward", "backward"):
        method = getattr(type(backend), name)

        def noted(self: Backend, *arguments: Any, method: Any = method) -> Any:
            given.append(arguments[-1])  # the executor's calls end with cuts, those of the expected values do not
            return method(self, *arguments)

        monkeypatch.setattr(type(backend), name, noted)
    sequences = [Sequence_(length=64, group=(0, 1, 2, 3), schedule="ring"), Sequence_(length=16, group=(2,))]
    heads, scoring = virtual.HeadCount(query=4, key=2), Scoring(0.3)
    data = make_data([64, 16], heads, 16, Mask(), scoring, torch.float64, seed=1)
    attend_together(sequences, data, Mask(), scoring, torch.float64, backend="reference")
    given = [cuts for cuts in given if not isinstance(cuts, Scoring)]
    assert len(given) > 2 * 4 * 4
    assert all(isinstance(rows, torch.Tensor) for rows, *_ in given)
    assert len({id(rows) for rows, *_ in given}) < len(given) / 2


@pytest.fixture
def deterministic() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def test_a_deterministic_backward_may_be_asked_for_at_any_time(
    monkeypatch: pytest.MonkeyPatch, deterministic: None
) -> None:
    """The choice of a backend is kept; what is asked of it is not."""
    seen: list[bool] = []

    class Kernel:
        def forward(self, q: Tensor, k: Tensor, v: Tensor, variant: flash.Variant) -> tuple[Tensor, Tensor]:
            seen.append(variant.deterministic)
            return q, torch.zeros(q.shape[1], q.shape[0])

    made = flash.VarlenBackend("flash_attn_2", Kernel(), "stand-in", softcaps=True)  # type: ignore[arg-type]
    monkeypatch.setitem(backends.MAKERS, "flash_attn_2", lambda device: made)
    resolve_backend.cache_clear()
    q, k, v, _ = tensors(4, 4, 2, 2, torch.bfloat16)
    for wanted in (False, True, False):
        torch.use_deterministic_algorithms(wanted)
        backend = resolve_backend("flash_attn_2", GPU, torch.bfloat16)
        backend.forward(q, k, v, Shape.CAUSAL, Scoring(1.0))
        assert backend.deterministic == wanted  # type: ignore[attr-defined]
    resolve_backend.cache_clear()
    assert seen == [False, True, False]


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0), (None, 1)])
def test_the_choice_is_printed_once_by_rank_0(
    rank: str | None, lines: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    resolve_backend.cache_clear()
    for _ in range(3):
        resolve_backend("auto", CPU, torch.float32)
    printed = [line for line in capfd.readouterr().err.splitlines() if line.startswith("hdp: ")]
    assert len(printed) == lines
    assert all(line.startswith("hdp: attention of float32 on cpu: cpu (") for line in printed)


def test_fp32_on_a_gpu_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "require_gpu", lambda *_: None)
    with pytest.raises(ValueError, match=r"compute in bf16, with hdp\.shard\(\.\.\., mp_policy=MixedPrecisionPolicy"):
        resolve_backend("auto", GPU, torch.float32)


def test_torch_varlen_without_determinism_says_so(deterministic: None) -> None:
    kernel = flash.TorchVarlen(FakeOps.Forward(), FakeOps.Backward())
    backend = flash.VarlenBackend("torch_varlen", kernel, "", softcaps=False)
    torch.use_deterministic_algorithms(True)
    q, k, v, do = tensors(4, 4, 2, 2, torch.bfloat16)
    out, lse = backend.forward(q, k, v, Shape.CAUSAL, Scoring(1.0))
    with pytest.raises(ValueError, match="no deterministic backward"):
        backend.backward(do, q, k, v, lse, out, Shape.CAUSAL, Scoring(1.0))


def test_packages_of_another_version_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        _schema = torch.ops.aten.add.Tensor._schema

    with pytest.raises(ValueError, match="than this was written for"):
        flash.TorchVarlen(Other(), Other())
    old = types.ModuleType("flash_attn.flash_attn_interface")
    old._flash_attn_varlen_forward = lambda q, k, v: None  # type: ignore[attr-defined]
    monkeypatch.setattr(flash, "require_gpu", lambda *_: None)
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, old.__name__, old)
    with pytest.raises(ValueError, match="no argument 'window_size_left': update the package"):
        resolve_backend.__wrapped__("flash_attn_2", GPU, torch.bfloat16)


def test_head_dimensions_that_kernels_do_not_take() -> None:
    backend = flash.VarlenBackend("flash_attn_2", None, "", softcaps=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="multiples of 8 up to 256, not 12"):
        backend.check(Scoring(1.0), 12)
    backend.check(Scoring(1.0, 50.0), 256)
