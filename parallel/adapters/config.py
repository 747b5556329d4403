"""What a trainer has to know to plan global batches, and the engine that it then trains with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from hdp.balance.machine import Machine
from hdp.balance.plan import REGIMES
from hdp.parallel.batch import REDUCTIONS
from hdp.parallel.engine import Engine
from hdp.parallel.fitting import AUTO
from hdp.parallel.world import World

ENGINES = ("fsdp", "ddp")


@dataclass(frozen=True, kw_only=True)
class HdpConfig:
    """Stands in for a trainer's batch sizes. Raises ValueError for values that cannot work."""

    tokens_per_step: int
    """Tokens of a global batch, over all ranks; one optimizer step."""
    capacity: int | str = AUTO
    """Tokens that one rank holds in one micro-batch; ``"auto"``: as many as fit its memory, see ``hdp.Loader``."""
    planner: str = "auto"
    """Name of a planner of ``hdp.balance``."""
    engine: str = "fsdp"
    """``"fsdp"``: FSDP2, see ``hdp.shard``. ``"ddp"``: see ``hdp.parallel.ddp``."""
    regime: str = "step"
    """``"step"`` or ``"slot"``, see ``hdp.parallel.fsdp``; DDP has ``"step"`` only."""
    reduction: str = "token"
    """The loss: mean over label tokens (``"token"``) or over documents, each counting alike (``"sample"``)."""
    machine: Machine | str | Path | None = None
    """What is planned for, see ``hdp.Loader``; None: measured at the start, or the checkpoint's that is resumed."""

    def __post_init__(self) -> None:
        for name in ("tokens_per_step", "capacity"):
            value = getattr(self, name)
            if name == "capacity" and value == AUTO:
                continue
            if not isinstance(value, int) or value < 1:
                or_auto = ', or "auto"' if name == "capacity" else ""
                raise ValueError(f"HdpConfig.{name} is {value!r}: give a positive number of tokens{or_auto}")
        for name, choices in (("engine", ENGINES), ("regime", REGIMES), ("reduction", REDUCTIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"HdpConfig.{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        if self.engine == "ddp" and self.regime != "step":
            raise ValueError(f"HdpConfig.regime is {self.regime!r}: engine 'ddp' runs regime 'step'")


def build_engine(model: nn.Module, world: World, config: HdpConfig, *, bf16: bool = False) -> Engine:
    """Makes ``model`` use hdp's attention and wraps it.

    Args:
        bf16: compute in bfloat16 with parameters, reductions and optimizer in fp32. DDP has no mixed precision of its own:
            run its steps under ``torch.autocast``.

    Raises:
        ValueError: whatever the engine refuses.
    """
    if getattr(getattr(model, "config", None), "_attn_implementation", "hdp") != "hdp":
        model.set_attn_implementation("hdp")  # type: ignore[operator]
    if config.engine == "fsdp":
        from hdp.parallel.fsdp import shard

        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else None
        return shard(model, world, regime=config.regime, mp_policy=policy)
    from hdp.parallel.ddp import replicate

    return replicate(model, world)
