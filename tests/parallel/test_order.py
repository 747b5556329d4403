"""Ranks that walk different attention calls backward: noticed before a gradient is used, on backends without tags as well."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import full_gradients, make_engine, make_model
from harness import Ranks
from test_between_steps import FIRST, SECOND, batch_of, held, made, same, sum_of
from tiny import gradient_errors, make_documents
from torch import nn

import hdp
from hdp.parallel.order import PRIME, CallOrder


class Twice(nn.Module):
    """Runs a model twice and gives back one of both outputs, so that the other pass is walked by nobody."""

    def __init__(self) -> None:
        super().__init__()
        hdp.register_attention()
        self.inner = make_model()
        self.config = self.inner.config
        self._no_split_modules = self.inner._no_split_modules
        self.which = 0

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.lm_head

    def forward(self, **keywords: Any) -> Any:
        return [self.inner(**keywords) for _ in range(2)][self.which]


def step_apart(world: hdp.World, name: str) -> Any:
    """As on NCCL. The error of a step in which each rank walks another pass, whether gradients are as they were before it, and
    those after a step more."""
    world.channel._grouped, world.channel.can_ask = True, False
    engine = made(world, name, Twice())
    engine.forward_backward(batch_of(world, engine, FIRST))
    before = held(engine)
    engine.model.which = world.rank
    with pytest.raises(hdp.CallMismatch) as error:
        engine.forward_backward(batch_of(world, engine, SECOND))
    engine.model.which = 0
    unchanged = same(before, held(engine))
    engine.forward_backward(batch_of(world, engine, SECOND))
    return str(error.value), unchanged, full_gradients(engine)


@pytest.mark.parametrize("name", ["fsdp-step", "fsdp-slot", "fsdp-step, streams", "ddp"])
def test_a_step_in_which_ranks_walk_different_calls_leaves_no_gradients(ranks, name):
    exact = sum_of(FIRST, SECOND)
    exact = {f"inner.{key}": gradient for key, gradient in exact.items()}
    for text, unchanged, gradients in ranks(2).run(step_apart, name):
        assert text.startswith("step 0: ranks ran the attention of what they share in different orders"), text
        assert "rank 0 ran backward of attention call 1 where rank 1 ran backward of attention call 3" in text
        assert unchanged
        errors = gradient_errors(gradients, exact)
        assert max(errors.values()) <= 1e-5, errors


def refused(world: hdp.World, name: str) -> str:
    world.channel._grouped, world.channel.can_ask = True, False
    engine = make_engine(world, name, Twice())
    engine.model.which = world.rank
    with pytest.raises(hdp.CallMismatch) as error:
        engine.forward_backward(batch_of(world, engine, FIRST + SECOND))
    return str(error.value)


def test_deepspeed_notices_as_well(ranks):
    assert all("rank 1 ran backward of attention call 3" in text for text in ranks(2).run(refused, "zero1"))


def apart(world: hdp.World) -> None:
    engine = make_engine(world, "fsdp-step", Twice())
    engine.model.which = world.rank
    engine.forward_backward(batch_of(world, engine, FIRST + SECOND))


def test_where_messages_have_tags_the_error_names_both_calls():
    with Ranks(2, timeout=4.0) as two:
        outcomes = two.outcomes(apart)
    for outcome, mine, theirs in zip(outcomes, (1, 3), (3, 1), strict=True):
        text = outcome.error
        assert text.startswith(f"PeerError: rank {outcome.rank}, step 0, slot "), outcome
        assert f" from rank {1 - outcome.rank} in backward of attention call {mine} of micro-batch (0, " in text, (
            outcome
        )
        assert f"; meanwhile rank {1 - outcome.rank} at: step 0, slot " in text, outcome
        assert f"in backward of attention call {theirs} of micro-batch (0, " in text.rpartition("meanwhile")[2], outcome


def evaluate_apart(world: hdp.World) -> tuple[float, str]:
    """One rank notes a call more, as of one in which it only sends."""
    engine = make_engine(world, "fsdp-step", make_model())
    documents = make_documents([100, 30, 64])
    loss = engine.evaluate(documents, capacity=64)

    def once_more(module: nn.Module, inputs: tuple, keywords: dict, output: Any) -> None:
        keywords["hdp_route"].calls.begin()

    if world.rank == 1:
        engine.model.register_forward_hook(once_more, with_kwargs=True)
    with pytest.raises(hdp.CallMismatch) as error:
        engine.evaluate(documents, capacity=64)
    return loss, str(error.value)


def test_evaluation_notices(ranks):
    for loss, text in ranks(2).run(evaluate_apart):
        assert loss > 0 and text.startswith("evaluation, batch 0: ") and "nothing more" in text, text


# ------------------------------------------------------------ the sum, without processes


def account(rank: int, micro_batches: Sequence[dict[int, tuple[int, ...]]], orders: Sequence[list[int]]) -> float:
    """What a rank counts; per micro-batch the group of each sequence, and this rank's calls."""
    order = CallOrder(rank)
    for slot, (groups, calls) in enumerate(zip(micro_batches, orders, strict=True)):
        shards = [SimpleNamespace(sequence=s, group=g) for s, g in groups.items() if rank in g]
        order.add(SimpleNamespace(serial=(4, slot), shards=shards, calls=SimpleNamespace(order=array("q", calls))))
    return order.number()


