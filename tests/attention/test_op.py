"""The attention operator on real ranks: against dense attention in float64, under hooks, checkpointing and its own checks."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import hdp
from hdp.attention.channel import VirtualNetwork
from hdp.attention.layout import make_layout
from hdp.attention.route import AttentionRuntime, Route, RouteShard

HEADS, KEY_HEADS, DIM = 4, 2, 8
SEQUENCES = [(45, (0, 1, 2)), (20, (2, 0)), (7, (1,)), (13, (2,))]  # length, group


def whole(length: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, do of one sequence, [tokens, heads, head_dim]."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(length, heads, DIM, dtype=torch.float64, generator=generator)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    )  # type: ignore[return-value]


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int | None) -> Tensor:
    at = torch.arange(len(q))
    distance = at[:, None] - at[None]
    allowed = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        allowed &= distance >= 0
    if window is not None:
        allowed &= distance.abs() < window
    k, v = (t.repeat_interleave(HEADS // KEY_HEADS, 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, float("-inf")).softmax(-1), v)


def ranges(length: int, group: tuple[int, ...], rank: int, layout: str = "zigzag") -> Any:
    return make_layout(layout, length, len(group)).shard_ranges(group.index(rank))


def cut(tensor: Tensor, length: int, group: tuple[int, ...], rank: int) -> Tensor:
    return torch.cat([tensor[:0], *(tensor[start:stop] for start, stop in ranges(length, group, rank))])


def route_of(world: hdp.World, schedule: str = "ring") -> Route:
    shards = [
        RouteShard(
            sequence=i,
            length=length,
            group=group,
            schedule=schedule if len(group) > 1 else "local",
            schedule_backward=schedule if len(group) > 1 else "local",
        )
        for i, (length, group) in enumerate(SEQUENCES)
        if world.rank in group
    ]
    return Route(world.runtime, shards)


def packed(world: hdp.World, dtype: torch.dtype) -> list[Tensor]:
    """This rank's q, k, v, do."""
    parts = [
        [cut(tensor, length, group, world.rank) for tensor in whole(length, i)]
        for i, (length, group) in enumerate(SEQUENCES)
        if world.rank in group
    ]
    return [torch.cat(tensors).to(dtype) for tensors in zip(*parts, strict=True)]


def run(world: hdp.World, dtype: torch.dtype, schedule: str, options: dict) -> tuple[Tensor, ...]:
    q, k, v, do = packed(world, dtype)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    route = route_of(world, schedule)  # lives until backward is over
    out = hdp.attend(*leaves, route=route, **options)
    out.backward(do)
    return (out.detach(), *(t.grad for t in leaves))


OPTIONS = [
    {},
    {"scale": 0.7},
    {"causal": False},
    {"window": 6},
    {"window": 9, "causal": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=str)
def test_out_and_gradients_over_three_ranks(ranks, dtype, limit, options):
    found = ranks(3).run(run, dtype, "ring", options)
    fields = {"scale": DIM**-0.5, "causal": True, "window": None, **options}
    expected: list[list[list[Tensor]]] = [[], [], []]
    for i, (length, group) in enumerate(SEQUENCES):
        q, k, v, do = whole(length, i)
        leaves = [t.requires_grad_() for t in (q, k, v)]
        out = dense(*leaves, **fields)
        out.backward(do)
        for rank in group:
            expected[rank].append([cut(t, length, group, rank) for t in (out.detach(), *(t.grad for t in leaves))])
    for rank in range(3):
        for ours, parts in zip(found[rank], zip(*expected[rank], strict=True), strict=True):
            theirs = torch.cat(parts)
            assert ours.dtype == dtype
            assert float((ours.double() - theirs).norm() / theirs.norm()) < limit


def recompute(world: hdp.World, keep: bool) -> tuple[bool, int, int, int]:
    """Bytes sent by a forward and backward: plain, and with the layer recomputed in backward."""
    operation = torch.ops.hdp.attend.default

    def policy(_: Any, called: Any, *__: Any, **___: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if called is operation else CheckpointPolicy.PREFER_RECOMPUTE

    def layer(q: Tensor, k: Tensor, v: Tensor, route: Route) -> Tensor:
        return hdp.attend(q * 2, k.sin(), v, route=route).sin()

    contexts = partial(create_selective_checkpoint_contexts, policy)
    sent, grads = [], []
    for wrapped in (False, True):
        q, k, v, do = packed(world, torch.float32)
        leaves = [t.requires_grad_() for t in (q, k, v)]
        before, route = world.channel.sent_bytes, route_of(world)
        if wrapped:
            options = {"context_fn": contexts} if keep else {}
            out = checkpoint(layer, *leaves, route, use_reentrant=False, **options)
        else:
            out = layer(*leaves, route)
        forward = world.channel.sent_bytes - before
        out.backward(do)
        sent.append(world.channel.sent_bytes - before)
        grads.append([t.grad for t in leaves])
    same = all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    return same, forward, sent[0], sent[1]


@pytest.mark.parametrize("keep", [True, False])
def test_recomputation_sends_nothing_if_outputs_are_kept(ranks, keep):
    for same, forward, plain, recomputed in ranks(3).run(recompute, keep):
        assert same and forward > 0
        assert recomputed == (plain if keep else plain + forward)


def saved(world: hdp.World) -> tuple[bool, set[tuple[int, ...]]]:
    """Whether gradients survive that every saved tensor is moved away and back, and the shapes that were saved."""
    shapes: set[tuple[int, ...]] = set()

    def pack(tensor: Tensor) -> Tensor:
        shapes.add(tuple(tensor.shape))
        return tensor.clone()

    results = []
    for hooked in (False, True):
        q, k, v, do = packed(world, torch.float32)
        leaves = [t.requires_grad_() for t in (q, k, v)]
        route = route_of(world)
        if hooked:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor.clone()):
                out = hdp.attend(*leaves, route=route)
        else:
            out = hdp.attend(*leaves, route=route)
        out.backward(do)
        results.append([t.grad for t in leaves])
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True)), shapes


