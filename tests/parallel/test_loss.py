"""The loss fused with the head against float64: chunks, biases, weights, ignored tokens, precision, compilation, Liger."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hdp.parallel import loss
from hdp.parallel.loss import IGNORE_INDEX, chunk_rows, loss_sum

TOKENS, WIDTH, VOCABULARY = 37, 16, 101


def make(dtype: torch.dtype = torch.float32, *, bias: bool = False, weighted: bool = False, seed: int = 0):
    """Hidden states, head, bias, labels with some ignored, weights with some 0."""
    torch.manual_seed(seed)
    hidden = torch.randn(TOKENS, WIDTH, dtype=dtype)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=dtype)
    labels = torch.randint(0, VOCABULARY, (TOKENS,))
    labels[::5] = IGNORE_INDEX
    weights = torch.rand(TOKENS).where(torch.arange(TOKENS) % 7 > 0, 0) if weighted else None
    return hidden, weight, torch.randn(VOCABULARY, dtype=dtype) if bias else None, labels, weights


def exact(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, weights: Tensor | None, scale: float):
    """Loss and gradients, float64, logits whole."""
    leaves = [t.double().requires_grad_() if t is not None else None for t in (hidden, weight, bias)]
    losses = F.cross_entropy(F.linear(*leaves), labels, ignore_index=IGNORE_INDEX, reduction="none")
    total = (losses * (1.0 if weights is None else weights.double())).sum()
    (scale * total).backward()
    return total, [t.grad for t in leaves if t is not None]


def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, weights: Tensor | None, scale: float):
    leaves = [t.clone().requires_grad_() if t is not None else None for t in (hidden, weight, bias)]
    total = loss_sum(*leaves, labels, weights)
    (scale * total).backward()
    return total, [t.grad for t in leaves if t is not None]


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double() - wanted.detach()).norm() / wanted.detach().norm())


@pytest.mark.parametrize("rows", [1, 8, 37, 1000])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradients(monkeypatch, bias, weighted, rows):
    monkeypatch.setattr(loss, "chunk_rows", lambda *_: rows)
    inputs = make(bias=bias, weighted=weighted)
    total, gradients = ours(*inputs, 0.3)
    want, wanted = exact(*inputs, 0.3)
    assert error(total, want) < 1e-6
    for found, gradient in zip(gradients, wanted, strict=True):
        assert error(found, gradient) < 2e-6


def test_bf16_is_as_good_as_whole_logits(monkeypatch):
    monkeypatch.setattr(loss, "chunk_rows", lambda *_: 8)
    inputs = make(torch.bfloat16, bias=True)
    total, gradients = ours(*inputs, 1.0)
    want, wanted = exact(*inputs, 1.0)
    leaves = [t.clone().requires_grad_() for t in inputs[:3]]
    plain = F.cross_entropy(F.linear(*leaves).float(), inputs[3], ignore_index=IGNORE_INDEX, reduction="sum")
    plain.backward()
    assert error(total, want) < 1.5 * error(plain, want) + 1e-4
    for found, leaf, gradient in zip(gradients, leaves, wanted, strict=True):
        assert found.dtype == torch.bfloat16
        assert error(found, gradient) < 1.5 * error(leaf.grad, gradient)


def test_a_second_backward_pass_is_refused():
    hidden, weight, _, labels, _ = make()
    total = loss_sum(hidden.requires_grad_(), weight, None, labels)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|runs backward once"):
        total.backward()


def test_a_second_backward_pass_is_refused_under_hooks():
    """Saved-tensor hooks hide from autograd that a tensor changed."""
    hidden, weight, _, labels, _ = make()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        total = loss_sum(hidden.requires_grad_(), weight, None, labels)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="runs backward once"):
        total.backward()


def test_large_logits_do_not_overflow():
    hidden, weight, _, labels, _ = make()
    inputs = (1e3 * hidden, weight, None, labels, None)
    total, gradients = ours(*inputs, 1.0)
    want, wanted = exact(*inputs, 1.0)
    assert error(total, want) < 1e-6
    assert error(gradients[0], wanted[0]) < 1e-5


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1)])
def test_frozen_inputs_get_no_gradient(frozen):
    hidden, weight, _, labels, _ = make()
    leaves = [t.clone().requires_grad_(i not in frozen) for i, t in enumerate((hidden, weight))]
    total = loss_sum(*leaves, None, labels)
    if len(frozen) == 2:
        assert not total.requires_grad
        return
    total.backward()
    _, wanted = exact(hidden, weight, None, labels, None, 1.0)
    for i, leaf in enumerate(leaves):
        assert leaf.grad is None if i in frozen else error(leaf.grad, wanted[i]) < 2e-6


def test_nothing_to_learn_from():
    hidden, weight, _, labels, _ = make()
    for size in (0, TOKENS):
        leaf = hidden[:size].clone().requires_grad_()
        total = loss_sum(leaf, weight, None, torch.full_like(labels[:size], IGNORE_INDEX))
        total.backward()
        assert float(total.detach()) == 0.0 and float(leaf.grad.abs().sum()) == 0.0


@pytest.mark.parametrize("label", [-1, VOCABULARY])
def test_labels_outside_the_vocabulary(label):
    hidden, weight, _, labels, _ = make()
    labels[4] = label
    with pytest.raises(ValueError, match=f"label {label} is outside the vocabulary of {VOCABULARY}"):
        loss_sum(hidden, weight, None, labels)


def test_compiled():
    inputs = make()
    compiled = torch.compile(lambda h, w: loss_sum(h * 2, w, None, inputs[3]) / 3, backend="aot_eager")
    leaves = [t.clone().requires_grad_() for t in inputs[:2]]
    compiled(*leaves).backward()
    _, wanted = exact(2 * inputs[0], inputs[1], None, inputs[3], None, 1 / 3)
    assert error(leaves[0].grad, 2 * wanted[0]) < 2e-6
    assert error(leaves[1].grad, wanted[1]) < 2e-6


def test_chunks_are_bounded():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for vocabulary in (1, 100, 2048, 49152, 256_000, 10**9):
        for device in (cpu, gpu):
            rows = chunk_rows(vocabulary, device)
            assert rows == 1 or 1 <= rows <= loss.MOST_LOGITS // vocabulary
        assert chunk_rows(vocabulary, cpu) <= chunk_rows(vocabulary, gpu)


LIGER = """
import torch
from hdp.parallel import loss
from test_loss import error, exact, make

