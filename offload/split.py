"""Which bytes of a storage leave: whole tokens where the tensor has them, else the first bytes (ByteScale 4.3)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MIN_RUN = 4096
"""Bytes below which a run of tokens is not worth a copy of its own."""
ALIGN = 64


@dataclass(frozen=True, slots=True)
class Split:
    """A storage seen as ``outer`` blocks of equal size, of each of which the first ``run`` bytes leave.

    A tensor [heads, tokens, head_dim] has one block a head; one whose tokens are outermost has a single block.
    """

    nbytes: int
    """Bytes of the storage."""
    outer: int
    """Number of blocks."""
    run: int
    """Bytes of each block that leave."""

    @property
    def block(self) -> int:
        return self.nbytes // self.outer

    @property
    def away(self) -> int:
        """Bytes that leave."""
        return self.outer * self.run

    @property
    def rest(self) -> int:
        """Bytes that stay."""
        return self.nbytes - self.away

    def runs(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int, int]]:
        """(position in the storage, position in the copy, bytes) of the leaving bytes [start, stop)."""
        stop = self.away if stop is None else stop
        while start < stop:
            block, inside = divmod(start, self.run)
            size = min(self.run - inside, stop - start)
            yield block * self.block + inside, start, size
            start += size

    def rest_runs(self) -> Iterator[tuple[int, int, int]]:
        """The same for the bytes that stay, gathered into one tensor of ``rest`` bytes."""
        stay = self.block - self.run
        for block in range(self.outer if stay else 0):
            yield block * self.block + self.run, block * stay, stay


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor's elements fill its storage, each byte once, in whatever order of dimensions."""
    if tensor.storage_offset() or tensor.numel() * tensor.itemsize != tensor.untyped_storage().nbytes():
        return False
    expected = 1
    for stride, size in sorted((st, sz) for st, sz in zip(tensor.stride(), tensor.shape, strict=True) if sz > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def make_split(tensor: Tensor, ratio: float, tokens: int | None) -> Split:
    """How the storage of ``tensor`` is split when a fraction ``ratio`` of it leaves.

    ``tokens``: tokens of the micro-batch. Where a dimension of the tensor has that size, the first
    ``round(ratio * tokens)`` tokens leave; otherwise the first ``ratio`` of the bytes.
    """
    nbytes = tensor.untyped_storage().nbytes()
    if ratio >= 1.0:
        return Split(nbytes, 1, nbytes)
    if tokens and tokens in tensor.shape and is_dense(tensor):
        inner = max(st for st, sz in zip(tensor.stride(), tensor.shape, strict=True) if sz == tokens) * tensor.itemsize
        run = round(ratio * tokens) * inner
        outer = nbytes // (inner * tokens)
        if run == 0 or outer == 1 or run >= MIN_RUN:
            return Split(nbytes, outer, run)
    return Split(nbytes, 1, round(ratio * nbytes) // ALIGN * ALIGN)


def flat_bytes(tensor: Tensor) -> Tensor:
    """The tensor's whole storage as uint8 [bytes]."""
    storage = tensor.untyped_storage()
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return flat.set_(storage, 0, (storage.nbytes(),), (1,))  # type: ignore[call-overload,no-any-return]


def copy_bytes(target: Tensor, source: Tensor) -> None:
    """Copies uint8 [n], never blocking a GPU's host; on the CPU in the calling thread alone, without the GIL."""
    if target.device.type == "cpu" and source.device.type == "cpu":
        np.copyto(target.numpy(), source.numpy())
    else:
        target.copy_(source, non_blocking=True)
