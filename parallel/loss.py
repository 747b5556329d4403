"""Token losses from hidden states, fused with the output head and computed in chunks.

Logits are never whole in memory: 64K tokens of a vocabulary of 128K would be 32 GB in fp32. Each chunk's logits, loss and
gradients are computed at once in forward (as Liger does), so beyond the hidden states' gradient and the head's the peak
does not grow with the number of tokens. On a GPU Liger's kernel does it where that is installed and tokens weigh alike.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100
MOST_LOGITS = 1 << 24
"""Logits (tokens x vocabulary) of one chunk: at most 64 MB in fp32."""
CACHED_LOGITS = 1 << 20
"""Few enough that a CPU's cache holds them between the passes over them: 4 MB in fp32."""
FEWEST_ROWS = 256
"""Tokens below which a chunk's products would be bound by reading the head."""


def loss_sum(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Sum of cross-entropies of ``hidden @ weight.T + bias`` against ``labels``, in fp32 at least.

    Args:
        hidden: [tokens, width]. weight: [vocabulary, width]. bias: [vocabulary] or None. Products are computed in the dtype of
            ``hidden``, or in autocast's; gradients of the head are summed in fp32.
        labels: [tokens], already shifted; IGNORE_INDEX for tokens that do not count.
        weights: [tokens] factors of each token's loss, or None.

    Raises:
        ValueError: a label outside the vocabulary.
    """
    valid = labels != IGNORE_INDEX
    if labels.numel():
        outside = valid & ((labels < 0) | (labels >= weight.shape[0]))
        if bool(outside.any()):
            bad = int(labels[outside][0])
            raise ValueError(
                f"label {bad} is outside the vocabulary of {weight.shape[0]}: use {IGNORE_INDEX} for ignored tokens"
            )
    if torch.is_autocast_enabled(hidden.device.type):  # as the head's own product would be computed
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    if liger_takes(hidden, weights) and weight.dtype == hidden.dtype:
        liger: Any = liger_loss()
        return liger(weight, hidden, labels, bias)
    return _ChunkedLoss.apply(hidden, weight, bias, labels, weights)


def liger_takes(hidden: Tensor, weights: Tensor | None) -> bool:
    """Whether Liger's fused kernel computes this loss: on a GPU, in fp32 at most, every token counting alike."""
    narrow = hidden.dtype != torch.float64 and hidden.shape[0] > 0
    return hidden.is_cuda and narrow and weights is None and liger_loss() is not None


@cache
def liger_loss() -> Any:
    """Liger's fused linear cross-entropy, summed, gradients of the head accumulated in fp32; None: not installed."""
    try:
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    return LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE_INDEX, reduction="sum", accum_dtype=torch.float32)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, weights: Tensor | None
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        needs = ctx.needs_input_grad
        d_hidden = torch.empty_like(hidden) if needs[0] else None
        d_weight = torch.zeros_like(weight, dtype=wide) if needs[1] else None
        d_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needs[2] else None
        step = max(min(chunk_rows(weight.shape[0], hidden.device), hidden.shape[0]), 1)
        logits = hidden.new_empty((step, weight.shape[0]))
        for start in range(0, hidden.shape[0], step):
            part = slice(start, start + step)
            rows = logits[: hidden[part].shape[0]]
            torch.mm(hidden[part], weight.t(), out=rows)
            if bias is not None:
                rows += bias
            d_logits, loss = _cross_entropy(rows.to(wide), labels[part], None if weights is None else weights[part])
            total += loss
            narrow = d_logits.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(narrow, weight, out=d_hidden[part])
            if d_weight is not None and d_weight.dtype == narrow.dtype:
                d_weight.addmm_(narrow.t(), hidden[part])
            elif d_weight is not None:
                d_weight += narrow.t() @ hidden[part]
            if d_bias is not None:
                d_bias += d_logits.sum(0)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.used = False
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.used:
            raise RuntimeError(
                "the fused loss runs backward once: its gradients are scaled in place; run forward again"
            )
        ctx.used = True
        # In place: a copy of each would be as large as all that chunks save.
        d_hidden, d_weight, d_bias = (None if d is None else d.mul_(grad) for d in ctx.saved_tensors)
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight_dtype),
            None if d_bias is None else d_bias.to(bias_dtype),
            None,
            None,
        )


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Tokens of one chunk."""
    most = MOST_LOGITS // max(vocabulary, 1)
    if device.type == "cpu":
        most = min(most, max(FEWEST_ROWS, CACHED_LOGITS // max(vocabulary, 1)))
    return max(most, 1)


def _cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradient of the weighted sum of losses with respect to the logits (in their place), and the sum."""
    valid = labels != IGNORE_INDEX
    target = labels.masked_fill(~valid, 0).unsqueeze(-1)
    factor = (valid.to(logits.dtype) if weights is None else valid * weights.to(logits.dtype)).unsqueeze(-1)
    logits -= logits.amax(dim=-1, keepdim=True)
    wanted = logits.gather(-1, target)
    total = logits.exp_().sum(dim=-1, keepdim=True)
    loss = ((total.log() - wanted) * factor).sum()
    logits *= factor / total
    return logits.scatter_add_(-1, target, -factor), loss
