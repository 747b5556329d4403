"""One saved storage on its way out and back, and the handles that autograd holds for it.

Storages are what moves, not tensors: views of one storage are stored once, and all come back as views of one storage.
A storage is known by a weak reference, which keeps its identity (not its memory) from being reused: a new storage at a
freed one's address can never be taken for it.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from hdp.offload.split import Split, flat_bytes
from hdp.offload.streams import Done
from hdp.offload.tiers import Slot

if TYPE_CHECKING:
    from hdp.offload.micro_batch import MicroBatch


class State(enum.Enum):
    KEPT = enum.auto()
    """On the device for good. Left only by the death of the last handle."""
    LEAVING = enum.auto()
    """Being copied out; the source is held. Becomes AWAY when the copy is over and the host has seen it."""
    AWAY = enum.auto()
    """In a tier; the part that stays is on the device. Becomes RETURNING when somebody asks for it."""
    RETURNING = enum.auto()
    """Being copied into a new storage. Becomes BACK when backward needs it and is ordered behind the copy."""
    BACK = enum.auto()
    """In a new storage on the device. Becomes AWAY again only when the graph is retained and backward has passed."""
    DEAD = enum.auto()
    """No handle is left."""


class VersionProbe:
    """Shares a tensor's version counter without holding its memory, so that changes after saving are seen."""

    __slots__ = ("_alias", "saved")

    def __init__(self, tensor: Tensor, *, alias: Tensor | None = None) -> None:
        """``alias``: a detached alias that is held anyway."""
        if alias is None:
            alias = tensor.detach()
            empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            if type(tensor) in (Tensor, nn.Parameter):
                alias.data = empty
            else:  # spread over ranks: changes are counted by the whole, not by this rank's part
                alias._local_tensor = empty  # type: ignore[attr-defined]
        self._alias = alias
        self.saved = tensor._version

    @property
    def changed(self) -> bool:
        return self._alias._version != self.saved

    def check(self, handle: Handle) -> None:
        """Raises what autograd raises where it watches a saved tensor itself."""
        if self.changed:
            shape = ", ".join(str(n) for n in handle.size)
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{handle.kind} [{shape}]] is at version {self._alias._version}; expected version {self.saved} "
                "instead. Hint: enable anomaly detection to find the operation that failed to compute its gradient, "
                "with torch.autograd.set_detect_anomaly(True)."
            )


class Record:
    """One storage. Only the engine, under its lock, changes a record."""

    __slots__ = (
        "epoch", "flat", "handles", "key", "nbytes", "probe", "read",
        "ref", "rest", "slot", "split", "state", "visit", "written",
    )  # fmt: skip

    def __init__(self, tensor: Tensor, visit: int, epoch: int, whole: Tensor | None = None) -> None:
        """``whole``: as of :class:`Handle`."""
        storage = tensor.untyped_storage()
        self.ref = StorageWeakRef(storage)
        self.key: int = storage._cdata
        self.nbytes = storage.nbytes()
        self.visit = visit
        """Layer call that saved it first."""
        self.epoch = epoch
        """See ``ActivationStore``."""
        self.probe = VersionProbe(tensor if whole is None else whole)
        self.state = State.KEPT
        self.handles = 0
        self.split: Split | None = None
        self.slot: Slot | None = None
        self.flat: Tensor | None = flat_bytes(tensor)
        """uint8 [nbytes]: the source until it has left, then what came back."""
        self.rest: Tensor | None = None
        """uint8 [split.rest]: what stays on the device while the others are away."""
        self.written: Done | None = None
        self.read: Done | None = None

    @property
    def on_device(self) -> int:
        """Bytes held on the device now."""
        return (0 if self.flat is None else self.nbytes) + (0 if self.rest is None else self.rest.numel())


def spread_of(whole: Tensor) -> Callable[[Tensor], Tensor]:
    """What makes a tensor of several ranks again of this one's part."""
    from torch.distributed.tensor import DTensor

    assert isinstance(whole, DTensor)
    return partial(
        DTensor.from_local,
        device_mesh=whole.device_mesh,
        placements=whole.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


class Handle:
    """What autograd holds instead of a saved tensor."""

    __slots__ = (
        "__weakref__",
        "alias",
        "dtype",
        "kind",
        "offset",
        "owner",
        "probe",
        "record",
        "size",
        "spread",
        "stride",
        "visit",
    )

    def __init__(
        self, tensor: Tensor, owner: MicroBatch, visit: int, record: Record | None, whole: Tensor | None = None
    ) -> None:
        """``whole``: the tensor of several ranks (tensor parallelism) of which ``tensor`` is this one's part."""
        self.spread = None if whole is None or whole is tensor else spread_of(whole)
        self.record: Record | None = None
        self.owner = owner
        self.visit = visit
        self.kind = tensor.type()
        self.size, self.dtype = tensor.size(), tensor.dtype
        if record is None:
            # Not the tensor itself: where a node saves its own output that would be a reference cycle.
            self.alias: Tensor | None = tensor.detach()
            self.probe = VersionProbe(tensor, alias=self.alias)
            return
        self.alias = None
        self.probe = VersionProbe(tensor if whole is None else whole)
        self.stride, self.offset = tensor.stride(), int(tensor.storage_offset())
        record.handles += 1
        self.record = record

    def view_of(self, flat: Tensor) -> Tensor:
        """The saved tensor on the storage of ``flat``."""
        tensor = torch.empty(0, dtype=self.dtype, device=flat.device)
        part: Tensor = tensor.set_(flat.untyped_storage(), self.offset, self.size, self.stride)  # type: ignore[call-overload]
        return part if self.spread is None else self.spread(part)

    def __del__(self) -> None:
        # Any thread, any moment, possibly inside the engine: a deque's append takes no lock.
        record = getattr(self, "record", None)
        if record is not None:
            self.owner.engine.dropped.append(record)
