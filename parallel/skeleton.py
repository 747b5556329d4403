"""A model's code with parameters of its own: one layer of each kind, to be run and timed without touching the model.

Nothing of the model is read but shapes, so that it may be sharded, or on the meta device: parameters are made up, buffers are
copied. What has hooks (FSDP2's, DeepSpeed's, the user's) has none here.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

BLOCK = 1 << 16
"""Random numbers that a parameter repeats: drawing as many as a large layer has takes seconds."""
PLAIN = (bool, int, float, str, type(None))
NUMBERS = ("layer_idx", "layer_id", "layer_number", "training")
"""Attributes by which layers of one kind may differ."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Layers that compute alike."""

    layer: nn.Module
    """A skeleton of the first of them."""
    count: int
    window: int
    """Tokens of the sliding window; 0: none."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A model of one layer of each kind."""

    model: nn.Module
    kinds: tuple[Kind, ...]
    head: nn.Module
    """Returns its input."""


def make_sample(
    model: nn.Module,
    layers: Sequence[nn.Module],
    head: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    *,
    cut: bool,
) -> Sample:
    """``layers``: of the model. ``cut``: lists of layers hold one of each kind; else each is its kind's first layer."""
    maker = _Maker(device, dtype)
    first: dict[Any, nn.Module] = {}
    kinds: dict[int, nn.Module] = {id(layer): first.setdefault(kind_of(layer), layer) for layer in layers}
    made = {id(layer): maker.module(layer, filled=True) for layer in first.values()}
    left_out = {id(layer) for layer in layers if id(layer) not in made} if cut else set()
    maker.stand_ins = {number: made[id(layer)] for number, layer in kinds.items()}
    maker.left_out = left_out
    whole = maker.module(model, filled=False)
    output = maker.module(head, filled=False)
    output.forward = lambda hidden, *_, **__: hidden
    counts = {id(layer): 0 for layer in first.values()}
    for layer in kinds.values():
        counts[id(layer)] += 1
    return Sample(
        model=whole,
        kinds=tuple(
            Kind(layer=made[id(layer)], count=counts[id(layer)], window=window_of(layer)) for layer in first.values()
        ),
        head=output,
    )


