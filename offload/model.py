"""How many bytes of saved activations a micro-batch has on its device at most. Pure: no torch.

The walk of :mod:`hdp.offload.micro_batch`, in closed steps: during the forward of call n the storages of n - 1 may still be
on their way out; during its backward those of n - 1 are on their way back. Of a storage of which a part leaves, the part
that stays is copied to a tensor of its own, so that for as long as both exist it counts twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hdp.offload.policy import LayerAction


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerBytes:
    """What one layer saves, in bytes."""

    all: int
    """Everything, when it is not recomputed."""
    kept: int = 0
    """Input and outputs of the kept operators: all that is saved when the layer is recomputed."""


def device_bytes(layers: Sequence[LayerBytes], actions: Sequence[LayerAction]) -> int:
    """Peak bytes of saved activations on the device, with copies that hide; recomputed ones of one layer included.

    Raises ValueError when the two sequences differ in length.
    """
    if len(layers) != len(actions):
        raise ValueError(f"{len(layers)} layers but {len(actions)} actions: give one action a layer")
    saved = [layer.kept if action.recompute else layer.all for layer, action in zip(layers, actions, strict=True)]
    stays = [round(size * (1.0 - action.ratio)) for size, action in zip(saved, actions, strict=True)]
    moves = [action.ratio > 0.0 for action in actions]
    peak, below = 0, 0
    for n in range(len(layers)):
        # At layer n everything before n - 1 has left. Layer n: all it saves, plus the copy of its rest while it leaves.
        now = saved[n] + (stays[n] if moves[n] else 0)
        if actions[n].recompute:
            now = max(now, saved[n] + layers[n].all)
        before = (saved[n - 1] + (stays[n - 1] if moves[n - 1] else 0)) if n else 0
        # Forward: n's own copy of the rest exists with before's. Backward: n has arrived and dropped its rest.
        backward = saved[n] + (layers[n].all if actions[n].recompute else 0) + before
        forward = now + before
        peak = max(peak, below + max(backward, forward))
        if n:
            below += stays[n - 1] if moves[n - 1] else saved[n - 1]
    return peak


def tier_bytes(layers: Sequence[LayerBytes], actions: Sequence[LayerAction]) -> int:
    """Bytes outside the device at the end of forward."""
    return sum(
        round((layer.kept if action.recompute else layer.all) * action.ratio)
        for layer, action in zip(layers, actions, strict=True)
    )
