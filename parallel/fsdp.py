"""FSDP2 in both regimes.

``step``: parameters are gathered once a step and gradients reduced once, in each rank's last micro-batch; ranks run different
numbers of micro-batches. Costs full parameters and gradients on every rank. ``slot``: parameters are gathered and gradients
reduced layer by layer in every micro-batch, for models that do not fit otherwise; every rank runs the same number.

[Note: hangs] Sharing a sequence between ranks while FSDP gathers or reduces per layer can hang: a rank waits in attention
for one that waits in a collective. So all gathers are launched, in one fixed order, before the first micro-batch, and
gradients are reduced only where ``hdp.parallel.arrangement`` has shown that every rank arrives. FSDP2's own notion of the last
backward is left alone: telling it otherwise leaves it with a stale order of prefetching.

Gradients are summed, not averaged: the loss is divided by the label tokens of the whole global batch beforehand. FSDP2 needs
that said on every wrapped module (``set_gradient_divide_factor``), together with plain sums on the wire.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hdp.balance.foresee import ADAM
from hdp.balance.held import EngineMemory
from hdp.balance.plan import REGIMES
from hdp.parallel.arrangement import Work
from hdp.parallel.collectives import Beside, forget_gradients, is_sharded, reduced_as_stored
from hdp.parallel.engine import Engine
from hdp.parallel.footprint import bare_model
from hdp.parallel.gradients import Earlier
from hdp.parallel.models import (
    check_alike,
    check_attention,
    check_mesh,
    check_precision,
    check_unwrapped,
    output_head,
)
from hdp.parallel.world import World

GLOO_GATHERS, GLOO_REDUCTIONS = 1, 1
"""Copies of what it moves that gloo makes while a gather, or a reduction, is under way."""


class FSDPEngine(Engine):
    """See the module. Made by :func:`shard`."""

    def __init__(
        self,
        model: nn.Module,
        world: World,
        regime: str = "step",
        *,
        plain_reductions: bool = False,
        dtype: torch.dtype | None = None,
        mesh: DeviceMesh | None = None,
        bare: tuple[nn.Module, list[nn.Module]] | None = None,
    ) -> None:
        super().__init__(model, world, dtype)
        self.regime, self.mesh, self.bare = regime, mesh, bare
        self._earlier = Earlier()
        self._is_running = self._has_failed = False
        self.modules: list[FSDPModule] = [m for m in model.modules() if isinstance(m, FSDPModule)]
        for module in self.modules:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            module.set_reduce_scatter_unused_params(True)
        self.beside: Beside | None = None
        """Collectives beside computation; None on devices whose streams do that."""
        if world.device.type == "cpu":
            self.beside = Beside(self.modules, self.waits, reductions=plain_reductions, layer_by_layer=regime == "slot")
        model.register_forward_pre_hook(self._forget_gathered, prepend=True)

    @property
    def root(self) -> FSDPModule:
        return self.modules[0]

    def parameters(self) -> Iterator[nn.Parameter]:
        self._forget_gathered()  # a plain forward pass leaves others in their place
        return super().parameters()

    def engine_memory(self) -> EngineMemory | None:
        mesh, groups = self.mesh, [g for m in self.modules for g in m._get_fsdp_state()._fsdp_param_groups]
        parameters = list(self.model.parameters())
        if mesh is None or not groups or not parameters:
            return None
        policy = groups[0].mp_policy
        stored = parameters[0].dtype
        reduced = policy.reduce_dtype or policy.param_dtype or stored
        is_away = any(p.device.type != self.world.device.type for p in parameters)  # offload_policy
        is_cpu = self.world.device.type == "cpu"
        return EngineMemory(
            kind="fsdp",
            regime=self.regime,
            sharers=mesh.size(mesh.ndim - 1),
            ranks=self.world.world_size,
            stored=0 if is_away else stored.itemsize,
            computed=self.dtype.itemsize,
            reduced=reduced.itemsize,
            optimizer=0.0 if is_away else ADAM * stored.itemsize,
            beside=self.beside is not None and self.beside.allowed,
            gather_copies=GLOO_GATHERS if is_cpu else 0,
            reduce_copies=GLOO_REDUCTIONS if is_cpu else 0,
        )

    def _forget_gathered(self, *_: object) -> None:
        """Before a forward pass that is not the engine's, too: what the last one gathered may be other weights by now."""
        if self._is_running:
            return
        if self._has_failed:
            self._recover()
        for module in self.modules:
            module.reshard()
        if not all(is_sharded(module) for module in self.modules):  # a forward pass of the user's own has failed
            self._recover()

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        self._forget_gathered()
        self._is_running = True
        try:
            yield
        finally:
            self._is_running = False
            self._forget_gathered()

    def _recover(self) -> None:
        """After a step that failed FSDP2 is told to forget what is under way, and what is added up already."""
        self.root._get_fsdp_state()._lazy_init()  # the first may have failed before it ran anything
        self.root.reset_iter_state()
        for module in self.modules:
            forget_gradients(module)
        if self.beside is not None:
            self.beside.forget()
        self._has_failed = False

    def _begin(self) -> None:
        self._forget_gathered()
        self._is_running = True
        reduces = torch.is_grad_enabled()
        if self.beside is not None:
            self.beside.begin(reduces=reduces)
        if reduces:
            self._earlier.put_aside(self.model.parameters())
        if self.regime == "slot":
            return
        if self.beside is not None:
            self.beside.gather()
            return
        for module in self.modules:
            module.unshard()

    def _before(self, work: Work) -> None:
        if self.beside is not None:
            self.beside.put_aside()
        if self.regime == "slot":
            return
        self.root.set_requires_gradient_sync(work.reduces)
        self.root.set_reshard_after_backward(work.reduces)

    def _end(self) -> None:
        if self.beside is not None:
            self.beside.end()
        self._is_running = False

    def _accept(self) -> None:
        self._earlier.add_back()

    def _abandon(self) -> None:
        if self.beside is not None:
            self.beside.abandon()
        self._earlier.restore()
        self._is_running, self._has_failed = False, True  # nobody is waited for here: see _recover

    def _end_evaluation(self) -> None:
        if self.beside is not None:
            self.beside.end()
        self._is_running = False
        for module in self.modules:
            module.reshard()


