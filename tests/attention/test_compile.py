"""The operator under torch.compile, activation checkpointing and autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from harness import Ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hdp.attention import AttentionRuntime, Route, RouteShard, attend
from hdp.attention.channel import VirtualNetwork
from hdp.attention.checkpoint import keep_attention

CPU = torch.device("cpu")
HEADS, KEYS, DIM = 4, 2, 8


def make_route(lengths: list[int], runtime: AttentionRuntime | None = None) -> Route:
    runtime = runtime or AttentionRuntime(0, VirtualNetwork().channel(0), CPU)
    return Route(runtime, [RouteShard(sequence=i, length=n, group=(0,)) for i, n in enumerate(lengths)])


class Layer(nn.Module):
    """Projections around the operator."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = HEADS * DIM
        self.qkv = nn.Linear(width, (HEADS + 2 * KEYS) * DIM)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, route: Route) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (-1, DIM)).split((HEADS, KEYS, KEYS), dim=1)
        return x + self.out(torch.tanh(attend(q, k, v, route=route).flatten(1)))


def step(layer: nn.Module, x: Tensor, route: Route) -> list[Tensor]:
    layer.zero_grad()
    out = layer(x, route)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in layer.parameters())]


def test_the_operator_keeps_the_contract_of_custom_operators() -> None:
    route = make_route([5, 7])
    q, k, v = (torch.randn(12, n, DIM).requires_grad_() for n in (HEADS, KEYS, KEYS))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.hdp.attend.default, (q, k, v, route.handle, DIM**-0.5, True, 0, 0.0), test_utils=checks
    )


@pytest.mark.parametrize("dynamic", [None, True])
def test_no_graph_break_and_no_recompilation_for_a_new_batch(dynamic: bool | None) -> None:
    """``fullgraph`` forbids breaks; another route of as many tokens compiles nothing."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    layer = Layer()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    x = torch.randn(12, HEADS * DIM)
    for lengths in ([5, 7], [12], [1, 1, 10], [3, 3, 3, 3]):
        route = make_route(lengths)
        for mine, theirs in zip(step(compiled, x, route), step(layer, x, route), strict=True):
            torch.testing.assert_close(mine, theirs)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize(("dynamic", "sizes"), [(True, 1), (None, 2)])
def test_micro_batches_of_any_length_compile_nothing_new(dynamic: bool | None, sizes: int) -> None:
    """One graph for every number of tokens (two if dynamo has to find out that they vary), and one for a single token.

    That one is dynamo's: it always takes sizes 0 and 1 for constants. A rank without work runs two tokens, therefore.
    """
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    layer = Layer()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)

    def graphs(*batches: list[int]) -> int:
        for lengths in batches:
            x, route = torch.randn(sum(lengths), HEADS * DIM), make_route(lengths)
            for mine, theirs in zip(step(compiled, x, route), step(layer, x, route), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        return counters["stats"]["unique_graphs"]

    assert graphs([5, 7], [9, 11]) == sizes
    assert graphs([30], [2], [17, 4, 4], [64, 1], [0, 5], [90], [3]) == sizes
    assert graphs([1]) == sizes + 1
    assert graphs([8, 8], [1], [257], [1, 0], [12]) == sizes + 1
    assert not counters["graph_break"]


def recomputed(world: Any, keeps: bool) -> tuple[int, int, bool]:
    """Messages of forward and of backward with recomputation, and whether the gradients are the same."""
    layer, channel = Layer(), world.channel
    x = torch.randn(20, HEADS * DIM, generator=torch.Generator().manual_seed(world.rank))
    shard = RouteShard(sequence=0, length=40, group=(0, 1), schedule="ring", schedule_backward="ring")
    route = Route(world.runtime, [shard])
    plain = step(layer, x, route)
    begin = channel.messages
    contexts = {"context_fn": keep_attention} if keeps else {}
    layer.zero_grad()
    out = checkpoint(layer, x.requires_grad_(), route, use_reentrant=False, **contexts)
    forward = channel.messages - begin
    out.square().sum().backward()
    backward = channel.messages - begin - forward
    grads = [p.grad for p in layer.parameters()]
    same = all(torch.equal(a, b) for a, b in zip(plain[1:], grads, strict=True))
    return forward, backward, same


def test_recomputation_sends_nothing(ranks: Callable[[int], Ranks]) -> None:
    for forward, backward, same in ranks(2).run(recomputed, True):
        assert same and forward > 0
        kept = backward
    for forward, backward, same in ranks(2).run(recomputed, False):
        assert same
        assert backward == kept + forward  # without the policy forward is sent once more


def test_bf16_autocast() -> None:
    layer, route = Layer(), make_route([5, 7])
    x = torch.randn(12, HEADS * DIM)
    with torch.autocast("cpu", torch.bfloat16):
        mine = step(layer, x, route)
    for a, b in zip(mine, step(layer, x, route), strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert (a - b).norm() <= 2e-2 * b.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[:5], k[:5], v[:5]), "has 5 tokens but this rank's part of the micro-batch has 12"),
        (lambda q, k, v: (q, k.double(), v), "q, k, v must have one dtype"),
        (lambda q, k, v: (q, k[:, :, :4], v[:, :, :4]), "attend takes q"),
        (lambda q, k, v: (q[:, :3], k, v), "3 query heads over 2 key/value heads"),
    ],
)
def test_wrong_tensors_are_refused(change: Any, message: str) -> None:
    tensors = [torch.randn(12, n, DIM) for n in (HEADS, KEYS, KEYS)]
    with pytest.raises(ValueError, match=message):
        attend(*change(*tensors), route=make_route([5, 7]))


def test_a_route_that_is_gone_says_so() -> None:
    route = make_route([12])
    q, k, v = (torch.randn(12, n, DIM).requires_grad_() for n in (HEADS, KEYS, KEYS))
    out = attend(q, k, v, route=route)
    del route
    with pytest.raises(RuntimeError, match="keep the route of a micro-batch until its backward is over"):
        out.sum().backward()
