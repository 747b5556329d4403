"""How fast each rank computes a model: attention from small tiles to large ones, a layer of each kind, and the output head.

All ranks compute at once, so that what they share (memory, power, cores) is shared as in training; each keeps its own times.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hdp.attention.huggingface import planned_mask
from hdp.attention.op import attend
from hdp.balance.machine import Tile
from hdp.balance.measured import fit_terms
from hdp.balance.models import ModelShape
from hdp.parallel.loss import loss_sum
from hdp.parallel.metrics import gather_numbers
from hdp.parallel.profile_host import Clock, micro_batch
from hdp.parallel.skeleton import Call, Kind, NotSampled, Sample, record_calls
from hdp.parallel.world import World

TILES = (16, 64, 256, 1024, 4096)
"""Tokens of the documents whose attention is timed, as far as the time goes."""
LENGTHS = (16, 64, 256, 1024, 4096)
"""Tokens of the micro-batches on which layers are timed, as far as the time goes."""
LEAST = 2
"""Of each as many are timed whatever they take."""
RUNS = 9
"""Of each at most; the median counts."""
GROWTH = 5.0
"""What four times the length may take, at most, for all that is timed."""
HEAD_WEIGHTS = 1 << 23
"""Elements of the output head that are timed: a larger one takes as much longer as it has more rows."""
HEAD_TOKENS = 64

Pair = tuple[float, float]
"""Seconds of forward and of backward."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One rank's times of a kind of layer."""

    tokens: tuple[int, ...]
    seconds: tuple[Pair, ...]
    kept: float
    """Bytes a token that it keeps from forward to backward."""


class Stopwatch:
    """Times what all ranks do at once: the same lengths everywhere, as many runs of each as one rank's time allows."""

    def __init__(self, world: World, clock: Clock) -> None:
        self.world, self.clock = world, clock

    def slowest(self, seconds: float) -> float:
        """Of all ranks."""
        return float(gather_numbers(self.world, seconds)[:, 0].max())

    def growing(
        self, lengths: Sequence[int], budget: float, make: Callable[[int], Callable[[], Pair]], least: int = LEAST
    ) -> tuple[tuple[int, ...], tuple[Pair, ...]]:
        """``make(length)()`` runs once and says what it took. Lengths and their times, while ``budget`` seconds last."""
        done: list[int] = []
        times: list[Pair] = []
        begin = time.perf_counter()
        for number, length in enumerate(lengths):
            run = make(length)
            dist.barrier(group=self.world.control)
            start = time.perf_counter()
            runs = [run()]  # compiles, allocates, lowers
            first = time.perf_counter() - start
            share = budget / (2.0 * len(lengths))
            if first < share:  # else that hardly counts, and there is no time for another
                runs = [run()]
            while first < share and len(runs) < RUNS and time.perf_counter() - start < share + first:
                runs.append(run())
            done.append(length)
            times.append((statistics.median(r[0] for r in runs), statistics.median(r[1] for r in runs)))
            spent = self.slowest(time.perf_counter() - begin)
            once = self.slowest(sum(runs[-1]))
            if number + 1 >= least and spent + 2.0 * GROWTH * once > budget:
                break
        return tuple(done), tuple(times)


