"""What engines, loaders and the attention function refuse; and what a job outlives."""

from __future__ import annotations

import logging
import os
import re
import signal
from typing import Any

import pytest
import torch
from engines import make_engine, plan_batch
from harness import PATIENCE, Ranks
from stand_in import planning
from tiny import make_documents, make_model

import hdp
from hdp.parallel.channel import TorchChannel

CAPACITY = 64


def warnings_of_positions(world: hdp.World) -> list[str]:
    """Of three steps, of which the last two have a document that is longer than what the model's positions are meant for."""
    model = make_model()
    model.config.max_position_embeddings = 20
    engine, said = make_engine(world, "fsdp-step", model), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("hdp").addHandler(handler)
    try:
        for lengths in ([20, 9], [21, 9], [33]):
            engine.forward_backward(plan_batch(world, engine, make_documents(lengths), CAPACITY, planner="naive"))
    finally:
        logging.getLogger("hdp").removeHandler(handler)
    return said


def test_documents_beyond_the_models_positions_are_warned_of_once(ranks):
    first, *others = ranks(2).run(warnings_of_positions)
    (text,) = first
    assert "a document of 21 tokens, the model's positions are meant for 20 (config.max_position_embeddings)" in text
    assert not any(others)


def message_of(world: hdp.World, what: str) -> str:
    engine = make_engine(world, "fsdp-step", make_model())
    documents: list[Any] = make_documents([9, 9])
    try:
        if what == "clip":
            engine.clip_grad_norm_(-1.0)
        elif what == "clip nan":
            engine.clip_grad_norm_(float("nan"))
        elif what == "documents instead of a batch":
            engine.forward_backward(documents)  # type: ignore[arg-type]
        elif what in ("id too large", "negative id", "float labels", "bool ids"):
            documents[1] = {
                "id too large": torch.tensor([1, 101]),
                "negative id": torch.tensor([1, -2]),
                "float labels": {"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([1.5, 2.0])},
                "bool ids": torch.tensor([True, False]),
            }[what]
            engine.forward_backward(plan_batch(world, engine, documents, CAPACITY, planner="naive"))
        elif what == "too long for the model":
            engine.positions = 20  # as of a model that learns them
            engine.forward_backward(plan_batch(world, engine, make_documents([9, 20, 21]), CAPACITY, planner="naive"))
        elif what == "fp16":
            with torch.autocast("cpu", torch.float16):
                engine.forward_backward(plan_batch(world, engine, documents, CAPACITY, planner="naive"))
        elif what == "another regime":
            options: dict[str, Any] = {"tokens_per_step": 99, "capacity": CAPACITY}
            other = planning(world, regime="slot")
            engine.forward_backward(next(iter(hdp.Loader(documents, other, **options))))
        elif what == "no step to run":
            hdp.Loader(documents, engine, tokens_per_step=99, capacity=CAPACITY, start=9, steps=3)
        elif what == "a plan that holds too much":
            plan = hdp.Plan.from_groups(
                [9, 9], [(0,), (0,)], [0, 0], world_size=world.world_size, capacity=10, regime="step", planner="mine"
            )
            plan_batch(world, engine, documents, 10, planner=lambda lengths, **_: plan)
        elif what == "attention sinks":
            sinks()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def sinks() -> None:
    """GPT-OSS hands its sinks down as a keyword that sdpa would ignore."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16,
        num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    model = GptOssForCausalLM(config)
    model.set_attn_implementation("hdp")
    model(input_ids=torch.tensor([[1, 2, 3]]))


@pytest.mark.parametrize(
    ("what", "pattern"),
    [
        ("clip", r"max_norm is -1.0"),
        ("clip nan", r"max_norm is nan"),
        ("documents instead of a batch", r"takes a batch of hdp.Loader, not list: iterate over hdp.Loader"),
        ("id too large", r"token id 101 in document 1 .* vocabulary of 101"),
        ("negative id", r"token id -2 in document 1 .* vocabulary of 101"),
        ("too long for the model", r"document 2 has more than 20 tokens, the model positions for 20: cut"),
        ("fp16", r"torch.autocast computes in float16: there is no gradient scaler"),
        (
            "another regime",
            r"regime 'slot'; this engine runs 'step': make the loader with this engine",
        ),
        ("float labels", r"document 1: labels must be integers"),
        ("bool ids", r"document 1: token ids must be one row of integers"),
        ("no step to run", r"steps is 3 and start is 9"),
        ("a plan that holds too much", r"holds 18 tokens in slot 0: more than the capacity, 10"),
        ("attention sinks", r"attention keyword 's_aux' is not supported outside a planned batch"),
    ],
)
def test_refused_with_value_and_fix(ranks, what, pattern):
    assert re.search(pattern, ranks(1).run(message_of, what)[0])


def caught_then_step(world: hdp.World, dies: int | None) -> Any:
    """Every rank catches an error of its own and goes on; then one may be killed."""
    engine = make_engine(world, "fsdp-step", make_model())
    for _ in range(2):
        with pytest.raises(ValueError, match="token id 500"), world.guard.watch("reading"):
            raise ValueError("token id 500 is outside the vocabulary")
    documents = make_documents([60, 9])
    batch = plan_batch(world, engine, documents, CAPACITY // 2, planner="naive")
    if world.rank == dies:
        os.kill(os.getpid(), signal.SIGKILL)
    return engine.forward_backward(batch).loss


def test_an_error_that_was_outlived_is_not_blamed_later():
    with Ranks(2) as two:
        losses = two.run(caught_then_step, None)
        assert losses[0] == losses[1]
    with Ranks(2) as two:
        survivor, _ = two.outcomes(caught_then_step, 1)
        assert survivor.error.startswith("PeerError: rank 1 is dead or stopped: "), survivor.error
        assert "token id" not in survivor.error, survivor.error  # its number may be that of a port


def join_again(world: hdp.World) -> float:
    """A second job of the same processes after the first has ended."""
    world.close()
    torch.distributed.destroy_process_group() if torch.distributed.is_initialized() else None
    with hdp.init(timeout=PATIENCE, device="cpu") as again:
        engine = make_engine(again, "fsdp-step", make_model())
        return engine.forward_backward(plan_batch(again, engine, make_documents([60, 9]), 32, planner="naive")).loss


def test_a_job_can_be_joined_again():
    with Ranks(2) as two:
        losses = two.run(join_again)
        assert losses[0] == losses[1]


def backend_of(world: hdp.World) -> tuple[str, bool]:
    lane = torch.distributed.new_group(backend="cpu:gloo")
    return torch.distributed.get_backend(lane), TorchChannel(world.rank, [lane], torch.device("cpu"))._grouped


def test_a_lane_is_judged_by_the_backend_of_its_device(ranks):
    assert all(not grouped for _, grouped in ranks(2).run(backend_of))
