"""The world: this process among the ranks of a job, under torchrun or alone."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hdp.attention.route import AttentionRuntime, check_options
from hdp.balance.machine import ranks_per_node
from hdp.parallel.channel import LANES, TorchChannel
from hdp.parallel.guard import Guard


@dataclass(eq=False)
class World:
    """This rank, its device and its communicators. Made by :func:`init`; usable as a context manager."""

    rank: int
    """Position among the ranks that share sequences; with tensor parallelism, that of this rank's tensor-parallel group."""
    world_size: int
    """Ranks that share sequences: all ranks divided by ``tensor_parallel``."""
    local_rank: int
    device: torch.device
    timeout: float
    """Seconds after which a rank that waits for another gives up."""
    channel: TorchChannel
    control: dist.ProcessGroup
    """Small CPU messages: plan digests, label counts, metrics. Never a lane's traffic."""
    runtime: AttentionRuntime
    guard: Guard
    owns_process_group: bool
    mesh: DeviceMesh
    """Dimensions ``hdp`` and, with tensor parallelism, ``tp`` (neighbouring ranks)."""
    nodes: tuple[int, ...]
    """Ranks that share sequences of each node, as torchrun started them."""

    def close(self) -> None:
        """Leaves the job. Only what :func:`init` itself set up is taken down."""
        self.guard.stop()
        self.channel.close()
        if self.owns_process_group and dist.is_initialized():
            dist.destroy_process_group()

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.guard.report(error)
        self.close()


def init(
    *,
    timeout: float = 300.0,
    backend: str = "auto",
    device: str | torch.device | None = None,
    tensor_parallel: int = 1,
    schedule: str | None = None,
    wire_dtype: torch.dtype | None = None,
) -> World:
    """Joins the job that torchrun started, or starts one of a single rank.

    Args:
        timeout: seconds after which waiting for another rank ends in an error.
        backend: attention backend (see ``hdp.attention.backends``); ``"auto"`` takes the fastest that runs here.
        device: None: this rank's GPU if there is one, else the CPU. ``"cuda"``: this rank's GPU.
        tensor_parallel: neighbouring ranks that hold slices of one model; they run the same micro-batches with fewer heads.
            Split the model with ``parallelize_module(model, world.mesh["tp"], ...)`` before ``hdp.shard``.
        schedule: how shared sequences are computed: a name (``"ring"``), one forward and one backward (``"ring/ring_q"``), or
            ``"auto"``, which chooses for each by cost; see ``hdp.attention.schedules``. None: as the plan says; where it names
            none, ``"auto"`` on a machine that was measured, else a ring.
        wire_dtype: bf16 or fp16: q, k and v of an fp32 model travel so, at half the bytes. None: as the model computes.

    Raises:
        ValueError: a timeout that is not positive, a GPU where there is none, a tensor_parallel that does not divide the
            ranks, an unknown backend or schedule, a wire dtype that saves nothing, a schedule or wire dtype that is another
            on another rank.
    """
    if not isinstance(timeout, int | float) or not timeout > 0:
        raise ValueError(f"timeout is {timeout!r} s: give the seconds after which a silent rank counts as lost")
    check_options(backend, wire_dtype, schedule)  # before anybody waits for this rank
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    place = _device(device, local_rank)
    owns, generation = not dist.is_initialized(), next(_GENERATIONS)
    if owns:
        _join(place, timeout, generation)
    total = dist.get_world_size()
    if tensor_parallel < 1 or total % tensor_parallel:
        raise ValueError(f"tensor_parallel is {tensor_parallel}: it must divide the {total} ranks of the job")
    rank, world_size = dist.get_rank() // tensor_parallel, total // tensor_parallel
    control, lanes = _groups(tensor_parallel, timedelta(seconds=timeout))
    for lane in lanes:  # connects all peers now, not in the middle of the first step
        dist.all_reduce(torch.zeros(1, device=place), group=lane)
    channel = TorchChannel(rank, lanes, place)
    _check_agreement(control, schedule=schedule, wire_dtype=wire_dtype)
    _register_transformers()
    runtime = AttentionRuntime(rank, channel, place, backend, wire_dtype, schedule=schedule)
    nodes = _nodes(control, world_size, tensor_parallel)
    runtime.ranks_per_node = ranks_per_node(nodes) if len(nodes) > 1 else None
    return World(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        device=place,
        timeout=timeout,
        channel=channel,
        control=control,
        runtime=runtime,
        guard=Guard(dist.get_rank(), total, channel, generation),
        owns_process_group=owns,
        mesh=_mesh(place, world_size, tensor_parallel),
        nodes=nodes,
    )


