"""What becomes of saved activations while an engine runs a plan: kept, offloaded, recomputed, as the plan or the user says.

    with Activations.open(world, policy="auto", folder="/local/scratch") as engine.activations:
        ...                                                     # train
    store = hdp.offload.OffloadEngine([hdp.offload.FileTier("/local/scratch")])
    engine.activations = Activations(store=store)               # as the plan says, micro-batch by micro-batch
    engine.activations = Activations(store=store, policy="recompute")

Recomputation keeps the outputs of attention, so that it sends no message; what recomputes must be equal for all sharers of a
sequence, which a policy for the whole job and the plan's own list of slots both are.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from hdp.balance.machine import CopyRates, LayerWork, Machine
from hdp.balance.plan import MicroBatch
from hdp.offload import POLICIES, FileTier, HostTier, OffloadEngine, Tier
from hdp.parallel.world import World

PLANNED = "plan"


@dataclass(frozen=True, kw_only=True)
class Room:
    """What plans may count on outside the device; equal on all ranks."""

    copies: CopyRates | None = None
    """Measured with all ranks copying; None: nothing leaves."""
    host_memory: float = 0.0
    """Bytes of this rank, as of ``hdp.balance.CostModel``."""
    disk_memory: float = 0.0
    in_flight: int = 2
    """Layers on the device at once while they leave or return."""


@dataclass(frozen=True, kw_only=True)
class Activations:
    """How an engine treats saved activations. The caller owns ``store`` and closes it.

    Raises:
        ValueError: an unknown policy, a ratio outside 0 to 1, a ``memo_fraction`` without policy ``memo`` or none with it.
    """

    store: OffloadEngine
    policy: str = PLANNED
    """``"plan"``: each micro-batch as planned; else one of ``hdp.offload.POLICIES`` for all of them. ``auto`` follows the plan
    where a micro-batch fits only so."""
    ratio: float = 1.0
    """Fraction that leaves under ``offload`` and ``recompute``, and at most under ``auto``; 0 to 1."""
    keep_first: int = 1
    keep_last: int = 1
    """Layers at each end that keep everything."""
    memo_fraction: float | None = None
    """``memo``: fraction of the layers that offload everything; the others recompute. Equal on all ranks, so that sharers of
    a sequence recompute the same layers; ``hdp.offload.auto.memo_fraction`` solves for it."""
    room: Room | None = None
    """What plans count on; None: what the machine says."""

    def __post_init__(self) -> None:
        check_policy(self.policy)
        if not 0.0 <= self.ratio <= 1.0:
            raise ValueError(f"ratio is {self.ratio}: give a number from 0 to 1")
        if (self.memo_fraction is None) == (self.policy == "memo"):
            cure = "give a number from 0 to 1" if self.policy == "memo" else "leave it out, or take policy 'memo'"
            raise ValueError(f"memo_fraction is {self.memo_fraction} under policy {self.policy!r}: {cure}")

    @classmethod
    def open(
        cls,
        world: World,
        *,
        policy: str = PLANNED,
        folder: str | Path | None = None,
        host_bytes: int | None = None,
        ratio: float = 1.0,
        memo_fraction: float | None = None,
        keep_first: int = 1,
        keep_last: int = 1,
    ) -> Activations:
        """A store for this rank, its bandwidth measured by all ranks at once; a collective. Close it, or use ``with``.

        As ``engine.activations`` it tells loaders of that engine the measured bandwidth, host memory and this rank's share of
        the free disk as the bound of what leaves, and the layers that keep everything.

        Args:
            policy, ratio, memo_fraction, keep_first, keep_last: as of the class.
            folder: on a local disk; None: no disk tier. With ``ratio`` 0 nothing leaves and none is needed.
            host_bytes: pinned host memory that this rank may use, on GPUs; None: as much as there is, 0: none.

        Raises:
            ValueError: as the class, or no tier: on a CPU only a folder frees memory.
            OffloadError: a folder that cannot take activations.
        """
        check_policy(policy)
        store = None
        try:
            with world.guard.watch("opening activations"):
                tiers: list[Tier] = []
                if world.device.type != "cpu" and host_bytes != 0:
                    tiers.append(HostTier(budget=host_bytes, device=world.device))
                if folder is not None:
                    tiers.append(FileTier(folder, device=world.device, sharers=processes_per_node(world)))
                if not tiers and not (ratio == 0.0 and policy in (PLANNED, "recompute", "keep")):
                    raise ValueError(
                        "activations have nowhere to go: give folder=, on a local disk, or ratio=0.0 to recompute alone"
                    )
                store = OffloadEngine(tiers or [HostTier(budget=0)], device=world.device)
                made = cls(
                    room=Room(),
                    store=store,
                    policy=policy,
                    ratio=ratio,
                    memo_fraction=memo_fraction,
                    keep_first=keep_first,
                    keep_last=keep_last,
                )
                if tiers:
                    made = replace(made, room=_measure(world, store, host_bytes))
        except BaseException:
            if store is not None:
                store.close()
            raise
        return made

    def __enter__(self) -> Activations:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.store.__exit__(kind, *error)

    def known_to(self, machine: Machine) -> Machine:
        """The machine as plans see it that count on this: with the layers that keep everything, and the room there is."""
        if self.room is None:
            return machine
        cost = replace(
            machine.cost,
            keep_first=self.keep_first,
            keep_last=self.keep_last,
            in_flight=self.room.in_flight,
            copy_bandwidth=self.room.copies.least if self.room.copies else 0.0,
            host_memory=self.room.host_memory,
            disk_memory=self.room.disk_memory,
        )
        return replace(machine, cost=cost, copies=self.room.copies)

    def _check_kept(self, micro_batch: MicroBatch | None) -> None:
        """Raises ValueError where layers that keep everything need more room than the plan counts on.

        A last layer's activations are gone by the time that others come back or run again, so a first one in its stead
        takes its room and that of one more.
        """
        if micro_batch is None or not needs_store(micro_batch):
            return
        first, last = micro_batch.kept_layers
        if self.keep_first + max(self.keep_last, last) > first + last:
            raise ValueError(
                f"keep_first {self.keep_first} and keep_last {self.keep_last} need more room than the plan has, which was made"
                f" for {first} and {last}: lower them, or plan with a cost model that has them (Activations.open does)"
            )

    def _check_covers(self, micro_batch: MicroBatch | None) -> None:
        """Raises ValueError where a policy for the whole job keeps what a plan counts on being elsewhere."""
        if micro_batch is None or not needs_store(micro_batch):
            return
        moves = self.ratio if self.policy == "offload" else 0.0
        if self.policy == "keep" or (
            self.policy == "offload" and (micro_batch.recompute or moves < micro_batch.offload_ratio)
        ):
            again = ", and runs layers again" if micro_batch.recompute else ""
            raise ValueError(
                f"policy {self.policy!r} moves a ratio of {moves:g} out, but the plan fits a micro-batch of rank"
                f" {micro_batch.rank} only with {micro_batch.offload_ratio:g}{again}: take policy {PLANNED!r}, or plan with"
                ' offload="off" and recompute="off"'
            )

    def around(
        self, model: nn.Module, micro_batch: MicroBatch | None, tokens: int, machine: Machine | None = None
    ) -> AbstractContextManager[object]:
        """The context for forward and backward of one micro-batch of ``tokens`` tokens.

        ``machine``: tells what a layer takes until one has been measured.
        """
        policy, ratio, layers = self.policy, self.ratio, None
        if policy == PLANNED or (
            policy == "auto" and needs_store(micro_batch)
        ):  # what the plan needs is not weighed again
            ratio = 0.0 if micro_batch is None else micro_batch.offload_ratio
            recomputes = micro_batch is not None and micro_batch.recompute
            layers = None if micro_batch is None else micro_batch.recompute_layers
            self._check_kept(micro_batch)
            policy = "recompute" if recomputes else "offload" if ratio > 0 else "keep"
        else:
            self._check_covers(micro_batch)
        if micro_batch is None or policy == "keep":
            return nullcontext()
        return self.store.micro_batch(
            model,
            ratio=ratio,
            policy=policy,
            tokens=tokens,
            layer=None if machine is None else layer_of(machine, micro_batch),
            memo_fraction=self.memo_fraction,
            recompute_layers=layers,
            keep_first=self.keep_first,
            keep_last=self.keep_last,
            keep_ops=frozenset({torch.ops.hdp.attend.default}),
        )


def layer_of(machine: Machine, micro_batch: MicroBatch) -> LayerWork:
    """What one layer of the model takes on a micro-batch."""
    shards = micro_batch.shards
    return machine.layer([shard.length for shard in shards], [len(shard.group) for shard in shards])


def needs_store(micro_batch: MicroBatch | None) -> bool:
    """Whether a micro-batch was planned to fit only with some of its activations elsewhere."""
    return micro_batch is not None and (micro_batch.offload_ratio > 0 or micro_batch.recompute)


def check_policy(policy: str) -> None:
    """Raises ValueError for an unknown one."""
    if policy not in (PLANNED, *POLICIES):
        raise ValueError(f"unknown activation policy {policy!r}: choose one of {PLANNED}, {', '.join(POLICIES)}")


def _measure(world: World, store: OffloadEngine, host_bytes: int | None) -> Room:
    """With all ranks copying; a collective."""

    def slowest(seconds: float) -> float:
        found = torch.tensor(seconds, dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=world.control)
        return float(found)

    copies = store.measure(barrier=lambda: dist.barrier(group=world.control), slowest=slowest)
    share = _disk_share(world, store)
    host = _least(world, host_bytes or 0)
    on_gpu = any(isinstance(tier, HostTier) for tier in store.chain.tiers)
    return Room(
        copies=copies,
        # Without a limit to host memory (0) there is none to all tiers; without host memory the disk is all there is.
        host_memory=float(host if on_gpu else share),
        disk_memory=float(share if on_gpu and host else 0),
    )


def _least(world: World, value: int) -> int:
    """Over all ranks, for plans must be equal."""
    found = torch.tensor(value)
    dist.all_reduce(found, dist.ReduceOp.MIN, group=world.control)
    return int(found)


def processes_per_node(world: World) -> int:
    """Processes that share a node's disk, where nodes are alike; else those of the whole job."""
    names = world.mesh.mesh_dim_names or ()
    return (world.runtime.ranks_per_node or world.world_size) * (world.mesh["tp"].size() if "tp" in names else 1)


def _disk_share(world: World, store: OffloadEngine) -> int:
    """Bytes on disk that every rank may plan with: the smallest share of any, for plans must be equal."""
    room = sum(tier.room or 0 for tier in store.chain.tiers if isinstance(tier, FileTier))
    # A ninth may be lost to rounding (see Chain.room).
    share = torch.tensor(max(room * 8 // 9, 1), dtype=torch.int64)  # 0 would be no limit
    dist.all_reduce(share, dist.ReduceOp.MIN, group=world.control)
    return int(share)
