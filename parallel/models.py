"""What a model must be like to be trained here, and alike on all ranks: refused with the reason otherwise."""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hdp.parallel.metrics import gather_numbers
from hdp.parallel.rotations import find_long_rotations
from hdp.parallel.world import World

SAMPLE = 64
"""Elements of each parameter that ranks compare."""


def compute_dtype(model: nn.Module) -> torch.dtype:
    """Of most of the model's parameters; mixed precision that a wrapper adds is not seen here."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


LAYER_TYPES = ("full_attention", "sliding_attention")
"""Of transformers' layers those that keep documents apart and can be shared; the others mix tokens in other ways."""


def check_attention(model: nn.Module) -> None:
    """Raises ValueError if a transformers model would not use hdp's attention, or needs more than that can do."""
    for part in model.modules():
        if not _uses_interface(type(part)):
            raise ValueError(
                f"{type(part).__name__} is not supported: its attention adds biases or masks of its own (ALiBi, for one) and"
                " does not go through transformers' AttentionInterface; choose a model that does, such as Llama, Qwen, Mistral,"
                " Gemma or GPT-NeoX"
            )
        if getattr(part, "_is_stateful", False):
            raise ValueError(
                f"{type(part).__name__} is not supported: it has layers that carry a state from token to token, which would run"
                " from one document into the next"
            )
    find_long_rotations(model)
    config: Any = getattr(model, "config", None)
    if config is None:
        return
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for kind in getattr(text, "layer_types", None) or ():
        if kind not in LAYER_TYPES:
            raise ValueError(
                f"{type(model).__name__} has layers of type {kind!r}, which is not supported: documents packed behind each"
                f" other are kept apart, and shared, in layers of type {' and '.join(LAYER_TYPES)} alone"
            )
    name = getattr(config, "_attn_implementation", None)
    if name != "hdp":
        raise ValueError(
            f'the model\'s attention is {name!r}: make it with attn_implementation="hdp",'
            ' or call model.set_attn_implementation("hdp")'
        )


def _uses_interface(kind: type) -> bool:
    """Whether a model of transformers computes attention through its AttentionInterface; True for what is none."""
    known = (c for c in kind.__mro__ if c.__module__.startswith("transformers.models."))
    found: Any = next(known, None)
    return found is None or getattr(found, "_can_set_attn_implementation", lambda: True)()


def check_router(model: nn.Module) -> None:
    """Raises ValueError if a mixture of experts asks for its auxiliary loss, which no micro-batch can compute alone."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(text, "output_router_logits", False):
        raise ValueError(
            "config.output_router_logits is True: the router's load-balancing loss is a product of means over the whole"
            " global batch, and transformers would take them over one micro-batch of one rank; set"
            " config.output_router_logits = False to train without it"
        )


POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings")
"""What transformers calls embeddings of positions that are learnt."""


def learnt_positions(model: nn.Module) -> int | None:
    """Tokens of the longest document for which the model has learnt positions; None: it computes them."""
    config: Any = getattr(model, "config", None)
    most = getattr(config, "max_position_embeddings", None)
    for name, part in model.named_modules():
        if isinstance(part, nn.Embedding) and name.rpartition(".")[2] in POSITION_TABLES:
            return most if isinstance(most, int) else part.num_embeddings
    return None


def trained_positions(model: nn.Module) -> int | None:
    """Tokens of the longest document that the model's positions are meant for; None: not said."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(text, "max_position_embeddings", None)
    return most if isinstance(most, int) else None


def output_head(model: nn.Module) -> nn.Linear:
    """The linear layer that makes logits. Raises ValueError if there is none that the fused loss can stand in for."""
    head: Any = getattr(model, "get_output_embeddings", lambda: getattr(model, "lm_head", None))()
    if head is None or not hasattr(head, "weight"):
        raise ValueError(
            f"{type(model).__name__} has no output head (get_output_embeddings() or lm_head) to compute a loss from"
        )
    if hasattr(head, "base_layer") or hasattr(head, "modules_to_save"):
        raise ValueError(
            f"the output head is wrapped by peft ({type(head).__name__}): the fused loss reads its weight and would pass the"
            " adapter by; leave lm_head out of target_modules and modules_to_save"
        )
    config = getattr(model, "config", None)
    for field in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        value = getattr(config, field, None)
        if value not in (None, 1, 1.0):
            raise ValueError(
                f"{type(model).__name__} changes its logits after the head ({field}={value}), which is not supported"
            )
    if not hasattr(head, "bias"):
        head.bias = None
    return head


