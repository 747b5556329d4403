"""What becomes of saved activations while an engine runs a plan: kept, offloaded, recomputed, as the plan or the user says.

    store = hdp.offload.OffloadEngine([hdp.offload.FileTier("/local/scratch")])
    engine.activations = Activations(store=store)               # as the plan says, micro-batch by micro-batch
    engine.activations = Activations(store=store, policy="recompute")

Recomputation keeps the outputs of attention, so that it sends no message; what recomputes must be equal for all sharers of a
sequence, which a policy for the whole job and the plan's own list of slots both are.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from hdp.balance.plan import MicroBatch
from hdp.offload import POLICIES, OffloadEngine

PLANNED = "plan"


@dataclass(frozen=True, kw_only=True)
class Activations:
    """How an engine treats saved activations. The caller owns ``store`` and closes it."""

    store: OffloadEngine
    policy: str = PLANNED
    """``"plan"``: each micro-batch as planned; else one of ``hdp.offload.POLICIES`` for all of them."""
    ratio: float = 1.0
    """Fraction that leaves under ``offload`` and ``recompute``, and at most under ``auto``; 0 to 1."""
    keep_first: int = 1
    keep_last: int = 1
    """Layers at each end that keep everything."""

    def __post_init__(self) -> None:
        if self.policy not in (PLANNED, *POLICIES):
            raise ValueError(
                f"unknown activation policy {self.policy!r}: choose one of {PLANNED}, {', '.join(POLICIES)}"
            )

    def around(self, model: nn.Module, micro_batch: MicroBatch | None, tokens: int) -> AbstractContextManager[object]:
        """The context for forward and backward of one micro-batch of ``tokens`` tokens."""
        policy, ratio = self.policy, self.ratio
        if policy == PLANNED:
            ratio = 0.0 if micro_batch is None else micro_batch.offload_ratio
            recomputes = micro_batch is not None and micro_batch.recompute
            policy = "recompute" if recomputes else "offload" if ratio > 0 else "keep"
        if micro_batch is None or policy == "keep":
            return nullcontext()
        return self.store.micro_batch(
            model,
            ratio=ratio,
            policy=policy,
            tokens=tokens,
            keep_first=self.keep_first,
            keep_last=self.keep_last,
            keep_ops=frozenset({torch.ops.hdp.attend.default}),
        )


def needs_store(micro_batch: MicroBatch | None) -> bool:
    """Whether a micro-batch was planned to fit only with some of its activations elsewhere."""
    return micro_batch is not None and (micro_batch.offload_ratio > 0 or micro_batch.recompute)