def time_tiles(watch: Stopwatch, shape: ModelShape, dtype: torch.dtype, budget: float) -> tuple[Tile, ...]:
    """Attention of one document on one rank, by its length; on CPUs of a few heads, for all of them take that much longer."""
    world = watch.world
    group = shape.heads // shape.kv_heads
    some = -(-min(torch.get_num_threads(), shape.heads) // group) * group
    heads = shape.heads if world.device.type == "cuda" else min(some, shape.heads)

    def make(length: int) -> Callable[[], Pair]:
        inputs = micro_batch(world, [torch.zeros(length, dtype=torch.int64)], [(world.rank,)])()

        def tensor(heads: int) -> Tensor:
            return torch.randn(length, heads, shape.head_dim, dtype=dtype, device=world.device, requires_grad=True)

        q, k, v = tensor(heads), tensor(heads // group), tensor(heads // group)

        def run() -> Pair:
            start = watch.clock()
            out = attend(q, k, v, route=inputs.route)
            middle = watch.clock()
            torch.autograd.grad(out, (q, k, v), out)
            return middle - start, watch.clock() - middle

        return run

    lengths, times = watch.growing(TILES, budget, make, least=3)
    launch, more = times[0], shape.heads / heads  # the shortest is all launch, which more heads do not take again
    return tuple(
        Tile(tokens=n, forward=launch[0] + more * (f - launch[0]), backward=launch[1] + more * (b - launch[1]))
        for n, (f, b) in zip(lengths, times, strict=True)
    )


def call_layers(sample: Sample, world: World, length: int) -> list[Call]:
    """How a forward pass over one document of so many tokens calls each kind of layer."""
    return record_calls(sample, passage(sample.model, world, length))


def passage(model: nn.Module, world: World, length: int) -> Callable[[], Any]:
    """A forward pass of one document of so many tokens on one rank."""
    inputs = micro_batch(world, [torch.zeros(length, dtype=torch.int64)], [(world.rank,)])()
    return lambda: model(
        input_ids=inputs.input_ids.unsqueeze(0),
        position_ids=inputs.position_ids.unsqueeze(0),
        attention_mask=planned_mask(world.device),
        use_cache=False,
        hdp_route=inputs.route,
    )


def time_layers(watch: Stopwatch, sample: Sample, budget: float) -> list[Timed]:
    """Each kind of layer, by the tokens of one document."""
    share = budget / len(sample.kinds)
    calls: dict[int, list[Call]] = {}

    def call(length: int, number: int) -> Call:
        if length not in calls:
            calls[length] = call_layers(sample, watch.world, length)
        return calls[length][number]

    found = []
    for number, kind in enumerate(sample.kinds):

        def make(length: int, number: int = number, kind: Kind = kind) -> Callable[[], Pair]:
            return _runner(watch, kind.layer, call(length, number))

        tokens, seconds = watch.growing(LENGTHS, share, make)
        some = tokens[:LEAST][-1]
        kept = _kept_bytes(kind.layer, call(some, number)) / some
        found.append(Timed(tokens=tokens, seconds=seconds, kept=kept))
    return found


def _runner(watch: Stopwatch, layer: nn.Module, call: Call) -> Callable[[], Pair]:
    hidden = torch.randn_like(call.hidden).requires_grad_()
    arguments, keywords = call.with_hidden(hidden)

    def run() -> Pair:
        start = watch.clock()
        out = _first(layer(*arguments, **keywords))
        middle = watch.clock()
        out.backward(torch.ones_like(out))
        stop = watch.clock()
        layer.zero_grad(set_to_none=True)
        hidden.grad = None
        return middle - start, stop - middle

    return run


def _first(out: Any) -> Tensor:
    found = out if isinstance(out, Tensor) else out[0]
    if not isinstance(found, Tensor):
        raise NotSampled(f"a layer returns {type(found).__name__}, not hidden states")
    return found


def _kept_bytes(layer: nn.Module, call: Call) -> float:
    """Bytes that a pass keeps for backward, counted where autograd saves them; what all layers share does not count."""
    shared = {p.untyped_storage().data_ptr() for p in (*layer.parameters(), *layer.buffers())}
    shared |= {
        t.untyped_storage().data_ptr() for t in _tensors((call.arguments, call.keywords)) if t is not call.hidden
    }
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no storage is freed and its address used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in shared:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    arguments, keywords = call.with_hidden(torch.randn_like(call.hidden).requires_grad_())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = _first(layer(*arguments, **keywords))
    out.backward(torch.ones_like(out))
    layer.zero_grad(set_to_none=True)
    return float(sum(kept.values()))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def time_head(watch: Stopwatch, shape: ModelShape, dtype: torch.dtype, budget: float) -> float:
    """Seconds per token of output head and loss, forward and backward."""
    device = watch.world.device
    rows = max(min(shape.vocabulary, HEAD_WEIGHTS // shape.hidden), 1)
    weight = (torch.randn(rows, shape.hidden, device=device) * 0.02).to(dtype).requires_grad_()
    hidden = torch.randn(HEAD_TOKENS, shape.hidden, device=device).to(dtype).requires_grad_()
    labels = torch.zeros(HEAD_TOKENS, dtype=torch.int64, device=device)

    def make(_: int) -> Callable[[], Pair]:
        def run() -> Pair:
            weight.grad = hidden.grad = None
            start = watch.clock()
            loss_sum(hidden, weight, None, labels).backward()
            return watch.clock() - start, 0.0

        return run

    _, ((seconds, _zero),) = watch.growing((HEAD_TOKENS,), budget, make)
    return seconds * shape.vocabulary / rows / HEAD_TOKENS


def time_whole(watch: Stopwatch, model: nn.Module, length: int, budget: float) -> float:
    """Seconds of a model without its head over one document of ``length`` tokens, forward and backward."""

    def make(_: int) -> Callable[[], Pair]:
        forward = passage(model, watch.world, length)

        def run() -> Pair:
            start = watch.clock()
            out = forward()
            hidden = out.logits if hasattr(out, "logits") else _first(out)
            hidden.backward(torch.ones_like(hidden))
            stop = watch.clock()
            model.zero_grad(set_to_none=True)
            return stop - start, 0.0

        return run

    _, ((seconds, _zero),) = watch.growing((length,), budget, make)
    return seconds


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Seconds of one rank, forward and backward: per pair of tokens, per kernel call, per token, per micro-batch."""

    quadratic: Pair
    call: Pair
    linear: Pair
    constant: Pair


def terms_of(tiles: Sequence[Tile], timed: Sequence[Timed], kinds: Sequence[Kind]) -> Terms:
    """Fitted to one rank's times; linear and constant are means over all layers."""
    squares = np.array([float(t.tokens) ** 2 for t in tiles])
    ones = np.ones(len(tiles))
    attention = [
        fit_terms(np.stack([squares, ones], axis=1), np.array([t.forward if p == 0 else t.backward for t in tiles]))
        for p in (0, 1)
    ]
    layers = sum(kind.count for kind in kinds)
    found = np.zeros((2, 2))
    for kind, each in zip(kinds, timed, strict=True):
        tokens = np.array(each.tokens, dtype=np.float64)
        window = np.minimum(tokens, kind.window) if kind.window else tokens
        pairs = 2 * tokens * window - window * window
        for p in (0, 1):
            seconds = np.array([s[p] for s in each.seconds])
            rest = np.maximum(seconds - attention[p][0] * pairs - attention[p][1], 0.1 * seconds)
            found[p] += (
                kind.count / layers * np.array(fit_terms(np.stack([tokens, np.ones(len(tokens))], axis=1), rest))
            )
    return Terms(
        quadratic=(attention[0][0], attention[1][0]),
        call=(attention[0][1], attention[1][1]),
        linear=(float(found[0][0]), float(found[1][0])),
        constant=(float(found[0][1]), float(found[1][1])),
    )
