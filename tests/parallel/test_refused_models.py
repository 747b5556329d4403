"""Models whose attention hdp cannot stand in for are refused by name, before the first step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch.distributed.fsdp import MixedPrecisionPolicy

import hdp
from hdp.parallel.fsdp import find_layers
from hdp.parallel.models import check_attention, check_precision, check_unwrapped, learnt_positions, trained_positions

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ANOTHER = {"vocab_size": 64, "hidden_size": 32, "bos_token_id": 1, "eos_token_id": 2}
GPT = {k: v for k, v in ANOTHER.items() if k != "hidden_size"}
CASES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**SMALL, "num_local_experts": 2, "intermediate_size_mlp": 48, "layer_types": ["chunked_attention"] * 2},
        "Llama4ForCausalLM has layers of type 'chunked_attention'",
    ),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {**ANOTHER, "n_layer": 1, "n_head": 2},
        "BloomForCausalLM is not supp",
    ),
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        {**ANOTHER, "num_hidden_layers": 1, "num_attention_heads": 2, "alibi": True},
        "FalconForCausalLM is not supported: its attention adds biases",
    ),
    "mpt": ("MptForCausalLM", "MptConfig", {"vocab_size": 64, "d_model": 32, "n_layers": 1, "n_heads": 2}, "MptForCau"),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {**ANOTHER, "num_layers": 2, "num_heads": 2, "attention_types": [[["local", "global"], 1]]},
        "GPTNeoForCausalLM is not supported",
    ),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {**ANOTHER, "num_hidden_layers": 1},
        "carry a state from token to token",
    ),
}


def build(kind: str, config: str, fields: dict[str, Any]) -> Any:
    model = getattr(transformers, kind)(getattr(transformers, config)(**fields))
    model.config._attn_implementation = "hdp"
    return model


@pytest.mark.parametrize("name", CASES)
def test_refused_by_name(name):
    hdp.register_attention()
    kind, config, fields, message = CASES[name]
    with pytest.raises(ValueError, match=message):
        check_attention(build(kind, config, fields))


@pytest.mark.parametrize(
    ("kind", "config", "fields"),
    [
        ("LlamaForCausalLM", "LlamaConfig", SMALL),
        ("Gemma3ForCausalLM", "Gemma3TextConfig", {**SMALL, "layer_types": ["sliding_attention", "full_attention"]}),
        ("GPT2LMHeadModel", "GPT2Config", {**GPT, "n_embd": 32, "n_layer": 1, "n_head": 2}),
    ],
)
def test_others_are_not(kind, config, fields):
    hdp.register_attention()
    check_attention(build(kind, config, fields))


def test_a_subclass_of_a_script_is_judged_by_its_parent():
    hdp.register_attention()

    class Mine(transformers.LlamaForCausalLM):
        pass

    Mine.__module__ = "__main__"  # as in a notebook, whose source nobody can read
    model = Mine(transformers.LlamaConfig(**SMALL))
    model.config._attn_implementation = "hdp"
    check_attention(model)


def small_llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))


@pytest.mark.parametrize(
    ("change", "policy", "message"),
    [
        (lambda m: m.half(), None, "model.embed_tokens.weight is float16: there is no gradient scaler"),
        (lambda m: None, torch.float16, "mp_policy.param_dtype is torch.float16"),
        (
            lambda m: m.lm_head.bfloat16(),
            None,
            "lm_head.weight is torch.bfloat16, model.embed_tokens.weight is torch.float32",
        ),
        (lambda m: m.lm_head.bfloat16(), torch.bfloat16, "lm_head.weight is torch.bfloat16"),  # of one group with it
        (lambda m: m.model.layers[1].bfloat16(), None, r"layers.1.self_attn.q_proj.weight is torch.bfloat16"),
        (
            lambda m: m.model.layers[1].mlp.bfloat16(),
            torch.bfloat16,
            r"layers.1.mlp.gate_proj.weight is torch.bfloat16",
        ),
    ],
)
def test_dtypes_that_cannot_be_trained_together_are_refused(change, policy, message):
    model = small_llama()
    change(model)
    with pytest.raises(ValueError, match=message):
        check_precision(model, find_layers(model), policy and MixedPrecisionPolicy(param_dtype=policy))


def test_dtypes_that_can_be_are_not():
    whole, layers, frozen = small_llama().bfloat16(), small_llama(), small_llama()
    check_precision(whole, find_layers(whole), None)
    layers.model.layers[1].bfloat16()  # gathered alone, and computed in what the policy says
    check_precision(layers, find_layers(layers), MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    frozen.model.layers[0].half().requires_grad_(False)
    check_precision(frozen, find_layers(frozen), None)


def test_what_is_no_module_is_refused():
    with pytest.raises(ValueError, match=r"the model is a str: give a torch\.nn\.Module"):
        check_unwrapped("llama")  # type: ignore[arg-type]


def test_learnt_positions_bound_documents():
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT, n_embd=32, n_layer=1, n_head=2, n_positions=48))
    opt = transformers.OPTForCausalLM(  # whose table has two rows more
        transformers.OPTConfig(**ANOTHER, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=40)
    )
    assert (learnt_positions(gpt2), learnt_positions(opt), learnt_positions(small_llama())) == (48, 40, None)
    assert trained_positions(small_llama()) == small_llama().config.max_position_embeddings
