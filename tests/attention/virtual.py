"""Virtual ranks: whole micro-batches of several sequences, forward and backward, in one process, in any order of delivery."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hdp.attention.auto import Chooser
from hdp.attention.backends import Scoring
from hdp.attention.channel import VirtualNetwork
from hdp.attention.delta import delta_of
from hdp.attention.executor import drive_together
from hdp.attention.layout import Ranges, make_layout
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount
from hdp.attention.route import AttentionRuntime, LayerKey, Route, RouteShard

CPU = torch.device("cpu")
RANKS_PER_NODE = 2
"""Virtual ranks 0 and 1 share a node, 2 and 3 the next, and so on."""


@dataclass(frozen=True, kw_only=True)
class Sequence_:
    """One sequence: its length, the ranks that share it, how."""

    length: int
    group: tuple[int, ...]
    schedule: str = "local"
    backward: str = ""
    layout: str = "zigzag"

    def shard(self, number: int) -> RouteShard:
        return RouteShard(
            sequence=number,
            length=self.length,
            group=self.group,
            schedule=self.schedule,
            schedule_backward=self.backward or self.schedule,
            layout=self.layout,
        )

    def ranges(self, rank: int) -> Ranges:
        return make_layout(self.layout, self.length, len(self.group)).shard_ranges(self.group.index(rank))


@dataclass
class Data:
    """One sequence's tensors, each [tokens, heads, head_dim], and what dense attention makes of them (float64)."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    out: Tensor
    lse: Tensor
    """[tokens, heads]."""
    dq: Tensor
    dk: Tensor
    dv: Tensor


