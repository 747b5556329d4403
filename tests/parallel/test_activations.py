"""Offload and recomputation under the engines: the same bits, and no message sent twice."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import full_gradients, make_engine, plan_batch
from stand_in import machine_of
from tiny import gradient_errors, loss_sums, make_documents, make_model, widen

import hdp
from hdp.balance import Plan
from hdp.offload import FileTier, HostTier, OffloadEngine
from hdp.parallel import activations
from hdp.parallel.activations import Activations

LENGTHS = [10, 115, 40, 3, 73, 21]
CAPACITY = 64
SETTINGS: list[Any] = [("offload", 0.3), ("offload", 1.0), ("recompute", 1.0), ("recompute", 0.0), ("memo", 1.0)]
UNEQUAL = [("recompute", 0.0), ("keep", 0.0)]
"""Of rank 0 and of rank 1: sharers do not hang if they disagree, for attention sends nothing when a layer is recomputed.
ZeRO-3 is left out: it gathers parameters again for the modules that run again."""


def steps(world: hdp.World, name: str, settings: list[Any], folder: str | None) -> Any:
    """(loss, gradients, messages) of one step without, then with each setting."""
    engine = make_engine(world, name, make_model())
    batch = plan_batch(world, engine, make_documents(LENGTHS), CAPACITY, planner="naive")
    tier = HostTier() if folder is None else FileTier(folder)
    found = []
    with OffloadEngine([tier], min_bytes=256) as store:
        for setting in [None, *settings]:
            if setting is not None:
                policy, ratio = setting if isinstance(setting, tuple) else setting[world.rank]
                fraction = 0.5 if policy == "memo" else None
                engine.activations = Activations(
                    store=store, policy=policy, ratio=ratio, memo_fraction=fraction, keep_first=0, keep_last=0
                )
            engine.model.zero_grad()
            before = world.channel.messages
            loss = engine.forward_backward(batch).loss
            found.append((loss, full_gradients(engine), world.channel.messages - before))
            if hasattr(engine, "deepspeed"):
                engine.deepspeed.step()  # clears what ZeRO-3 has accumulated; the learning rate is 0
    return found


@pytest.mark.parametrize("disk", [False, True], ids=["host", "disk"])
@pytest.mark.parametrize("name", ["fsdp-step", "fsdp-slot", "ddp", "zero1", "zero3"])
def test_the_same_bits_and_messages(ranks, tmp_path, name, disk):
    settings = SETTINGS if name == "zero3" else [*SETTINGS, UNEQUAL]
    for plain, *others in ranks(2).run(steps, name, settings, str(tmp_path) if disk else None):
        for setting, (loss, gradients, messages) in zip(settings, others, strict=True):
            assert loss == plain[0], setting
            assert all(torch.equal(gradients[key], value) for key, value in plain[1].items()), setting
            assert messages == plain[2], f"{setting}: {messages} messages instead of {plain[2]}"


def planned(world: hdp.World, offload: tuple, recompute: tuple, with_store: bool) -> Any:
    lengths = [90, 30, 20]
    fields = {"world_size": 2, "capacity": 64, "regime": "step", "planner": "by hand"}
    plan = Plan.from_groups(lengths, [(0, 1), (0,), (1,)], [0, 1, 2], offload=offload, recompute=recompute, **fields)
    engine = make_engine(world, "fsdp-step", make_model())
    batch = plan_batch(world, engine, make_documents(lengths), 64, planner=lambda _, **__: plan)
    if not with_store:
        try:
            engine.forward_backward(batch)
        except ValueError as error:
            return str(error)
        return "ran"
    with OffloadEngine([HostTier()], min_bytes=256) as store:
        engine.activations = Activations(store=store, keep_first=0, keep_last=0)
        result = engine.forward_backward(batch)
        return result.loss, full_gradients(engine)


def test_the_plan_decides_per_micro_batch(ranks):
    plain = ranks(2).run(planned, (), (), True)
    for offload, recompute in [(((0, 0, 0.5), (1, 0, 0.5)), ()), ((), (0, 2)), (((1, 2, 1.0),), (0,))]:
        found = ranks(2).run(planned, offload, recompute, True)
        for a, b in zip(plain, found, strict=True):
            assert a[0] == b[0]
            assert all(torch.equal(a[1][key], b[1][key]) for key in a[1])


def test_a_plan_that_offloads_needs_a_store(ranks):
    offload = ((0, 0, 0.5), (1, 0, 0.5))
    assert all("engine.activations = Activations" in text for text in ranks(2).run(planned, offload, (), False))


def overruled(world: hdp.World) -> list[str]:
    """Errors of policies for the whole job, under plans that need offload (0.5) and recomputation."""
    made = []
    for needs in ({"offload": ((0, 0, 0.5),)}, {"recompute": (0,)}):
        plan = Plan.from_groups([90], [(0,)], [0], world_size=1, capacity=64, regime="step", planner="by hand", **needs)
        made += plan.micro_batches(0)
    found = []
    with OffloadEngine([HostTier()]) as store:
        for micro_batch in made:
            for policy, ratio in (("keep", 1.0), ("offload", 0.4), ("offload", 0.5), ("recompute", 0.0), ("auto", 1.0)):
                try:
                    Activations(store=store, policy=policy, ratio=ratio)._check_covers(micro_batch)
                except ValueError as error:
                    found.append(f"{policy} {ratio}: {error}")
    return found


def test_a_policy_that_keeps_what_the_plan_moves_is_refused(ranks):
    (found,) = ranks(1).run(overruled)
    assert [text.partition(":")[0] for text in found] == [
        "keep 1.0",
        "offload 0.4",
        "keep 1.0",
        "offload 0.4",
        "offload 0.5",
    ]
    assert "moves a ratio of 0.4 out, but the plan fits a micro-batch of rank 0 only with 0.5:" in found[1]
    assert "only with 0, and runs layers again: take policy 'plan'" in found[2]


def test_auto_moves_what_the_plan_needs():
    """What is asked of the store for micro-batches that fit only so, and for one that fits as it is."""
    asked: list[tuple[str, float, int | None]] = []

    def micro_batch(model: Any, *, policy: str, ratio: float, recompute_layers: int | None, **_: Any) -> None:
        asked.append((policy, ratio, recompute_layers))

    store: Any = SimpleNamespace(micro_batch=micro_batch)
    policy = Activations(store=store, policy="auto", ratio=0.4)
    cases: list[tuple[int, dict[str, Any]]] = [
        (90, {"offload": ((0, 0, 0.5),)}),
        (90, {"recompute": (0,), "recompute_layers": (2,)}),
        (60, {}),
    ]
    for length, needs in cases:
        plan = Plan.from_groups(
            [length], [(0,)], [0], world_size=1, capacity=64, regime="step", planner="by hand", **needs
        )
        policy.around(torch.nn.Linear(1, 1), plan.micro_batches(0)[0], length)
    assert asked == [("offload", 0.5, None), ("recompute", 0.0, 2), ("auto", 0.4, None)]


def room(world: hdp.World, folder: str) -> tuple[int, int]:
    """Bytes that this rank may move out, and those that the disk has free."""
    with Activations.open(world, policy="auto", folder=folder) as activations:
        (tier,) = activations.store.chain.tiers
        assert isinstance(tier, FileTier)
        return activations.store.chain.room or 0, tier.file.free


def test_ranks_share_the_room_of_their_disk(ranks, tmp_path):
    found = ranks(2).run(room, str(tmp_path))
    assert sum(mine for mine, _ in found) < found[0][1]


def least(world: hdp.World) -> int:
    return activations._least(world, 10 + world.rank)


def test_memory_that_plans_count_on_is_that_of_the_rank_with_least(ranks):
    assert ranks(3).run(least) == [10, 10, 10]


def opened(world: hdp.World, folder: str) -> tuple[float, str, list[float]]:
    """The measured bandwidth, the error without a folder, and losses of a longer document than the ranks hold."""
    engine = hdp.shard(deeper("hdp"), world)
    error = ""
    try:
        Activations.open(world)
    except ValueError as caught:
        error = str(caught)
    documents = make_documents([int(1.8 * world.world_size * CAPACITY), 20, 30])
    with Activations.open(world, folder=folder) as engine.activations:
        loader = hdp.Loader(documents, engine, tokens_per_step=10**5, capacity=CAPACITY, offload=1.0, steps=2)
        batches = list(loader)
        losses = [engine.forward_backward(batch).loss for batch in batches]
    return batches[0].machine.cost.copy_bandwidth, error, losses


def test_opened_for_a_world(ranks, tmp_path):
    results = ranks(2).run(opened, str(tmp_path))
    assert results[0] == results[1] and results[0][0] > 0
    assert "give folder=" in results[0][1]
    alone = ranks(1).run(opened_with_room, str(tmp_path))[0]
    assert results[0][2] == pytest.approx(alone, rel=1e-5)


def opened_with_room(world: hdp.World, folder: str) -> list[float]:
    """The same documents on one rank that holds them."""
    engine = hdp.shard(deeper("hdp"), world)
    documents = make_documents([int(1.8 * 2 * CAPACITY), 20, 30])
    loader = hdp.Loader(documents, engine, tokens_per_step=10**5, capacity=1000, steps=2)
    return [engine.forward_backward(batch).loss for batch in loader]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"policy": "sell"}, "unknown activation policy 'sell'"),
        ({"policy": "memo"}, "memo_fraction is None under policy 'memo': give a number from 0 to 1"),
        ({"policy": "offload", "memo_fraction": 0.5}, "memo_fraction is 0.5 under policy 'offload': leave it out"),
        ({"policy": "offload", "ratio": 1.5}, "ratio is 1.5: give a number from 0 to 1"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with OffloadEngine([HostTier()]) as store, pytest.raises(ValueError, match=message):
        Activations(store=store, **fields)


def too_long(world: hdp.World, offload: str | float) -> Any:
    """A document of 1.8 x world x capacity tokens."""
    from hdp.balance import CostModel, PlanError

    cost = CostModel(layers=6, quadratic=1e-9, linear=1e-6, activation_bytes=1000.0, copy_bandwidth=1e12)
    model = deeper("hdp")
    engine = hdp.shard(model, world)
    documents = make_documents([int(1.8 * world.world_size * CAPACITY), 20, 30])
    try:
        batch = plan_batch(
            world,
            engine,
            documents,
            CAPACITY,
            planner="auto",
            offload=offload,
            machine=machine_of(world.world_size, cost),
        )
    except PlanError as error:
        return str(error)
    with OffloadEngine([HostTier()], min_bytes=256) as store:
        engine.activations = Activations(store=store)
        loss = engine.forward_backward(batch).loss
        return loss, full_gradients(engine), [mb.offload_ratio for mb in batch.plan.micro_batches(world.rank)]


def deeper(attention: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    hdp.register_attention()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.set_attn_implementation(attention)
    return model


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_document_longer_than_world_times_capacity_trains(ranks, world):
    assert all("an offload ratio of" in text for text in ranks(world).run(too_long, "off"))
    model = widen(deeper("eager"))
    total, weight = loss_sums(model, make_documents([int(1.8 * world * CAPACITY), 20, 30]))
    (total / weight).backward()
    exact = {name: p.grad for name, p in model.named_parameters()}
    for loss, gradients, ratios in ranks(world).run(too_long, 1.0):
        assert max(ratios) > 0
        assert loss == pytest.approx(float(total.detach()) / weight, rel=1e-6)
        errors = gradient_errors(gradients, exact)
        assert max(errors.values()) <= 1e-5, errors
