"""A tiny Llama, documents for it, and its exact gradient: float64 throughout, one process, one document at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 101
HEADS = {"gqa": (4, 2), "mha": (4, 4), "mqa": (3, 1)}  # query and key heads
IGNORE = -100


def make_model(heads: str = "gqa", attention: str = "hdp", seed: int = 0, **options: Any) -> LlamaForCausalLM:
    """The same weights for the same arguments, whatever the attention."""
    query, key = HEADS[heads]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16 * query,
        head_dim=16,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=query,
        num_key_value_heads=key,
        max_position_embeddings=4096,
        attention_bias=True,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **options,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.set_attn_implementation(attention)
    with torch.no_grad():  # fresh norms and biases are all equal: nothing would show that they were mixed up
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def make_documents(lengths: Sequence[int], seed: int = 0) -> list[Tensor]:
    """Token ids, one tensor [tokens] a document."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator) for length in lengths]


def make_reference(heads: str = "gqa", seed: int = 0, **options: Any) -> LlamaForCausalLM:
    """:func:`make_model` in float64. transformers computes norms and rotations in fp32 whatever the weights: not here."""
    return widen(make_model(heads, "eager", seed, **options))


def widen(model: Any) -> Any:
    """float64 throughout, norms and rotations of transformers included."""
    for module in model.double().modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _norm.__get__(module)
        elif type(module).__name__.endswith("RotaryEmbedding"):
            module.forward = _rotation.__get__(module)
    return model


def _norm(self: nn.Module, hidden: Tensor) -> Tensor:
    return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def _rotation(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    dim = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
    theta = self.config.rope_parameters["rope_theta"]
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = position_ids[..., None].double() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def loss_sums(model: nn.Module, documents: Sequence[Any]) -> tuple[Tensor, float]:
    """Sum of the weighted token losses of all documents, and the sum of the weights: labels by hand, no code of hdp."""
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    for document in documents:
        fields = document if isinstance(document, Mapping) else {"input_ids": document}
        ids = fields["input_ids"]
        labels = fields.get("labels", ids)[1:]
        weights = fields.get("loss_weights", torch.ones(len(ids)))[1:].double()
        if len(ids) < 2:
            continue
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        losses = F.cross_entropy(logits.double(), labels, ignore_index=IGNORE, reduction="none")
        total = total + (losses * weights).sum()
        weight += float(weights[labels != IGNORE].sum())
    return total, weight


def exact_gradient(heads: str, documents: Sequence[Any], **options: Any) -> tuple[float, dict[str, Tensor]]:
    """Mean loss over label tokens, and its gradient by parameter, all float64."""
    model = _reference(heads, tuple(sorted(options.items())))
    model.zero_grad()
    total, weight = loss_sums(model, documents)
    (total / weight).backward()
    return float(total.detach()) / weight, {name: p.grad.clone() for name, p in model.named_parameters()}


@cache
def _reference(heads: str, options: tuple[tuple[str, Any], ...]) -> LlamaForCausalLM:
    return make_reference(heads, **dict(options))


def gradient_errors(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """Per parameter ||difference|| / max(||its gradient||, 1e-3 ||all gradients||)."""
    assert found.keys() == exact.keys()
    floor = 1e-3 * float(torch.stack([g.norm() for g in exact.values()]).norm())
    return {name: float((found[name].double() - g).norm()) / max(float(g.norm()), floor) for name, g in exact.items()}
