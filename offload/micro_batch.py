"""The context around forward and backward of one micro-batch: layer borders, and what is fetched when.

Forward: on entering the n-th layer call, the host waits until what call n-2 and earlier gave away has left, so that at most two
calls' activations are on the device beside those that stay. Backward: the first saved tensor of call n that is asked for
starts the copies of call n-1, in the reverse of the order in which they were saved: one layer ahead (MEMO's two rotating
buffers, ByteScale 4.3).
"""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from hdp.balance.machine import LayerWork
from hdp.offload.policy import LayerAction
from hdp.offload.recompute import recomputing
from hdp.offload.records import Handle, Record, State

if TYPE_CHECKING:
    from hdp.offload.engine import OffloadEngine

BEFORE = -1
"""Visit number of what is saved before the first layer call."""
_KEEP = LayerAction()
_T = TypeVar("_T")


def _does(action: LayerAction) -> bool:
    return action.recompute or action.ratio > 0.0


def _untraced(function: Callable[..., _T]) -> Callable[..., _T]:
    """Kept from torch's compiler, which traces what compiled layers call. (Unless it is imported nothing is compiled.)"""
    return torch.compiler.disable(function) if "torch._dynamo" in sys.modules else function  # type: ignore[no-any-return]


def in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


def retains_graph() -> bool:
    """Whether saved tensors may be asked for again after this use."""
    return not in_backward() or bool(torch._C._autograd._get_current_graph_task_keep_graph())


class MicroBatch:
    """Made by :meth:`hdp.offload.engine.OffloadEngine.micro_batch`; entered once."""

    def __init__(
        self,
        engine: OffloadEngine,
        model: nn.Module,
        layers: Sequence[nn.Module],
        actions: Sequence[LayerAction],
        *,
        tokens: int | None = None,
        keep_ops: frozenset[Any] = frozenset(),
        timed: bool = False,
        may_stay: bool = False,
    ) -> None:
        """``may_stay``: what finds no room in any tier stays on the device instead of being an error."""
        self._timed = timed and not any(action.recompute for action in actions)
        self.engine = engine
        self.tokens = tokens
        self.may_stay = may_stay
        self.layer_seconds: list[float] = []
        """Seconds of each layer call's forward, on the host's clock."""
        self.layer_bytes: Counter[int] = Counter()
        """Bytes that each layer call, or what runs between it and the one before, was the first to save."""
        self.input_bytes = 0
        """Bytes of a layer's largest input."""
        self._model = model
        self._layers = tuple(layers)
        self._actions = tuple(actions)
        self._keep_ops = keep_ops
        self._visit = BEFORE
        self._action = _KEEP
        self._visits: dict[int, list[Record]] = {}
        self._reached: int | None = None
        self._task = -1
        self._entered = 0.0
        self._saved_outside = False
        self._exits = ExitStack()

    # ---------------------------------------------------------------- the context

    def __enter__(self) -> MicroBatch:
        with ExitStack() as exits:
            self.engine.parameters.refresh(self._model)
            pack, unpack = _untraced(self._pack), _untraced(self._unpack)
            for i, layer in enumerate(self._layers):
                # Ours run last before and first after forward: inside FSDP's, which gathers the parameters first.
                enter, leave = _untraced(partial(self._enter_layer, i)), _untraced(partial(self._leave_layer, i))
                before = layer.register_forward_pre_hook(enter, with_kwargs=True)
                after = layer.register_forward_hook(leave, prepend=True)
                exits.callback(before.remove)
                exits.callback(after.remove)
                if self._actions[i].recompute:
                    exits.enter_context(recomputing(layer, pack, unpack, self._keep_ops))
            gathered = self._model.register_forward_pre_hook(lambda module, _: self._refresh(module))
            exits.callback(gathered.remove)
            exits.enter_context(saved_tensors_hooks(pack, unpack))
            self._exits = exits.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._exits.close()
        self._visits.clear()
        self.engine.finish(failed=kind is not None)
        if kind is None and self._saved_outside and not self.layer_seconds and any(map(_does, self._actions)):
            warnings.warn(
                f"none of the {len(self._layers)} layers was called while the model saved activations, so all of them stayed:"
                " name the layers that forward calls, and compile them one by one, not the whole model",
                stacklevel=2,
            )
        if kind is None and self._timed:
            self._take_profile()

    def _take_profile(self) -> None:
        inner = range(1, len(self.layer_seconds) - 1) if len(self.layer_seconds) > 2 else range(len(self.layer_seconds))
        if not inner or self.tokens is None:
            return
        whole = sum(self.layer_bytes[i] for i in inner) // len(inner)
        self.engine.profiles[self.tokens] = LayerWork(
            forward_seconds=sum(self.layer_seconds[i] for i in inner) / len(inner),
            bytes_all=whole,
            # The layer's input and the attention output, which is as wide.
            bytes_kept=min(whole, 2 * self.input_bytes),
        )

    # ---------------------------------------------------------------- forward

    def _refresh(self, module: nn.Module) -> None:
        if not in_backward():
            self.engine.parameters.refresh(module)

    def _enter_layer(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if in_backward():
            return  # some recomputation of the user's runs the layer again
        self._refresh(module)
        self._visit = len(self.layer_seconds)
        self._action = self._actions[index]
        for record in self._visits.get(self._visit - 2, ()):
            self.engine.wait_left(record)
        sizes = [x.numel() * x.itemsize for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        self.input_bytes = max(self.input_bytes, *sizes, 0)
        self._synchronize()
        self._entered = time.perf_counter()

    def _synchronize(self) -> None:
        """Where times are asked for, a GPU's queue is emptied at layer borders."""
        if self._timed and self.engine.device.type == "cuda":
            torch.cuda.synchronize(self.engine.device)

    def _leave_layer(self, index: int, *_: object) -> None:
        if in_backward():
            return
        self._synchronize()
        self.layer_seconds.append(time.perf_counter() - self._entered)
        # What is saved between two layers goes where the first one's does; what comes after the last one stays, for
        # backward needs it at once.
        self._visit = len(self.layer_seconds)
        if index == len(self._layers) - 1:
            self._action = _KEEP

    def _pack(self, tensor: Tensor) -> Handle:
        handle = self.engine.save(tensor, self, self._visit, self._action.ratio)
        self._saved_outside |= self._visit == BEFORE
        if handle.record is not None:
            self._visits.setdefault(self._visit, []).append(handle.record)
            if handle.record.handles == 1:
                self.layer_bytes[self._visit] += handle.record.nbytes
        return handle

    # ---------------------------------------------------------------- backward

    def _unpack(self, handle: Handle) -> Tensor:
        retain = retains_graph()
        if in_backward():
            self._reach(handle.visit, retain)
        return self.engine.load(handle, retain=retain)

    def _reach(self, visit: int, retain: bool) -> None:
        """Backward has come to a layer call: fetches what it and the one before it need."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task, self._reached = task, None  # a first or a further backward
        if self._reached is not None and visit >= self._reached:
            return
        passed, self._reached = self._reached, visit
        if retain and passed is not None:
            for record in self._visits.get(passed, ()):
                if record.visit > visit:
                    self.engine.send_off(record)
        self.engine.settle()  # what backward has passed makes room first
        for ahead in (visit, visit - 1):
            for record in reversed(self._visits.get(ahead, ())):
                if record.state in (State.AWAY, State.LEAVING):
                    self.engine.fetch(record)
        if not retain:
            self._visits.pop(visit + 2, None)
