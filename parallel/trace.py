"""One pass forward and two backward over a model without data, with every storage counted: see ``hdp.parallel.footprint``."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from hdp.attention.huggingface import planned_mask
from hdp.attention.route import AttentionRuntime, Route, RouteShard
from hdp.balance.footprint import AttentionShape
from hdp.parallel.models import output_head


@dataclass
class TracedPart:
    """One stretch of a trace: before the layers, a layer, behind them. Bytes."""

    start: int = 0
    forward: list[int] = field(default_factory=list)
    """After each change, above ``start``."""
    held: int = 0
    saved: list[int] = field(default_factory=list)
    """Storages that autograd saved there first."""
    backward: list[list[int]] = field(default_factory=lambda: [[], []])
    """Of both passes: what is there above what the parts before it hold, and above gradients of those behind it."""
    attention: list[AttentionShape] = field(default_factory=list)
    attended: int = 0
    """Bytes of attention's out and lse."""
    input: int = 0
    """Bytes of the hidden states that come in."""


class _Live(TorchDispatchMode):
    """Counts bytes of storages from their first tensor to their end; stands in for attention."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace
        self.known: dict[int, int] = {}
        self.live = 0

    def note(self, tensor: Tensor) -> None:
        if tensor.device.type != "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        size = storage.nbytes()
        self.known[key] = size
        self.live += size
        weakref.finalize(storage, self._end, key).atexit = False
        self.trace.changed()

    def _end(self, key: int) -> None:
        self.live -= self.known.pop(key)
        self.trace.changed()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.hdp.attend.default:
            out = self.attend(*args)
        elif func is torch.ops.hdp.attend_backward.default:
            out = self.attend_backward(*args)
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.note(tensor)
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor, route: Tensor, scale: float, causal: bool, window: int, *_: Any):
        out = torch.empty(q.shape, dtype=q.dtype, device="meta")
        lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        lse = torch.empty(q.shape[:2], dtype=lse_dtype, device="meta")
        for tensor in (out, lse):
            self.note(tensor)
        size = out.nbytes + lse.nbytes
        part = self.trace.part
        if self.trace.in_forward and self.trace.turn == 0:
            part.attended += size
            part.attention.append(
                AttentionShape(
                    heads=q.shape[1],
                    key_heads=k.shape[1],
                    head_dim=q.shape[2],
                    element=q.itemsize,
                    causal=causal,
                    window=window,
                )
            )
        self.passing(size)  # what kernels return is moved to its place
        return out, lse, torch.empty(0, dtype=torch.uint8, device="meta"), torch.zeros(2, dtype=torch.int64)

    def attend_backward(self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
        grads = tuple(torch.empty(t.shape, dtype=t.dtype, device="meta") for t in (q, k, v))
        for tensor in grads:
            self.note(tensor)
        self.passing(sum(g.nbytes for g in grads))
        return grads

    def passing(self, size: int) -> None:
        """Bytes that are there for a moment."""
        self.live += size
        self.trace.changed()
        self.live -= size
        self.trace.changed()


class Trace:
    """One length."""

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], runtime: AttentionRuntime, length: int) -> None:
        self.model, self.layers, self.length = model, layers, length
        self.route = Route(runtime, [RouteShard(sequence=0, length=length, group=(runtime.rank,))])
        self.parts = [TracedPart() for _ in range(len(layers) + 2)]
        self.at = 0
        self.saved: set[int] = set()
        """Storages that autograd has saved."""
        self.turn = 0
        """Which of the two passes: gradients are new, or added to."""
        self.in_forward = self.in_backward = False
        self.base = 0
        self.live = _Live(self)

    @property
    def part(self) -> TracedPart:
        return self.parts[self.at]

    def changed(self) -> None:
        if self.in_backward:
            self.part.backward[self.turn].append(self.live.live - self.base)
        elif self.in_forward and self.turn == 0:
            self.part.forward.append(self.live.live - self.part.start)

    def run(self) -> list[TracedPart]:
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            tensor.grad = None
            self.live.known[tensor.untyped_storage()._cdata] = 0
        with self.live:
            for self.turn in (0, 1):
                self._pass()
        return self.parts

    def _pass(self) -> None:
        self.at, self.in_forward = 0, True
        self.part.start = self.live.live  # gradients of the pass before
        ids, positions, labels = (torch.empty((1, self.length), dtype=torch.int64, device="meta") for _ in range(3))
        with self._hooked():
            output = self.model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=planned_mask(torch.device("meta")),
                use_cache=False,
                hdp_route=self.route,
            )
        loss = output.logits if hasattr(output, "logits") else output[0]
        del output
        self._leave()
        self.in_forward, self.in_backward = False, True
        self._enter_backward(len(self.parts) - 1)
        loss.backward()
        self.in_backward = False
        del loss, ids, positions, labels

    def _leave(self) -> None:
        if self.turn == 0:
            self.part.held = self.live.live - self.part.start
        self.at += 1
        if self.at < len(self.parts):
            self.part.start = self.live.live

    def _enter_backward(self, index: int) -> None:
        """Gradients of parts behind this one are not its own: the base has them in it."""
        self.at = index
        below = sum(part.held for part in self.parts[: index + 1])
        grads = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        self.base = below + grads
        self.changed()

    @contextlib.contextmanager
    def _hooked(self) -> Iterator[None]:
        head = output_head(self.model)
        before = head.__dict__.get("forward")
        head.forward = lambda hidden: _Loss.apply(hidden.flatten(0, -2))  # type: ignore[method-assign, assignment]
        with contextlib.ExitStack() as exits:
            for i, layer in enumerate(self.layers):
                enter = layer.register_forward_pre_hook(
                    lambda module, args, kwargs, i=i: self._enter(i, args, kwargs), with_kwargs=True
                )
                leave = layer.register_forward_hook(lambda module, args, out, i=i: self._left(i, out))
                exits.callback(enter.remove)
                exits.callback(leave.remove)
            exits.enter_context(saved_tensors_hooks(self._pack, lambda tensor: tensor))
            try:
                yield
            finally:
                if before is None:
                    del head.forward
                else:
                    head.forward = before  # type: ignore[method-assign]

    def _enter(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.in_backward:
            return  # it runs again
        hidden = _first([*args, *kwargs.values()])
        if index == 0:
            self._leave()
            if hidden is not None and hidden.requires_grad:
                hidden.register_hook(lambda grad: self._enter_backward(0))
        if hidden is not None:
            self.part.input = hidden.nbytes

    def _left(self, index: int, out: Any) -> None:
        if self.in_backward:
            return
        hidden = _first(out if isinstance(out, tuple | list) else [out])
        if hidden is not None and hidden.requires_grad:
            hidden.register_hook(lambda grad: self._enter_backward(index + 1))
        self._leave()

    def _pack(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == "meta" and self.turn == 0 and not self.in_backward:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if self.live.known.get(key) and key not in self.saved:
                self.saved.add(key)
                self.part.saved.append(storage.nbytes())
        return tensor.detach()


class _Loss(torch.autograd.Function):
    """As the fused loss: hidden states in, their gradient kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(torch.empty_like(hidden))
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return ctx.saved_tensors[0]


def _first(values: Sequence[Any]) -> Tensor | None:
    return next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)
