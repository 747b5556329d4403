"""Distributed attention as a torch operator, ``torch.ops.hdp.attend``, with a backward of its own.

As an operator it is seen whole by saved-tensor hooks, selective checkpointing (keep its outputs, and recomputation sends
nothing) and torch.compile. The route travels as a handle, in the arguments and among the saved tensors, never in a
thread-local: CUDA runs backward on other threads, and pipelines interleave micro-batches. Beside it lies the name of the
forward call, an output of the operator: backward is that of the same call on every rank, see [Note: call names].
"""

from __future__ import annotations

import math
from array import array
from typing import Any

import torch
from torch import Tensor

from hdp.attention.backends import Scoring
from hdp.attention.bound import Bound
from hdp.attention.calls import RunningCall
from hdp.attention.delta import delta_of
from hdp.attention.executor import Run, drive
from hdp.attention.mask import Mask
from hdp.attention.program import HeadCount
from hdp.attention.route import ROUTES, LayerKey, Route


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    route: Route,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Attention of one micro-batch, within each sequence, over the ranks that share it.

    Args:
        q: [tokens, heads, head_dim], packed as ``route`` says. k, v: [tokens, key_heads, head_dim].
        route: the micro-batch's route.
        scale: of the scores; None: head_dim ** -0.5.
        causal: no query sees a later key. window: tokens that a query sees, its own included; None: all.
        softcap: scores become softcap * tanh(score / softcap); 0: they stay as they are.

    Returns:
        [tokens, heads, head_dim], q's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit each other or the route; a window below 1 or no whole number; a
            scale that is not finite, a softcap that is negative or infinite; what the backend cannot compute.
        PeerError: another rank failed, fell silent, or describes a shared sequence otherwise.
    """
    _check(q, k, v, route)
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        raise ValueError(
            f"window is {window!r}: give a whole number of tokens, the query's own included, so 1 or more; None for no window"
        )
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap is {softcap}: give the positive bound of the scores, or 0 for none")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}: scores are multiplied by a finite number; None for head_dim ** -0.5")
    reach = 0 if window is None else window
    out, *_ = torch.ops.hdp.attend(q, k, v, route.handle, scale, causal, reach, float(softcap))
    return out


def _check(q: Tensor, k: Tensor, v: Tensor, route: Route) -> None:
    if not isinstance(route, Route):
        raise ValueError(f"route is a {type(route).__name__}: give the hdp.Route of this micro-batch")
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"attend takes q [tokens, heads, head_dim] and k, v [tokens, key_heads, head_dim],"
            f" not {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if 0 in (q.shape[1], k.shape[1], q.shape[2]) or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{q.shape[1]} query heads over {k.shape[1]} key/value heads of dimension {q.shape[2]}: heads and their dimension"
            " are 1 or more, and the first number a multiple of the second"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v must have one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    if q.shape[0] != route.tokens:
        raise ValueError(f"q has {q.shape[0]} tokens but this rank's part of the micro-batch has {route.tokens}")


def _key(q: Tensor, k: Tensor, causal: bool, window: int) -> LayerKey:
    return LayerKey(
        heads=HeadCount(query=q.shape[1], key=k.shape[1]),
        head_dim=q.shape[2],
        dtype=q.dtype,
        mask=Mask(causal=causal, window=window or None),
    )


@torch.library.custom_op("hdp::attend", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, route: Tensor, scale: float, causal: bool, window: int, softcap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    number = int(route.item())
    path, key = ROUTES.get(number), _key(q, k, causal, window)
    program, executor, scoring = path.program(key, False), path.runtime.executor(q.dtype), Scoring(scale, softcap)
    executor.backend.check(scoring, q.shape[2])
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=program.sum_dtype, device=q.device)
    kept = torch.empty(program.lowered.kept_bytes, dtype=torch.uint8, device=q.device)
    inputs = _laid_out(program, q=q, k=k, v=v)
    tensors = program.bind([*inputs, out, lse], kept)
    name = path.calls.begin()
    _drive(executor.run(program, tensors, scoring, (*path.serial, name)), path, name, is_backward=False)
    # From an array: a third of the time of torch.tensor (3 against 11 us on a busy core).
    return out, lse, kept, torch.frombuffer(array("q", (number, name)), dtype=torch.int64)


def _drive(run: Run, path: Route, name: int, is_backward: bool) -> None:
    """Runs to the end; the channel knows meanwhile, and after a failure, which call it serves."""
    channel = path.runtime.channel
    channel.call = RunningCall(path.serial, name, is_backward)
    drive(run)
    channel.call = None


def _laid_out(program: Bound, **tensors: Tensor) -> list[Tensor]:
    """Tensors whose head_dim is dense; those that are sent as they lie are dense as a whole."""
    return [t.contiguous() if name in program.dense or t.stride(-1) != 1 else t for name, t in tensors.items()]


@_attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, route: Tensor, scale: float, causal: bool, window: int, softcap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    kept = torch.library.get_ctx().new_dynamic_size()
    return (
        torch.empty(q.shape, dtype=q.dtype, device=q.device),
        torch.empty(q.shape[:2], dtype=lse_dtype, device=q.device),
        torch.empty(kept, dtype=torch.uint8, device=q.device),
        torch.empty(2, dtype=torch.int64),
    )


@torch.library.custom_op("hdp::attend_backward", mutates_args=())
def _attend_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kept: Tensor,
    call: Tensor,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    number, name = call.tolist()
    path, key = ROUTES.get(number), _key(q, k, causal, window)
    program, executor = path.program(key, True), path.runtime.executor(q.dtype)
    inputs = _laid_out(program, q=q, k=k, v=v, do=do)
    delta = lse.new_empty(0)
    if program.sends_delta:
        delta = delta_of(inputs[3], out)
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    tensors = program.bind([*inputs, out, lse, delta, dq, dk, dv], kept)
    path.calls.begin_backward(name)
    run = executor.run(program, tensors, Scoring(scale, softcap), (*path.serial, name))
    _drive(run, path, name, is_backward=True)
    return dq, dk, dv


@_attend_backward.register_fake
def _(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kept: Tensor,
    call: Tensor,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    return dq, dk, dv


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, _, ctx.scale, ctx.causal, ctx.window, ctx.softcap = inputs
    out, lse, kept, call = output
    ctx.mark_non_differentiable(lse, kept, call)
    ctx.save_for_backward(q, k, v, out, lse, kept, call)


def _backward(ctx: Any, do: Tensor, *_: Tensor | None) -> tuple:
    q, k, v, out, lse, kept, call = ctx.saved_tensors
    options = (ctx.scale, ctx.causal, ctx.window, ctx.softcap)
    grads = torch.ops.hdp.attend_backward(do, q, k, v, out, lse, kept, call, *options)
    return (*grads, None, None, None, None, None)


_attend.register_autograd(_backward, setup_context=_setup_context)
