"""The attention function of transformers: outside a planned batch it is sdpa, inside one nothing is dropped in silence."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "parallel"))
from tiny import make_documents, make_model
from transformers import MistralConfig, MistralForCausalLM

from hdp.attention import attend
from hdp.attention.channel import VirtualNetwork
from hdp.attention.huggingface import hdp_attention, hdp_mask, planned_mask, register
from hdp.attention.route import AttentionRuntime, Route, RouteShard

register()


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """The same weights with hdp's attention and with transformers' sdpa."""
    return make_model(attention="hdp").eval(), make_model(attention="sdpa").eval()


IDS = torch.stack(make_documents([24, 24, 24]))
PADDING = torch.ones_like(IDS)
PADDING[0, :9] = 0  # left, as for generation
PADDING[2, 17:] = 0  # right


@torch.no_grad()
def test_a_plain_forward_is_sdpa(models):
    ours, theirs = (model(input_ids=IDS).logits for model in models)
    assert torch.equal(ours, theirs)


@torch.no_grad()
def test_a_padding_mask_is_honoured(models):
    ours, theirs = (model(input_ids=IDS, attention_mask=PADDING).logits for model in models)
    assert torch.equal(ours[PADDING.bool()], theirs[PADDING.bool()])
    without = models[0](input_ids=IDS).logits
    assert not torch.equal(ours[0, 9:], without[0, 9:])  # it made a difference


def test_gradients_of_a_plain_forward_are_those_of_sdpa():
    found = []
    for attention in ("hdp", "sdpa"):
        model = make_model(attention=attention)
        model(input_ids=IDS, attention_mask=PADDING, labels=IDS).loss.backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_generation_is_that_of_sdpa(models, padded, use_cache):
    mask = PADDING.clone()
    mask[2] = 1  # generation takes padding on the left
    options = {"max_new_tokens": 8, "do_sample": False, "use_cache": use_cache}
    ours, theirs = (
        model.generate(IDS, attention_mask=mask if padded else torch.ones_like(IDS), **options) for model in models
    )
    assert torch.equal(ours, theirs) and ours.shape[1] > IDS.shape[1]


def planned(model: Any, lengths: list[int], vocabulary: int = 101, **keywords: Any) -> torch.Tensor:
    """Logits of documents packed behind each other on one rank."""
    runtime = AttentionRuntime(0, VirtualNetwork().channel(0), torch.device("cpu"))
    shards = [RouteShard(sequence=i, length=length, group=(0,)) for i, length in enumerate(lengths)]
    route = Route(runtime, shards)
    documents = make_documents(lengths)
    fields = {
        "input_ids": torch.cat(documents)[None] % vocabulary,
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "attention_mask": planned_mask(torch.device("cpu")),
        "use_cache": False,
        "hdp_route": route,
        **keywords,
    }
    return model(**fields).logits[0]


@torch.no_grad()
def test_a_planned_batch_keeps_documents_apart(models):
    lengths = [11, 30, 1, 7]
    packed = planned(models[0], lengths)
    alone = torch.cat([models[1](input_ids=ids[None]).logits[0] for ids in make_documents(lengths)])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 5])
def test_a_model_that_is_told_to_see_later_tokens(window):
    """``config.is_causal``, with and without a window that counts in another way than causal ones do."""
    lengths = [11, 30, 1, 7]
    config = MistralConfig(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=window, is_causal=False, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    ours = MistralForCausalLM(config).eval()
    theirs = copy.deepcopy(ours)
    ours.set_attn_implementation("hdp")
    theirs.set_attn_implementation("eager")
    packed = planned(ours, lengths)
    alone = torch.cat([theirs(input_ids=ids[None]).logits[0] for ids in make_documents(lengths)])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
    ours.config.is_causal = True
    assert not torch.allclose(planned(ours, lengths), packed, atol=1e-2)


def test_a_layer_and_a_mask_that_disagree_are_refused(models):
    attention = models[0].model.layers[0].self_attn
    forward = attention.forward
    attention.forward = lambda *args, **keywords: forward(*args, **{**keywords, "is_causal": False})
    try:
        with pytest.raises(
            ValueError, match="LlamaAttention is bidirectional and its mask is causal: both must be the same"
        ):
            planned(models[0], [11, 7])
    finally:
        del attention.forward


REFUSED = [
    ("takes no attention mask", {"attention_mask": torch.zeros(1, 1, 18, 18, dtype=torch.bool)}),
    ("attention keyword 's_aux'", {"s_aux": torch.zeros(4)}),
    ("has no logit soft-cap", {"softcap": 30.0}),
]


@pytest.mark.parametrize(("message", "keywords"), REFUSED, ids=[message for message, _ in REFUSED])
def test_what_a_planned_batch_cannot_honour_is_refused(models, message, keywords):
    with pytest.raises(ValueError, match=message):
        planned(models[0], [11, 7], **keywords)


def test_a_two_dimensional_padding_mask_is_refused(models):
    """transformers turns it into a 4-D mask by itself."""
    mask = torch.ones(1, 18, dtype=torch.long)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="takes no attention mask"):
        planned(models[0], [11, 7], attention_mask=mask)


SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def test_chunked_attention_is_refused():
    """Llama 4 tells attention nothing of its chunks: they are in the mask alone."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        **SMALL,
        attention_chunk_size=16,
        num_local_experts=2,
        intermediate_size_mlp=48,
        no_rope_layers=[1, 1],
        layer_types=["chunked_attention"] * 2,
    )
    model = Llama4ForCausalLM._from_config(config, attn_implementation="hdp").eval()
    with pytest.raises(ValueError, match=r"chunked attention \(Llama4TextConfig\) is not supported in a planned batch"):
        planned(model, [40], vocabulary=64)


