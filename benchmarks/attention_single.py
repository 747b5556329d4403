"""One process of ``benchmarks/attention.py``: what Python costs a step, and what a whole sequence costs beside plain SDPA.

Prints one JSON object.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from attention_worker import DIM, QuietChannel
from torch import Tensor

from hdp.attention import AttentionRuntime, Route, RouteShard, attend
from hdp.attention.backends import Scoring
from hdp.attention.backends.cpu import CpuBackend
from hdp.attention.backends.protocol import Cuts
from hdp.attention.executor import Executor
from hdp.attention.mask import Mask, Shape
from hdp.attention.program import HeadCount
from hdp.attention.route import LayerKey

CPU = torch.device("cpu")


class NullBackend(CpuBackend):
    """Takes what the CPU's backend takes, and computes nothing."""

    def __init__(self, rows: int, heads: int, dim: int) -> None:
        self.out, self.lse = torch.zeros(1, heads, rows, dim), torch.zeros(1, heads, rows)

    def launch(
        self, inputs: Sequence[Sequence[Tensor]], shape: Shape, scoring: Scoring, cuts: Sequence[Cuts | None]
    ) -> list[Tensor]:
        results: list[Tensor] = []
        for q, k, _, *rest in zip(*inputs, strict=True):
            of_queries, of_keys = self.out[:, :, : q.shape[2]], self.out[:, :, : k.shape[2]]
            results += (of_queries, of_keys, of_keys) if rest else (of_queries, self.lse[:, :, : q.shape[2]])
        return results


def step_microseconds(schedule: str, size: int) -> dict[str, float]:
    """Median microseconds a program step: run forward, run backward, lower and bind (schedule included)."""
    heads, dim, tokens = 8, 8, 4 * size
    backend = NullBackend(tokens, heads, dim)
    runtime = AttentionRuntime(size // 2, QuietChannel(), CPU, "cpu")
    executor = Executor(backend, QuietChannel())
    shard = RouteShard(
        sequence=0, length=tokens, group=tuple(range(size)), schedule=schedule, schedule_backward=schedule
    )
    key = LayerKey(heads=HeadCount(query=heads, key=heads), head_dim=dim, dtype=torch.float32, mask=Mask())
    found: dict[str, float] = {}
    lowering = []
    for _ in range(5):
        route = Route(runtime, [shard])
        begin = time.thread_time()
        programs = [route.program(key, backward) for backward in (False, True)]
        lowering.append((time.thread_time() - begin) / sum(len(p.rounds) for p in programs) * 1e6)
    found["lower"] = statistics.median(lowering)
    rows = route.tokens
    wide, narrow = (torch.zeros(rows, heads, dim) for _ in range(2))
    lse = torch.zeros(rows, heads)
    for program, name in zip(programs, ("forward", "backward"), strict=True):
        kept = torch.empty(program.lowered.kept_bytes, dtype=torch.uint8)
        tensors = [lse if n in ("lse", "delta") else wide if n in "kv" else narrow for n in program.lowered.externals]

        def once() -> None:
            for _ in executor.run(program, program.bind(tensors, kept), Scoring(1.0), (1, 2, 3)):  # noqa: B023
                pass

        found[name] = seconds(once, 50) / len(program.rounds) * 1e6
    return found


def seconds(once: Callable[[], None], rounds: int) -> float:
    """Median seconds."""
    times = []
    for _ in range(rounds):
        begin = time.thread_time()
        once()
        times.append(time.thread_time() - begin)
    return statistics.median(times)


def local_overhead(lengths: list[int], heads: tuple[int, int], rounds: int) -> dict[str, float]:
    """Seconds of forward and backward of packed sequences: the operator, and plain SDPA for each sequence, in turn."""
    rows = sum(lengths)
    q, k, v = (torch.randn(rows, n, DIM).requires_grad_() for n in (heads[0], heads[1], heads[1]))
    do = torch.randn(rows, heads[0], DIM)
    runtime = AttentionRuntime(0, QuietChannel(), CPU, "cpu")
    route = Route(runtime, [RouteShard(sequence=i, length=n, group=(0,)) for i, n in enumerate(lengths)])

    def operator() -> None:
        attend(q, k, v, route=route).backward(do)
        q.grad = k.grad = v.grad = None

    def plain() -> None:
        parts = zip(*(t.split(lengths) for t in (q, k, v)), strict=True)
        outs = [
            F.scaled_dot_product_attention(
                *(t.transpose(0, 1).unsqueeze(0) for t in part), is_causal=True, enable_gqa=heads[0] != heads[1]
            )[0].transpose(0, 1)
            for part in parts
        ]
        torch.cat(outs).backward(do)
        q.grad = k.grad = v.grad = None

    times: dict[str, list[float]] = {"operator": [], "plain": []}
    for number in range(rounds + 1):
        for name, once in (("operator", operator), ("plain", plain)):
            begin = time.process_time()
            once()
            if number:
                times[name].append(time.process_time() - begin)
    ratios = [a / b - 1 for a, b in zip(times["operator"], times["plain"], strict=True)]
    return {"overhead": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def main() -> None:
    torch.set_num_threads(1)
    steps = {f"{s} of {n}": step_microseconds(s, n) for s in ("ring", "token_ring", "direct") for n in (4, 16, 64)}
    cases = {
        "6 x 1024, 8:8 heads": ([1024] * 6, (8, 8)),
        "6 x 1024, 8:2 heads": ([1024] * 6, (8, 2)),
        "1024 + 2048 + 4096, 8:2 heads": ([1024, 2048, 4096], (8, 2)),
    }
    local = {name: local_overhead(lengths, heads, 7) for name, (lengths, heads) in cases.items()}
    print(json.dumps({"steps": steps, "local": local}))


if __name__ == "__main__":
    main()
