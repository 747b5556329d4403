"""The attention function ``"hdp"`` of Hugging Face transformers.

Inside a planned batch (the model is called with ``hdp_route=...``, which transformers hands down to attention) it runs the
route's programs. Outside one (evaluation, ``generate``) it is transformers' own ``sdpa``, masks included; a soft-cap (Gemma
2), which sdpa does not know, is computed in plain torch there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hdp.attention.op import attend
from hdp.attention.route import Route

NAME = "hdp"
ROUTE_KEYWORD = "hdp_route"

# Keywords that transformers hands down and that cannot change what a planned batch computes.
_HARMLESS = frozenset(
    {"position_ids", "cache_position", "use_cache", "output_hidden_states", "return_dict", "layer_idx"}
)
# What else sdpa honours, or what cannot change its result: sliding windows come with the mask, losses after it.
_OUTSIDE = frozenset({"output_attentions", "position_bias", "cache", "num_items_in_batch"})


def register() -> None:
    """Makes ``attn_implementation="hdp"`` known to transformers; repeating is harmless.

    ``hdp.init`` calls it: needed only where a model is made before, or without. Raises ModuleNotFoundError
    without transformers.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, hdp_attention)
    # Without a mask function transformers would silently drop padding masks.
    AttentionMaskInterface.register(NAME, hdp_mask)


def planned_mask(device: torch.device) -> Tensor:
    """What a planned batch passes as ``attention_mask``: a 2-D mask of no keys, by which :func:`hdp_mask` knows it.

    A 4-D one would pass transformers by as it is, and with it every pattern that the model asks for.
    """
    return torch.empty((1, 0), dtype=torch.bool, device=device)


# Patterns that a planned batch computes by itself: causal or not, and sliding windows, which attention is told of. Each is the
# name of a function of transformers.masking_utils (or of Gemma 3), or of the one that made it.
_PATTERNS = {
    "causal_mask_function",
    "bidirectional_mask_function",
    "sliding_window_overlay",
    "sliding_window_bidirectional_overlay",
    "_bidirectional_window_overlay",
}
_PATTERN_NAMES = {
    "chunked_overlay": "chunked attention",
    "blockwise_overlay": "attention in blocks of tokens that see each other",
}


def hdp_mask(*arguments: Any, **keywords: Any) -> Tensor | None:
    """transformers' mask interface: that of ``sdpa``; in a planned batch an empty mask, if it can do without.

    The empty mask is as wide as a sliding window that the pattern has: some models (Phi-MoE, Qwen2-MoE) tell attention of it in
    no other way. Its second dimension says whether queries see later keys: 1 no, 2 yes.

    Raises:
        ValueError: in a planned batch, a pattern that is more than causal, bidirectional or a sliding window.
    """
    from transformers.masking_utils import sdpa_mask

    given = keywords.get("attention_mask")
    if given is None or given.dim() != 2 or given.shape[-1]:
        return sdpa_mask(*arguments, **keywords)
    config = keywords.get("config")
    patterns = _patterns(keywords["mask_function"], getattr(config, "use_bidirectional_attention", False) is True)
    for pattern in patterns:
        if pattern not in _PATTERNS:
            name = _PATTERN_NAMES.get(pattern, f"the attention pattern {pattern!r}")
            raise ValueError(
                f"{name} ({type(config).__name__}) is not supported in a planned batch: each layer's attention must be causal"
                " or bidirectional, whole or in a sliding window"
            )
    ways = 2 if any("bidirectional" in pattern for pattern in patterns) else 1
    return torch.empty((1, ways, 0, _window(keywords["mask_function"])), dtype=torch.bool, device=given.device)


def _window(function: Callable[..., Any]) -> int:
    """Tokens of the narrowest sliding window among what a mask function is made of, a query's own included; 0: none."""
    cells = {
        name: cell.cell_contents
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    }
    if function.__qualname__.startswith("sliding_window_overlay."):
        return int(cells["sliding_window"])
    if function.__qualname__.startswith("sliding_window_bidirectional_overlay."):
        return int(cells["sliding_window"]) + 1  # this one counts without the query's own
    if not function.__qualname__.startswith("and_masks."):
        return 0
    windows = [_window(part) for parts in cells.values() for part in parts]
    return min((window for window in windows if window), default=0)