def odd_masks() -> dict[str, Any]:
    return {
        "or_mask_function": lambda batch, head, q, k: k < 3,
        "and_mask_function": lambda batch, head, q, k: (q - k) % 2 == 0,
        "block_sequence_ids": torch.zeros(1, 18, dtype=torch.long),
    }


@pytest.mark.parametrize("what", odd_masks())
def test_a_pattern_of_the_models_own_is_refused(models, what):
    """What a model adds to its mask reaches attention in no other way."""
    from transformers.masking_utils import create_causal_mask

    fields = {
        "inputs_embeds": torch.zeros(1, 18, 8),
        "attention_mask": planned_mask(torch.device("cpu")),
        "cache": None,
    }
    assert create_causal_mask(models[0].config, **fields).shape == (1, 1, 0, 0)
    with pytest.raises(ValueError, match="is not supported in a planned batch: each layer's attention must be causal"):
        create_causal_mask(models[0].config, **fields, **{what: odd_masks()[what]})


@torch.no_grad()
@pytest.mark.parametrize("is_bidirectional", [False, True])
def test_windows_and_both_directions_are_computed(is_bidirectional):
    """Gemma 3 makes a causal mask and lets it see the rest when it embeds texts."""
    from transformers import Gemma3TextConfig, Gemma3TextModel

    config = Gemma3TextConfig(
        **SMALL,
        sliding_window=10,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
        use_bidirectional_attention=is_bidirectional,
    )
    model = Gemma3TextModel._from_config(config, attn_implementation="eager").eval().float()
    ids = make_documents([40])[0] % 64
    want = model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    model.set_attn_implementation("hdp")
    runtime = AttentionRuntime(0, VirtualNetwork().channel(0), torch.device("cpu"))
    found = model(
        input_ids=ids[None],
        position_ids=torch.arange(40)[None],
        attention_mask=planned_mask(torch.device("cpu")),
        use_cache=False,
        hdp_route=(route := Route(runtime, [RouteShard(sequence=0, length=40, group=(0,))])),
    ).last_hidden_state[0]
    assert route.tokens == 40
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


def width_of(*windows: int) -> int:
    """Of the mask that stands for these windows together in a planned batch."""
    from transformers.masking_utils import and_masks, causal_mask_function, sliding_window_overlay

    function = causal_mask_function
    for window in windows:
        function = and_masks(sliding_window_overlay(window), function)
    mask = hdp_mask(attention_mask=planned_mask(torch.device("cpu")), mask_function=function, config=None)
    assert mask.shape[:3] == (1, 1, 0)
    return mask.shape[3]


def test_the_narrowest_window_counts():
    assert [width_of(), width_of(9), width_of(5, 9), width_of(9, 5)] == [0, 9, 5, 5]


@pytest.mark.parametrize(("width", "told", "window"), [(0, None, None), (0, 7, 7), (7, None, 7), (7, 7, 7)])
def test_a_window_comes_with_the_call_or_with_the_mask(width, told, window):
    route = Route(
        AttentionRuntime(0, VirtualNetwork().channel(0), torch.device("cpu")),
        [RouteShard(sequence=0, length=18, group=(0,))],
    )
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 18, 8) for heads in (4, 2, 2))
    mask = torch.empty((1, 1, 0, width), dtype=torch.bool)
    out, _ = hdp_attention(torch.nn.Module(), q, k, v, mask, sliding_window=told, hdp_route=route)
    want = attend(*(t[0].transpose(0, 1) for t in (q, k, v)), route=route, window=window)
    assert torch.equal(out[0], want)
    with pytest.raises(ValueError, match="a sliding window of 8 tokens, and its mask one of 7: both must be the same"):
        hdp_attention(torch.nn.Module(), q, k, v, mask.new_empty(1, 1, 0, 7), sliding_window=8, hdp_route=route)


def test_a_batch_of_two_rows_is_refused(models):
    with pytest.raises(ValueError, match="batch size 1, not 2"):
        planned(models[0], [11, 7], input_ids=IDS[:2, :18], position_ids=torch.arange(18).expand(2, -1))


def test_dropout_is_refused_while_training():
    model = make_model(attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"attention dropout 0\.1"):
        planned(model.train(), [11, 7])
    assert planned(model.eval(), [11, 7]).shape == (18, 101)


def test_tokens_that_do_not_fit_the_route_are_refused(models):
    with pytest.raises(ValueError, match="q has 20 tokens but this rank's part of the micro-batch has 18"):
        planned(models[0], [11, 7], input_ids=IDS[:1, :20], position_ids=torch.arange(20)[None])
