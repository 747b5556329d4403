"""Throughput between two log lines, from what steps report."""

from __future__ import annotations

import logging

from torch import nn

from hdp.parallel.batch import PlannedBatch
from hdp.parallel.flops import ModelFlops
from hdp.parallel.metrics import StepResult
from hdp.parallel.world import World

logger = logging.getLogger("hdp")


class Meter:
    """Adds up steps; :meth:`take` returns the means since the last one and begins anew."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._shape: ModelFlops | None = None
        self._unknown = False
        self._clear()

    def flops(self, batch: PlannedBatch, model: nn.Module) -> int:
        """Model FLOPs of a batch, over all ranks; 0, with one warning, for a model whose FLOPs are not known."""
        if self._shape is None and not self._unknown:
            try:
                self._shape = ModelFlops.of(model)
            except ValueError as error:
                self._unknown = True
                if self.world.rank == 0:
                    logger.warning("no FLOPs in logs: %s", error)
        return 0 if self._shape is None else self._shape.step(batch.plan.lengths)

    def add(self, batch: PlannedBatch, result: StepResult, model: nn.Module) -> None:
        """Notes one step."""
        self._steps += 1
        self._tokens += result.tokens
        self._seconds += result.seconds
        self._flops += self.flops(batch, model)
        self._imbalance += result.imbalance
        self._waiting += result.waiting_share

    def take(self) -> dict[str, float]:
        """Tokens and FLOPs a second (FLOPs per rank), and means of imbalance and waiting; empty without steps."""
        if not self._steps or not self._seconds:
            return {}
        means = {
            "tokens_per_second": self._tokens / self._seconds,
            "imbalance": self._imbalance / self._steps,
            "waiting": self._waiting / self._steps,
        }
        if self._shape is not None:
            means["flops_per_second_per_rank"] = self._flops / self._seconds / self.world.world_size
        self._clear()
        return means

    def _clear(self) -> None:
        self._steps = self._tokens = self._flops = 0
        self._seconds = self._imbalance = self._waiting = 0.0