def _nodes(control: dist.ProcessGroup, world_size: int, tensor_parallel: int) -> tuple[int, ...]:
    """Ranks of each node, as torchrun started them: LOCAL_WORLD_SIZE processes each. One node where that does not add up."""
    mine = int(os.environ.get("LOCAL_WORLD_SIZE", world_size * tensor_parallel))
    sizes: list[int] = [0] * world_size
    dist.all_gather_object(sizes, mine, group=control)
    found, rank = [], 0
    while rank < world_size:
        size = sizes[rank] // tensor_parallel
        if size < 1 or sizes[rank] % tensor_parallel or set(sizes[rank : rank + size]) != {sizes[rank]}:
            return (world_size,)
        found.append(min(size, world_size - rank))
        rank += size
    return tuple(found)


def _check_agreement(control: dist.ProcessGroup, **settings: object) -> None:
    """Raises ValueError, on every rank, if ranks were given different settings: they would send what nobody expects."""
    mine = {name: str(value) for name, value in settings.items()}
    found: list[dict[str, str]] = [{} for _ in range(control.size())]
    dist.all_gather_object(found, mine, group=control)
    for rank, theirs in enumerate(found):
        for name, value in theirs.items():
            if value != found[0][name]:
                raise ValueError(
                    f"hdp.init: {name} is {found[0][name]} on rank 0, {value} on rank {rank}: give all ranks the same"
                )


def _mesh(device: torch.device, world_size: int, tensor_parallel: int) -> DeviceMesh:
    if tensor_parallel == 1:
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=("hdp",))
    return init_device_mesh(device.type, (world_size, tensor_parallel), mesh_dim_names=("hdp", "tp"))


def _groups(tensor_parallel: int, limit: timedelta) -> tuple[dist.ProcessGroup, list[dist.ProcessGroup]]:
    """This rank's control group and lanes. Every rank takes part in making every group, in one order."""
    total = dist.get_world_size()
    control, lanes = None, []
    for slice_ in range(tensor_parallel):
        ranks = list(range(slice_, total, tensor_parallel))
        group = dist.new_group(ranks, backend="gloo", timeout=limit, group_desc="hdp_control")
        if dist.get_rank() in ranks:
            control = group
        for lane in range(LANES if len(ranks) > 1 else 0):
            group = dist.new_group(ranks, timeout=limit, group_desc=f"hdp_lane{lane}")
            if dist.get_rank() in ranks:
                lanes.append(group)
    assert control is not None
    return control, lanes


def _device(device: str | torch.device | None, local_rank: int) -> torch.device:
    if device is None:
        return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    place = torch.device(device)
    if place.type != "cuda":
        return place
    if not torch.cuda.is_available():
        raise ValueError(f"device is {str(device)!r}, but torch finds no GPU: leave device out, or check the driver")
    return torch.device("cuda", local_rank) if place.index is None else place


_GENERATIONS = itertools.count()
"""Counts the calls of :func:`init` in this process, the same on every rank: each job gets keys of its own in a store that may
outlive it (torchrun's)."""


def _join(device: torch.device, timeout: float, generation: int) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    limit = timedelta(seconds=timeout)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=limit))  # type: ignore[attr-defined]
        store = dist.PrefixStore(f"hdp/job/{generation}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)


def _register_transformers() -> None:
    """transformers is optional; where it is installed, ``attn_implementation="hdp"`` works from here on."""
    try:
        from hdp.attention.huggingface import register

        register()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "transformers":
            raise