NO_SCALER = "there is no gradient scaler here, without which small gradients become 0 and large ones inf: use bfloat16"


def check_trained_dtype(model: nn.Module) -> None:
    """Raises ValueError for trained parameters in fp16."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype == torch.float16:
            raise ValueError(f"the parameter {name} is float16: {NO_SCALER} or float32")


def check_precision(model: nn.Module, layers: list[nn.Module], policy: MixedPrecisionPolicy | None) -> None:
    """Raises ValueError for trained parameters of several dtypes that FSDP2 cannot gather together or compute with, and for
    fp16."""
    check_trained_dtype(model)
    computed = None if policy is None else policy.param_dtype
    if computed == torch.float16:
        raise ValueError(f"mp_policy.param_dtype is torch.float16: {NO_SCALER}")
    group = {id(p): number for number, layer in enumerate(layers, start=1) for p in layer.parameters()}
    first: dict[int, tuple[str, torch.dtype]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # A dtype to compute in makes groups alike when they are gathered, but not the parameters of one.
        other, dtype = first.setdefault(group.get(id(parameter), 0) if computed else 0, (name, parameter.dtype))
        if parameter.dtype != dtype:
            raise ValueError(
                f"the parameter {name} is {parameter.dtype}, {other} is {dtype}: give all trained parameters one dtype, for"
                " example model.float(), and say in mp_policy what to compute in"
            )


def check_unwrapped(model: nn.Module) -> None:
    """Raises ValueError if somebody has wrapped the model already, or gives something else."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"the model is a {type(model).__name__}: give a torch.nn.Module, as from_pretrained returns it"
        )
    if isinstance(model, DistributedDataParallel) or any(isinstance(m, FSDPModule) for m in model.modules()):
        raise ValueError(
            f"the model is wrapped already ({type(model).__name__}): give the plain one, hdp wraps it; to train it with"
            " another regime make it anew"
        )


def check_mesh(mesh: DeviceMesh, world: World) -> None:
    """Raises ValueError for a mesh over which gradients would not be those of all ranks."""
    if mesh.ndim > 2 or mesh.size() != world.world_size:
        shape = " x ".join(map(str, mesh.shape))
        raise ValueError(
            f"the mesh has {shape} ranks, the world {world.world_size}: give (shard) or (replicate, shard) over all ranks"
            " that share sequences"
        )


def check_no_tensor_parallel(world: World, engine: str) -> None:
    """Raises ValueError in a world with tensor parallelism, which runs beside FSDP2 alone."""
    if world.mesh.ndim > 1:
        raise ValueError(
            f"tensor parallelism with {engine}: its gradients would be summed over slices of one model; use hdp.shard,"
            " or hdp.init without tensor_parallel"
        )


def check_alike(model: nn.Module, world: World) -> None:
    """Raises ValueError, on every rank, if ranks hold different parameters; a collective.

    Each would shard its own: a model that is none of them. Compared are shapes and some elements. Models whose parameters
    are on the meta device on some rank are filled later, and are let through.
    """
    prints = {name: _fingerprint(p) for name, p in model.named_parameters()}
    is_meta = any(p.is_meta for p in model.parameters())
    mine = -1 if is_meta else zlib.crc32(repr(list(prints.items())).encode())
    with world.guard.watch("comparing parameters"):
        found = [int(n) for n in gather_numbers(world, mine)[:, 0]]
        if -1 in found or len(set(found)) == 1:
            return
        rows: list[dict[str, int]] = [{} for _ in found]
        dist.all_gather_object(rows, prints, group=world.control)
    other = next(rank for rank, number in enumerate(found) if number != found[0])
    names = [name for name in rows[0].keys() | rows[other].keys() if rows[0].get(name) != rows[other].get(name)]
    raise ValueError(
        f"ranks 0 and {other} begin with different parameters ({min(names)}, {len(names)} of {len(rows[0])}): set the same"
        " seed on all ranks before the model is made, or load the same weights"
    )


def _fingerprint(parameter: nn.Parameter) -> int:
    tensor: Tensor = parameter.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    value = zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if tensor.is_meta or not tensor.numel():
        return value
    flat = tensor.flatten()
    picked = flat[:: max(flat.numel() // SAMPLE, 1)].contiguous().cpu()
    return zlib.crc32(picked.view(torch.uint8).numpy().tobytes(), value)
