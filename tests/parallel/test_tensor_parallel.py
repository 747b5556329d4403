"""Tensor parallelism beside HDP on a 2 x 2 mesh: the same gradients, each rank with half of the heads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import CollectiveRecorder, full_gradients, plan_batch
from tiny import exact_gradient, gradient_errors, make_documents, make_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import hdp
from hdp.offload import HostTier, OffloadEngine

CAPACITY = 64


def split(model: Any, world: hdp.World) -> None:
    """Heads and hidden units over the mesh's dimension ``tp``."""
    plan: dict[str, Any] = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    plan |= {f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
    plan |= {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    for layer in model.model.layers:
        parallelize_module(layer, world.mesh["tp"], plan)


def step(_: hdp.World, lengths: list[int], regime: str, is_offloaded: bool = False) -> Any:
    with hdp.init(device="cpu", tensor_parallel=2) as world:  # the ranks have joined: a second view of them
        model = make_model("gqa")
        split(model, world)
        engine = hdp.shard(model, world, regime=regime)
        batch = plan_batch(world, engine, make_documents(lengths), CAPACITY, planner="naive")
        with CollectiveRecorder() as recorder, OffloadEngine([HostTier()], min_bytes=64) as store:
            if is_offloaded:
                engine.activations = hdp.Activations(store=store, policy="offload", keep_first=0, keep_last=0)
            result = engine.forward_backward(batch)
            assert (store.meter.left > 0) == is_offloaded
            norm = float(engine.clip_grad_norm_(1e9))
        calls = [(name, size) for name, _, size in recorder.calls]
        return world.rank, world.world_size, result.loss, norm, full_gradients(engine), calls


@pytest.mark.parametrize("regime", ["step", "slot"])
@pytest.mark.parametrize("lengths", [[10, 115, 40, 3, 73, 21], [17]], ids=["mixed", "fewer than ranks"])
def test_gradients_are_exact(ranks, exactness, lengths, regime):
    found = ranks(4).run(step, lengths, regime)
    assert [f[:2] for f in found] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    loss, gradient = exact_gradient("gqa", make_documents(lengths))
    norm = sum(float(g.norm()) ** 2 for g in gradient.values()) ** 0.5
    assert found[0][5] == found[1][5] and found[2][5] == found[3][5]  # the two ranks of a tensor-parallel group
    assert any("all_reduce" in name for name, _ in found[0][5])
    for _, _, found_loss, found_norm, gradients, _ in found:
        assert found_loss == pytest.approx(loss, rel=1e-6)
        assert found_norm == pytest.approx(norm, rel=1e-5)
        errors = gradient_errors(gradients, gradient)
        worst = max(errors, key=errors.__getitem__)
        exactness(f"world 2 x 2, {len(lengths)} documents, naive, gqa, {regime}, tensor parallel", errors[worst], worst)
        assert errors[worst] <= 1e-5, f"{worst}: {errors[worst]:.2e}"


def offloaded(world: hdp.World, is_split: bool) -> Any:
    """Bytes that leave, and gradients, of layers whose tensors are spread over a mesh (of one rank), or plain."""
    model = make_model("gqa")
    if is_split:
        split(model, SimpleNamespace(mesh={"tp": init_device_mesh("cpu", (1,))}))
    ids = make_documents([120])[0][None]
    with OffloadEngine([HostTier()], min_bytes=64) as store:
        with store.micro_batch(model, policy="offload", ratio=1.0, tokens=120, keep_first=0, keep_last=0):
            model(ids, labels=ids, use_cache=False).loss.backward()
        grads = {name: getattr(p.grad, "_local_tensor", p.grad) for name, p in model.named_parameters()}
        return store.meter.left, store.meter.peak_device, grads


def test_what_is_spread_over_ranks_leaves_as_well(ranks):
    ((left, peak, exact),) = ranks(1).run(offloaded, False)
    ((also, beside, found),) = ranks(1).run(offloaded, True)
    assert (also, beside) == (left, peak) and left > 0
    assert all(torch.equal(found[name], gradient) for name, gradient in exact.items())


@pytest.mark.parametrize("regime", ["step", "slot"])
def test_offload_keeps_the_bits(ranks, regime):
    lengths = [10, 115, 40, 3, 73, 21]
    for plain, found in zip(
        ranks(4).run(step, lengths, regime), ranks(4).run(step, lengths, regime, True), strict=True
    ):
        assert found[2:4] == plain[2:4]
        assert all(torch.equal(found[4][name], gradient) for name, gradient in plain[4].items())


def changed(world: hdp.World) -> str:
    """A tensor of several ranks is changed after it was saved."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    weight = torch.nn.Parameter(torch.randn(64, 64))
    whole = distribute_tensor(torch.randn(64, 64), mesh, [Replicate()])
    layer = torch.nn.Identity()
    with OffloadEngine([HostTier()], min_bytes=64) as store:
        try:
            with store.micro_batch(layer, layers=[layer], policy="offload", ratio=1.0, keep_first=0, keep_last=0):
                out = layer(whole) * distribute_tensor(weight, mesh, [Replicate()])
                whole.add_(1.0)
                out.sum().backward()
        except RuntimeError as error:
            return str(error)
    return "nothing was refused"


def test_changes_of_what_is_spread_are_seen(ranks):
    assert "modified by an inplace operation" in ranks(1).run(changed)[0]


def refuse(world: hdp.World) -> str:
    try:
        hdp.init(tensor_parallel=3)
    except ValueError as error:
        return str(error)
    return "not refused"


def test_a_degree_that_does_not_divide_is_refused(ranks):
    assert all("tensor_parallel is 3: it must divide the 4 ranks" in text for text in ranks(4).run(refuse))
