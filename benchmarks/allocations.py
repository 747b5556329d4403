"""Counts what torch's allocator has handed out on a CPU, to the byte, and the most that it had: what a GPU's allocator tells.

    with Peak(store) as peak:
        ...
    peak.bytes

torch counts allocations on the CPU where it is told to (``caffe2_report_cpu_memory_usage``) and notes each in a profile. What
offload keeps in a pool of its own is added, moment by moment. Slow: for benchmarks and tests.
"""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from hdp.offload import OffloadEngine
from hdp.offload.buffers import Buffer, BufferPool

ALLOCATED = 96
"""Bytes from the start of c10's ProfiledCPUMemoryReporter (a mutex, a hash table) to its count; checked by :func:`start`."""


class _Reporter:
    """c10's counter."""

    def __init__(self) -> None:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        ctypes.c_bool.in_dll(library, "FLAGS_caffe2_report_cpu_memory_usage").value = True
        self._find = library._ZN3c1025profiledCPUMemoryReporterEv
        self._find.restype = ctypes.c_void_p

    def allocated(self) -> int:
        return ctypes.c_size_t.from_address(self._find() + ALLOCATED).value


_REPORTER: list[_Reporter] = []


def start() -> None:
    """From now on every allocation counts. Raises RuntimeError where this torch counts otherwise."""
    if _REPORTER:
        return
    reporter = _Reporter()
    before = reporter.allocated()
    probe = torch.empty(1 << 20, dtype=torch.uint8)
    if reporter.allocated() - before != probe.nbytes:
        raise RuntimeError(f"torch {torch.__version__} keeps its count of CPU memory elsewhere: see ALLOCATED")
    _REPORTER.append(reporter)


def allocated() -> int:
    """Bytes that were allocated since :func:`start` and are still there."""
    return _REPORTER[0].allocated()


class Peak:
    """The most that was there within the context, in bytes, and which operators asked for it."""

    def __init__(self, store: OffloadEngine | None = None) -> None:
        """``store``: whose pool counts as well."""
        self.bytes = 0
        self.operators: list[str] = []
        """From the innermost outwards."""
        self._pool: BufferPool | None = None if store is None else store._returned
        self._owned: list[tuple[int, int]] = []
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> Peak:
        start()
        if self._pool is not None:
            self._watch(self._pool)
        self._profile.__enter__()
        return self

    def _watch(self, pool: BufferPool) -> None:
        grow, drop = pool._grow, pool._drop

        def noted_grow(size: int) -> Buffer | None:
            buffer = grow(size)
            self._owned.append((time.time_ns(), pool.owned))
            return buffer

        def noted_drop(buffer: Buffer) -> None:
            drop(buffer)
            self._owned.append((time.time_ns(), pool.owned))

        self._owned = [(time.time_ns(), pool.owned)]
        pool._grow, pool._drop = noted_grow, noted_drop  # type: ignore[method-assign]

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        if self._pool is not None:
            del self._pool._grow, self._pool._drop
        owned, at = 0, 0
        for moment, total, event in sorted(self._events(), key=lambda found: found[0]):
            while at < len(self._owned) and self._owned[at][0] <= moment:
                owned = self._owned[at][1]
                at += 1
            if total + owned > self.bytes:
                self.bytes, highest = total + owned, event
        if self.bytes:
            self.operators = _callers(highest)

    def _events(self) -> list[tuple[int, int, Any]]:
        """(nanoseconds, bytes there, event) of every allocation and every end of one."""
        open_ = list(self._profile.profiler.kineto_results.experimental_event_tree())
        found = []
        while open_:
            event = open_.pop()
            open_ += event.children
            if str(event.tag) == "_EventType.Allocation":
                found.append((event.start_time_ns, event.extra_fields.total_allocated, event))
        return found


def _callers(event: Any) -> list[str]:
    names = []
    while event is not None:
        names.append(event.name)
        event = event.parent
    return names