def test_hooks_see_all_that_is_saved(ranks):
    for rank, (same, shapes) in enumerate(ranks(3).run(saved)):
        tokens = sum(
            stop - start for length, group in SEQUENCES if rank in group for start, stop in ranges(length, group, rank)
        )
        assert same
        assert {(tokens, HEADS, DIM), (tokens, KEY_HEADS, DIM), (tokens, HEADS)} <= shapes  # q and out, k and v, lse


# ------------------------------------------------------------ one rank, no processes


def alone(length: int = 10) -> Route:
    runtime = AttentionRuntime(0, VirtualNetwork().channel(0), torch.device("cpu"))
    return Route(runtime, [RouteShard(sequence=0, length=length, group=(0,))])


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


REFUSED = {
    "q has 9 tokens": (tensor(9, 4, 8), tensor(9, 2, 8), tensor(9, 2, 8)),
    "attend takes q": (tensor(1, 10, 4, 8), tensor(10, 2, 8), tensor(10, 2, 8)),
    "must have one dtype": (tensor(10, 4, 8), tensor(10, 2, 8), tensor(10, 2, 8, dtype=torch.float64)),
    "3.*2|divide|multiple": (tensor(10, 3, 8), tensor(10, 2, 8), tensor(10, 2, 8)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_shapes_that_do_not_fit_are_refused(message):
    with pytest.raises(ValueError, match=message):
        hdp.attend(*REFUSED[message], route=alone())


def test_a_route_that_is_gone_is_an_error_not_a_crash():
    q, k = tensor(10, 4, 8).requires_grad_(), tensor(10, 2, 8)
    route = alone()
    out = hdp.attend(q, k, k, route=route)
    del route
    with pytest.raises(RuntimeError, match="keep the route of a micro-batch until its backward is over"):
        out.sum().backward()


def test_a_route_without_sequences_gives_nothing_back():
    runtime = AttentionRuntime(0, VirtualNetwork().channel(0), torch.device("cpu"))
    route = Route(runtime, [])
    q, k, v = (torch.zeros(0, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    out = hdp.attention.attend(q, k, v, route=route)
    out.sum().backward()
    assert out.shape == q.shape
    assert all(t.grad is not None and t.grad.shape == t.shape for t in (q, k, v))


def test_a_group_that_does_not_hold_this_rank_is_refused():
    runtime = AttentionRuntime(0, VirtualNetwork().channel(0), torch.device("cpu"))
    with pytest.raises(ValueError):
        hdp.attend(
            *(tensor(10, 2, 8),) * 3,
            route=Route(runtime, [RouteShard(sequence=0, length=10, group=(1, 2), schedule="ring")]),
        )


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="unknown attention backend 'magic'"):
        AttentionRuntime(0, VirtualNetwork().channel(0), torch.device("cpu"), backend="magic")
