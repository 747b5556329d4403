"""One layer of each kind with parameters of its own: which layers are alike, and that the model is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import Ranks
from tiny import make_model
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MixtralConfig

import hdp
from hdp.parallel.measure import layers_of
from hdp.parallel.measure_layers import call_layers
from hdp.parallel.models import output_head
from hdp.parallel.skeleton import Sample, kind_of, make_sample

hdp.register_attention()

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def sample_of(model: nn.Module, *, cut: bool = True) -> Sample:
    return make_sample(model, layers_of(model), output_head(model), CPU, torch.float32, cut=cut)


def alternating() -> nn.Module:
    config = Gemma2Config(**SMALL, num_hidden_layers=5, sliding_window=16)
    config.final_logit_softcapping = config.attn_logit_softcapping = None
    return AutoModelForCausalLM.from_config(config, attn_implementation="hdp")


def test_layers_of_one_kind_stand_for_each_other():
    model = make_model()
    (kind,) = sample_of(model).kinds
    assert kind.count == 2 and kind.window == 0
    assert kind_of(model.model.layers[0]) == kind_of(model.model.layers[1])


def test_windows_and_experts_make_kinds():
    kinds = sample_of(alternating()).kinds
    assert [(kind.count, kind.window) for kind in kinds] == [(3, 16), (2, 0)]
    config = MixtralConfig(**SMALL, num_hidden_layers=3, num_local_experts=4)
    mixture = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    assert [kind.count for kind in sample_of(mixture).kinds] == [3]
    assert kind_of(mixture.model.layers[0]) != kind_of(make_model().model.layers[0])


class Storage:
    """What a model holds, to be compared."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.values = {name: t.detach().clone() for name, t in self.tensors.items()}

    def is_untouched(self, model: nn.Module) -> bool:
        now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        same = all(now[name] is t and torch.equal(t, self.values[name]) for name, t in self.tensors.items())
        return same and now.keys() == self.tensors.keys() and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("make", [make_model, alternating], ids=["llama", "gemma2"])
@pytest.mark.parametrize("cut", [True, False])
def test_layers_are_called_as_the_model_calls_them_and_it_stays_as_it_is(ranks, make, cut):
    (found,) = ranks(1).run(called, make, cut)
    shapes, untouched, layers, own = found
    assert untouched and own
    assert all(shape == (1, 12, shapes[0][2]) for shape in shapes) and len(shapes) == layers


def called(world: hdp.World, make: Any, cut: bool) -> Any:
    model = make()
    before = Storage(model)
    sample = sample_of(model, cut=cut)
    calls = call_layers(sample, world, 12)
    out = sample.kinds[0].layer(*calls[0].arguments, **calls[0].keywords)
    (out if isinstance(out, torch.Tensor) else out[0]).sum().backward()
    own = {p.data_ptr() for p in sample.model.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters())
    return [tuple(c.hidden.shape) for c in calls], before.is_untouched(model), len(sample.kinds), own


def sharded(world: hdp.World) -> Any:
    """A model that FSDP2 has sharded and given hooks, and one on the meta device: whole layers of each."""
    found = []
    engine = hdp.shard(make_model(), world)
    with torch.device("meta"):
        absent = make_model()
    for model in (engine.model, absent):
        sample = sample_of(model)
        call_layers(sample, world, 8)
        layer = sample.kinds[0].layer
        hooks = len(layer._forward_hooks) + len(layer._forward_pre_hooks)
        found.append((type(layer).__name__, {n: tuple(p.shape) for n, p in layer.named_parameters()}, hooks))
    return found


def test_sharded_and_absent_models_are_sampled_whole():
    plain = make_model().model.layers[0]
    shapes = {n: tuple(p.shape) for n, p in plain.named_parameters()}
    with Ranks(2) as two:
        for found in two.run(sharded):
            assert found == [(type(plain).__name__, shapes, 0)] * 2


def test_an_8b_model_on_the_meta_device_takes_the_memory_of_one_layer():
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    sample = make_sample(model, layers_of(model), output_head(model), CPU, torch.bfloat16, cut=True)
    (kind,) = sample.kinds
    assert kind.count == 32
    layer = sum(p.untyped_storage().nbytes() for p in kind.layer.parameters())
    assert sum(p.untyped_storage().nbytes() for p in sample.model.parameters()) < layer + 1000
    assert layer == 2 * sum(p.numel() for p in model.model.layers[0].parameters())
