"""What happens to each layer's activations: keep, offload, recompute, or the mix that MEMO solves for.

Pure: no torch. A policy is turned into one :class:`LayerAction` a layer; the first and the last layers keep what they
save (ByteScale's l - 2: the last layer's activations are needed first, the first layer's free nothing in time).

MEMO offloads every layer's input and attention output and, of the rest, offloads a fraction of the *tokens* and
recomputes the others. Here the fraction is taken over *layers*, spread evenly: a layer either offloads all of the rest or
recomputes all of it. The bytes and the work are the same over neighbouring layers, and a layer is recomputed by the very
kernels and shapes of its forward, so that the gradient keeps its bits, which a product over part of the tokens would not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

POLICIES = ("keep", "offload", "recompute", "memo", "auto")


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerAction:
    """What one layer does with what it would save."""

    ratio: float = 0.0
    """Fraction of each saved tensor that leaves; of a recomputed layer: of its input and its kept operators' outputs."""
    recompute: bool = False
    """Save the input and the outputs of the kept operators only; run the layer again in backward."""


def layer_actions(
    layers: int,
    *,
    policy: str,
    ratio: float = 1.0,
    memo_fraction: float = 0.0,
    recompute_layers: int | None = None,
    keep_first: int = 1,
    keep_last: int = 1,
) -> tuple[LayerAction, ...]:
    """One action for each of ``layers`` layers.

    Args:
        policy: ``keep``, ``offload``, ``recompute`` or ``memo`` (``auto`` is resolved to one of them first).
        ratio: fraction that leaves, 0 to 1 (see :class:`LayerAction`); unused by ``keep`` and ``memo``.
        memo_fraction: ``memo``: fraction of the layers whose rest is offloaded; the others recompute it.
        recompute_layers: ``recompute``: how many layers run again, spread evenly, the last one of all last; of the others
            ``ratio`` leaves as well. None: all between those that keep everything.
        keep_first, keep_last: layers at each end that keep everything.

    Raises:
        ValueError: an unknown policy, a number out of its range, or more layers to run again than do not keep everything.
    """
    if policy not in POLICIES or policy == "auto":
        raise ValueError(f"policy {policy!r} is not one of {', '.join(p for p in POLICIES if p != 'auto')}")
    for name, value in (("ratio", ratio), ("memo_fraction", memo_fraction)):
        if not (0.0 <= value <= 1.0) or math.isnan(value):
            raise ValueError(f"{name} is {value}: give a number from 0 to 1")
    if keep_first < 0 or keep_last < 0:
        raise ValueError(f"keep_first is {keep_first}, keep_last is {keep_last}: give numbers of at least 0")
    first, last = min(keep_first, layers), max(layers - keep_last, min(keep_first, layers))
    keep, inner = LayerAction(), last - first
    if policy == "keep":
        middle = [keep] * inner
    elif policy == "memo":
        marks = [
            math.floor((i + 1) * memo_fraction + 1e-9) > math.floor(i * memo_fraction + 1e-9) for i in range(inner)
        ]
        middle = [LayerAction(ratio=1.0, recompute=not mark) for mark in marks]
    else:
        again = _layers_again(policy, recompute_layers, inner)
        # From the end, so that the last layer comes last: in its room, free by then, the others run again.
        marks = [(j + 1) * again // inner > j * again // inner for j in reversed(range(inner))]
        middle = [LayerAction(ratio=ratio, recompute=mark) for mark in marks]
    return (*[keep] * first, *middle, *[keep] * (layers - last))


def _layers_again(policy: str, wanted: int | None, inner: int) -> int:
    if policy != "recompute":
        return 0
    if wanted is not None and not 0 <= wanted <= inner:
        raise ValueError(
            f"{wanted} layers are to run again but {inner} are between those that keep everything: plan with the keep_first"
            " and keep_last that the engine has, or lower them"
        )
    return inner if wanted is None else wanted
