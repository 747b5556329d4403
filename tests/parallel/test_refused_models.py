"""Models whose attention hdp cannot stand in for are refused by name, before the first step."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

import hdp
from hdp.parallel.models import check_attention

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