def total(numbers: list[float]) -> int:
    return sum(map(int, numbers)) % PRIME


@pytest.mark.parametrize("seed", range(20))
def test_the_sum_is_zero_for_one_order_and_for_no_other(seed):
    draw = random.Random(seed)
    world = draw.randint(2, 9)
    batches, sequence = [], 0
    for _ in range(draw.randint(1, 3)):
        groups = {}
        for _ in range(draw.randint(1, 6)):
            groups[sequence] = tuple(draw.sample(range(world), draw.randint(2, world)))
            sequence += 1
        batches.append(groups)
    calls = [[draw.randrange(200) for _ in range(draw.randint(2, 30))] for _ in batches]
    numbers = [account(rank, batches, calls) for rank in range(world)]
    assert total(numbers) == 0 and all(0 <= n < PRIME and float(int(n)) == n for n in numbers)
    assert torch.tensor(numbers, dtype=torch.float64).tolist() == numbers
    slot = draw.randrange(len(batches))
    group = draw.choice(list(batches[slot].values()))
    for change in (
        lambda c: c[::-1] if c[::-1] != c else [*c, 1],
        lambda c: c[:-1],
        lambda c: [*c, 0],
        lambda c: [c[0] ^ 1, *c[1:]],
    ):
        others = [list(c) for c in calls]
        others[slot] = change(others[slot])
        for rank in group[:2]:
            mixed = list(numbers)
            mixed[rank] = account(rank, batches, others)
            assert total(mixed) != 0


def test_sequences_that_lie_in_one_micro_batch_do_not_cancel():
    """Each rank is the first sharer of one: what is added for the one is not what is taken off for the other."""
    groups = [{1: (0, 1), 2: (1, 0)}]
    assert total([account(0, groups, [[0, 2, 1, 3]]), account(1, groups, [[0, 2, 3, 1]])]) != 0


def test_the_modulus_is_prime():
    assert PRIME < 2**53 and all(pow(a, PRIME - 1, PRIME) == 1 for a in (2, 3, 5, 7, 11, 13, 17, 19, 23))
    d, r = PRIME - 1, 0
    while d % 2 == 0:
        d, r = d // 2, r + 1
    for a in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37):  # decides below 3.3e24
        x = pow(a, d, PRIME)
        assert x in (1, PRIME - 1) or any(pow(x, 2**i, PRIME) == PRIME - 1 for i in range(1, r))
