"""DeepSpeed ZeRO 0 to 3 through ``deepspeed.initialize``.

=====  ================  ====================================================================================
stage  regimes           why
=====  ================  ====================================================================================
0, 1   ``step``          gradients are reduced only at the accumulation boundary, the rank's last micro-batch
2      ``slot``          gradients are reduced and partitioned in every backward: equal numbers of micro-batches
3      ``slot``          parameters are gathered layer by layer in every forward and backward
=====  ================  ====================================================================================

A parameter that only some ranks use would be reduced by these alone, which on gloo ends the process. ZeRO 0 and 1 therefore
reduce zeros for what a rank has not used; ZeRO 2 and 3, which reduce in the order in which gradients arrive, refuse it.

DeepSpeed averages gradients over ranks; the loss is multiplied by the world size to undo it. Clipping, mixed precision and
the optimizer are DeepSpeed's own, set in its configuration; after ``forward_backward`` call ``deepspeed_engine.step()``.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hdp.balance.foresee import ADAM
from hdp.balance.held import EngineMemory
from hdp.balance.plan import REGIMES, Plan
from hdp.parallel.arrangement import Work, arrange, works
from hdp.parallel.engine import Engine
from hdp.parallel.metrics import gather_numbers
from hdp.parallel.models import check_no_tensor_parallel
from hdp.parallel.world import World

ALLOWED = {0: ("step",), 1: ("step",), 2: ("slot",), 3: ("slot",)}
"""Regimes by ZeRO stage."""


class DeepSpeedEngine(Engine):
    """Trains what ``deepspeed.initialize`` returned.

    Args:
        deepspeed_engine: the first of the values that ``deepspeed.initialize`` returns.
        world: from ``hdp.init``, called before ``deepspeed.initialize``.
        regime: None: the one that the ZeRO stage allows.

    Raises:
        ValueError: a regime that the stage does not allow; a pipeline, or DeepSpeed's own tensor or sequence parallelism.
    """

    def __init__(self, deepspeed_engine: Any, world: World, *, regime: str | None = None) -> None:
        check_no_tensor_parallel(world, "DeepSpeed")
        check_data_parallel(deepspeed_engine, world)
        super().__init__(deepspeed_engine.module, world)
        stage = int(deepspeed_engine.zero_optimization_stage())
        regime = regime or ALLOWED[stage][0]
        if regime not in REGIMES:
            raise ValueError(f"unknown regime {regime!r}: choose one of {', '.join(REGIMES)}")
        if regime not in ALLOWED[stage]:
            raise ValueError(
                f"regime {regime!r} cannot run with ZeRO-{stage}, whose collectives need"
                f" {'equal numbers of micro-batches' if stage > 1 else 'one reduction a step'} on all ranks:"
                f" use regime {ALLOWED[stage][0]!r}"
            )
        self.deepspeed, self.stage, self.regime = deepspeed_engine, stage, regime

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        raise ValueError("DeepSpeed clips by itself: set gradient_clipping in its configuration")

    def engine_memory(self) -> EngineMemory:
        computed = self.dtype.itemsize
        # A 16-bit model has fp32 weights beside Adam's two numbers.
        optimizer = ADAM * 4 + (4 if computed < 4 else 0)
        return EngineMemory(
            kind="zero",
            regime=self.regime,
            sharers=self.world.world_size,
            ranks=self.world.world_size,
            stored=computed,
            computed=computed,
            reduced=computed,
            optimizer=optimizer,
            stage=self.stage,
        )

    def _works(self, plan: Plan) -> list[Work]:
        return works(plan, self.world.rank, arrange(plan))

    def _module(self) -> nn.Module:
        return self.deepspeed if torch.is_grad_enabled() else self.deepspeed.module

    def _before(self, work: Work) -> None:
        self.deepspeed.set_gradient_accumulation_boundary(self._is_boundary(work))

    def _is_boundary(self, work: Work) -> bool:
        return work.reduces if self.regime == "step" else work.is_last

    def _backward(self, loss: Tensor) -> None:
        if self.stage >= 2:
            check_used_alike(self.model, loss, self.world)
        elif self.deepspeed.is_gradient_accumulation_boundary():
            fill_gradients(self.model)
        self.deepspeed.backward(loss * self.world.world_size, scale_wrt_gas=False)


def check_data_parallel(deepspeed_engine: Any, world: World) -> None:
    """Raises ValueError if DeepSpeed splits the model, or sequences, over ranks that hdp takes for whole ones."""
    if getattr(deepspeed_engine, "pipeline_parallelism", False):
        raise ValueError("DeepSpeed's pipeline runs micro-batches in an order of its own: use ZeRO without a pipeline")
    whole = int(deepspeed_engine.dp_world_size)
    if whole != world.world_size:
        raise ValueError(
            f"DeepSpeed has {whole} data-parallel ranks of {world.world_size}: leave out its tensor and sequence parallelism"
            " (autotp_size, sequence_parallel_size); hdp shares sequences itself"
        )


def fill_gradients(model: nn.Module) -> None:
    """Zeros for every trained parameter without a gradient."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def check_used_alike(model: nn.Module, loss: Tensor, world: World) -> None:
    """Raises ValueError, on every rank, if this micro-batch trains other parameters on some rank; a collective."""
    found = used_parameters(loss)
    names = [name for name, parameter in model.named_parameters() if id(parameter) in found]
    table = gather_numbers(world, zlib.crc32(repr(names).encode()))[:, 0]
    if bool((table == table[0]).all()):
        return
    rows: list[list[str]] = [[] for _ in range(world.world_size)]
    dist.all_gather_object(rows, names, group=world.control)
    some = sorted(set().union(*rows) - set(rows[0]).intersection(*rows[1:]))
    ranks = [rank for rank, row in enumerate(rows) if some[0] in row]
    raise ValueError(
        f"only ranks {ranks} use the parameter {some[0]} in this micro-batch, and ZeRO-2 and 3 reduce gradients in the order in"
        " which they arrive: use ZeRO-1, DDP or FSDP2, or make every forward pass use it"
    )


def used_parameters(loss: Tensor) -> set[int]:
    """``id`` of every parameter that a backward pass from ``loss`` reaches."""
    seen: set[Any] = set()
    found: set[int] = set()
    open_ = [loss.grad_fn]
    while open_:
        node = open_.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        open_ += [following for following, _ in node.next_functions]
    return found
