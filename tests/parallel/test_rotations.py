"""Rotary positions that depend on how long a document is: each document's own, whatever lies beside it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from engines import full_gradients, make_engine, plan_batch
from tiny import gradient_errors, loss_sums, make_documents, make_model, widen

import hdp
from hdp.parallel.rotations import find_long_rotations, rotated_by_document

transformers = pytest.importorskip("transformers")

ORIGINAL = 40
"""Tokens from which on documents have the long factors."""
FACTORS = {
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.0, 1.2, 1.0, 1.1, 1.3, 1.0],
    "long_factor": [1.0, 2.0, 4.0, 3.0, 8.0, 5.0, 6.0, 2.0],
    "original_max_position_embeddings": ORIGINAL,
}
LENGTHS = [100, 20, 40, 41, 64, 9, 30, 120]
CAPACITY = 64


def phi3() -> Any:
    hdp.register_attention()
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        vocab_size=101, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=160, original_max_position_embeddings=ORIGINAL, pad_token_id=0,
        initializer_range=0.1, rope_parameters={"rope_type": "longrope", **FACTORS},
    )  # fmt: skip
    model = transformers.Phi3ForCausalLM(config)
    model.set_attn_implementation("hdp")
    return model


def step(world: hdp.World, name: str) -> Any:
    engine = make_engine(world, name, phi3())
    batch = plan_batch(world, engine, make_documents(LENGTHS), CAPACITY, planner="naive")
    loss = engine.forward_backward(batch).loss
    return loss, engine.evaluate(make_documents(LENGTHS), capacity=CAPACITY), full_gradients(engine)


@pytest.mark.parametrize("name", ["fsdp-step", "fsdp-slot", "ddp"])
def test_long_and_short_documents_in_one_batch(ranks, name):
    model = phi3()
    model.set_attn_implementation("eager")
    widen(model)
    del model.model.rotary_emb.forward  # the model's own
    total, weight = loss_sums(model, make_documents(LENGTHS))
    (total / weight).backward()
    exact = {name: p.grad for name, p in model.named_parameters()}
    for loss, evaluated, gradients in ranks(2).run(step, name):
        assert loss == pytest.approx(float(total) / weight, rel=1e-5) == pytest.approx(evaluated, rel=1e-5)
        assert max(gradient_errors(gradients, exact).values()) <= 1e-5


def rotation(kind: str) -> Any:
    if kind == "phi3":
        return phi3().model.rotary_emb
    from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding

    config = transformers.PhimoeConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=160,
        rope_parameters={"rope_type": "longrope", "short_mscale": 1.1, "long_mscale": 1.3, **FACTORS},
    )  # fmt: skip
    return PhimoeRotaryEmbedding(config)


@pytest.mark.parametrize("kind", ["phi3", "phimoe"])
@pytest.mark.parametrize("lengths", [[30, 50], [50, 30], [41], [40], [100, 41, 40, 7]])
def test_a_part_of_a_document_is_rotated_as_the_whole(kind, lengths):
    """Every third token of each document, as if others had the rest."""
    module = rotation(kind)
    x = torch.zeros(1, dtype=torch.float32)
    alone = copy.deepcopy(module)
    wanted = [[part[:, ::3] for part in alone(x, torch.arange(n)[None])] for n in lengths]
    positions = torch.cat([torch.arange(0, n, 3) for n in lengths])[None]
    whole = torch.cat([torch.full((len(range(0, n, 3)),), n) for n in lengths])
    with rotated_by_document([module], whole):
        found = module(x, positions)
    assert "forward" not in vars(module)
    module.forward = alone.forward  # somebody's own
    with rotated_by_document([module], whole):
        assert torch.equal(module(x, positions)[0], found[0])
    assert module.forward == alone.forward
    for got, parts in zip(found, zip(*wanted, strict=True), strict=True):
        assert torch.equal(got, torch.cat(parts, dim=1))


def llama(kind: str, **fields: Any) -> Any:
    config = make_model(attention="eager").config
    config.rope_parameters = {"rope_type": kind, "rope_theta": 10_000.0, **fields}
    return transformers.LlamaForCausalLM(config)


def test_rotations_that_change_with_what_was_seen_are_refused():
    with pytest.raises(ValueError, match=r"rotary positions of model.rotary_emb are of type 'dynamic'.*linear, yarn"):
        find_long_rotations(llama("dynamic", factor=2.0))
    assert not find_long_rotations(llama("linear", factor=2.0))
    assert not find_long_rotations(llama("yarn", factor=2.0, original_max_position_embeddings=64))
    assert len(find_long_rotations(phi3())) == 1


def refused(world: hdp.World) -> list[bool]:
    """Whether the model is still plain after each engine has refused it."""
    found = []
    for make in (hdp.shard, hdp.replicate):
        model = llama("dynamic", factor=2.0)
        model.set_attn_implementation("hdp")
        with pytest.raises(ValueError, match="of type 'dynamic'"):
            make(model, world)
        found.append(type(model) is transformers.LlamaForCausalLM)
    return found


def test_a_refused_model_is_not_wrapped(ranks):
    assert ranks(1).run(refused) == [[True, True]]