def shard(
    model: nn.Module,
    world: World,
    *,
    regime: str = "step",
    layers: Iterable[nn.Module] | None = None,
    mesh: DeviceMesh | None = None,
    mp_policy: MixedPrecisionPolicy | None = None,
    offload_policy: OffloadPolicy | None = None,
) -> FSDPEngine:
    """Shards ``model`` with FSDP2 over all ranks and returns the engine that trains it.

    Args:
        model: parameters in fp32 (or with ``mp_policy``); moved to this rank's device.
        world: from ``hdp.init``.
        regime: ``"step"`` or ``"slot"``, see the module; batches must be planned for the same.
        layers: modules to wrap one by one; None: the decoder layers, found by transformers' own list of modules that must
            not be split, or as the members of the longest ``nn.ModuleList``.
        mesh: None: parameters are sharded over all ranks that share sequences. A mesh of two dimensions (replicate, shard) over
            them is HSDP: sharded inside a node, replicated across.
        mp_policy: FSDP2's mixed precision; None: none, gradients reduced in fp32.
        offload_policy: FSDP2's ``CPUOffloadPolicy`` keeps parameters, gradients and optimizer state in host memory. The
            model then stays where it is, and on GPUs the process group needs a backend for both (``cpu:gloo,cuda:nccl``).

    Raises:
        ValueError: an unknown regime, attention that is not hdp's, no layers found, a model without output head, one that is
            wrapped already or differs between ranks, a mesh over other ranks, a loss that would be rounded, trained parameters
            of several dtypes, or of fp16.
    """
    if regime not in REGIMES:
        raise ValueError(f"unknown regime {regime!r}: choose one of {', '.join(REGIMES)}")
    mesh = world.mesh["hdp"] if mesh is None else mesh
    check_unwrapped(model)  # whatever is wrong is said before anything is wrapped
    wrapped = list(layers) if layers is not None else find_layers(model)
    check_mesh(mesh, world)
    check_attention(model)
    output_head(model)
    if mp_policy is not None and mp_policy.output_dtype not in (None, torch.float32, torch.float64):
        raise ValueError(
            f"mp_policy.output_dtype is {mp_policy.output_dtype}: the model's output is the loss, which would be rounded;"
            " leave it out"
        )
    check_precision(model, wrapped, mp_policy)
    check_alike(model, world)
    offloaded = isinstance(offload_policy, CPUOffloadPolicy)
    if not offloaded:
        model.to(world.device)
    computed = mp_policy.param_dtype if mp_policy is not None else None
    bare = bare_model(model, wrapped, computed)
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": regime == "slot"}
    options["mp_policy"] = mp_policy or MixedPrecisionPolicy(reduce_dtype=torch.float32)
    options["offload_policy"] = offload_policy or OffloadPolicy()
    # Weakly, for FSDP2 frees each whole parameter as it is sharded.
    before = [(name, weakref.ref(parameter)) for name, parameter in model.named_parameters()]
    for layer in wrapped:
        fully_shard(layer, **options)
    # The root's head is the first that backward needs: gathering embedding and head again would bring nothing.
    fully_shard(model, **{**options, "reshard_after_forward": False})
    mark_replaced(before, model)
    plain = mesh.ndim == 1 and not offloaded and reduced_as_stored(model, options["mp_policy"])
    if has_rare_parameters(model, wrapped):
        for layer in wrapped:  # before FSDP2's own hook, which looks at what requires gradients
            layer.register_forward_pre_hook(require_gradient, prepend=True, with_kwargs=True)
    return FSDPEngine(model, world, regime, plain_reductions=plain, dtype=computed, mesh=mesh, bare=bare)


