"""Where activations go: one interface, pinned host memory, and chains of tiers with a budget each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hdp.offload.buffers import SLACK, Buffer, BufferPool
from hdp.offload.errors import OffloadError
from hdp.offload.split import Split, copy_bytes


@dataclass(frozen=True, slots=True)
class Slot:
    """Room for one storage's leaving bytes in one tier."""

    tier: Tier
    nbytes: int
    place: object
    """What the tier needs to find it: a buffer, or an extent of a file."""


class Tier(ABC):
    """A place outside device memory. ``write`` and ``read`` run as jobs of a copy stream; the rest is called by the host."""

    name: str
    budget: int | None
    """Bytes it may hold; None for no limit."""
    on_device_stream = False
    """True when ``write`` and ``read`` only enqueue work on the current CUDA stream; False: they block a host thread."""

    @abstractmethod
    def reserve(self, nbytes: int) -> Slot | None:
        """Room for ``nbytes``; None when the budget does not allow it."""

    @abstractmethod
    def write(self, slot: Slot, flat: Tensor, split: Split) -> None:
        """Copies the leaving bytes of ``flat`` (uint8 [split.nbytes]) out. Raises :class:`OffloadError`."""

    @abstractmethod
    def read(self, slot: Slot, flat: Tensor, split: Split) -> None:
        """Copies the bytes back to where they were in ``flat``. Raises :class:`OffloadError`."""

    @abstractmethod
    def release(self, slot: Slot) -> None:
        """Gives the room back. No copy of the slot may be under way."""

    @property
    def room(self) -> int | None:
        """Bytes that it can still take; None for no limit."""
        return None if self.budget is None else max(self.budget - self.used, 0)

    @property
    @abstractmethod
    def used(self) -> int:
        """Bytes in use now."""

    @property
    @abstractmethod
    def peak(self) -> int:
        """Most bytes ever in use."""

    @property
    @abstractmethod
    def owned(self) -> int:
        """Bytes taken from the system now, in use or kept for reuse."""

    @abstractmethod
    def trim(self) -> None:
        """Gives what is not in use back to the system."""

    @abstractmethod
    def close(self) -> None:
        """Gives everything back; the tier cannot be used again."""


class HostTier(Tier):
    """Host memory from an own pool; pinned when the device is a GPU.

    On a CPU device it moves activations from memory to memory, which frees nothing: there it is the twin on which tests
    run the GPU's logic.
    """

    def __init__(self, *, budget: int | None = None, device: torch.device | str = "cpu", name: str = "host") -> None:
        self.name = name
        self.budget = budget
        self.on_device_stream = torch.device(device).type == "cuda"
        self._pool = BufferPool(budget=budget, pin=self.on_device_stream)

    def reserve(self, nbytes: int) -> Slot | None:
        buffer = self._pool.acquire(nbytes)
        return None if buffer is None else Slot(self, nbytes, buffer)

    def write(self, slot: Slot, flat: Tensor, split: Split) -> None:
        buffer = _buffer(slot)
        for at, to, size in split.runs():
            copy_bytes(buffer.tensor[to : to + size], flat[at : at + size])

    def read(self, slot: Slot, flat: Tensor, split: Split) -> None:
        buffer = _buffer(slot)
        for at, to, size in split.runs():
            copy_bytes(flat[at : at + size], buffer.tensor[to : to + size])

    def release(self, slot: Slot) -> None:
        self._pool.release(_buffer(slot))

    @property
    def used(self) -> int:
        return self._pool.used

    @property
    def peak(self) -> int:
        return self._pool.peak_used

    @property
    def owned(self) -> int:
        return self._pool.owned

    def trim(self) -> None:
        self._pool.trim()

    close = trim


def _buffer(slot: Slot) -> Buffer:
    assert isinstance(slot.place, Buffer)
    return slot.place


class Chain:
    """Tiers in order of preference: a storage goes to the first whose budget has room for it."""

    def __init__(self, tiers: Sequence[Tier]) -> None:
        if not tiers:
            raise ValueError("no tier given: name at least one, such as HostTier() or FileTier('/local/scratch')")
        names = [tier.name for tier in tiers]
        if len(set(names)) < len(names):
            raise ValueError(f"two tiers have the same name: {', '.join(names)}; give each its own")
        self.tiers = tuple(tiers)

    @property
    def room(self) -> int | None:
        """Bytes that all tiers together can still take, what rounding to pages may take off; None for no limit."""
        rooms = [tier.room for tier in self.tiers]
        if any(room is None for room in rooms):
            return None
        return sum(room for room in rooms if room is not None) * SLACK // (SLACK + 1)

    def reserve(self, nbytes: int) -> Slot | None:
        """Room in the first tier that has it; None when none does."""
        for tier in self.tiers:
            slot = tier.reserve(nbytes)
            if slot is not None:
                return slot
        return None

    def full(self, nbytes: int) -> OffloadError:
        """The error for bytes that no tier has room for."""
        filled = ", ".join(f"{tier.name} holds {tier.used} of {tier.budget} bytes" for tier in self.tiers)
        return OffloadError(
            f"no tier has room for {nbytes} more bytes ({filled}): raise a budget, add a tier, or lower the offload ratio"
        )

    def bytes_by_tier(self) -> dict[str, int]:
        """Bytes in use now, by tier."""
        return {tier.name: tier.used for tier in self.tiers}

    def trim(self) -> None:
        for tier in self.tiers:
            tier.trim()

    def close(self) -> None:
        for tier in self.tiers:
            tier.close()
