"""Context parallelism as its users have it, to compare with: each exchanges a packed micro-batch once per layer and direction.

A micro-batch is some documents, each cut over all ranks of a group and padded so that every rank holds as many rows of it.

- :class:`Ulysses`: one all-to-all of queries, keys and values, whole documents for a share of the heads, one all-to-all back.
- :class:`Gather`: keys and values are gathered once (as for Llama 3), their gradients summed where they belong; zigzag.
- :class:`Ring`: zigzag; all documents' keys and values are one message a hop, posted before a block is computed and waited for
  after it. In backward their gradients travel one hop behind.

    attention = Ring([400, 64], group)        # once a micro-batch; lengths padded to a multiple of Ring.unit(size)
    out = attention(q, k, v, scale)           # [rows, heads, head_dim], rows of this rank: attention.positions

Attention itself is aten's flash kernel for CPUs, called document by document, as SDPA calls it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def flash(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out [rows, heads, dim], lse [rows, heads]) of one rectangle."""
    out, lse = _flash(*map(_heads_first, (q, k, v)), 0.0, causal, attn_mask=mask, scale=scale)
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


def flash_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    mask: Tensor | None = None,
) -> list[Tensor]:
    """dq, dk, dv of one rectangle; ``out`` and ``lse`` are those of all keys."""
    inputs, lse = map(_heads_first, (do, q, k, v, out)), lse.transpose(0, 1).unsqueeze(0)
    grads = _flash_backward(*inputs, lse, 0.0, causal, attn_mask=mask, scale=scale)
    return [grad[0].transpose(0, 1) for grad in grads]


def _heads_first(t: Tensor) -> Tensor:
    return t.transpose(0, 1).unsqueeze(0)


