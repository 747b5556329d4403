"""What a model holds while it trains, traced: a copy without data runs forward and backward, and every storage is counted.

    footprint = trace_footprint(bare_copy(model), world.runtime)

The copy's parameters lie on torch's ``meta`` device, where operators only tell shapes, so that a 70B model is traced
at once, in no memory. Two lengths are traced; what differs between them is per token. Attention, loss and parameters are not
traced: what they hold depends on plan, schedule and engine, and is counted by ``hdp.balance.foresee``.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hdp.attention.route import AttentionRuntime
from hdp.balance.footprint import Footprint, Line, Lines, Segment, upper_lines
from hdp.offload.layers import find_layers
from hdp.parallel.models import output_head
from hdp.parallel.trace import Trace, TracedPart

LENGTHS = (96, 224)
"""Tokens of the two traces."""
SAMPLES = 2
"""Layers of each kind that run: behind the first, which reads what the embeddings gave, the others are alike."""


HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
LIBRARIES = ("torch", "transformers", "peft", "accelerate")
"""Whose hooks run in a trace as well."""


class NotTraced(ValueError):
    """A model that cannot run on the meta device, such as one that looks at values."""


def bare_copy(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """The same modules with parameters and buffers that hold no data; ``model`` stays as it is.

    ``dtype``: of parameters, where they are computed with in another than they have. Hooks of libraries are part of how a model
    computes (inputs that require gradients, under PEFT); those of a script may count, print or look at values: left out.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name in HOOKS:
            hooks = vars(module)[name]
            memo[id(hooks)] = type(hooks)((key, hook) for key, hook in hooks.items() if _is_of_library(hook))
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                kind = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
                empty = torch.empty(parameter.shape, dtype=kind, device="meta")
                memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for buffer in module._buffers.values():
            if buffer is not None and id(buffer) not in memo:
                memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device="meta")
    return copy.deepcopy(model, memo)


def _is_of_library(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).partition(".")[0] in LIBRARIES


def bare_model(
    model: nn.Module, layers: Sequence[nn.Module] | None = None, dtype: torch.dtype | None = None
) -> tuple[nn.Module, list[nn.Module]] | None:
    """A bare copy and its layers, to be taken before the model is wrapped; ``layers``: those of ``model``, None: found.

    None for a model that cannot be copied, is split over ranks already (tensor parallelism), or has no layers.
    """
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return None
    try:
        bare = bare_copy(model, dtype).train()  # as it will be when it counts, checkpointing included
        if layers is None:
            return bare, list(find_layers(bare))
    except (TypeError, RuntimeError, NotImplementedError, AttributeError, ValueError):
        return None
    names = {id(module): name for name, module in model.named_modules()}
    return bare, [bare.get_submodule(names[id(layer)]) for layer in layers]


def trace_footprint(model: nn.Module, layers: Sequence[nn.Module], runtime: AttentionRuntime) -> Footprint:
    """Runs ``model`` (of :func:`bare_copy`), whose ``layers`` are in the order of forward, at two lengths.

    Of layers alike only the first two run, where the others can be left out.

    Raises:
        NotTraced: it needs values that the meta device does not have.
    """
    kinds = [_kind(layer) for layer in layers]
    key = (_kind(model), len(layers))
    if key not in TRACED:
        TRACED[key] = _trace_some(model, layers, kinds, runtime)
        while len(TRACED) > MOST_TRACED:
            del TRACED[next(iter(TRACED))]
    return TRACED[key]


TRACED: dict[object, Footprint] = {}
"""Registry of the models traced last: a process often wraps one shape again."""
MOST_TRACED = 16


def _trace_some(
    model: nn.Module, layers: Sequence[nn.Module], kinds: list[tuple[object, ...]], runtime: AttentionRuntime
) -> Footprint:
    chosen = [i for i, kind in enumerate(kinds) if kinds[:i].count(kind) < SAMPLES]
    if len(chosen) < len(layers):
        with contextlib.suppress(NotTraced), _only(model, layers, chosen):
            few = _traced(model, [layers[i] for i in chosen], runtime)
            last = {kinds[i]: few.layers[n] for n, i in enumerate(chosen)}
            return replace(few, layers=tuple(last[kind] for kind in kinds))
    return _traced(model, layers, runtime)


