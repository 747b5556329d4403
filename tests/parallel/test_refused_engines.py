"""Models, meshes and regimes that an engine refuses: on every rank, with the value and the fix."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from engines import make_engine, make_model
from stand_in import planning
from tiny import make_documents
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

import hdp

CAPACITY = 64


def wave(world: hdp.World) -> None:
    hdp.shard(make_model(), world, regime="wave")


def zero3_step(world: hdp.World) -> None:
    hdp.DeepSpeedEngine(make_engine(world, "zero3", make_model()).deepspeed, world, regime="step")


def zero1_slot(world: hdp.World) -> None:
    hdp.DeepSpeedEngine(make_engine(world, "zero1", make_model()).deepspeed, world, regime="slot")


def another_regime(world: hdp.World) -> None:
    engine = make_engine(world, "fsdp-slot", make_model())
    options: Any = {"tokens_per_step": 10**6, "capacity": CAPACITY, "planner": "naive"}
    (batch,) = hdp.Loader(make_documents([9, 9]), planning(world), **options)
    engine.forward_backward(batch)


def clip_deepspeed(world: hdp.World) -> None:
    make_engine(world, "zero1", make_model()).clip_grad_norm_(1.0)


def no_layers(world: hdp.World) -> None:
    hdp.shard(torch.nn.Sequential(torch.nn.Linear(3, 3)), world)


def soft_capped(world: hdp.World) -> None:
    model = make_model()
    model.config.final_logit_softcapping = 30.0
    hdp.shard(model, world)


def rounded_loss(world: hdp.World) -> None:
    hdp.shard(make_model(), world, mp_policy=MixedPrecisionPolicy(output_dtype=torch.bfloat16))


def part_of_the_ranks(world: hdp.World) -> None:
    mesh = init_device_mesh("cpu", (world.world_size, 1), mesh_dim_names=("a", "b"))
    hdp.shard(make_model(), world, mesh=mesh["b"])


def sharded_twice(world: hdp.World) -> None:
    model = make_model()
    hdp.shard(model, world)
    hdp.shard(model, world, regime="slot")


def sharded_then_replicated(world: hdp.World) -> None:
    model = make_model()
    hdp.shard(model, world)
    hdp.replicate(model, world)


def another_seed(world: hdp.World) -> None:
    hdp.shard(make_model(seed=world.rank // 2), world)


def early_optimizer(world: hdp.World) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    engine = hdp.shard(model, world)
    later = torch.optim.AdamW(engine.parameters())
    options: Any = {"tokens_per_step": 10**6, "capacity": CAPACITY}
    for batch in hdp.Loader(make_documents([9, 9]), engine, **options):
        engine.forward_backward(batch)
        later.step()
        optimizer.step()


CASES: dict[str, tuple[Any, str]] = {
    "wave": (wave, "unknown regime 'wave': choose one of step, slot"),
    "zero3 step": (
        zero3_step,
        "regime 'step' cannot run with ZeRO-3.*equal numbers of micro-batches.*use regime 'slot'",
    ),
    "zero1 slot": (zero1_slot, "regime 'slot' cannot run with ZeRO-1.*one reduction a step.*use regime 'step'"),
    "another regime": (another_regime, "planned for regime 'step'; this engine runs 'slot'"),
    "clip": (clip_deepspeed, "set gradient_clipping in its configuration"),
    "no layers": (no_layers, "no repeated layers"),
    "soft-capped logits": (soft_capped, "final_logit_softcapping=30.0"),
    "rounded loss": (rounded_loss, "output_dtype is torch.bfloat16.*would be rounded"),
    "part of the ranks": (part_of_the_ranks, "the mesh has 1 ranks, the world 4"),
    "sharded twice": (sharded_twice, "wrapped already.*make it anew"),
    "sharded then replicated": (sharded_then_replicated, "wrapped already"),
    "early optimizer": (early_optimizer, "the optimizer holds model.embed_tokens.weight as it was before hdp.shard"),
    "another seed": (another_seed, "ranks 0 and 2 begin with different parameters.*set the same seed"),
}


def message(world: hdp.World, what: str) -> str:
    try:
        CASES[what][0](world)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize("what", CASES)
def test_refused_on_every_rank(ranks, what):
    for text in ranks(4).run(message, what):
        assert re.search(CASES[what][1], text), text


def beside_tensor_parallelism(_: hdp.World, name: str) -> str:
    with hdp.init(device="cpu", tensor_parallel=2) as world:
        try:
            make_engine(world, name, make_model())
        except ValueError as error:
            return str(error)
    return "nothing was refused"


@pytest.mark.parametrize(("name", "engine"), [("ddp", "DDP"), ("zero1", "DeepSpeed")])
def test_tensor_parallelism_is_for_fsdp(ranks, name, engine):
    for text in ranks(4).run(beside_tensor_parallelism, name):
        assert f"tensor parallelism with {engine}" in text and "use hdp.shard" in text, text


def meta_on_some(world: hdp.World) -> str:
    """Weights that rank 0 alone has loaded are spread later."""
    model = make_model()
    if world.rank:
        model = model.to("meta")
    from hdp.parallel.models import check_alike

    check_alike(model, world)
    return "let through"


def test_models_that_are_filled_later_are_let_through(ranks):
    assert set(ranks(2).run(meta_on_some)) == {"let through"}


def deepspeed_that_splits(world: hdp.World, what: str) -> str:
    from types import SimpleNamespace

    from hdp.parallel.deepspeed import check_data_parallel

    engine = SimpleNamespace(pipeline_parallelism=what == "pipeline", dp_world_size=1 if what == "tensor" else 2)
    try:
        check_data_parallel(engine, world)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("what", "pattern"), [("pipeline", "pipeline"), ("tensor", "1 data-parallel ranks of 2"), ("", "^$")]
)
def test_deepspeed_that_splits_the_model(ranks, what, pattern):
    assert all(re.search(pattern, text) for text in ranks(2).run(deepspeed_that_splits, what))
