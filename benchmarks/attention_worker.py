"""One host of ``benchmarks/attention.py``: measures candidates in turn on this rank, all ranks together.

    attention_worker.py '[{"tokens": 8192, "heads": [8, 8], "candidates": ["hdp:ring/ring", "quiet:ring/ring"], ...}, ...]'

Rank 0 prints a JSON list, one object a job: per candidate the seconds of each round (slowest rank), CPU seconds (mean over
ranks) and bytes sent (every rank).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from attention_choice import pairs
from attention_grid import middle
from packed import RIVALS
from torch import Tensor

import hdp
from hdp.attention import AttentionRuntime, Route, RouteShard, attend
from hdp.attention.lowered import Packet

DIM = 64  # of a head


class QuietChannel:
    """Posts nothing and waits for nothing: the same tiles without communication."""

    can_ask = False

    def post(self, sends: Sequence[tuple[Packet, Tensor]], receives: Sequence[tuple[Packet, Tensor]], tag: int) -> int:
        return tag

    def has_received(self, ticket: int) -> bool:
        return True

    def wait_receives(self, ticket: int) -> None:
        return None

    def wait_late(self, ticket: int) -> None:
        return None

    def wait_sends(self, ticket: int) -> None:
        return None


@dataclass
class Job:
    """What to measure."""

    tokens: int
    """Of the shared sequences."""
    heads: tuple[int, int]
    """Query and key/value heads."""
    candidates: list[str]
    local: list[int] = field(default_factory=list)
    """Tokens of each whole sequence on every rank."""
    documents: list[int] = field(default_factory=list)
    """Tokens of each shared sequence, ``tokens`` in all; empty: one."""
    picks: list[str] = field(default_factory=list)
    """Of the candidate ``hdp:picks``: a pair of schedules for each of them."""
    rounds: int = 5
    parts: str = "both"
    """"both", "forward" or "backward": what is timed."""
    within: float | None = None
    """Candidates whose fastest round is slower by this factor than the median of the fastest one are measured no more."""
    keep: list[str] = field(default_factory=list)
    """Candidates that are measured to the end all the same."""
    duel: int = 0
    """More rounds, at the end, of ``keep`` and the two others that were fastest, timed apart (``again``): which of many is
    fastest is partly luck, and luck does not come twice. Three times as many where the first of ``keep`` is behind."""


class Bench:
    """The tensors of this rank and the candidates that run on them."""

    def __init__(self, job: Job, world: hdp.World) -> None:
        self.job, self.world = job, world
        self.rank, self.size = world.rank, world.world_size
        self.documents = job.documents or [job.tokens]
        self.shared = job.tokens // self.size
        self.rows = self.shared + sum(job.local)
        draw = torch.Generator().manual_seed(self.rank)

        def make(heads: int) -> Tensor:
            return torch.randn(self.rows, heads, DIM, generator=draw).requires_grad_()

        query, key = job.heads
        self.q, self.k, self.v, self.do = make(query), make(key), make(key), make(query).detach()
        self.runs: dict[str, Callable[[], Tensor]] = {}
        self.quiet = AttentionRuntime(self.rank, QuietChannel(), torch.device("cpu"), "cpu")
        self.quiet.workspace = world.runtime.workspace  # holds real numbers once a real round has run

    def forward(self, name: str) -> Callable[[], Tensor]:
        kind, _, what = name.partition(":")
        if kind in ("hdp", "quiet"):
            picks = self.job.picks if what == "picks" else [what] * len(self.documents)
            return self._attend(self.world.runtime if kind == "hdp" else self.quiet, picks)
        return {"packed": self._packed, "torch": self._torch_ring}[kind](what)

    def _attend(self, runtime: AttentionRuntime, picks: list[str]) -> Callable[[], Tensor]:
        group = tuple(range(self.size))
        shards = []
        for number, (length, pick) in enumerate(zip(self.documents, picks, strict=True)):
            forward, backward = pick.split("/") if self.size > 1 else ("local", "local")
            shards.append(
                RouteShard(sequence=number, length=length, group=group, schedule=forward, schedule_backward=backward)
            )
        shards += [
            RouteShard(sequence=len(self.documents) + self.rank * len(self.job.local) + i, length=n, group=(self.rank,))
            for i, n in enumerate(self.job.local)
        ]
        name = "".join(picks)
        route = Route(runtime, shards, serial=(len(name), sum(map(ord, name))))
        return lambda: attend(self.q, self.k, self.v, route=route)

    def _packed(self, schedule: str) -> Callable[[], Tensor]:
        packed, rows = RIVALS[schedule](self.documents, dist.group.WORLD), slice(0, self.shared)
        return lambda: packed(*(t[rows] for t in (self.q, self.k, self.v)), DIM**-0.5)

    def _torch_ring(self, method: str) -> Callable[[], Tensor]:
        """Document by document."""
        own = [n // self.size for n in self.documents]

        def run() -> Tensor:
            parts = zip(*(t[: self.shared].split(own) for t in (self.q, self.k, self.v)), strict=True)
            outs = [TorchRing.apply(*(t.transpose(0, 1).unsqueeze(0) for t in part), method) for part in parts]
            return torch.cat(outs, 2).squeeze(0).transpose(0, 1)

        return run

    def measure(self, name: str) -> dict[str, float]:
        if name not in self.runs:
            self.runs[name] = self.forward(name)
        run, parts = self.runs[name], self.job.parts
        return self._timed(lambda: self._round(run, parts))

    def _round(self, run: Callable[[], Tensor], parts: str) -> tuple[float, float, float]:
        channel = self.world.channel
        begin = _mark(channel)
        out = run()
        if parts == "forward":
            return _since(channel, begin)
        if parts == "backward":
            dist.barrier()
            begin = _mark(channel)
        out.backward(self.do[: out.shape[0]])
        self.q.grad = self.k.grad = self.v.grad = None
        return _since(channel, begin)

    def _timed(self, once: Callable[[], tuple[float, float, float]]) -> dict[str, Any]:
        dist.barrier()
        seconds, cpu, sent = once()
        everyone = [None] * self.size
        dist.all_gather_object(everyone, (seconds, cpu, sent))
        table: list[tuple[float, float, float]] = everyone  # type: ignore[assignment]
        return {
            "seconds": max(t[0] for t in table),
            "cpu": sum(t[1] for t in table) / self.size,
            "sent": [t[2] for t in table],
        }


def _mark(channel: Any) -> tuple[float, float, int]:
    return time.perf_counter(), time.process_time(), channel.sent_bytes


def _since(channel: Any, begin: tuple[float, float, int]) -> tuple[float, float, float]:
    return time.perf_counter() - begin[0], time.process_time() - begin[1], channel.sent_bytes - begin[2]


class TorchRing(torch.autograd.Function):
    """torch's templated ring with its head-tail balancer, given the flash op of the CPU."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, method: str) -> Tensor:
        from torch.distributed.tensor.experimental._context_parallel import _attention as torch_ring

        torch_ring.set_rotate_method(method)
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        out, lse = torch_ring._templated_ring_attention(
            dist.group.WORLD, 2, op, q, k, v, is_causal=True, dropout_p=0.0, scale=DIM**-0.5
        )[:2]
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.method = method
        return out

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Any, ...]:
        from torch.distributed.tensor.experimental._context_parallel import _attention as torch_ring

        torch_ring.set_rotate_method(ctx.method)
        q, k, v, out, lse = ctx.saved_tensors
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        grads = torch_ring._templated_ring_attention_backward(
            *(dist.group.WORLD, 2, op, do, "grad_out", q, k, v, out, lse, True), dropout_p=0.0, scale=DIM**-0.5
        )
        return (*grads[:3], None)


