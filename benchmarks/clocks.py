"""CPU seconds of attention within a training step: in its kernels, and in all that is done around them.

Marks in the autograd graph, before and after attention, begin and end the count in forward and in backward. What is counted is
the whole process, so that threads that move bytes meanwhile are in it, and the thread that computes, apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Times = tuple[float, float, float]


class AttentionClock:
    """Adds up; ``take`` returns the sums and begins anew."""

    def __init__(self) -> None:
        self.process = self.thread = self.kernels = 0.0
        self._begun = (0.0, 0.0)

    def take(self) -> Times:
        """Seconds of the process and of the computing thread within attention, kernels included, and of the kernels."""
        found = self.process, self.thread, self.kernels
        self.process = self.thread = self.kernels = 0.0
        return found

    def begin(self) -> None:
        self._begun = time.process_time(), time.thread_time()

    def end(self) -> None:
        self.process += time.process_time() - self._begun[0]
        self.thread += time.thread_time() - self._begun[1]

    def kernel(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted as a kernel's."""

        def timed(*arguments: Any, **keywords: Any) -> Any:
            begin = time.thread_time()
            try:
                return function(*arguments, **keywords)
            finally:
                self.kernels += time.thread_time() - begin

        return timed

    def around(self, attention: Callable[..., Any]) -> Callable[..., Any]:
        """An attention function of transformers, counted forward and backward."""

        def counted(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **keywords: Any) -> Any:
            inputs = _Before.apply(query, key, value, self)
            self.begin()
            out, weights = attention(module, *inputs, *rest, **keywords)
            self.end()
            return _After.apply(out, self), weights

        return counted


class _Before(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, clock: AttentionClock) -> tuple[Tensor, ...]:
        ctx.clock = clock
        return q.view_as(q), k.view_as(k), v.view_as(v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.clock.end()
        return (*grads, None)


class _After(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, clock: AttentionClock) -> Tensor:
        ctx.clock = clock
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.clock.begin()
        return grad, None
