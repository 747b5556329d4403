"""Activation checkpointing that does not send attention's messages a second time."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import hdp.attention.op  # noqa: F401  # the operator


def keep_attention() -> tuple[Any, Any]:
    """``context_fn`` of ``torch.utils.checkpoint.checkpoint``: attention's out and lse are kept, all else runs again.

    So is what its backward pass needs of received blocks (a ring one, Ulysses all heads' queries, keys and values).
    For checkpoints of one's own (``use_reentrant=False``); engines give it to those of transformers by themselves.
    """
    return create_selective_checkpoint_contexts(_policy)


def _policy(ctx: Any, op: Any, *args: Any, **keywords: Any) -> CheckpointPolicy:
    is_attention = op is torch.ops.hdp.attend.default
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE


def keep_attention_in(model: nn.Module) -> None:
    """Gives :func:`keep_attention` to the checkpoints that ``gradient_checkpointing_enable`` of transformers has set.

    Not to reentrant ones, which know no policy, nor to layers that hold compiled parts, of which no operator's output can be
    kept; ones that have a ``context_fn`` keep it.
    """
    module: Any
    for module in model.modules():
        function: Any = getattr(module, "_gradient_checkpointing_func", None)
        if (
            isinstance(function, functools.partial)
            and function.func is checkpoint
            and function.keywords.get("use_reentrant") is False
            and "context_fn" not in function.keywords
            and not any(part._compiled_call_impl is not None for part in module.modules())
        ):
            module._gradient_checkpointing_func = functools.partial(function, context_fn=keep_attention)
