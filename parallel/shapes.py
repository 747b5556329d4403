"""A model's shape as planners count it: from its config, or from what its modules show.

    seen = see_shape(model)
    seen.shape      # layers, widths, heads
    seen.guesses    # what could not be seen and was assumed, in words

Without a transformers config layers are found by structure (``hdp.offload.layers``), every matrix of a layer is taken for
a linear layer, and heads are looked for in attributes by their usual names, then in the shapes of projections.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from hdp.balance.models import ModelShape
from hdp.balance.plan import PlanError
from hdp.offload.layers import find_layers

HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "num_query_heads", "nheads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "num_query_groups")
HEAD_DIM = ("head_dim", "head_size", "d_head", "dim_head")
EXPERTS_USED = ("num_experts_per_tok", "num_experts_per_token", "top_k", "topk", "n_activated_experts")
QUERY = ("q_proj", "wq", "query", "to_q", "q_linear", "linear_q")
KEY = ("k_proj", "wk", "key", "to_k", "k_linear", "linear_k")
FUSED = ("qkv_proj", "qkv", "wqkv", "c_attn", "query_key_value", "in_proj")


@dataclass(frozen=True, kw_only=True)
class SeenShape:
    """A shape and where it is from."""

    shape: ModelShape
    has_config: bool
    """Whether a config told it all; otherwise the modules did."""
    guesses: tuple[str, ...] = ()
    """What could not be seen, and what is assumed in its stead."""

    def __str__(self) -> str:
        shape = self.shape
        weights = shape.layer_weights
        text = (
            f"{shape.layers} layer{'s' if shape.layers > 1 else ''} of {weights:,} weights a token, {shape.heads} heads"
            f" ({shape.kv_heads} of keys) of {shape.head_dim}, a head of {shape.hidden:,} x {shape.vocabulary:,}"
        )
        return text + "".join(f"; assumed: {guess}" for guess in self.guesses)


def see_shape(model: nn.Module) -> SeenShape | None:
    """The shape of a model; None where neither a config nor a layer with weights and an output head are to be seen."""
    try:
        return SeenShape(shape=ModelShape.from_config(getattr(model, "config", None)), has_config=True)
    except (PlanError, AttributeError, TypeError, ValueError):
        return _see(model)


def _see(model: nn.Module) -> SeenShape | None:
    head: Any = getattr(model, "get_output_embeddings", lambda: getattr(model, "lm_head", None))()
    size = _size(getattr(head, "weight", None))
    layers = _layers(model)
    if len(size) != 2 or not layers:
        return None
    guesses: list[str] = []
    weights = sum(_weights(layer, guesses) for layer in layers) // len(layers)
    if not weights:
        return None
    vocabulary, hidden = size
    heads, kv_heads, head_dim = _heads(layers[0], hidden, guesses)
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    shape = ModelShape(
        name=type(model).__name__.removeprefix("FSDP"),
        layers=len(layers),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        # One matrix that has all weights but attention's: as many FLOPs, and as many activations, as an MLP of two or three.
        intermediate=max(round((weights - attention) / hidden), 1),
        mlp_matrices=1,
        vocabulary=vocabulary,
    )
    return SeenShape(shape=shape, has_config=False, guesses=tuple(dict.fromkeys(guesses)))


def _layers(model: nn.Module) -> tuple[nn.Module, ...]:
    try:
        return find_layers(model)
    except ValueError:  # no list of them: those that the user named to hdp.shard
        return tuple(part for part in model.modules() if isinstance(part, FSDPModule) and part is not model)


def _size(parameter: Any) -> tuple[int, ...]:
    """Of the whole parameter; ZeRO-3 leaves empty ones behind."""
    return tuple(getattr(parameter, "ds_shape", getattr(parameter, "shape", ())))


def _weights(layer: nn.Module, guesses: list[str]) -> int:
    """Elements of a layer's matrices that one token is multiplied with."""
    used = _number(layer, EXPERTS_USED)
    total = 0
    for name, part in layer.named_modules():
        for parameter in part.parameters(recurse=False):
            size = _size(parameter)
            if len(size) < 2 or isinstance(part, nn.Embedding):
                continue
            experts = _experts(layer, name) or (size[0] if len(size) == 3 and not _is_convolution(part) else 0)
            if experts and used is None:
                guesses.append(f"a token passes through all {experts} experts")
            total += math.prod(size) * min(used or experts, experts) // experts if experts else math.prod(size)
    return total


def _is_convolution(part: nn.Module) -> bool:
    return isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _experts(layer: nn.Module, name: str) -> int:
    """Members of the list of experts that a module of a layer belongs to; 0: it belongs to none."""
    parts = name.split(".")
    for end, part in enumerate(parts, start=1):
        found = layer.get_submodule(".".join(parts[:end]))
        if "expert" in part and "shared" not in part and isinstance(found, nn.ModuleList) and end < len(parts):
            return len(found)
    return 0


def _heads(layer: nn.Module, hidden: int, guesses: list[str]) -> tuple[int, int, int]:
    """Query heads, key heads, elements of a head."""
    query, key, fused = (_outputs(layer, names) for names in (QUERY, KEY, FUSED))
    heads, kv_heads, head_dim = (_number(layer, names) for names in (HEADS, KV_HEADS, HEAD_DIM))
    width = query or (hidden if heads is None or head_dim is None else heads * head_dim)
    keys = key or ((fused - width) // 2 if fused and fused > width else None)
    if heads is None and head_dim is None:
        if not keys or width % keys:
            guesses.append(f"attention {hidden if not query else width} wide, as many heads of keys as of queries")
            return 1, 1, width
        return width // keys, 1, keys  # only the widths count
    head_dim = head_dim or max(width // (heads or 1), 1)
    heads = heads or max(width // head_dim, 1)
    if kv_heads is None and keys:
        kv_heads = keys // head_dim
    if not kv_heads or heads % kv_heads:
        guesses.append("as many heads of keys as of queries")
        kv_heads = heads
    return heads, kv_heads, head_dim


def _number(layer: nn.Module, names: tuple[str, ...]) -> int | None:
    """The first attribute of these names that is a positive whole number, of the layer or of a module in it."""
    for part in layer.modules():
        for name in names:
            value = getattr(part, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _outputs(layer: nn.Module, names: tuple[str, ...]) -> int | None:
    """Outputs of the first projection of these names."""
    for name, weight in _matrices(layer):
        if name.lower() in names or name.lower().removesuffix("_weight") in names:
            rows, columns = weight
            return (
                columns if name == "c_attn" and columns > rows else rows
            )  # transformers' Conv1D is the other way round
    return None


def _matrices(layer: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name of the module (of the parameter, where it is not called weight) and size of every matrix."""
    for name, parameter in layer.named_parameters():
        size = _size(parameter)
        if len(size) == 2:
            module, _, own = name.rpartition(".")
            yield (module.rpartition(".")[2] if own == "weight" else own), (size[0], size[1])
