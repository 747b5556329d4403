"""Measured machines on disk, so that a job on ranks and of a model that were measured before starts at once.

One file a machine in ``$HDP_CACHE/machines`` (else ``$XDG_CACHE_HOME/hdp``, ``~/.cache/hdp``), named after all that it depends
on. Rank 0 reads and writes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import socket
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from hdp.balance.machine import FORMAT, Machine
from hdp.balance.plan import PlanError
from hdp.parallel.measure import layers_of
from hdp.parallel.shapes import see_shape
from hdp.parallel.skeleton import kind_of
from hdp.parallel.world import World

if TYPE_CHECKING:
    from hdp.parallel.engine import Engine

INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA")
CGROUPS = ("/sys/fs/cgroup", "/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct")
QUOTA_FILES = ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us")

logger = logging.getLogger("hdp")


def folder() -> Path:
    """Where machines are kept."""
    base = os.environ.get("HDP_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hdp"
    return Path(base) / "machines"


def key_of(engine: Engine) -> str:
    """Hash of all that a machine depends on: hardware, hosts and quotas of all ranks, model, dtypes, versions; a collective."""
    world = engine.world
    ranks: list[Any] = [None] * world.world_size
    dist.all_gather_object(ranks, describe_rank(world), group=world.control)
    kinds = [repr(kind_of(layer)) for layer in layers_of(engine.model)]
    fields = {
        "format": FORMAT,
        "ranks": ranks,
        "nodes": world.nodes,
        "model": str(see_shape(engine.model)),
        "layers": hashlib.sha256("\n".join(kinds).encode()).hexdigest(),
        "dtype": str(engine.dtype),
        "wire": str(world.runtime.wire_dtype),
        "backend": world.runtime.backend_name,
        "versions": (_version("hdp"), torch.__version__),
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:32]


def describe_rank(world: World) -> dict[str, Any]:
    """What of this rank decides how fast it is."""
    on_gpu = world.device.type == "cuda"
    return {
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(world.device) if on_gpu else _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "quota": cpu_quota(),
        "interfaces": {name: os.environ.get(name) for name in INTERFACES},
    }


def cpu_quota() -> list[str]:
    """What the CPU cgroups of this process say of their quotas; empty where there are none to be read."""
    found = []
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for base in CGROUPS:
            for name in QUOTA_FILES:
                try:
                    found.append(f"{name} {Path(base + path, name).read_text(encoding='utf-8').strip()}")
                except OSError:
                    continue
    return sorted(set(found))


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def load(world: World, key: str) -> Machine | None:
    """Rank 0's entry on all ranks; None where it has none. A collective."""
    told: list[str | None] = [None]
    if dist.get_rank(world.control) == 0:
        try:
            told = [(folder() / f"{key}.json").read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError):
            told = [None]
    dist.broadcast_object_list(told, group=world.control, group_src=0)
    if told[0] is None:
        return None
    try:
        return Machine.from_json(told[0])
    except PlanError:  # written in part, or by hand: measured again, and written over
        return None


def store(world: World, key: str, machine: Machine) -> None:
    """Writes rank 0's entry, whole or not at all. A folder that cannot be written to costs a warning."""
    if world.rank != 0:
        return
    place = folder()
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=place, suffix=".part", delete=False, encoding="utf-8") as file:
            file.write(machine.to_json() + "\n")
        os.replace(file.name, place / f"{key}.json")
    except OSError as error:
        logger.warning(
            "the machine is not kept for the next start (%s): set HDP_CACHE to a folder that can be written", error
        )