def make_whole(model: nn.Module, head: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """All layers with parameters of their own, which take the memory of the model; its head returns its input."""
    maker = _Maker(device, dtype)
    output = maker.module(head, filled=False)
    output.forward = lambda hidden, *_, **__: hidden
    return maker.module(model, filled=True)


def kind_of(layer: nn.Module) -> Any:
    """Equal for layers that compute alike: classes, shapes of parameters, and plain attributes of all parts."""
    parts = []
    for name, part in layer.named_modules():
        shapes = tuple((n, tuple(shape_of(p))) for n, p in part._parameters.items() if p is not None)
        plain = tuple(
            (n, v)
            for n, v in sorted(part.__dict__.items())
            if isinstance(v, PLAIN) and n not in NUMBERS and n[:1] != "_"
        )
        parts.append((name, class_of(part), shapes, plain))
    return tuple(parts)


def window_of(layer: nn.Module) -> int:
    """Tokens of a layer's sliding window; 0: none."""
    for part in layer.modules():
        window = part.__dict__.get("sliding_window")
        if isinstance(window, int) and not isinstance(window, bool) and part.__dict__.get("is_sliding", True):
            return window
    return 0


def class_of(module: nn.Module) -> type:
    """Without what FSDP2 has made of it."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def shape_of(parameter: Tensor) -> torch.Size:
    """Of the whole parameter, wherever its parts are."""
    return getattr(parameter, "ds_shape", parameter.shape)


class _Maker:
    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.stand_ins: Mapping[int, nn.Module] = {}
        """What takes the place of a module, by its id."""
        self.left_out: set[int] = set()
        self._modules: dict[int, nn.Module] = {}
        self._tensors: dict[int, Tensor] = {}
        generator = torch.Generator().manual_seed(0)
        self._block = (torch.randn(BLOCK, generator=generator) * 0.02).to(device, dtype)

    def module(self, module: nn.Module, *, filled: bool) -> nn.Module:
        """``filled``: parameters are random; else zeros that take no memory."""
        if id(module) in self.stand_ins:
            return self.stand_ins[id(module)]
        if id(module) in self._modules:
            return self._modules[id(module)]
        kind = class_of(module)
        made: nn.Module = nn.Module.__new__(kind)
        self._modules[id(module)] = made
        fields = dict(module.__dict__)
        for name, value in fields.items():
            if name.endswith("_hooks") or "_hooks_" in name:
                fields[name] = type(value)() if isinstance(value, dict) else value
        fields["_compiled_call_impl"] = None
        forward = fields.get("forward")
        if isinstance(forward, types.MethodType) and forward.__self__ is module:
            fields["forward"] = types.MethodType(forward.__func__, made)
        else:
            fields.pop("forward", None)
        fields["_parameters"] = {
            name: None if p is None else self._parameter(p, filled) for name, p in module._parameters.items()
        }
        fields["_buffers"] = {name: None if b is None else self._buffer(b) for name, b in module._buffers.items()}
        children = [
            (n, None if c is None else self.module(c, filled=filled))
            for n, c in module._modules.items()
            if id(c) not in self.left_out
        ]
        if isinstance(module, nn.ModuleList):
            children = [(str(i), child) for i, (_, child) in enumerate(children)]
        fields["_modules"] = dict(children)
        made.__dict__.update(fields)
        return made

    def _parameter(self, parameter: nn.Parameter, filled: bool) -> nn.Parameter:
        if id(parameter) not in self._tensors:
            self._tensors[id(parameter)] = nn.Parameter(self._values(parameter, filled), parameter.requires_grad)
        return self._tensors[id(parameter)]  # type: ignore[return-value]

    def _values(self, parameter: Tensor, filled: bool) -> Tensor:
        shape = shape_of(parameter)
        if not parameter.is_floating_point():
            raise NotSampled(f"a parameter is {parameter.dtype}: its values are a format of their own")
        if not filled:
            return torch.zeros((), dtype=self.dtype, device=self.device).expand(shape)  # of no memory
        made = torch.empty(shape, dtype=self.dtype, device=self.device)
        if made.dim() < 2:
            return made.fill_(1.0)
        flat = made.view(-1)
        whole = flat.numel() // BLOCK
        flat[: whole * BLOCK].view(whole, BLOCK).copy_(self._block)
        flat[whole * BLOCK :].copy_(self._block[: flat.numel() - whole * BLOCK])
        return made

    def _buffer(self, buffer: Tensor) -> Tensor:
        if id(buffer) not in self._tensors:
            if isinstance(buffer, DTensor) or buffer.is_meta:
                made = torch.zeros(buffer.shape, dtype=buffer.dtype, device=self.device)
            else:
                made = buffer.detach().clone().to(self.device)
            self._tensors[id(buffer)] = made
        return self._tensors[id(buffer)]


class NotSampled(Exception):
    """A model whose layers cannot be run by themselves; the message says why."""


@dataclass(kw_only=True)
class Call:
    """How the model calls one of its layers."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    hidden: Tensor
    """The hidden states among them, [1, tokens, hidden]."""

    def with_hidden(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call with other hidden states."""
        arguments = tuple(hidden if a is self.hidden else a for a in self.arguments)
        return arguments, {name: hidden if a is self.hidden else a for name, a in self.keywords.items()}


def record_calls(sample: Sample, run: Any) -> list[Call]:
    """How ``run()``, a forward pass of the sample, calls each kind of layer."""
    calls: dict[int, Call] = {}

    def note(number: int, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        tensors = (a for a in (*arguments, keywords.get("hidden_states")) if isinstance(a, Tensor))
        hidden = next((a for a in tensors if a.is_floating_point()), None)
        if hidden is None:
            raise NotSampled("a layer is called without hidden states")
        calls.setdefault(number, Call(arguments=arguments, keywords=keywords, hidden=hidden))

    handles = []
    for number, kind in enumerate(sample.kinds):

        def before(_: nn.Module, arguments: tuple, keywords: dict, number: int = number) -> None:
            note(number, arguments, keywords)

        handles.append(kind.layer.register_forward_pre_hook(before, with_kwargs=True))
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    if len(calls) < len(sample.kinds):
        raise NotSampled(f"of {len(sample.kinds)} kinds of layers {len(calls)} were called")
    return [calls[number] for number in range(len(sample.kinds))]