def dense_cpu(tokens: int, heads: tuple[int, int]) -> float:
    """CPU seconds of forward and backward of the whole sequence on one rank, plain SDPA."""
    q, k, v, do = (torch.randn(1, n, tokens, DIM) for n in (heads[0], heads[1], heads[1], heads[0]))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    begin = time.process_time()
    F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=heads[0] != heads[1]).backward(do)
    return time.process_time() - begin


def run_job(settings: dict[str, Any], world: hdp.World) -> dict[str, dict[str, list]]:
    """Measures one job's candidates in turn."""
    dense = settings.pop("dense", False)
    bench = Bench(Job(**{**settings, "heads": tuple(settings["heads"])}), world)
    job = bench.job
    found: dict[str, dict[str, list]] = {
        name: {"seconds": [], "cpu": [], "sent": [], "again": []} for name in job.candidates
    }
    warm: dict[str, float] = {}
    for number in range(job.rounds + 1):
        for name in in_turn(running(job, found), number):
            measured = bench.measure(name)
            warm[name] = warm.get(name, measured["seconds"])
            if number or is_hopeless(job, name, warm):  # the first warms up
                for what, value in measured.items():
                    found[name][what].append(value)
    fastest = sorted(job.candidates, key=lambda name: statistics.median(found[name]["seconds"]))
    finalists = [*job.keep, *[name for name in fastest if name not in job.keep][:2]]
    for number in range(3 * job.duel):
        if number == job.duel and not is_behind(finalists, found):
            break
        for name in in_turn(finalists, number):
            found[name]["again"].append(bench.measure(name)["seconds"])
    if dense:
        found["dense"] = {"cpu": [dense_cpu(job.tokens, job.heads) for _ in range(2)]}
    return found


def in_turn(names: list[str], number: int) -> list[str]:
    """Each begins a round once: under a CPU quota it matters who comes first."""
    at = number % len(names)
    return names[at:] + names[:at]


HOPELESS = 1.5
BEHIND = 1.02


def is_hopeless(job: Job, name: str, warm: dict[str, float]) -> bool:
    """Whether a candidate was so slow when it warmed up that it is not measured again; the first ones are."""
    return job.within is not None and name not in job.keep and warm[name] > HOPELESS * min(warm.values())


def is_behind(finalists: list[str], found: dict[str, dict[str, list]]) -> bool:
    """Whether the first of them is slower than another by more than what is measured often enough already."""
    first, *others = (middle(found[name]["again"]) for name in finalists)
    return first > BEHIND * min(others)


def running(job: Job, found: dict[str, dict[str, list]]) -> list[str]:
    """Candidates that are measured in the next round; the same on every rank, for all know the same seconds."""
    rounds = {name: times["seconds"] for name, times in found.items()}
    if job.within is None or not any(rounds.values()):
        return job.candidates
    if not all(rounds.values()):  # after warming up: all but the hopeless
        return [name for name in job.candidates if not rounds[name]]
    limit = job.within * min(map(statistics.median, rounds.values()))
    return [name for name in job.candidates if name in job.keep or min(rounds[name]) <= limit]


def main() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # buffers that nobody has filled must not cost more than real numbers
    with hdp.init(timeout=120) as world:
        found = [
            pairs(world, tuple(settings["choose"]), settings["lengths"])
            if "choose" in settings
            else run_job(settings, world)
            for settings in json.loads(sys.argv[1])
        ]
        if world.rank == 0:
            print(json.dumps(found))


if __name__ == "__main__":
    main()
