"""What of a trainer's many arguments hdp cannot honour: refused with the reason, or named in one warning."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("hdp")

_OWN_LOSS = "the loss is computed inside the output head, in chunks, and logits never exist"
_SHARDED = "hdp wraps the model itself: choose with HdpConfig(engine=...)"

REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "gradient_accumulation_steps": (
        lambda v: v != 1,
        "a step is one planned global batch: set it to 1 and raise HdpConfig.tokens_per_step",
    ),
    "average_tokens_across_devices": (lambda v: not v, "the loss is always the mean over all ranks' label tokens"),
    "fp16": (bool, "there is no gradient scaler here: use bf16=True"),
    "fp16_full_eval": (bool, "sharded parameters keep their dtype: use bf16=True"),
    "bf16_full_eval": (bool, "sharded parameters keep their dtype: use bf16=True"),
    "deepspeed": (bool, f"{_SHARDED}; DeepSpeed is for scripts of your own, see hdp.parallel.deepspeed"),
    "fsdp": (bool, _SHARDED),
    "parallelism_config": (lambda v: v is not None, "the plan decides how each batch is laid over the ranks"),
    "torch_compile": (bool, "compile the layers yourself before the trainer is made: layer.compile()"),
    "auto_find_batch_size": (bool, "memory is bounded by HdpConfig.capacity"),
    "label_smoothing_factor": (bool, _OWN_LOSS),
    "neftune_noise_alpha": (lambda v: v is not None, "its noise depends on the packed length, which the plan changes"),
    "use_liger_kernel": (bool, "it replaces the model's forward and loss"),
    "save_on_each_node": (bool, "weights are gathered on one rank: use a shared folder"),
    "batch_eval_metrics": (bool, _OWN_LOSS),
    "activation_offloading": (bool, "its hooks do not know planned micro-batches: see hdp.offload"),
    "loss_type": (lambda v: v not in (None, "nll"), _OWN_LOSS),
}
"""Argument: (is this value refused, why and what instead)."""

IGNORED = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "train_sampling_strategy",
    "dataloader_drop_last",
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context",
    "dataloader_in_order",
    "ddp_find_unused_parameters",
    "ddp_bucket_cap_mb",
    "ddp_broadcast_buffers",
    "ddp_static_graph",
    "eval_accumulation_steps",
    "eval_use_gather_object",
    "ignore_data_skip",
    "torch_empty_cache_steps",
    "padding_free",
)
"""Arguments that have no meaning for planned batches; a value other than the default is warned about."""

_OPTIMIZERS_IN_BACKWARD = ("lomo", "layerwise")


def check_arguments(args: Any) -> None:
    """Raises ValueError for the first training argument that is refused."""
    for name, (is_refused, reason) in REFUSED.items():
        if hasattr(args, name) and is_refused(getattr(args, name)):
            raise ValueError(f"training argument {name}={getattr(args, name)!r} is not supported with hdp: {reason}")
    optimizer = str(getattr(args.optim, "value", args.optim))
    if any(word in optimizer for word in _OPTIMIZERS_IN_BACKWARD):
        raise ValueError(
            f"training argument optim={optimizer!r} is not supported with hdp: it steps inside backward, before gradients of"
            " all ranks are summed"
        )
    if args.load_best_model_at_end and args.save_only_model:
        raise ValueError(
            "load_best_model_at_end with save_only_model is not supported with hdp: the best model is read back from the"
            " training state, which save_only_model leaves out"
        )
    if args.n_gpu > 1:
        raise ValueError(f"one process sees {args.n_gpu} GPUs: launch with torchrun, one process per GPU")


def check_trainer(trainer: Any) -> None:
    """Raises ValueError for what was given to the trainer itself and cannot work."""
    for name, reason in (
        ("model_init", "give the model: it is sharded once"),
        ("compute_metrics", f"{_OWN_LOSS}; evaluate with a plain Trainer, or by generation"),
        ("preprocess_logits_for_metrics", _OWN_LOSS),
        ("compute_loss_func", _OWN_LOSS),
    ):
        if getattr(trainer, name, None) is not None:
            raise ValueError(f"{name} is not supported with hdp: {reason}")
    if getattr(trainer, "is_deepspeed_enabled", False) or getattr(trainer, "is_fsdp_enabled", False):
        raise ValueError(f"accelerate was launched with FSDP or DeepSpeed of its own: launch with torchrun; {_SHARDED}")
    if getattr(trainer, "is_distributed_loading_by_transformers", False):
        raise ValueError(f"the model was sharded by from_pretrained(distributed_config=...): load it whole; {_SHARDED}")


def ignored_arguments(args: Any) -> list[str]:
    """``name=value`` of the arguments that are set but have no effect."""
    fields = {field.name: field for field in dataclasses.fields(args)}
    found = []
    for name in IGNORED:
        value = getattr(args, name, None)
        if name not in fields or (name == "train_sampling_strategy" and value in ("random", "sequential")):
            continue
        if value != fields[name].default:
            found.append(f"{name}={value!r}")
    return found
