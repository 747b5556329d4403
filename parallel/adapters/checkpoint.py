"""Checkpoints of sharded models: weights that ``from_pretrained`` reads, and the state of training, in any world.

All functions are collective: every rank calls them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

STATE_FOLDER = "hdp_state"


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, whole, on the CPU of rank 0; an empty dict on other ranks. Not for ZeRO-3."""
    state: dict[str, Any] = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    return state


def save_pretrained(model: Any, folder: str | Path, *, rank: int) -> None:
    """Writes a transformers (or peft) model whole, from rank 0, so that ``from_pretrained`` reads it."""
    state = full_state_dict(model)
    if rank == 0:
        model.save_pretrained(folder, state_dict=state)


def save_state(folder: str | Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Writes model and optimizer in shards, each rank its own, to be resumed by any number of ranks.

    Of a peft model only what is trained is written.
    """
    options = _options(model)
    state = {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    dcp.save(state, checkpoint_id=Path(folder) / STATE_FOLDER)


def load_state(folder: str | Path, model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Reads what :func:`save_state` wrote, into sharded or plain parameters.

    Raises:
        ValueError: the folder holds no such state, or that of another model.
    """
    path = Path(folder) / STATE_FOLDER
    if not (path / ".metadata").exists():
        raise ValueError(
            f"no training state at {path}: it was not written by hdp, or with save_only_model; start a new run from its"
            " weights with from_pretrained"
        )
    options = _options(model)
    state: dict[str, Any] = {"model": get_model_state_dict(model, options=options)}
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer, options=options)
    try:
        dcp.load(state, checkpoint_id=path)
    except CheckpointException as error:  # no Exception, so that nobody who handles errors would see it
        causes = [cause for cause, _ in error.failures.values()]
        if not all(isinstance(cause, ValueError | RuntimeError | KeyError) for cause in causes):
            raise
        raise ValueError(
            f"the training state at {path} is not this model's and optimizer's: {causes[0]}; make them as they were when it was"
            " written"
        ) from error
    lenient = StateDictOptions(strict=False) if options.ignore_frozen_params else StateDictOptions()
    set_model_state_dict(model, state["model"], options=lenient)
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)


def _options(model: nn.Module) -> StateDictOptions:
    return StateDictOptions(ignore_frozen_params=hasattr(model, "peft_config"))
