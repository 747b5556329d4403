"""What a traced model holds: as its shape says, as autograd saves it, and without leaving anything behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from tiny import make_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import hdp
from hdp.balance.footprint import at, highest, shape_footprint
from hdp.balance.models import ModelShape
from hdp.parallel import footprint
from hdp.parallel.footprint import NotTraced, bare_copy, bare_model, trace_footprint


@pytest.fixture(scope="module")
def world() -> Iterator[hdp.World]:
    with hdp.init(device="cpu") as made:
        yield made


@pytest.fixture(autouse=True)
def traced_anew() -> None:
    footprint.TRACED.clear()


def llama(layers: int = 5) -> nn.Module:
    config = make_model().config
    config.num_hidden_layers, config.attention_bias = layers, False
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("hdp")
    return model


def traced(model: nn.Module, world: hdp.World, dtype: torch.dtype | None = None) -> footprint.Footprint:
    found = bare_model(model, None, dtype)
    assert found is not None
    return trace_footprint(*found, world.runtime)


def test_a_llama_holds_what_its_shape_says(world: hdp.World) -> None:
    model = llama()
    found, said = traced(model, world), shape_footprint(ModelShape.from_config(model.config), 4)
    assert found.parameters == said.parameters == sum(p.numel() for p in model.parameters())
    assert len(found.layers) == len(said.layers) == 5
    for one, other in zip((found.before, *found.layers), (said.before, *said.layers), strict=True):
        assert at(one.held, 1000) == pytest.approx(at(other.held, 1000), rel=0.02)
        assert highest(one.forward, 1000) == pytest.approx(highest(other.forward, 1000), rel=0.1)
    layer, shape = found.layers[2], said.layers[2]
    assert at(layer.again, 1000) == pytest.approx(at(shape.again, 1000), rel=0.02)
    assert sum(at(line, 1000) for line in layer.moves) == pytest.approx(at(layer.held, 1000), rel=0.05)
    assert layer.attention == shape.attention


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_a_layer_holds_is_what_autograd_saves(world: hdp.World, dtype: torch.dtype | None) -> None:
    """Counted on a real run of another length than those that are traced."""
    model, tokens = llama(3).to(dtype or torch.float32), 160
    found = traced(model, world)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    route = hdp.Route(world.runtime, [hdp.RouteShard(sequence=0, length=tokens, group=(0,))])
    ids = torch.zeros((1, tokens), dtype=torch.int64)
    empty = torch.empty((1, 0), dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(
            input_ids=ids,
            position_ids=torch.arange(tokens)[None],
            attention_mask=empty,
            use_cache=False,
            hdp_route=route,
        )
    said = sum(at(line, tokens) for part in (*found.layers, found.behind) for line in part.moves)
    said -= at(found.behind.moves[-1], tokens)  # the gradient that the loss keeps
    assert sum(kept.values()) == pytest.approx(said, rel=0.02)


def test_layers_alike_are_traced_for_all(world: hdp.World) -> None:
    model = llama(6)
    few = traced(model, world)
    bare = bare_copy(model)
    every = footprint._traced(bare, list(bare.model.layers), world.runtime)
    for tokens in (10, 500, 5000):
        for one, other in zip(few.layers, every.layers, strict=True):
            assert at(one.held, tokens) == at(other.held, tokens)
            assert highest(one.backward, tokens) == pytest.approx(highest(other.backward, tokens), rel=0.03)
    assert dataclasses.replace(few, layers=()).parameters == dataclasses.replace(every, layers=()).parameters


def test_bf16_holds_less(world: hdp.World) -> None:
    wide, narrow = traced(llama(), world), traced(llama(), world, torch.bfloat16)
    assert 0.5 < at(narrow.layers[1].held, 1000) / at(wide.layers[1].held, 1000) < 0.8


def test_frozen_parameters_get_no_gradients(world: hdp.World) -> None:
    model = llama()
    for layer in model.model.layers[:2]:
        layer.requires_grad_(False)
    found = traced(model, world)
    assert [layer.trained > 0 for layer in found.layers] == [False, False, True, True, True]
    assert highest(found.layers[1].backward, 10) < highest(found.layers[3].backward, 10)


def test_checkpointed_layers_hold_their_input(world: hdp.World) -> None:
    plain = traced(llama(), world)
    model = llama()
    model.gradient_checkpointing_enable()
    found = traced(model.train(), world)
    assert at(found.layers[2].held, 1000) < 0.5 * at(plain.layers[2].held, 1000)
    assert highest(found.layers[2].backward, 1000) > highest(plain.layers[2].backward, 1000)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3 with windows"])
def test_other_models(world: hdp.World, kind: str) -> None:
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=101,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=512,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        model: nn.Module = GPT2LMHeadModel._from_config(config, attn_implementation="hdp")
    else:
        model = Qwen3ForCausalLM._from_config(
            Qwen3Config(
                vocab_size=101,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                use_sliding_window=True,
                sliding_window=32,
                max_window_layers=2,
            ),
            attn_implementation="hdp",
        )
    found = traced(model, world)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert all(at(layer.held, 100) > 0 and highest(layer.backward, 100) > 0 for layer in found.layers)
    if kind != "gpt2":
        assert [layer.attention[0].window for layer in found.layers] == [0, 0, 32, 32]


def test_nothing_is_left_behind(world: hdp.World) -> None:
    model, state = llama(), torch.get_rng_state()
    before = {name: p.clone() for name, p in model.named_parameters()}
    traced(model, world)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not model._forward_hooks and not model.model.layers[0]._forward_pre_hooks


class Looks(LlamaForCausalLM):
    """A model that does otherwise where a value is large."""

    def forward(self, **inputs):  # type: ignore[no-untyped-def]
        out = super().forward(**inputs)
        return out if float(out.logits.sum()) < 1e9 else None


def test_a_model_that_looks_at_values_is_not_traced(world: hdp.World) -> None:
    model = Looks(llama().config)
    model.set_attn_implementation("hdp")
    with pytest.raises(NotTraced, match="Looks does not run without data"):
        traced(model, world)
    engine = hdp.shard(model, world)
    assert engine.foresight is not None and not engine.foresight.is_traced
    assert engine.foresight.model.parameters == sum(p.numel() for p in llama().parameters())


def test_hooks_of_a_script_do_not_run_those_of_libraries_do(world: hdp.World) -> None:
    """With frozen weights and layers that run again, nothing has a gradient unless transformers' hook asks for it."""
    model, calls = llama(2), []
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: calls.append(0))
        module.register_forward_hook(lambda *_: calls.append(0))
        module.register_full_backward_hook(lambda *_: calls.append(0))
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp.requires_grad_(True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    found = traced(model, world)
    assert not calls
    assert all(at(layer.held, 1000) < at(layer.again, 1000) * 2 for layer in found.layers)
    assert all(segment.trained > 0 for segment in found.layers)
