"""Rotary positions that depend on how long a document is, in micro-batches that hold parts of many.

transformers chooses LongRoPE's factors by the largest position that it is given, Phi-MoE its scale as well: short documents
packed beside a long one would get the long one's, and the sharers of one document different ones. Here every document has its
own. Of rotations whose base grows with the longest document seen so far ("dynamic") no document has one: they are refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def find_long_rotations(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that compute LongRoPE.

    Raises:
        ValueError: rotations that change with what was seen before.
    """
    found = []
    for name, module in model.named_modules():
        kinds = getattr(module, "rope_type", None)
        kinds = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
        if any(isinstance(kind, str) and "dynamic" in kind for kind in kinds):
            raise ValueError(
                f"the rotary positions of {name} are of type 'dynamic': their base grows with the longest document so far, so"
                " what a document gets depends on the others; set config.rope_parameters to linear, yarn, llama3 or longrope"
            )
        if "longrope" in kinds:
            found.append(module)
    return found


@contextlib.contextmanager
def rotated_by_document(rotations: Sequence[nn.Module], lengths: Tensor) -> Iterator[None]:
    """Within it each of ``rotations`` rotates a token by the length of its own document; ``lengths`` [tokens] has these."""
    with contextlib.ExitStack() as exits:
        for module in rotations:
            forward, had_own = module.forward, "forward" in vars(module)
            module.forward = _ByDocument(module, forward, lengths)  # type: ignore[method-assign]
            undo: Any = (setattr, module, "forward", forward) if had_own else (delattr, module, "forward")
            exits.callback(*undo)
        yield


class _ByDocument:
    """A rotary embedding's forward, called apart for short and long documents."""

    def __init__(self, module: Any, forward: Any, lengths: Tensor) -> None:
        self.module, self.forward, self.lengths = module, forward, lengths

    def __call__(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, ...]:
        """position_ids [1, tokens]; cos and sin, each [1, tokens, width]."""
        options = {} if layer_type is None else {"layer_type": layer_type}
        parameters = self.module.config.rope_parameters
        most = (parameters if layer_type is None else parameters[layer_type]).get("original_max_position_embeddings")
        if most is None:
            return self.forward(x, position_ids, **options)  # type: ignore[no-any-return]
        is_long = self.lengths > most
        whole: list[Tensor] = []
        for chosen, last in ((~is_long, []), (is_long, [most])):
            if not bool(chosen.any()):
                continue
            rows = position_ids[:, chosen]
            # A row at the position by which transformers sees that the document is long, wherever this rank's part of it ends.
            end = torch.tensor([last], dtype=rows.dtype, device=rows.device)
            parts = self.forward(x, torch.cat((rows, end), dim=1), **options)
            whole = whole or [p.new_empty((1, len(chosen), p.shape[-1])) for p in parts]
            for to, part in zip(whole, parts, strict=True):
                to[:, chosen] = part[:, : rows.shape[1]]
        return tuple(whole)
