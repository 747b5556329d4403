"""Unchanged transformers models on two real ranks: logits and gradients are those of float64, document by document."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Ranks, RanksFailed
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hdp.attention.huggingface import planned_mask, register
from hdp.attention.layout import make_layout
from hdp.attention.route import AttentionRuntime, Route, RouteShard

SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
GQA = {**SMALL, "num_key_value_heads": 2, "head_dim": 16}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GQA),
    "qwen2": ("Qwen2Config", {k: v for k, v in GQA.items() if k != "head_dim"}),
    "qwen3": ("Qwen3Config", GQA),
    "mistral": ("MistralConfig", {**GQA, "sliding_window": 10}),
    "gemma2": (
        "Gemma2Config",
        {**GQA, "sliding_window": 10, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **GQA,
            "sliding_window": 10,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", SMALL),
    "qwen2_moe": (  # its attention is told of the window by the mask alone
        "Qwen2MoeConfig",
        {
            **{k: v for k, v in GQA.items() if k != "head_dim"},
            "use_sliding_window": True,
            "sliding_window": 10,
            "max_window_layers": 2,
            "layer_types": ["sliding_attention", "sliding_attention"],
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
    ),
}
# (tokens, ranks): one shared, with fewer and more tokens than the window; the others whole
SEQUENCES = ((37, (1, 0)), (9, (0,)), (14, (1,)), (3, (0, 1)))


def make_model(name: str) -> nn.Module:
    import transformers

    config_name, fields = CONFIGS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**fields)
    if "moe" in name:  # the default has no float64
        config._experts_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.float()


def document(number: int) -> tuple[Tensor, Tensor]:
    """Token ids, and a weight for every logit."""
    draw = torch.Generator().manual_seed(100 + number)
    length = SEQUENCES[number][0]
    return torch.randint(0, 64, (length,), generator=draw), torch.randn(length, 64, generator=draw)


class Wide(TorchFunctionMode):
    """transformers computes norms, rotations and softmax in fp32 whatever the weights: not in here, it is float64."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        args = [torch.float64 if a is torch.float32 else a for a in args]
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return function(*args, **kwargs)


def exact(name: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Logits of each document, and the gradients of all of them together: eager attention, float64 throughout."""
    model = make_model(name).double()
    logits = []
    with Wide():
        for number in range(len(SEQUENCES)):
            ids, weights = document(number)
            logits.append(model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0])
            (logits[-1] * weights).sum().backward()
    return [x.detach() for x in logits], {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def shared(world: Any, name: str, backend: str) -> tuple[float, float]:
    """On every rank: the largest error of the logits, and of the gradients summed over both ranks."""
    want_logits, want_grads = exact(name)
    model = make_model(name)
    model.set_attn_implementation("hdp")
    runtime = AttentionRuntime(world.rank, world.channel, world.device, backend)
    ids, positions, weights, expected, shards = [], [], [], [], []
    for number, (length, group) in enumerate(SEQUENCES):
        if world.rank not in group:
            continue
        schedule = "ring" if len(group) > 1 else "local"
        shards.append(
            RouteShard(sequence=number, length=length, group=group, schedule=schedule, schedule_backward=schedule)
        )
        tokens, weight = document(number)
        for start, stop in make_layout("zigzag", length, len(group)).shard_ranges(group.index(world.rank)):
            ids.append(tokens[start:stop])
            positions.append(torch.arange(start, stop))
            weights.append(weight[start:stop])
            expected.append(want_logits[number][start:stop])
    route = Route(runtime, shards)
    logits = model(
        input_ids=torch.cat(ids).unsqueeze(0),
        position_ids=torch.cat(positions).unsqueeze(0),
        attention_mask=planned_mask(world.device),
        use_cache=False,
        hdp_route=route,
    ).logits[0]
    (logits * torch.cat(weights)).sum().backward()
    wrong = (logits.detach() - torch.cat(expected)).abs().max().item() / max(x.abs().max().item() for x in want_logits)
    whole = sum(g.norm().item() ** 2 for g in want_grads.values()) ** 0.5
    worst = 0.0
    for key, parameter in model.named_parameters():
        if key in want_grads:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(grad)
            difference = (grad - want_grads[key]).norm().item()
            worst = max(worst, difference / max(want_grads[key].norm().item(), 1e-3 * whole))
    return wrong, worst


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "gemma2"])
def test_logits_and_gradients(ranks: Callable[[int], Ranks], name: str) -> None:
    for wrong, worst in ranks(2).run(shared, name, "cpu"):
        assert wrong <= 1e-5 and worst <= 1e-5


def test_a_soft_cap_where_the_backend_knows_it(ranks: Callable[[int], Ranks]) -> None:
    for wrong, worst in ranks(2).run(shared, "gemma2", "reference"):
        assert wrong <= 1e-5 and worst <= 1e-5


def test_a_soft_cap_is_refused_elsewhere(ranks: Callable[[int], Ranks]) -> None:
    with pytest.raises(RanksFailed, match=r"'cpu' has no logit soft-cap \(this layer asks for 2\.0\)"):
        ranks(2).run(shared, "gemma2", "cpu")


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_evaluation_outside_a_planned_batch(name: str) -> None:
    """Padded rows and generation with and without a cache, for windows and soft-caps, too: as eager attention does it."""
    register()
    theirs, ours = make_model(name).eval(), make_model(name).eval()
    ours.set_attn_implementation("hdp")
    ids = torch.stack([document(0)[0][:24], document(0)[0][13:37]])
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    for attention_mask in (None, mask):
        want, found = (m(input_ids=ids, attention_mask=attention_mask).logits for m in (theirs, ours))
        rows = mask.bool() if attention_mask is not None else torch.ones_like(ids, dtype=torch.bool)
        torch.testing.assert_close(found[rows], want[rows], rtol=1e-4, atol=1e-5)
    for use_cache in (True, False):
        options = {
            "attention_mask": mask,
            "max_new_tokens": 6,
            "do_sample": False,
            "use_cache": use_cache,
            "pad_token_id": 0,
        }
        assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))
