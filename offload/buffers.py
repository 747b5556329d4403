"""An own pool of host buffers: exact to the page, reused across layers and steps, pinned for a GPU.

torch's pinned allocator rounds to powers of two (up to twice the memory; MemAscend's complaint). Here a buffer is as
large as asked for, rounded up to a page, which is also what O_DIRECT needs. A request is served by the smallest free
buffer that is at most an eighth too large, so that micro-batches of nearly equal lengths share buffers; before the pool
would own more than an eighth above the most it ever had in use, it gives unused buffers back to the system.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from bisect import bisect_left, insort
from collections import deque
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hdp.offload.errors import OffloadError

PAGE = 4096
SLACK = 8
"""A buffer may be 1/8 larger than the request it serves, and the pool 1/8 larger than the most ever in use."""

Bytes = NDArray[np.uint8]


def round_to_page(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


class Buffer:
    """Page-aligned memory; unmapped when the last reference to it, its array or its tensor is gone."""

    __slots__ = ("__weakref__", "_pinned", "array", "born", "memory", "size", "tensor")

    def __init__(self, size: int, *, pin: bool, born: int) -> None:
        self.size = size
        self.born = born
        self.memory = mmap.mmap(-1, size)
        self.array: Bytes = np.frombuffer(self.memory, dtype=np.uint8)
        self.tensor = torch.frombuffer(self.memory, dtype=torch.uint8)
        self._pinned = pin
        if pin:
            code = torch.cuda.cudart().cudaHostRegister(self.tensor.data_ptr(), size, 0)
            if int(code) != 0:
                raise OffloadError(f"cudaHostRegister of {size} bytes failed with code {int(code)}: lower the budget")

    def unpin(self) -> None:
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self.tensor.data_ptr())
            self._pinned = False


class BufferPool:
    """Buffers of a few sizes. Thread-safe; tensors of :meth:`lease` come back by themselves."""

    def __init__(self, *, budget: int | None = None, pin: bool = False) -> None:
        """``budget``: bytes the pool may own; None for no limit. ``pin``: page-lock the memory for a GPU."""
        if budget is not None and budget < 0:
            raise ValueError(f"budget is {budget} bytes: give a number of at least 0, or None for no limit")
        self.budget = budget
        self._pin = pin
        self._lock = threading.Lock()
        self._free: list[tuple[int, int, Buffer]] = []
        # Leases end wherever the last reference to a tensor dies, possibly inside this very pool: appending to a deque
        # is atomic and takes no lock.
        self._ended: deque[Buffer] = deque()
        self._born = 0
        self._used = 0
        self.owned = 0
        """Bytes the pool has from the system."""
        self.peak_used = 0
        """Most bytes ever in use."""
        self.peak_owned = 0
        """Most bytes the pool ever had from the system."""

    @property
    def used(self) -> int:
        with self._lock:
            self._collect()
            return self._used

    def acquire(self, nbytes: int) -> Buffer | None:
        """A buffer of at least ``nbytes``; None when the budget does not allow it."""
        size = round_to_page(max(nbytes, 1))
        with self._lock:
            self._collect()
            i = bisect_left(self._free, (size,))
            if i < len(self._free) and self._free[i][0] <= size + size // SLACK:
                buffer = self._free.pop(i)[2]
            else:
                new = self._grow(size)
                if new is None:
                    return None
                buffer = new
            self._used += buffer.size
            self.peak_used = max(self.peak_used, self._used)
            return buffer

    def _grow(self, size: int) -> Buffer | None:
        most = max(self.peak_used, self._used + size)
        limit = most + most // SLACK
        if self.budget is not None:
            limit = min(limit, self.budget)
            if self._used + size > self.budget:
                return None
        while self._free and self.owned + size > limit:
            oldest = min(range(len(self._free)), key=lambda i: self._free[i][1])
            self._drop(self._free.pop(oldest)[2])
        self._born += 1
        buffer = Buffer(size, pin=self._pin, born=self._born)
        self.owned += size
        self.peak_owned = max(self.peak_owned, self.owned)
        return buffer

    def release(self, buffer: Buffer) -> None:
        """Gives a buffer back. No copy from or to it may be under way."""
        with self._lock:
            self._put(buffer)

    def lease(self, nbytes: int) -> torch.Tensor:
        """A uint8 tensor [nbytes] whose buffer returns to the pool when the tensor's storage is freed."""
        buffer = self.acquire(nbytes)
        if buffer is None:
            raise OffloadError(f"no {nbytes} bytes left of a pool of {self.budget}: raise its budget")
        view: Any = (ctypes.c_ubyte * nbytes).from_buffer(buffer.memory)
        # The storage holds `view` through the buffer protocol; `view` dies with the storage.
        weakref.finalize(view, self._ended.append, buffer).atexit = False
        return torch.frombuffer(view, dtype=torch.uint8)

    def trim(self) -> None:
        """Gives all unused buffers back to the system."""
        with self._lock:
            self._collect()
            for _, _, buffer in self._free:
                self._drop(buffer)
            self._free.clear()

    def _collect(self) -> None:
        while self._ended:
            self._put(self._ended.popleft())

    def _put(self, buffer: Buffer) -> None:
        self._used -= buffer.size
        insort(self._free, (buffer.size, buffer.born, buffer))

    def _drop(self, buffer: Buffer) -> None:
        buffer.unpin()
        self.owned -= buffer.size
