"""Making malloc give freed activations back, where activations live in ordinary memory.

glibc takes blocks of up to 32 MiB from its heap once it has seen blocks of that size freed, and a heap with holes does
not shrink: what has left for the disk would go on counting in the process. Measured (20 layers, 1,024 tokens, bf16): the
resident set of a step grew by 719 MiB with everything kept and 460-519 MiB with everything offloaded, of which 75 MiB
were saved activations; with a fixed threshold 535 and 140 MiB.
"""

from __future__ import annotations

import ctypes
import functools

THRESHOLD = 1 << 20
"""Bytes from which on a block comes straight from the system and goes straight back."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@functools.cache
def return_freed_blocks() -> bool:
    """Fixes glibc's thresholds for this process, once. False where the C library has no ``mallopt`` (not glibc)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, THRESHOLD)) and bool(mallopt(_M_TRIM_THRESHOLD, THRESHOLD))
