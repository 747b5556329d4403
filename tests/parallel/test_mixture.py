"""Mixtures of experts of transformers: exact under FSDP2 and DDP, also when some expert sees no token on some rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import full_gradients, make_engine, plan_batch
from tiny import VOCABULARY, gradient_errors, loss_sums, make_documents, widen
from transformers import MixtralConfig, MixtralForCausalLM

import hdp

CAPACITY = 64
LENGTHS = [10, 115, 40, 3, 21]


def mixture(attention: str, **options: Any) -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        head_dim=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        initializer_range=0.1,
        sliding_window=None,
        **options,
    )
    torch.manual_seed(0)
    model = MixtralForCausalLM(config)
    model.set_attn_implementation(attention)
    return model


def step(world: hdp.World, name: str, lengths: list[int]) -> Any:
    engine = make_engine(world, name, mixture("hdp"))
    result = engine.forward_backward(plan_batch(world, engine, make_documents(lengths), CAPACITY, planner="naive"))
    return result.loss, full_gradients(engine)


@pytest.mark.parametrize("lengths", [LENGTHS, [2]], ids=["mixed", "two tokens"])
@pytest.mark.parametrize("name", ["fsdp-step", "fsdp-slot", "ddp"])
def test_gradients_are_exact(ranks, exactness, name, lengths):
    model = widen(mixture("eager", experts_implementation="eager"))  # the grouped kernel knows no float64
    total, weight = loss_sums(model, make_documents(lengths))
    (total / weight).backward()
    exact = {key: p.grad for key, p in model.named_parameters()}
    for loss, gradients in ranks(2).run(step, name, lengths):
        assert loss == pytest.approx(float(total.detach()) / weight, rel=1e-6)
        errors = gradient_errors(gradients, exact)
        worst = max(errors, key=errors.__getitem__)
        exactness(f"world 2, {len(lengths)} documents, naive, Mixtral, {name}", errors[worst], worst)
        assert errors[worst] <= 1e-5, f"{worst}: {errors[worst]:.2e}"


def refuse(world: hdp.World) -> str:
    try:
        hdp.shard(mixture("hdp", output_router_logits=True), world)
    except ValueError as error:
        return str(error)
    return "not refused"


def test_an_auxiliary_loss_is_refused(ranks):
    assert all("output_router_logits" in text for text in ranks(2).run(refuse))
