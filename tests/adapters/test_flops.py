"""Model FLOPs against torch's own counter, which looks at every matrix product."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MixtralConfig, MixtralForCausalLM

from hdp.parallel.flops import AttentionShape, ModelFlops

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


def counted(model: torch.nn.Module, lengths: list[int], *, backward: bool) -> int:
    """Eager attention multiplies every query with every key, which torch's counter sees."""
    total = 0
    for length in lengths:
        with FlopCounterMode(display=False) as counter:
            output = model(input_ids=torch.zeros(1, length, dtype=torch.int64), use_cache=False).logits
            if backward:
                output.sum().backward()
        flops = counter.get_flop_counts()
        rotary = sum(
            sum(f.values()) for name, f in flops.items() if name.endswith("rotary_emb")
        )  # angles, not the model
        total += sum(flops["Global"].values()) - rotary
    return total


@pytest.mark.parametrize("tied", [False, True])
def test_dense_model_to_the_last_flop(tied):
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied, attn_implementation="eager"))
    flops = ModelFlops.of(model)
    assert flops.forward([7, 20], causal=False) == counted(model, [7, 20], backward=False)
    assert flops.step([7, 20], causal=False) == counted(model, [7, 20], backward=True)


def test_frozen_weights_cost_no_weight_gradient():
    peft = pytest.importorskip("peft")
    model = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager"))
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    flops = ModelFlops.of(model)
    assert flops.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert flops.forward([20], causal=False) == counted(model, [20], backward=False)
    # Nothing below the first layer is trained, so the gradient of that layer's inputs is left out by autograd.
    first = model.base_model.model.model.layers[0].self_attn
    untouched = ("k_proj.weight", "base_layer.weight", "lora_A.default.weight")
    spared = 2 * 20 * sum(p.numel() for name, p in first.named_parameters() if name.endswith(untouched))
    # ... and of its keys, which come from frozen weights, the gradient of the product as well.
    keys = 2 * 20 * 20 * SIZES["num_attention_heads"] * SIZES["head_dim"]
    assert flops.step([20], causal=False) - counted(model, [20], backward=True) == spared + keys


def test_experts_count_as_often_as_tokens_meet_them():
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=6, num_experts_per_tok=2))
    dense = LlamaForCausalLM(LlamaConfig(**SIZES))
    one_expert = 3 * SIZES["hidden_size"] * SIZES["intermediate_size"]
    router = 6 * SIZES["hidden_size"]
    expected = ModelFlops.of(dense).trained + SIZES["num_hidden_layers"] * (one_expert + router)
    assert ModelFlops.of(model).trained == expected


def brute_pairs(length: int, window: int | None) -> int:
    distance = np.arange(length)[:, None] - np.arange(length)[None, :]
    return int(((distance >= 0) & (distance < (window or length))).sum())


@pytest.mark.parametrize("window", [None, 1, 5, 16, 100])
def test_pairs_are_those_that_a_query_may_see(window):
    shape = AttentionShape(heads=1, qk_dim=1, v_dim=1, window=window)
    lengths = np.array([1, 4, 5, 6, 30])
    assert shape.pairs(lengths) == sum(brute_pairs(length, window) for length in lengths)


def test_packing_changes_nothing_and_long_documents_do_not_overflow():
    flops = ModelFlops.of(LlamaForCausalLM(LlamaConfig(**SIZES)))
    assert flops.step([100] * 8) < flops.step([800])
    assert flops.step([100] * 8) == 8 * flops.step([100])
    pairs = 10**7 * (10**7 + 1) // 2
    attention = 3 * SIZES["num_hidden_layers"] * SIZES["num_attention_heads"] * 4 * SIZES["head_dim"] * pairs * 10**5
    assert flops.step([10**7] * 10**5) == 6 * flops.trained * 10**12 + attention


def test_windows_come_from_the_config():
    config = MistralConfig(**SIZES, sliding_window=9)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.config = config
    assert {layer.window for layer in ModelFlops.of(model).attention} == {9}


def test_unknown_layers_are_refused():
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(ValueError, match="'linear_attention' are not attention"):
        ModelFlops.of(model)
    with pytest.raises(ValueError, match="Linear has no transformers config"):
        ModelFlops.of(torch.nn.Linear(2, 2))
