"""Model shapes: the few numbers of a transformer that decide what a token costs.

From any transformers configuration (the object, its ``config.json`` or the folder that holds it), or by the name of a
model of the ByteScale paper (section 1.7 of its evaluation: all with 8 key/value heads).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdp.balance.plan import PlanError


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder-only transformer, as far as time and memory go."""

    name: str
    layers: int
    hidden: int
    """Width of the residual stream."""
    heads: int
    """Query heads."""
    kv_heads: int
    head_dim: int
    intermediate: int
    """Width of one (expert's) gated MLP."""
    vocabulary: int
    experts: int = 1
    """Experts of an MoE layer; 1 for a dense model."""
    active_experts: int = 1
    """Experts that one token passes through."""
    window: int = 0
    """Tokens of the sliding window; 0 for none."""
    window_layers: int = 0
    """Layers that use the window; the others attend to everything before them."""
    mlp_matrices: int = 3
    """Matrices of one MLP: 3 when gated, 2 when not."""

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocabulary"):
            if getattr(self, name) < 1:
                raise PlanError(f"model {self.name}: {name} is {getattr(self, name)}, must be at least 1")
        if self.heads % self.kv_heads:
            raise PlanError(f"model {self.name}: {self.heads} query heads are no multiple of {self.kv_heads} kv heads")
        if not 0 <= self.window_layers <= self.layers:
            raise PlanError(f"model {self.name}: {self.window_layers} window layers of {self.layers} layers")

    @property
    def layer_weights(self) -> int:
        """Weights of one layer that a token is multiplied with."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + self.active_experts * self.mlp_matrices * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        """All parameters, embedding and head included (norms and biases left out)."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        mlp = self.experts * self.mlp_matrices * self.hidden * self.intermediate
        return self.layers * (attention + mlp) + 2 * self.vocabulary * self.hidden

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """From a transformers configuration, a mapping of its fields, or the path of a ``config.json`` or its folder."""
        if isinstance(config, str | Path):
            path = Path(config)
            path = path / "config.json" if path.is_dir() else path
            if not path.is_file():
                raise PlanError(f"model {str(config)!r} is no file and none of {', '.join(MODELS)}")
            try:
                config = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise PlanError(f"{path} is no JSON ({error}): give the config.json of a transformers model") from error
            if not isinstance(config, Mapping):
                raise PlanError(f"{path} holds a {type(config).__name__}: give the config.json of a transformers model")
        fields: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
        text = fields.get("text_config")
        return _from_fields(text if isinstance(text, Mapping) else fields)


def _from_fields(fields: Mapping[str, Any]) -> ModelShape:
    def first(*names: str, default: Any = None) -> Any:
        for name in names:
            if fields.get(name) is not None:
                return fields[name]
        if default is None:
            raise PlanError(
                f"model configuration has none of {', '.join(names)}: give a transformers config of a decoder"
            )
        return default

    layers = int(first("num_hidden_layers", "n_layer", "num_layers"))
    hidden = int(first("hidden_size", "n_embd", "d_model"))
    heads = int(first("num_attention_heads", "n_head"))
    experts = int(first("num_local_experts", "num_experts", "n_routed_experts", default=1))
    window = int(fields.get("sliding_window") or 0) if fields.get("use_sliding_window", True) else 0
    types = fields.get("layer_types")
    window_layers = types.count("sliding_attention") if types else layers
    gated = fields.get("model_type") not in ("gpt2", "gpt_neo", "gpt_neox", "opt", "bloom", "falcon", "phi")
    intermediate = first("moe_intermediate_size", "intermediate_size", "n_inner", default=4 * hidden)
    return ModelShape(
        name=str(fields.get("_name_or_path") or fields.get("model_type") or "model"),
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=int(first("num_key_value_heads", default=heads)),
        head_dim=int(first("head_dim", default=hidden // heads)),
        intermediate=int(intermediate),
        vocabulary=int(first("vocab_size")),
        experts=experts,
        active_experts=int(first("num_experts_per_tok", "num_experts_per_token", default=1)) if experts > 1 else 1,
        window=window,
        window_layers=window_layers if window else 0,
        mlp_matrices=3 if gated else 2,
    )


def _paper(name: str, layers: int, heads: int, hidden: int, intermediate: int, **more: int) -> ModelShape:
    return ModelShape(
        name=name,
        layers=layers,
        heads=heads,
        kv_heads=8,
        hidden=hidden,
        head_dim=128,
        intermediate=intermediate,
        vocabulary=32000,
        **more,
    )


MODELS: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        _paper("llama-7b", 32, 32, 4096, 11008),
        _paper("llama-13b", 40, 40, 5120, 13824),
        _paper("llama-30b", 60, 56, 6656, 17920),
        _paper("llama-70b", 80, 64, 8192, 28672),
        _paper("mixtral-8x7b", 32, 32, 4096, 14336, experts=8, active_experts=2),
        _paper("mixtral-8x22b", 56, 48, 6144, 16384, experts=8, active_experts=2),
    )
}


def model_shape(model: str | Path | ModelShape | Any) -> ModelShape:
    """A shipped model by name, or whatever :meth:`ModelShape.from_config` takes."""
    if isinstance(model, ModelShape):
        return model
    if isinstance(model, str) and model in MODELS:
        return MODELS[model]
    return ModelShape.from_config(model)
