"""Programs on real ranks over gloo: a covering subset of ``test_matrix``, with delays and grouped calls."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import HEAD_DIM, HEADS, MASKS, SCORING, mixed
from virtual import make_data

from hdp.attention import AttentionRuntime, Route, RouteShard, attend
from hdp.attention.channel import VirtualNetwork
from hdp.attention.counts import Sizes, count
from hdp.attention.layout import make_layout
from hdp.attention.mask import Mask
from hdp.attention.schedules import get_schedule, lay_out


class Slow:
    """A channel whose transfers are late: posts, and each wait for one, by times of their own."""

    def __init__(self, channel: Any, seed: int) -> None:
        self._channel, self._draw = channel, random.Random(seed)

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._channel, name)
        if name not in ("post", "wait_receives", "wait_late", "wait_sends"):
            return attribute

        def late(*arguments: Any) -> Any:
            time.sleep(self._draw.random() * 0.005)
            return attribute(*arguments)

        return late


def grouped(channel: Any) -> Any:
    """The channel as on NCCL: one grouped call a round and lane, no tags, nothing can be asked."""
    twin = copy.copy(channel)
    twin._grouped, twin.can_ask = True, False
    return twin


def on_real_ranks(
    world: Any, name: str, heads_name: str, mask_name: str, how: str, dtype: torch.dtype = torch.float32
) -> tuple[dict, list, bool]:
    """Errors of this rank's rows, their bits, and whether it sent the bytes that the programs count."""
    (mask, layout), heads = MASKS[mask_name], HEADS[heads_name]
    sequences = mixed(name, random.Random(f"{name} {heads_name}"), world.world_size, layout)
    data = make_data([s.length for s in sequences], heads, HEAD_DIM, mask, SCORING, dtype, seed=4)
    channel = {"prompt": copy.copy, "delayed": lambda c: Slow(c, world.rank), "grouped": grouped}[how](world.channel)
    runtime = AttentionRuntime(world.rank, channel, world.device, "cpu")
    mine = [(i, s) for i, s in enumerate(sequences) if world.rank in s.group]
    route = Route(runtime, [s.shard(i) for i, s in mine], serial=(1, 2))

    def rows(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([tensors[i][a:b] for i, s in mine for a, b in s.ranges(world.rank)] or [tensors[0][:0]])

    q, k, v, do = (rows([getattr(d, n) for d in data]).to(dtype) for n in ("q", "k", "v", "do"))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    before = channel.sent_bytes
    out = attend(*leaves, route=route, causal=mask.causal, window=mask.window)
    out.backward(do)
    sent = channel.sent_bytes - before
    sizes, expected = Sizes(head_dim=HEAD_DIM, model_bytes=dtype.itemsize), 0
    for _, s in mine:
        laid, schedule = (
            lay_out(make_layout(layout, s.length, len(s.group)), mask, s.schedule),
            get_schedule(s.schedule),
        )
        member = s.group.index(world.rank)
        for make, backward in ((schedule.forward, False), (schedule.backward, True)):
            program = make(laid, mask, heads, member)
            expected += count(program, laid, mask, heads, member, sizes, backward).sent_bytes
    results = {"out": out.detach(), **{f"d{n}": t.grad for n, t in zip("qkv", leaves, strict=True)}}
    errors = {}
    for what, result in results.items():
        want = rows([getattr(d, what) for d in data])
        errors[what] = ((result.double() - want).norm() / want.norm()).item()
    if dtype != torch.float32:  # over those of the same rows, computed whole on one rank
        single = alone(data, mask, dtype)
        for what, result in single.items():
            want = rows([getattr(d, what) for d in data])
            errors[what] /= ((rows(result).double() - want).norm() / want.norm()).item()
    return errors, [r.tolist() for r in results.values()], sent == expected


def alone(data: list[Any], mask: Mask, dtype: torch.dtype) -> dict[str, list[torch.Tensor]]:
    """out, dq, dk, dv of every sequence, whole on one rank."""
    runtime = AttentionRuntime(0, VirtualNetwork().channel(0), torch.device("cpu"), "cpu")
    lengths = [len(d.q) for d in data]
    route = Route(runtime, [RouteShard(sequence=i, length=n, group=(0,)) for i, n in enumerate(lengths)])
    q, k, v, do = (torch.cat([getattr(d, n) for d in data]).to(dtype) for n in ("q", "k", "v", "do"))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = attend(*leaves, route=route, causal=mask.causal, window=mask.window)
    out.backward(do)
    results = {"out": out.detach(), **{f"d{n}": t.grad for n, t in zip("qkv", leaves, strict=True)}}
    return {what: list(result.split(lengths)) for what, result in results.items()}


REAL = (
    *(
        ("ring", "gqa3", "causal"),
        ("ring_q", "mha", "causal"),
        ("token_ring", "mha", "window"),
        ("direct", "gqa8", "window"),
    ),
    *(("all_gather:2", "gqa3", "bidirectional"), ("ulysses:2", "mqa", "causal"), ("hybrid:2", "gqa3", "striped")),
    *(
        ("double_ring:2", "mha", "window_both_ways"),
        ("ulysses_home", "mha", "causal"),
        ("ulysses_home:2", "gqa3", "window"),
    ),
)
FIVE = (("ring", "gqa3", "causal"), ("token_ring", "mha", "striped"), ("ulysses_home", "mqa", "causal"))
BF16 = (("ring", "mha", "causal"), ("ulysses_home", "gqa3", "causal"), ("direct", "mqa", "window"))


@pytest.mark.parametrize(("name", "heads_name", "mask_name"), REAL)
def test_on_real_ranks(ranks: Callable[[int], Any], name: str, heads_name: str, mask_name: str) -> None:
    """Exact, the bytes of the closed forms; delays and NCCL's grouped calls change not a bit."""
    prompt, delayed, nccl = (
        ranks(4).run(on_real_ranks, name, heads_name, mask_name, how) for how in ("prompt", "delayed", "grouped")
    )
    for (errors, bits, sent), *others in zip(prompt, delayed, nccl, strict=True):
        assert max(errors.values()) <= 1e-5
        assert sent, "bytes on the wire are not those of the programs"
        for _, other, same in others:
            assert same and other == bits


@pytest.mark.parametrize(("name", "heads_name", "mask_name"), FIVE)
def test_groups_of_up_to_five(ranks: Callable[[int], Any], name: str, heads_name: str, mask_name: str) -> None:
    """A size that no head count here divides, in one micro-batch with smaller groups."""
    for errors, _, sent in ranks(5).run(on_real_ranks, name, heads_name, mask_name, "prompt"):
        assert max(errors.values()) <= 1e-5 and sent


@pytest.mark.parametrize(("name", "heads_name", "mask_name"), BF16)
def test_bf16(ranks: Callable[[int], Any], name: str, heads_name: str, mask_name: str) -> None:
    """At most 1.5 times the error of one rank in bf16."""
    for errors, _, sent in ranks(4).run(on_real_ranks, name, heads_name, mask_name, "prompt", torch.bfloat16):
        assert max(errors.values()) <= 1.5 and sent
