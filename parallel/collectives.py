"""FSDP2's collectives beside computation where there are no streams: on CPU.

On an accelerator FSDP2 launches gathers and reductions on streams of their own. On gloo the same calls block, so that every
byte of parameters and gradients shows. Here they are launched and waited for where their result is read: gathers by FSDP2
itself (``async_op``), reductions at the end of the step. That is possible where FSDP2 only takes views of what a
reduce-scatter will have written: sums in the parameters' own precision, nothing to add them to. So gradients are put aside
between micro-batches, and whatever does not meet this runs as FSDP2 would run it.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

from hdp.parallel.gradients import has_hook, local

Waits = list[tuple[float, float]]

MOST_PENDING = 2
"""Reductions under way in regime ``slot``, each holding a layer's whole gradients."""


class TimedWork(dist.Work):
    """A collective under way; notes how long the rank was held when it was waited for.

    Afterwards it lets go of the collective, which holds what it has read and written: of a step's gathers the parameters once
    more, as long as somebody remembers them.
    """

    def __init__(self, work: dist.Work, waits: Waits) -> None:
        super().__init__()
        self.work: dist.Work | None = work
        self.waits = waits

    @property
    def done(self) -> bool:
        """Whether it was waited for."""
        return self.work is None

    def wait(self, *timeout: Any) -> bool:
        if self.work is not None:
            start = time.perf_counter()
            self.work.wait(*timeout)
            self.work = None
            self.waits.append((start, time.perf_counter()))
        return True


class AllGather(DefaultAllGather):
    """FSDP2's own all-gather; remembers the last, for a rank that had nothing to run with its result."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits
        self.last: TimedWork | None = None

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        start = time.perf_counter()
        work = super().__call__(output_tensor, input_tensor, group, async_op)
        if work is None or not async_op:
            self.waits.append((start, time.perf_counter()))
            return work
        self.last = TimedWork(work, self.waits)
        return self.last


class ReduceScatter(DefaultReduceScatter):
    """FSDP2's own reduce-scatter of one module's gradients, launched now and waited for later where that is safe."""

    def __init__(self, beside: Beside, module: FSDPModule) -> None:
        super().__init__()
        self.beside, self.module = beside, module

    def __call__(  # type: ignore[override]  # None where FSDP2 is not to wait
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        beside = self.beside
        later = beside.running and not any(p.grad is not None or has_hook(p) for p in sharded_parameters(self.module))
        if not later:  # FSDP2 is going to read the result at once, and what it is added to
            beside.wait()
        elif beside.most and len(beside.pending) >= beside.most:
            beside.wait(len(beside.pending) - beside.most + 1)
        start = time.perf_counter()
        work = super().__call__(output_tensor, input_tensor, group, op, async_op or later)
        if later:
            beside.pending.append((TimedWork(work, beside.waits), input_tensor))
            return None
        beside.waits.append((start, time.perf_counter()))
        return work


class Beside:
    """Launches the collectives of FSDP2 modules beside computation, and knows what is under way.

    Args:
        modules: sharded already, the root first, the others in the order of their forward passes.
        waits: collects (start, stop) of every wait, ``time.perf_counter`` seconds.
        reductions: whether what FSDP2 does with a reduced gradient is to take views of it: one dimension of sharding,
            gradients reduced in the precision of the parameters. Only within a step: nobody waits for others.
        layer_by_layer: regime ``slot``: the next module is gathered while one computes, and at most ``MOST_PENDING``
            reductions are under way.
    """

    def __init__(self, modules: list[FSDPModule], waits: Waits, *, reductions: bool, layer_by_layer: bool) -> None:
        self.modules, self.waits, self.allowed = modules, waits, reductions
        self.most = MOST_PENDING if layer_by_layer else 0
        self.running = False
        self.pending: list[tuple[TimedWork, Tensor]] = []  # with the input, which must live as long
        self.aside: dict[nn.Parameter, Tensor] = {}
        self.gathers: list[AllGather] = []
        for module in modules:
            self.gathers.append(AllGather(waits))
            module.set_custom_all_gather(self.gathers[-1])
            module.set_custom_reduce_scatter(ReduceScatter(self, module))
        if layer_by_layer:
            modules[0]._set_unshard_async_op(True)
            for module, following in itertools.pairwise(modules):
                module.set_modules_to_forward_prefetch([following])

    def begin(self, *, reduces: bool) -> None:
        """Before a step, or an evaluation, which reduces nothing."""
        self.running = self.allowed and reduces

    def abandon(self) -> None:
        """The step failed, and what it has added up is forgotten. Waits for nobody."""
        self.pending.clear()
        self.aside.clear()
        self.running = False

    def forget(self) -> None:
        """After a step that failed: FSDP2 has forgotten what was under way."""
        for gather in self.gathers:
            gather.last = None

    def gather(self) -> None:
        """Launches the gathers of all modules; each is waited for where its module runs."""
        for module in self.modules:
            module.unshard(async_op=True)

    def put_aside(self) -> None:
        """Between micro-batches: finished gradients go where FSDP2 does not add to them."""
        if not self.running:
            return
        self.wait()
        for parameter in [p for module in self.modules for p in sharded_parameters(module)]:
            grad = parameter.grad
            if grad is None or has_hook(parameter):
                continue
            parameter.grad = None
            if parameter in self.aside:
                local(self.aside[parameter]).add_(local(grad))
            else:
                self.aside[parameter] = grad

    def wait(self, count: int | None = None) -> None:
        """Until the oldest ``count`` reductions are done, or all."""
        for work, _ in self.pending[:count]:
            work.wait()
        del self.pending[:count]

    def end(self) -> None:
        """After the last micro-batch: all gradients are whole, and what nobody ran is gathered no longer."""
        self.wait()
        for parameter, grad in self.aside.items():
            if parameter.grad is not None:
                local(grad).add_(local(parameter.grad))
            parameter.grad = grad
        self.aside.clear()
        self.running = False
        self.release()

    def release(self) -> None:
        """Frees parameters that were gathered for a module that did not run, which FSDP2 would take for gathered later."""
        for module, gather in zip(self.modules, self.gathers, strict=True):
            if gather.last is not None and not gather.last.done:
                module.unshard()  # waits
                module.reshard()
            gather.last = None


def sharded_parameters(module: FSDPModule) -> list[nn.Parameter]:
    """What FSDP2 reduces with ``module``; asked each time, for a checkpoint may have put others in their place."""
    return [p.sharded_param for group in module._get_fsdp_state()._fsdp_param_groups for p in group.fsdp_params]


def is_sharded(module: FSDPModule) -> bool:
    """Whether nothing of the module is gathered (guarded as below)."""
    return all(group.is_sharded for group in module._get_fsdp_state()._fsdp_param_groups)


def forget_gradients(module: FSDPModule) -> None:
    """Those of whole parameters that were to be reduced with later micro-batches (guarded: these names are not public)."""
    for group in module._get_fsdp_state()._fsdp_param_groups:
        for parameter in group.fsdp_params:
            parameter.unsharded_accumulated_grad = None
            if (whole := getattr(parameter, "_unsharded_param", None)) is not None:
                whole.grad = None


def reduced_as_stored(model: nn.Module, policy: MixedPrecisionPolicy) -> bool:
    """Whether gradients arrive in the precision of their parameters, so that nothing is cast after the reduction."""
    travels = policy.reduce_dtype or policy.param_dtype
    return travels is None or {p.dtype for p in model.parameters() if p.requires_grad} <= {travels}