def dense_scores(q: Tensor, k: Tensor, mask: Mask, scoring: Scoring) -> Tensor:
    """[heads, tokens, tokens], -inf where the mask forbids."""
    tokens, group = q.shape[0], q.shape[1] // k.shape[1]
    position = torch.arange(tokens)
    allowed = torch.ones(tokens, tokens, dtype=torch.bool)
    if mask.causal:
        allowed &= position[None] <= position[:, None]
    if mask.window:
        allowed &= (position[:, None] - position[None]).abs() < mask.window
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * scoring.scale
    if scoring.softcap:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    return scores.masked_fill(~allowed, float("-inf"))


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scoring: Scoring) -> Tensor:
    """Attention written out; autograd works through it."""
    weights = dense_scores(q, k, mask, scoring).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(q.shape[1] // k.shape[1], 1))


def make_data(
    lengths: Sequence[int], heads: HeadCount, head_dim: int, mask: Mask, scoring: Scoring, dtype: torch.dtype, seed: int
) -> list[Data]:
    """Random sequences, rounded to ``dtype`` but held in float64, with float64 results."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        shapes = [(length, n, head_dim) for n in (heads.query, heads.key, heads.key, heads.query)]
        made.append(
            solve(*(torch.randn(s, generator=draw, dtype=torch.float64).to(dtype) for s in shapes), mask, scoring)
        )
    return made


def solve(q: Tensor, k: Tensor, v: Tensor, do: Tensor, mask: Mask, scoring: Scoring) -> Data:
    """One sequence with its results in float64."""
    q, k, v, do = (t.double() for t in (q, k, v, do))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = dense(*leaves, mask, scoring)
    dq, dk, dv = torch.autograd.grad(out, leaves, do) if len(q) else leaves
    q, k, v, out, dq, dk, dv = (t.detach() for t in (q, k, v, out, dq, dk, dv))
    lse = dense_scores(q, k, mask, scoring).logsumexp(-1).T
    return Data(q, k, v, do, out, lse, dq, dk, dv)


RESULTS = ("out", "lse", "dq", "dk", "dv")


@dataclass
class Result:
    """What the ranks computed, put together again; sequences in order."""

    out: list[Tensor]
    lse: list[Tensor]
    dq: list[Tensor]
    dk: list[Tensor]
    dv: list[Tensor]
    networks: tuple[VirtualNetwork, VirtualNetwork]
    """Of forward and of backward."""
    peaks: dict[int, int] = field(default_factory=dict)
    """Bytes of each rank's arena."""

    def errors_of(self, data: Sequence[Data], numbers: Sequence[int]) -> dict[str, float]:
        """Relative error of each result over some sequences together: ||difference|| / ||result||."""
        found = {}
        for name in RESULTS:
            mine = torch.cat([getattr(self, name)[i].flatten().double() for i in numbers])
            want = torch.cat([getattr(data[i], name).flatten() for i in numbers])
            coming = torch.cat([data[i].do.flatten() for i in numbers]).norm()
            # Queries that see one key only have no gradient at all: there, what came in is the measure.
            scale = want.norm() if want.norm() > 1e-9 * coming else coming
            found[name] = ((mine - want).norm() / scale).item() if len(mine) else 0.0
        return found

    def errors(self, data: Sequence[Data]) -> dict[str, float]:
        """Largest relative error of each result over all sequences, each by itself."""
        each = [self.errors_of(data, [i]) for i in range(len(data))]
        return {name: max(e[name] for e in each) for name in RESULTS}


def attend_together(
    sequences: Sequence[Sequence_],
    data: Sequence[Data],
    mask: Mask,
    scoring: Scoring,
    dtype: torch.dtype,
    *,
    backend: str,
    seed: int = 0,
    can_ask: bool = True,
    wire_dtype: torch.dtype | None = None,
    chooser: Chooser | None = None,
) -> Result:
    """Runs all ranks that the sequences name, forward and backward."""
    ranks = sorted({r for s in sequences for r in s.group})
    networks = VirtualNetwork(seed), VirtualNetwork(seed + 1)
    heads = HeadCount(query=data[0].q.shape[1], key=data[0].k.shape[1])
    key = LayerKey(heads=heads, head_dim=data[0].q.shape[2], dtype=dtype, mask=mask)
    places = {r: _Rank(r, sequences, data, key, backend, wire_dtype, chooser) for r in ranks}
    for is_backward, network in enumerate(networks):
        runs = {r: p.start(bool(is_backward), network.channel(r, can_ask), scoring, seed) for r, p in places.items()}
        drive_together(runs, network, seed)
    result = Result([], [], [], [], [], networks, {r: p.runtime.peak_bytes for r, p in places.items()})
    for number, (sequence, d) in enumerate(zip(sequences, data, strict=True)):
        for name in RESULTS:
            whole = torch.full_like(getattr(d, name), float("nan"))
            for r in sequence.group:
                for (start, stop), rows in places[r].rows(number):
                    whole[start:stop] = places[r].tensors[name][rows].double()
            getattr(result, name).append(whole)
    return result


class _Rank:
    """One virtual rank's tensors, packed."""

    def __init__(
        self,
        rank: int,
        sequences: Sequence[Sequence_],
        data: Sequence[Data],
        key: LayerKey,
        backend: str,
        wire_dtype: torch.dtype | None,
        chooser: Chooser | None,
    ) -> None:
        self.rank, self.sequences, self.key = rank, sequences, key
        self.runtime = AttentionRuntime(rank, VirtualNetwork().channel(rank), CPU, backend, wire_dtype, chooser)
        self.runtime.ranks_per_node = RANKS_PER_NODE
        mine = [(i, s) for i, s in enumerate(sequences) if rank in s.group]
        self.route = Route(self.runtime, [s.shard(i) for i, s in mine])
        sums = torch.float64 if key.dtype == torch.float64 else torch.float32
        self.tensors = {
            name: torch.cat([getattr(data[i], name)[a:b] for i, s in mine for a, b in s.ranges(rank)] or [like[:0]]).to(
                key.dtype
            )
            for name, like in (("q", data[0].q), ("k", data[0].k), ("v", data[0].k), ("do", data[0].q))
        }
        nan = float("nan")
        for name, like in (("out", "q"), ("dq", "q"), ("dk", "k"), ("dv", "k")):
            self.tensors[name] = torch.full_like(self.tensors[like], nan)
        self.tensors["lse"] = torch.full(self.tensors["q"].shape[:2], nan, dtype=sums)
        self.kept = torch.empty(self.route.program(key, False).lowered.kept_bytes, dtype=torch.uint8)

    def start(self, backward: bool, channel: object, scoring: Scoring, seed: int):
        executor = self.runtime.executor(self.key.dtype)
        executor = type(executor)(executor.backend, channel)
        program = self.route.program(self.key, backward)
        t = self.tensors
        if backward:
            t["delta"] = delta_of(t["do"], t["out"])
        views = program.bind([t[name] for name in program.lowered.externals], self.kept)
        return executor.run(program, views, scoring, (seed, int(backward)))

    def rows(self, number: int):
        row = 0
        for i, sequence in enumerate(self.sequences):
            if self.rank not in sequence.group:
                continue
            for start, stop in sequence.ranges(self.rank):
                if i == number:
                    yield (start, stop), slice(row, row + stop - start)
                row += stop - start
