"""hdp inside other people's training loops: ``transformers.Trainer``, TRL's ``SFTTrainer``, checkpoints in their formats.

    from hdp.parallel.adapters import HdpConfig, HdpTrainer

    trainer = HdpTrainer(model, args, train_dataset=rows, hdp=HdpConfig(tokens_per_step=65536))
    trainer.train()

Any other trainer made from ``transformers.Trainer`` becomes one of ours with the mixin in front::

    class HdpSFTTrainer(HdpTrainerMixin, SFTTrainer): ...

Names load on first use: neither transformers nor accelerate is needed for the checkpoint functions.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hdp.parallel.adapters.checkpoint import full_state_dict, load_state, save_pretrained, save_state
    from hdp.parallel.adapters.config import HdpConfig
    from hdp.parallel.adapters.mixin import HdpTrainerMixin
    from hdp.parallel.adapters.rows import RowDocuments
    from hdp.parallel.adapters.trainer import HdpTrainer

_LAZY = {
    "HdpConfig": "hdp.parallel.adapters.config",
    "HdpTrainer": "hdp.parallel.adapters.trainer",
    "HdpTrainerMixin": "hdp.parallel.adapters.mixin",
    "RowDocuments": "hdp.parallel.adapters.rows",
    "full_state_dict": "hdp.parallel.adapters.checkpoint",
    "load_state": "hdp.parallel.adapters.checkpoint",
    "save_pretrained": "hdp.parallel.adapters.checkpoint",
    "save_state": "hdp.parallel.adapters.checkpoint",
}

__all__ = [
    "HdpConfig",
    "HdpTrainer",
    "HdpTrainerMixin",
    "RowDocuments",
    "full_state_dict",
    "load_state",
    "save_pretrained",
    "save_state",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
