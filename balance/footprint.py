"""What a model holds on a device while it trains, stretch by stretch, as lines: so many bytes and so many a token.

Traced from the model itself by ``hdp.parallel.footprint``, or drawn up from a model's shape by :func:`shape_footprint`;
``hdp.balance.foresee`` adds what engine, schedules and offload make of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hdp.balance.models import ModelShape

Line = tuple[float, float]
"""Bytes, and bytes a token."""
Lines = tuple[Line, ...]
"""The highest of them counts."""


def at(line: Line, tokens: int) -> float:
    """Bytes at so many tokens."""
    return line[0] + line[1] * tokens


def highest(lines: Lines, tokens: int) -> float:
    """Bytes of the highest line at so many tokens; at least 0."""
    return max((at(line, tokens) for line in lines), default=0.0) if lines else 0.0


def upper_lines(lines: Iterable[Line]) -> Lines:
    """Those that are highest at some number of tokens from 0 on, by growing slope."""
    best: dict[float, float] = {}
    for base, slope in lines:
        best[slope] = max(base, best.get(slope, base))
    hull: list[Line] = []
    for slope in sorted(best):
        base = best[slope]
        while hull and hull[-1][0] <= base:
            hull.pop()  # lower at 0 and less steep
        while len(hull) > 1 and _cross(hull[-2], (base, slope)) <= _cross(hull[-2], hull[-1]):
            hull.pop()
        hull.append((base, slope))
    return tuple(hull)


def _cross(flat: Line, steep: Line) -> float:
    """Tokens at which the steeper line overtakes."""
    return (flat[0] - steep[0]) / (steep[1] - flat[1])


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """One attention call of a layer."""

    heads: int
    key_heads: int
    head_dim: int
    element: int
    """Bytes of an element of q, k and v."""
    causal: bool = True
    window: int = 0
    """Tokens that a query sees; 0: all."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A stretch of the model: what comes before the layers, one layer, what comes behind them."""

    parameters: int
    """Elements of its parameters."""
    trained: int
    """Those that get gradients."""
    forward: Lines
    """The most in its forward pass, above what was there before."""
    held: Line
    """What is left of it from forward to backward."""
    moves: tuple[Line, ...]
    """Storages that autograd saves there first, one by one: what may leave the device."""
    again: Line
    """What it keeps instead where it runs again in backward: its input, attention's out and lse."""
    backward: Lines
    """The most in its backward pass, above what it and those before it hold, its parameters' gradients included."""
    backward_more: Lines
    """The same where gradients are added to those of an earlier micro-batch."""
    attention: tuple[AttentionShape, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """A model."""

    before: Segment
    layers: tuple[Segment, ...]
    behind: Segment
    vocabulary: int
    width: int
    """Of the hidden states that the head reads."""
    trains_head: bool = True

    @property
    def parameters(self) -> int:
        return sum(s.parameters for s in (self.before, *self.layers, self.behind))

    @property
    def trained(self) -> int:
        return sum(s.trained for s in (self.before, *self.layers, self.behind))


def shape_footprint(shape: ModelShape, element: int = 2) -> Footprint:
    """Of a decoder as transformers' Llama is written, from its shape alone: an estimate for other models.

    Args:
        element: bytes of an element of what is computed with.
    """
    hidden, wide, width = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    middle = shape.active_experts * shape.intermediate * (shape.mlp_matrices - 1)
    per_expert = shape.mlp_matrices * shape.hidden * shape.intermediate
    weights = shape.hidden * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads) + shape.experts * per_expert
    parameters = weights + 2 * hidden
    out = (0.0, float(wide * element + 4 * shape.heads))
    norms = 4.0 if element >= 4 else 4.0 * (1 + 2 * hidden) - 2 * element * hidden  # computed in fp32
    moves = [float(n * element) for n in (hidden,) * 6 + (wide,) * 2 + (width,) * 2 + (middle,) * 2]
    held = sum(moves) + 2 * norms + 4.0 * shape.heads
    peak = (float(shape.intermediate * hidden * element), 2.0 * middle / max(shape.mlp_matrices - 1, 1) * element)
    layer = Segment(
        parameters=parameters,
        trained=parameters,
        forward=((0.0, held + hidden * element),),
        held=(0.0, held),
        moves=tuple((0.0, size) for size in moves),
        again=(0.0, hidden * element + out[1]),
        backward=upper_lines([(float(parameters * element), -held * 0.75), peak]),
        backward_more=(peak,),
        attention=(
            AttentionShape(
                heads=shape.heads, key_heads=shape.kv_heads, head_dim=shape.head_dim, element=element, window=0
            ),
        ),
    )
    return Footprint(
        before=Segment(
            parameters=2 * shape.vocabulary * hidden + hidden,
            trained=2 * shape.vocabulary * hidden + hidden,
            forward=((0.0, 32.0 + (hidden + 5 * shape.head_dim) * element),),
            held=(0.0, 24.0 + (hidden + 2 * shape.head_dim) * element),
            moves=(),
            again=(0.0, 0.0),
            backward=((float(shape.vocabulary * hidden * element), 0.0),),
            backward_more=((float(shape.vocabulary * hidden * element), 0.0),),
        ),
        layers=(layer,) * shape.layers,
        behind=Segment(
            parameters=0,
            trained=0,
            forward=((0.0, 3.0 * hidden * element),),
            held=(0.0, 2.0 * hidden * element + norms),
            moves=(),
            again=(0.0, 0.0),
            backward=((0.0, 3.0 * hidden * element),),
            backward_more=((0.0, 3.0 * hidden * element),),
        ),
        vocabulary=shape.vocabulary,
        width=hidden,
    )
