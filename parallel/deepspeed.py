"""DeepSpeed ZeRO 1, 2 and 3 through ``deepspeed.initialize``.

=====  ================  ====================================================================================
stage  regimes           why
=====  ================  ====================================================================================
0, 1   ``step``          gradients are reduced only at the accumulation boundary, the rank's last micro-batch
2      ``slot``          gradients are reduced and partitioned in every backward: equal numbers of micro-batches
3      ``slot``          parameters are gathered layer by layer in every forward and backward
=====  ================  ====================================================================================

DeepSpeed averages gradients over ranks; the loss is multiplied by the world size to undo it. Clipping, mixed precision and
the optimizer are DeepSpeed's own, set in its configuration; after ``forward_backward`` call ``deepspeed_engine.step()``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hdp.balance.plan import REGIMES, Plan
from hdp.parallel.arrangement import Work, arrange, works
from hdp.parallel.engine import Engine
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
        ValueError: a regime that the stage does not allow, or a pipeline or sequence-parallel configuration.
    """

    def __init__(self, deepspeed_engine: Any, world: World, *, regime: str | None = None) -> None:
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

    def _works(self, plan: Plan) -> list[Work]:
        return works(plan, self.world.rank, arrange(plan))

    def _module(self) -> nn.Module:
        return self.deepspeed if torch.is_grad_enabled() else self.deepspeed.module

    def _before(self, work: Work) -> None:
        self.deepspeed.set_gradient_accumulation_boundary(self._is_boundary(work))

    def _is_boundary(self, work: Work) -> bool:
        return work.reduces if self.regime == "step" else work.is_last

    def _backward(self, loss: Tensor) -> None:
        self.deepspeed.backward(loss * self.world.world_size, scale_wrt_gas=False)