loss.liger_takes = lambda hidden, weights: weights is None  # on a CPU, in triton's interpreter
inputs = make()
leaves = [t.clone().requires_grad_() for t in inputs[:2]]
total = loss.loss_sum(*leaves, None, inputs[3])
assert "Liger" in type(total.grad_fn).__name__, total.grad_fn
(0.3 * total).backward()
want, wanted = exact(*inputs, 0.3)
assert error(total, want) < 1e-6
for leaf, gradient in zip(leaves, wanted):
    assert error(leaf.grad, gradient) < 2e-6
print("liger")
"""


def test_liger_in_tritons_interpreter():
    pytest.importorskip("liger_kernel")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run([sys.executable, "-c", LIGER], check=False, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "liger", done.stderr


def test_liger_is_for_gpus_and_equal_weights():
    def like(is_cuda: bool, tokens: int = 3, dtype: torch.dtype = torch.bfloat16) -> types.SimpleNamespace:
        return types.SimpleNamespace(is_cuda=is_cuda, shape=(tokens, 2), dtype=dtype)

    cuda, cpu = like(True), like(False)
    installed = loss.liger_loss() is not None
    assert loss.liger_takes(cuda, None) is installed
    assert not loss.liger_takes(cpu, None)
    assert not loss.liger_takes(cuda, torch.ones(3))
    assert not loss.liger_takes(like(True, tokens=0), None)
    assert not loss.liger_takes(like(True, dtype=torch.float64), None)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        made = function(*arguments, **(keywords or {}))
        if isinstance(made, Tensor):
            self.elements = max(self.elements, made.numel())
        return made


def test_logits_are_never_whole():
    vocabulary, largest = 4096, []
    for tokens in (2048, 8192):
        hidden, weight = torch.randn(tokens, 8, requires_grad=True), torch.randn(vocabulary, 8, requires_grad=True)
        with Largest() as mode:
            loss_sum(hidden, weight, None, torch.zeros(tokens, dtype=torch.int64)).backward()
        largest.append(mode.elements)
    assert largest[0] == largest[1] == chunk_rows(vocabulary, torch.device("cpu")) * vocabulary


@pytest.mark.parametrize("weighted", [False, True])
def test_autocast_computes_in_bf16_and_sums_in_fp32(weighted):
    inputs = make(bias=True, weighted=weighted)
    with torch.autocast("cpu", torch.bfloat16):
        leaves = [t.clone().requires_grad_() for t in inputs[:3]]
        total = loss_sum(*leaves, *inputs[3:])
    total.backward()
    want, wanted = exact(*inputs, 1.0)
    assert total.dtype == torch.float32 and 1e-6 < error(total, want) < 1e-2
    for leaf, gradient in zip(leaves, wanted, strict=True):
        assert leaf.grad.dtype == torch.float32 and 1e-5 < error(leaf.grad, gradient) < 2e-2
