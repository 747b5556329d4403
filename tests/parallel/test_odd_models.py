"""Models with frozen, tied, unused and rarely used parameters: the gradient of one process under every engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import ENGINES, full_gradients, make_engine, make_model, plan_batch, regime_of, worlds_of
from tiny import exact_gradient, gradient_errors, loss_sums, make_documents, make_reference

import hdp

CAPACITY = 64
LIMIT = 1e-5
LENGTHS = [30, 20, 40, 50]


class Odd(torch.nn.Module):
    """Adds to a causal model a parameter that nothing uses, and one that only tokens of one kind use."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        hdp.register_attention()
        self.inner = make_model()
        self.config = self.inner.config
        self.unused = torch.nn.Parameter(torch.ones(3))
        self.rare = torch.nn.Parameter(torch.full((self.config.hidden_size,), 0.1))
        if frozen:
            self.inner.model.embed_tokens.weight.requires_grad_(False)
            self.inner.model.layers[0].requires_grad_(False)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.inner.lm_head

    def forward(self, input_ids: torch.Tensor, **keywords: Any) -> Any:
        embedded = self.inner.model.embed_tokens(input_ids)
        marked = (input_ids == 100).unsqueeze(-1)
        if bool(marked.any()):
            embedded = embedded + marked * self.rare
        return self.inner(inputs_embeds=embedded, **keywords)


def odd_documents(rare: bool) -> list[torch.Tensor]:
    """Token 100 stands in the second document alone, or nowhere."""
    documents = [ids.clamp(max=99) for ids in make_documents(LENGTHS)]
    if rare:
        documents[1][::3] = 100
    return documents


def odd_step(world: hdp.World, name: str, frozen: bool, rare: bool) -> Any:
    model = Odd(frozen)
    layers = {"layers": list(model.inner.model.layers)} if name.startswith("fsdp") else {}  # a user's own list
    engine = hdp.shard(model, world, regime=regime_of(name), **layers) if layers else make_engine(world, name, model)
    engine.forward_backward(plan_batch(world, engine, odd_documents(rare), CAPACITY, planner="naive"))
    return full_gradients(engine)


REFUSED = ("zero2", "zero3")
"""A parameter that only one rank uses; see ``hdp.parallel.deepspeed``."""


CASES = [(name, frozen, rare) for name in ENGINES for frozen in (False, True) for rare in (False, True)]


@pytest.mark.parametrize(("name", "frozen", "rare"), [case for case in CASES if not (case[0] in REFUSED and case[2])])
def test_unused_rare_and_frozen_parameters(ranks, name, frozen, rare):
    found = ranks(worlds_of(name)[0]).run(odd_step, name, frozen, rare)
    exact = odd_reference(rare)
    for gradients in found:
        for name_ in ("unused",) if rare else ("unused", "rare"):
            gradient = gradients.pop(name_)
            assert gradient is None or not gradient.any()
        assert ("inner.model.embed_tokens.weight" in gradients) != frozen
        errors = gradient_errors(gradients, {k: v for k, v in exact.items() if k in gradients})
        assert max(errors.values()) <= LIMIT, errors


def refused(world: hdp.World, name: str) -> str:
    with pytest.raises(ValueError, match="only ranks") as error:
        odd_step(world, name, frozen=False, rare=True)
    return str(error.value)


@pytest.mark.parametrize("name", REFUSED)
def test_a_parameter_that_one_rank_uses_is_refused_by_all(ranks, name):
    found = ranks(2).run(refused, name)
    assert found[0] == found[1] and "use the parameter rare in this micro-batch" in found[0]


def odd_reference(rare: bool) -> dict[str, torch.Tensor]:
    model = Odd()
    model.inner = make_reference()
    model.double()
    total, weight = loss_sums(model, odd_documents(rare))
    (total / weight).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def tied_step(world: hdp.World, name: str) -> Any:
    engine = make_engine(world, name, make_model(tie_word_embeddings=True))
    engine.forward_backward(plan_batch(world, engine, make_documents(LENGTHS), CAPACITY, planner="naive"))
    return full_gradients(engine)


@pytest.mark.parametrize("name", ENGINES)
def test_tied_embeddings(ranks, name):
    _, exact = exact_gradient("gqa", make_documents(LENGTHS), tie_word_embeddings=True)
    for gradients in ranks(worlds_of(name)[-1]).run(tied_step, name):
        errors = gradient_errors(gradients, exact)
        assert max(errors.values()) <= LIMIT, errors