def _patterns(function: Callable[..., Any], is_bidirectional: bool) -> list[str]:
    """Names of what a mask function of transformers is made of.

    A union is one pattern, unless it lets a causal model see everything (Gemma 3's ``use_bidirectional_attention``).
    """
    name = function.__qualname__
    if name.startswith("and_masks.") or (is_bidirectional and name.startswith("or_masks.")):
        inner = [cell.cell_contents for cell in function.__closure__ or ()]
        return [name for parts in inner for part in parts for name in _patterns(part, is_bidirectional)]
    if is_bidirectional and name.endswith("<lambda>"):
        return ["bidirectional_mask_function"]
    return [name.partition(".<locals>")[0]]


def hdp_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    hdp_route: Route | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, heads, tokens, head_dim] in, [1, tokens, heads, head_dim] out.

    Raises:
        ValueError: a mask, dropout or keyword that a planned batch cannot honour; a soft-cap that the backend does not know.
    """
    if hdp_route is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        _refuse_unknown(keywords, _HARMLESS | _OUTSIDE, "outside a planned batch")
        if softcap is not None:
            return _capped(module, query, key, value, attention_mask, scaling, dropout, softcap, is_causal), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **keywords
        )
    _refuse(query, attention_mask, dropout, keywords)
    window = _agreed_window(attention_mask, sliding_window)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    _check_direction(module, attention_mask, bool(causal))
    device = query.device.type
    if device != "meta" and torch.is_autocast_enabled(
        device
    ):  # rotations leave queries and keys wider than values; sdpa casts them, too
        query, key, value = (t.to(torch.get_autocast_dtype(device)) for t in (query, key, value))
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    out = attend(q, k, v, route=hdp_route, scale=scaling, causal=bool(causal), window=window, softcap=softcap or 0.0)
    return out.unsqueeze(0), None


def _capped(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float,
    is_causal: bool | None,
) -> Tensor:
    """Attention with a soft-cap outside a planned batch, written out, since sdpa has none: rows x keys memory."""
    group, rows = query.shape[1] // key.shape[1], query.shape[2]
    key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.tanh(query @ key.transpose(2, 3) * (scale / softcap)) * softcap
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if mask is None and causal and rows > 1:  # as sdpa: no mask stands for a causal one, but for a single new token
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    weights = torch.nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous()


def _agreed_window(mask: Tensor | None, told: int | None) -> int | None:
    """The layer's window: of the keyword, or of the width of the empty mask (:func:`hdp_mask`)."""
    width = mask.shape[-1] if mask is not None and mask.dim() == 4 else 0
    if not width or told is None:
        return told or width or None
    if mask is not None and mask.shape[1] == 2:
        return width  # told is the config's number, which models take in either way
    if width < told:
        raise ValueError(
            f"a layer has a sliding window of {told} tokens, and its mask one of {width}: both must be the same"
        )
    return told


def _check_direction(module: torch.nn.Module, mask: Tensor | None, causal: bool) -> None:
    if mask is not None and mask.dim() == 4 and (mask.shape[1] == 2) == causal:
        layer, made = ("causal", "bidirectional") if causal else ("bidirectional", "causal")
        raise ValueError(
            f"{type(module).__name__} is {layer} and its mask is {made}: both must be the same (config.is_causal, the"
            " layer's is_causal)"
        )


def _refuse(query: Tensor, attention_mask: Tensor | None, dropout: float, keywords: dict[str, Any]) -> None:
    if query.shape[0] != 1:
        raise ValueError(f"a planned batch is packed: batch size 1, not {query.shape[0]}")
    if attention_mask is not None and attention_mask.numel():
        raise ValueError(
            f"a planned batch takes no attention mask (got shape {tuple(attention_mask.shape)}):"
            " documents are kept apart by the plan, and it has no padding"
        )
    if dropout:
        raise ValueError(f"attention dropout {dropout} is not supported: set attention_dropout=0 in the model's config")
    _refuse_unknown(keywords, _HARMLESS, "in a planned batch")


def _refuse_unknown(keywords: dict[str, Any], known: frozenset[str], where: str) -> None:
    unknown = sorted(k for k, v in keywords.items() if k not in known and v is not None and v is not False)
    if unknown:
        raise ValueError(f"attention keyword {unknown[0]!r} is not supported {where}; remove it from the call")