def mark_replaced(before: list[tuple[str, weakref.ref[nn.Parameter]]], model: nn.Module) -> None:
    """From now on an optimizer that holds parameters which FSDP2 has replaced raises ValueError in its step."""
    kept = {id(parameter) for parameter in model.parameters()}
    for name, reference in before:
        parameter = reference()
        if parameter is not None and id(parameter) not in kept:
            parameter._hdp_replaced = name  # type: ignore[attr-defined]
    watch_optimizers()


@functools.cache
def watch_optimizers() -> None:
    """Once a process."""
    register_optimizer_step_pre_hook(refuse_replaced)


def refuse_replaced(optimizer: Any, args: tuple, keywords: dict[str, Any]) -> None:
    """Pre-hook of every optimizer's step: without gradients a replaced parameter would stay as it is, without a word."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if name := getattr(parameter, "_hdp_replaced", None):
                raise ValueError(
                    f"the optimizer holds {name} as it was before hdp.shard, which replaces all parameters: nothing would be"
                    " trained; make the optimizer after hdp.shard, of engine.parameters()"
                )


def find_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a model. Raises ValueError if there are none."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [m for m in model.modules() if type(m).__name__ in names]
    if not layers:
        lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
        layers = max(lists, key=len, default=[])
    if not layers:
        raise ValueError(f"found no repeated layers in {type(model).__name__}: pass layers=[...]")
    return layers


def has_rare_parameters(model: nn.Module, layers: list[nn.Module]) -> bool:
    """Whether something is trained before the layers that some rank may not use, while all else there is frozen.

    [Note: same order] FSDP2 gathers for backward, and reduces in the order of the layers, only where gradients flow. Behind
    frozen embeddings they flow on those ranks alone that used such a parameter: ranks would issue other collectives.
    So hidden states then always require gradients, which costs a backward pass through frozen first layers.
    """
    embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    if embeddings is not None and any(p.requires_grad for p in embeddings.parameters()):
        return False
    later = {id(p) for layer in layers for p in layer.parameters()}
    later |= {id(p) for p in output_head(model).parameters()}
    later |= {id(p) for m in model.modules() if type(m).__name__.endswith("Norm") for p in m.parameters()}
    return any(p.requires_grad and id(p) not in later for p in model.parameters())


def require_gradient(module: nn.Module, args: tuple, keywords: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook: hidden states that require no gradient are made to. See [Note: same order]."""
    if not torch.is_grad_enabled():
        return None
    if args and isinstance(args[0], torch.Tensor):
        return (_required(args[0]), *args[1:]), keywords
    if isinstance(keywords.get("hidden_states"), torch.Tensor):
        return args, {**keywords, "hidden_states": _required(keywords["hidden_states"])}
    return None


def _required(hidden: torch.Tensor) -> torch.Tensor:
    return hidden if hidden.requires_grad else hidden.detach().requires_grad_()