class Packed(ABC):
    """One micro-batch of one group.

    Args:
        lengths: tokens of each whole document, multiples of :meth:`unit`.
        group: the ranks that share all of them.
    """

    def __init__(self, lengths: Sequence[int], group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()
        unit = self.unit(self.size)
        if any(n % unit for n in lengths):
            raise ValueError(f"documents have {list(lengths)} tokens: pad each to a multiple of {unit}")
        self.lengths, self.own = list(lengths), [n // self.size for n in lengths]
        self.rows = sum(self.own)
        self.starts = list(accumulate([0, *self.own[:-1]]))
        """First of this rank's rows of each document."""

    @staticmethod
    @abstractmethod
    def unit(size: int) -> int:
        """What documents are padded to a multiple of."""

    @abstractmethod
    def _chunks(self, rank: int) -> list[int]:
        """Which of ``unit`` equal parts of a document a rank holds, in the order of its rows."""

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, list[Tensor]]:
        """Out, and what backward needs."""

    @abstractmethod
    def backward(self, do: Tensor, saved: Sequence[Tensor], scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return _Attention.apply(q, k, v, scale, self)

    @cached_property
    def positions(self) -> list[Tensor]:
        """Of each document the positions of this rank's rows."""
        unit = self.unit(self.size)
        parts = [(n // unit, self._chunks(self.rank)) for n in self.lengths]
        return [torch.cat([torch.arange(i * c, (i + 1) * c) for i in chunks]) for c, chunks in parts]

    def _order(self) -> tuple[Tensor, Tensor]:
        """Index that brings the rows of all ranks, rank after rank, into whole documents one after the other; its inverse."""
        unit = self.unit(self.size)
        holders = sorted((i, r, j) for r in range(self.size) for j, i in enumerate(self._chunks(r)))
        parts = []
        for start, length in zip(self.starts, self.lengths, strict=True):
            c = length // unit
            firsts = [r * self.rows + start + j * c for _, r, j in holders]
            parts.append((torch.tensor(firsts)[:, None] + torch.arange(c)).flatten())
        order = torch.cat(parts)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return order, back

    def _all_to_all(self, parts: Tensor) -> Tensor:
        got = torch.empty_like(parts)
        dist.all_to_all_single(got, parts, group=self.group)
        return got


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, packed: Packed) -> Tensor:
        out, saved = packed.forward(q, k, v, scale)
        ctx.save_for_backward(*saved)
        ctx.scale, ctx.packed = scale, packed
        return out

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.packed.backward(do, ctx.saved_tensors, ctx.scale), None, None)


# ---------------------------------------------------------------- Ulysses


class Ulysses(Packed):
    """Key/value heads that are fewer than the ranks are repeated, as DeepSpeed and its followers do."""

    def __init__(self, lengths: Sequence[int], group: dist.ProcessGroup) -> None:
        super().__init__(lengths, group)
        self.order, self.back = self._order()

    @staticmethod
    def unit(size: int) -> int:
        return size

    def _chunks(self, rank: int) -> list[int]:
        return [rank]

    def _repeats(self, heads: int) -> int:
        if heads % self.size and self.size % heads:
            raise ValueError(f"{heads} key/value heads cannot be dealt out to {self.size} ranks")
        return max(self.size // heads, 1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, list[Tensor]]:
        repeats = self._repeats(k.shape[1])
        if repeats > 1:
            k, v = (t.repeat_interleave(repeats, 1) for t in (k, v))
        x = self._heads_out(q, k, v)
        query, key = q.shape[1] // self.size, k.shape[1] // self.size
        parts = [flash(*part.split([query, key, key], 1), scale, True) for part in x.split(self.lengths)]
        out, lse = (torch.cat(some) for some in zip(*parts, strict=True))
        saved = [x, out, lse, torch.tensor([query, key, repeats])]
        return self._heads_back(out, [query])[0], saved

    def backward(self, do: Tensor, saved: Sequence[Tensor], scale: float) -> tuple[Tensor, Tensor, Tensor]:
        x, out, lse, counts = saved
        query, key, repeats = counts.tolist()
        do, dx = self._heads_out(do), torch.empty_like(x)
        for part, *rows in zip(*(t.split(self.lengths) for t in (dx, do, x, out, lse)), strict=True):
            d, qkv, o, m = rows
            grads = flash_backward(d, *qkv.split([query, key, key], 1), o, m, scale, True)
            torch.cat(grads, 1, out=part)
        dq, dk, dv = self._heads_back(dx, [query, key, key])
        if repeats > 1:
            dk, dv = (t.unflatten(1, (-1, repeats)).sum(2) for t in (dk, dv))
        return dq, dk, dv

    def _heads_out(self, *tensors: Tensor) -> Tensor:
        """[own rows, heads, dim] each to whole documents' [rows, own heads of each, dim]."""
        shares = [t.shape[1] // self.size for t in tensors]
        send = tensors[0].new_empty(self.size, self.rows, sum(shares), tensors[0].shape[2])
        for part, t in zip(send.split(shares, 2), tensors, strict=True):
            part.copy_(t.unflatten(1, (self.size, -1)).transpose(0, 1))
        got = self._all_to_all(send).flatten(0, 1)
        return got if len(self.lengths) == 1 else got.index_select(0, self.order)

    def _heads_back(self, t: Tensor, shares: list[int]) -> list[Tensor]:
        """The other way."""
        t = t if len(self.lengths) == 1 else t.index_select(0, self.back)
        got = self._all_to_all(t.unflatten(0, (self.size, -1)))
        return [part.transpose(0, 1).flatten(1, 2) for part in got.split(shares, 2)]


# ---------------------------------------------------------------- zigzag

MASKED_ROWS = 192
"""Up to as many rows aten's kernel is faster with a mask than as two calls that are merged (measured)."""


class _Zigzag(Packed):
    @staticmethod
    def unit(size: int) -> int:
        return 2 * size

    def _chunks(self, rank: int) -> list[int]:
        return [rank, 2 * self.size - 1 - rank]


@cache
def _mask(rows: int, keys: int) -> Tensor:
    """Added to scores: the last row sees the last key."""
    return torch.full((rows, keys), float("-inf")).triu_(keys - rows + 1)


@dataclass(frozen=True)
class _Tile:
    """A chunk of queries and the keys that it sees."""

    rows: slice
    """Among this rank's."""
    keys: slice
    """Among the gathered ones."""
    parts: tuple[tuple[slice, bool], ...]
    """Calls: keys among ``keys``, and whether causal; one, masked, if it is neither."""
    is_masked: bool


class Gather(_Zigzag):
    """Gradients are summed by an all-to-all and a sum: gloo's own reduce-scatter sends twice as much."""

    def __init__(self, lengths: Sequence[int], group: dist.ProcessGroup) -> None:
        super().__init__(lengths, group)
        self.order, self.back = self._order()
        self.tiles = list(self._make_tiles())

    def _make_tiles(self) -> Iterator[_Tile]:
        first = 0
        for start, length in zip(self.starts, self.lengths, strict=True):
            c = length // self.unit(self.size)
            for j, i in enumerate(self._chunks(self.rank)):
                masked = i > 0 and c <= MASKED_ROWS
                parts = [(slice(0, i * c), False)] if i and not masked else []
                parts.append((slice(0, (i + 1) * c), False) if masked else (slice(i * c, (i + 1) * c), True))
                rows, keys = slice(start + j * c, start + (j + 1) * c), slice(first, first + (i + 1) * c)
                yield _Tile(rows, keys, tuple(parts), masked)
            first += length

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, list[Tensor]]:
        own = torch.cat([k, v], 1)
        kv = own.new_empty(self.size * self.rows, *own.shape[1:])
        dist.all_gather_single(kv, own, group=self.group)
        kv = kv.index_select(0, self.order)
        outs, lses = zip(*(self._tile(tile, q, kv, scale) for tile in self.tiles), strict=True)
        out = torch.cat(outs)
        return out, [q, kv, out, torch.cat(lses)]

    def _tile(self, tile: _Tile, q: Tensor, kv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        k, v = kv[tile.keys].chunk(2, 1)
        q = q[tile.rows]
        mask = _mask(len(q), len(k)) if tile.is_masked else None
        (out, lse), *others = (flash(q, k[keys], v[keys], scale, causal, mask) for keys, causal in tile.parts)
        for other, other_lse in others:
            out, lse = _merged(out, lse, other, other_lse)
        return out, lse

    def backward(self, do: Tensor, saved: Sequence[Tensor], scale: float) -> tuple[Tensor, Tensor, Tensor]:
        q, kv, out, lse = saved
        dq, dkv = torch.empty_like(q), torch.zeros_like(kv)
        for tile in self.tiles:
            k, v = kv[tile.keys].chunk(2, 1)
            dk, dv = dkv[tile.keys].chunk(2, 1)
            rows = [t[tile.rows] for t in (do, q, out, lse)]
            mask = _mask(len(rows[0]), len(k)) if tile.is_masked else None
            for number, (keys, causal) in enumerate(tile.parts):
                d, x, o, m = rows
                grads = flash_backward(d, x, k[keys], v[keys], o, m, scale, causal, mask)
                _put(dq[tile.rows], grads[0], first=number == 0)
                dk[keys].add_(grads[1])
                dv[keys].add_(grads[2])
        parts = dkv.index_select(0, self.back).unflatten(0, (self.size, -1))
        dk, dv = self._all_to_all(parts).sum(0).chunk(2, 1)
        return dq, dk, dv


def _merged(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    weight = torch.sigmoid(other_lse - lse).unsqueeze(-1)
    return torch.lerp(out, other, weight), torch.logaddexp(lse, other_lse)


def _put(total: Tensor, part: Tensor, *, first: bool) -> None:
    if first:
        total.copy_(part)
    else:
        total.add_(part)


class Ring(_Zigzag):
    """All rows see the first halves of lower ranks' blocks; the second half of the rows sees all of higher ranks'."""

    def __init__(self, lengths: Sequence[int], group: dist.ProcessGroup) -> None:
        super().__init__(lengths, group)
        halves = [n // 2 for n in self.own]
        whole, first, second = [], [], []
        for start, half in zip(self.starts, halves, strict=True):
            whole.append(slice(start, start + 2 * half))
            first.append(slice(start, start + half))
            second.append(slice(start + half, start + 2 * half))
        self.whole, self.first, self.second = whole, first, second
        self.late_rows = torch.cat([torch.arange(part.start, part.stop) for part in second])

    def _tiles(self, source: int) -> tuple[list[slice], list[slice], bool]:
        """Rows and keys of each document, and whether causal, with the block of a rank."""
        if source == self.rank:
            return self.whole, self.whole, True
        return (self.whole, self.first, False) if source < self.rank else (self.second, self.whole, False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, list[Tensor]]:
        own = kv = torch.stack([k, v])
        for hop in range(self.size):
            coming = self._pass_on(kv, 0) if hop + 1 < self.size else None
            source = (self.rank - hop) % self.size
            rows, keys, causal = self._tiles(source)
            parts = [flash(q[r], kv[0, s], kv[1, s], scale, causal) for r, s in zip(rows, keys, strict=True)]
            block, block_lse = (torch.cat(some) for some in zip(*parts, strict=True))
            if hop == 0:
                out, lse = block, block_lse
            elif source < self.rank:
                out, lse = _merged(out, lse, block, block_lse)
            else:
                late = self.late_rows
                out[late], lse[late] = _merged(out[late], lse[late], block, block_lse)
            kv = coming() if coming is not None else kv
        return out, [q, own, out, lse]

    def backward(self, do: Tensor, saved: Sequence[Tensor], scale: float) -> tuple[Tensor, Tensor, Tensor]:
        q, kv, out, lse = saved
        dq, returning = torch.empty_like(q), None
        for hop in range(self.size):
            coming = self._pass_on(kv, 0) if hop + 1 < self.size else None
            rows, keys, causal = self._tiles((self.rank - hop) % self.size)
            blocks = []
            for r, s in zip(rows, keys, strict=True):
                grads = flash_backward(do[r], q[r], kv[0, s], kv[1, s], out[r], lse[r], scale, causal)
                blocks.append(grads[1:])
                _put(dq[r], grads[0], first=hop == 0)
            dkv = torch.empty_like(kv) if returning is None else returning()
            for s, block in zip(keys, blocks, strict=True):
                for total, part in zip(dkv, block, strict=True):
                    _put(total[s], part, first=returning is None)
            if self.size > 1:
                returning = self._pass_on(dkv, 1)
            kv = coming() if coming is not None else kv
        dk, dv = dkv if returning is None else returning()
        return dq, dk, dv

    def _pass_on(self, tensor: Tensor, tag: int) -> Callable[[], Tensor]:
        """To the next rank; what is returned waits for what comes from the one before."""
        got = torch.empty_like(tensor)
        works = [
            dist.irecv(got, group=self.group, group_src=(self.rank - 1) % self.size, tag=tag),
            dist.isend(tensor, group=self.group, group_dst=(self.rank + 1) % self.size, tag=tag),
        ]

        def wait() -> Tensor:
            for work in works:
                work.wait()
            return got

        return wait


RIVALS: dict[str, type[Packed]] = {"ulysses": Ulysses, "all_gather": Gather, "ring": Ring}
"""By the schedule of ours that they are compared with."""