def _kind(layer: nn.Module) -> tuple[object, ...]:
    """What layers that hold as much have in common: modules, shapes, and settings but for the layer's number."""
    found: list[object] = []
    for name, module in layer.named_modules():
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, int | float | str | bool) and key not in ("layer_idx", "layer_id", "layer_number")
        }
        shapes = [(n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in module.named_parameters(recurse=False)]
        found += [name, type(module), repr(sorted(plain.items())), repr(shapes)]
    return tuple(found)


@contextlib.contextmanager
def _only(model: nn.Module, layers: Sequence[nn.Module], chosen: Sequence[int]) -> Iterator[None]:
    """The model with some of its layers. Raises NotTraced where they are not all the members of one list."""
    holder = next((m for m in model.modules() if isinstance(m, nn.ModuleList) and list(m) == list(layers)), None)
    if holder is None:
        raise NotTraced("the layers are not the members of one nn.ModuleList")
    before = holder._modules
    holder._modules = {str(n): layers[i] for n, i in enumerate(chosen)}
    try:
        yield
    finally:
        holder._modules = before


def _traced(model: nn.Module, layers: Sequence[nn.Module], runtime: AttentionRuntime) -> Footprint:
    try:
        short, long = (Trace(model, layers, runtime, length).run() for length in LENGTHS)
    except (RuntimeError, NotImplementedError, TypeError, LookupError, ValueError, AttributeError) as error:
        text = str(error).partition("\n")[0]
        raise NotTraced(f"{type(model).__name__} does not run without data ({text})") from error
    head = output_head(model)
    names = _owners(model, layers)
    segments = [
        _segment(one, other, parameters, trained)
        for one, other, (parameters, trained) in zip(short, long, names, strict=True)
    ]
    return Footprint(
        before=segments[0],
        layers=tuple(segments[1:-1]),
        behind=segments[-1],
        vocabulary=head.weight.shape[0],
        width=head.weight.shape[1],
        trains_head=head.weight.requires_grad,
    )


def _owners(model: nn.Module, layers: Sequence[nn.Module]) -> list[tuple[int, int]]:
    """Elements, and those that are trained, of what no layer holds, of each layer, and none behind them."""
    inside = [{id(p): p for p in layer.parameters()} for layer in layers]
    everywhere = {key for found in inside for key in found}
    root = {id(p): p for p in model.parameters() if id(p) not in everywhere}
    counts = [
        (sum(p.numel() for p in found.values()), sum(p.numel() for p in found.values() if p.requires_grad))
        for found in (root, *inside)
    ]
    return [*counts, (0, 0)]


def _segment(short: TracedPart, long: TracedPart, parameters: int, trained: int) -> Segment:
    return Segment(
        parameters=parameters,
        trained=trained,
        forward=_lines(short.forward, long.forward),
        held=_line(short.held, long.held),
        moves=tuple(_line(a, b) for a, b in zip(short.saved, long.saved, strict=True)),
        again=_line(short.attended + short.input, long.attended + long.input),
        backward=_lines(short.backward[0], long.backward[0]),
        backward_more=_lines(short.backward[1], long.backward[1]),
        attention=tuple(dict.fromkeys(short.attention)),
    )


def _line(short: float, long: float) -> Line:
    slope = (long - short) / (LENGTHS[1] - LENGTHS[0])
    return short - slope * LENGTHS[0], slope


def _lines(short: Sequence[int], long: Sequence[int]) -> Lines:
    if len(short) != len(long):
        return upper_lines([(0.0, max(long, default=0) / LENGTHS[1])])
    return upper_lines([_line(a, b) for a, b in zip(short, long, strict=True)])
