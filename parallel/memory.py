"""The memory of this rank's device: how much there is for training, and how much of it was taken at most.

On a GPU the allocator of torch counts. A CPU has no such count: there it is the resident size of the process, beyond what it
had when the engine was made; the kernel keeps its highest value, with all that the allocator of the C library has not given
back, and pages of files that are mapped.
"""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

STATUS = Path("/proc/self/status")
EIGHTHS, SIXTY_FOURTHS = 8, 64


class RankMemory:
    """Of one engine, from the moment at which it was made."""

    def __init__(self, device: torch.device, tensors: Iterable[Tensor], processes: int) -> None:
        """``tensors``: parameters and buffers that lie on the device; ``processes``: that share the node's memory."""
        self.device = device
        mine = model_bytes(tensors)
        if device.type == "cuda":
            self.others = max(torch.cuda.memory_allocated(device) - mine, 0)
            self.limit = float(gpu_room(device) - self.others)
        else:
            reset_highest()
            self.others = max(resident() - mine, 0)
            self.limit = float(host_room(processes, mine + self.others) - self.others)

    def restart(self) -> None:
        """Forgets the peak so far: what measuring took is no step's."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            reset_highest()

    @property
    def peak(self) -> int:
        """Bytes that were taken at most, so far; on a GPU since its statistics were reset last."""
        if self.device.type == "cuda":
            return max(torch.cuda.max_memory_allocated(self.device) - self.others, 0)
        return max(highest_resident() - self.others, 0)


def model_bytes(tensors: Iterable[Tensor]) -> int:
    """Of distinct storages on this rank."""
    found: dict[int, int] = {}
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.device.type != "meta":
            storage = local.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def gpu_room(device: torch.device) -> int:
    """Bytes that this process can have of its GPU: all that other processes have left, to a 64th of the whole."""
    free, total = torch.cuda.mem_get_info(device)
    room = free + torch.cuda.memory_reserved(device)
    return room - room % (total // SIXTY_FOURTHS)


def host_room(processes: int, held: int) -> int:
    """Bytes that one of ``processes`` can have of its host, which holds ``held`` now.

    An equal part of the whole; less, in eighths of that, where other programs have taken more.
    """
    share = host_memory() // processes
    available = _status_bytes(Path("/proc/meminfo"), "MemAvailable")
    if available is None:
        return share
    room = held + available // processes
    if room >= share * (EIGHTHS - 1) // EIGHTHS:
        return share
    return max(room // (share // EIGHTHS), 1) * (share // EIGHTHS)


def host_memory() -> int:
    """Bytes of this host, or of the control group that the process runs in."""
    import os

    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        file = Path(path)
        text = file.read_text().strip() if file.is_file() else ""
        if text.isdigit():
            whole = min(whole, int(text))
    return whole


def resident() -> int:
    """Bytes of this process in memory now; at most so far where the system tells no more."""
    return _status_bytes(STATUS, "VmRSS") or highest_resident()


def highest_resident() -> int:
    """The most that it had."""
    found = _status_bytes(STATUS, "VmHWM")
    if found is not None:
        return found
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_highest() -> None:
    """From now on the highest counts anew, where the system allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _status_bytes(path: Path, name: str) -> int | None:
    if not path.is_file():
        return None
    found = re.search(rf"^{name}:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else None
