"""Two towers over one sequence, two calls of one route: backward is that of the same call on every rank, or an error."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist
from harness import Ranks
from test_op import DIM, cut, dense, whole
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import hdp
import hdp.parallel.order
from hdp.attention.calls import Calls, describe
from hdp.attention.route import Route, RouteShard

LENGTH, GROUP = 24, (0, 1)
SCALE = DIM**-0.5


def tower(q: Tensor, k: Tensor, v: Tensor, route: Route) -> Tensor:
    return double(hdp.attend(q, k * 1, v, route=route))


def double(out: Tensor) -> Tensor:
    """What comes after attention: something that saves its input."""
    return out * out.detach().cos().add(2).square()


in_graphs = torch.compile(tower, backend="aot_eager", fullgraph=True)

WAYS: dict[str, Callable[..., Tensor]] = {
    "plain": tower,
    "keep": partial(checkpoint, tower, use_reentrant=False, context_fn=hdp.keep_attention),
    "recompute": partial(checkpoint, tower, use_reentrant=False),
    "reentrant": partial(checkpoint, tower, use_reentrant=True),
    "compiled": in_graphs,
    "compiled and recomputed": partial(checkpoint, in_graphs, use_reentrant=False),
}
RECOMPUTE = ("recompute", "reentrant", "compiled and recomputed")


def towers(world: hdp.World, way: str, walk: dict[int, str], grouped: bool = False) -> list[list[Tensor | None]]:
    """dq, dk, dv of both towers after the backward passes of ``walk``: "ab" is the first, then the second."""
    world.channel._grouped, world.channel.can_ask = grouped, not grouped
    route = Route(world.runtime, [RouteShard(sequence=2, length=LENGTH, group=GROUP, schedule="ring")], serial=(3, 0))
    compile_first(world, way)
    leaves, outs, dos = {}, {}, {}
    for seed, name in enumerate("ab"):
        *mine, dos[name] = (cut(t, LENGTH, GROUP, world.rank) for t in whole(LENGTH, seed))
        leaves[name] = [t.requires_grad_() for t in mine]
        outs[name] = WAYS[way](*leaves[name], route)
    with world.guard.watch("step 3, slot 0, backward"):
        for i, name in enumerate(walk[world.rank]):
            outs[name].backward(dos[name], retain_graph=name in walk[world.rank][i + 1 :])
        if grouped:
            hdp.parallel.order.check_calls(world, [route], "step 3")
    return [[t.grad for t in leaves[name]] for name in "ab"]


def compile_first(world: hdp.World, way: str) -> None:
    """On each rank alone, and to the end, so that nobody waits for a compiler."""
    route = Route(world.runtime, [RouteShard(sequence=0, length=LENGTH // 2, group=(world.rank,))])
    tensors = [t[: LENGTH // 2].requires_grad_() for t in whole(LENGTH, 0)[:3]]
    WAYS[way](*tensors, route).sum().backward()
    dist.barrier(group=world.control)


def exact(walk: str) -> list[list[Tensor]]:
    """The gradients of whole sequences in float64, nan where there is none."""
    found = []
    for seed, name in enumerate("ab"):
        *mine, do = whole(LENGTH, seed)
        leaves = [t.requires_grad_() for t in mine]
        (double(dense(*leaves, SCALE, True, None)) * do).sum().backward()
        times = walk.count(name) or float("nan")
        found.append([t.grad * times for t in leaves])
    return found


def check(found: list[list[list[Tensor | None]]], walk: str) -> None:
    for rank, towers_ in enumerate(found):
        for mine, want in zip(towers_, exact(walk), strict=True):
            for gradient, whole_ in zip(mine, want, strict=True):
                if bool(whole_.isnan().any()):
                    assert gradient is None
                else:
                    theirs = cut(whole_, LENGTH, GROUP, rank)
                    assert gradient is not None
                    assert float((gradient - theirs).norm() / theirs.norm()) < 1e-12


@pytest.mark.parametrize("walk", ["ab", "ba", "a", "b"])
@pytest.mark.parametrize("way", WAYS)
def test_any_order_that_all_ranks_have_in_common(ranks, way, walk):
    """Forward order too, and a branch that all ranks leave out."""
    check(ranks(2).run(towers, way, {0: walk, 1: walk}), walk)


@pytest.mark.parametrize("way", ["plain", "recompute"])
def test_a_graph_that_is_walked_again(ranks, way):
    check(ranks(2).run(towers, way, {0: "abba", 1: "abba"}), "abba")


@pytest.mark.parametrize("way", WAYS)
def test_messages_are_told_apart_by_call_where_no_tag_does(ranks, way):
    check(ranks(2).run(towers, way, {0: "ba", 1: "ba"}, True), "ba")


@pytest.mark.parametrize("way", WAYS)
def test_ranks_in_different_calls_end_in_an_error_that_names_both(way):
    """What a rank runs again it runs first: it is there that they wait for each other."""
    with Ranks(2, timeout=5.0) as two:
        outcomes = two.outcomes(towers, way, {0: "ab", 1: "ba"})
    direction, again = ("forward", ", recomputed") if way in RECOMPUTE else ("backward", "")
    for outcome, mine, theirs in zip(outcomes, (0, 1), (1, 0), strict=True):
        assert outcome.error is not None, outcome
        place = f"in {direction} of attention call {mine}{again} of micro-batch (3, 0)"
        other = f"in {direction} of attention call {theirs}{again} of micro-batch (3, 0)"
        assert outcome.error.startswith(f"PeerError: rank {mine}, step 3, slot 0, backward: receiving "), outcome
        assert f" of sequence 2 from rank {theirs} {place} failed: " in outcome.error, outcome
        assert outcome.error.endswith(f"; meanwhile rank {theirs} at: step 3, slot 0, backward, {other}"), outcome


def test_a_branch_that_one_rank_leaves_out_ends_in_an_error():
    with Ranks(2, timeout=5.0) as two:
        first, second = two.outcomes(towers, "plain", {0: "ba", 1: "a"})
    assert "from rank 1 in backward of attention call 1 " in str(first.error), first
    assert "from rank 0 in backward of attention call 0 " in str(second.error), second


def refused(world: hdp.World, way: str, walk: dict[int, str]) -> str:
    try:
        towers(world, way, walk, grouped=True)
    except hdp.CallMismatch as error:
        return str(error)
    return "nobody noticed"


OTHERS = [(way, walks) for way in WAYS for walks in (("ab", "ba"), ("a", "b"))]


@pytest.mark.parametrize(("way", "walks"), [*OTHERS, ("plain", ("aab", "abb")), ("recompute", ("aab", "abb"))], ids=str)
def test_where_no_tag_tells_messages_apart_it_is_found_at_the_end(ranks, way, walks):
    """As on NCCL: every message is taken for the one that is due."""
    for text in ranks(2).run(refused, way, dict(enumerate(walks))):
        assert text.startswith("step 3: ranks ran the attention of what they share in different orders"), text
        assert "sequence 2 (micro-batch (3, 0)): rank 0 ran " in text
        assert "of attention call 0" in text and "of attention call 1" in text


# ------------------------------------------------------------ one rank, no processes


def test_names_of_calls_in_words():
    calls = Calls()
    assert [calls.begin() for _ in range(3)] == [0, 1, 2]
    calls.begin_backward(1)
    assert list(calls.order) == [0, 2, 4, 3]
    assert describe(3, True) == "backward of attention call 3"
    assert describe(5 << 32, False) == "forward of attention call 3, recomputed"
    assert describe((5 << 32) + 1, True) == "backward of attention call 3, recomputed (1 more before it)"
    assert describe(1 << 32, False) == "forward of an attention call inside a backward pass"


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_what_runs_again_is_named_alike_in_whatever_order(use_reentrant, size, order):
    """Three checkpoints of some calls each; by region, whichever is walked first."""
    names: dict[int, list[int]] = {}

    def walk(order: tuple[int, ...]) -> dict[int, list[int]]:
        calls, seen, now = Calls(), {}, [-1]

        def region(x: Tensor) -> Tensor:
            for _ in range(size):
                x = x.sin() * 2
                seen.setdefault(now[0], []).append(calls.begin())
            return x.cos()

        x = torch.ones(2, requires_grad=True)
        outs = [checkpoint(region, x, use_reentrant=use_reentrant) for _ in range(3)]
        assert seen.pop(-1) == list(range(3 * size))
        for now[0] in order:
            outs[now[0]].sum().backward()
        return seen

    names = walk((0, 1, 2))
    assert walk(order) == names
    assert len({name for found in names.values() for name in found}) == 3 * size
