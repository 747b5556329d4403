"""Model FLOPs of a step, from the lengths of its documents: the only honest base of model FLOPs utilisation (MFU).

    flops = ModelFlops.of(model)
    flops.step(batch.plan.lengths) / result.seconds / (world.world_size * PEAK)     # MFU
    result.tokens_per_second

A linear layer of ``n`` weights costs ``2 n`` FLOPs a token forward, ``2 n`` for the gradient of its input and ``2 n`` for that
of its weights, if they are trained. Attention costs ``2 d_qk + 2 d_v`` for each head and each pair of a query and a key
that it may see (QK^T and PV; how many key heads there are does not matter), and twice that backward. A document of ``s``
tokens has ``s (s + 1) / 2`` pairs, so a batch has half the *sum of squares* of its lengths. The square of the packed
length, which many scripts use, counts pairs that no kernel computes, and shows utilisations above 1.

Recomputation is not counted (that would be hardware FLOPs), neither are embeddings, norms, activations and the optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Attention of one layer."""

    heads: int
    """Query heads."""
    qk_dim: int
    """Elements of a query, and of a key, of one head."""
    v_dim: int
    """Elements of a value of one head."""
    window: int | None = None
    """Keys that a query sees at most, its own included; None: all before it."""

    def pairs(self, lengths: np.ndarray, *, causal: bool = True) -> int:
        """(query, key) pairs of one head over documents of these lengths."""
        s = lengths.astype(object)  # Python integers: a million tokens squared, a thousand times, is beyond int64
        if not causal:
            return int((s * s).sum())
        if self.window is None:
            return int((s * (s + 1) // 2).sum())
        seen = np.minimum(s, self.window)
        return int((seen * (seen + 1) // 2 + (s - seen) * self.window).sum())


@dataclass(frozen=True, kw_only=True)
class ModelFlops:
    """What one token and one pair cost. Made by :meth:`of`."""

    trained: int
    """Weights of linear layers that a token is multiplied with and that get gradients."""
    frozen: int
    """Weights of linear layers that a token is multiplied with and that get none."""
    attention: tuple[AttentionShape, ...]
    """One a layer."""

    @classmethod
    def of(cls, model: nn.Module) -> ModelFlops:
        """Reads a causal language model of transformers: its layers from the config, its weights from the modules.

        Sharded parameters count whole. Of a mixture's experts those count that a token is sent to.

        Raises:
            ValueError: no transformers config, layers that are not attention, experts of an unknown number per token.
        """
        config = getattr(model, "config", None)
        if config is None or not hasattr(config, "get_text_config"):
            raise ValueError(f"{type(model).__name__} has no transformers config to read the attention's shape from")
        config = config.get_text_config()
        trained = frozen = 0
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                weights = _multiplied(module, parameter, config)
                trained, frozen = (
                    (trained + weights, frozen) if parameter.requires_grad else (trained, frozen + weights)
                )
        return cls(trained=trained, frozen=frozen, attention=_attention(config))

    def forward(self, lengths: Sequence[int] | np.ndarray, *, causal: bool = True) -> int:
        """FLOPs of a forward pass over documents of these lengths, in tokens."""
        lengths = np.asarray(lengths, dtype=np.int64)
        return 2 * (self.trained + self.frozen) * int(lengths.sum()) + self._pairs(lengths, causal)

    def step(self, lengths: Sequence[int] | np.ndarray, *, causal: bool = True) -> int:
        """FLOPs of forward and backward over documents of these lengths, in tokens."""
        lengths = np.asarray(lengths, dtype=np.int64)
        return (6 * self.trained + 4 * self.frozen) * int(lengths.sum()) + 3 * self._pairs(lengths, causal)

    def _pairs(self, lengths: np.ndarray, causal: bool) -> int:
        counts: dict[AttentionShape, int] = {}
        for layer in self.attention:
            counts[layer] = counts.get(layer, 0) + 1
        return sum(
            layers * a.heads * 2 * (a.qk_dim + a.v_dim) * a.pairs(lengths, causal=causal)
            for a, layers in counts.items()
        )


def _multiplied(module: nn.Module, parameter: nn.Parameter, config: Any) -> int:
    """How many of a parameter's elements one token is multiplied with."""
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves empty parameters behind
    if isinstance(module, nn.Embedding) or len(shape) < 2:  # looked up; norms and biases
        return 0
    elements = math.prod(shape)
    if len(shape) == 2:
        return elements
    experts = next(
        (getattr(config, n) for n in ("num_local_experts", "num_experts", "n_routed_experts") if hasattr(config, n)), 0
    )
    used = getattr(config, "num_experts_per_tok", None)
    if len(shape) != 3 or shape[0] != experts or used is None:
        raise ValueError(
            f"{type(module).__name__} has a parameter of shape {shape} that is neither a linear layer's"
            f" nor one of {experts} experts': count its FLOPs yourself"
        )
    return elements // experts * used


def _attention(config: Any) -> tuple[AttentionShape, ...]:
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    qk_dim = getattr(config, "qk_nope_head_dim", None)
    qk_dim = head_dim if qk_dim is None else qk_dim + config.qk_rope_head_dim
    v_dim = getattr(config, "v_head_dim", None) or head_dim
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    kinds = getattr(config, "layer_types", None) or [FULL if window is None else SLIDING] * layers
    unknown = sorted(set(kinds) - {FULL, SLIDING})
    if unknown:
        raise ValueError(f"layers of type {unknown[0]!r} are not attention: count their FLOPs yourself")
    return tuple(
        AttentionShape(heads=heads, qk_dim=qk_dim, v_dim=v_dim, window=window if kind == SLIDING else None)
        for kind in kinds
    )
