"""Shared parts of the offload tests: streams that shuffle, tiers that poison, and a model that saves awkward tensors."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdp.offload import HostTier, OffloadEngine
from hdp.offload.streams import Copies, Done, Finished, Job
from hdp.offload.tiers import Slot

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
WIDTH, HEADS, LAYERS = 32, 4, 5


class Shuffle:
    """Runs jobs in a random order, as late as it likes; a job's ``after`` is all that it respects."""

    def __init__(self, seed: int, eagerness: float) -> None:
        self.rng = random.Random(seed)
        self.eagerness = eagerness
        self.pending: list[ShuffledDone] = []
        self.overtaken = 0

    def run_one(self) -> None:
        able = [i for i, done in enumerate(self.pending) if all(earlier.over for earlier in done.after)]
        index = self.rng.choice(able)
        self.overtaken += index > 0
        self.pending.pop(index).perform()

    def perhaps(self) -> None:
        while self.pending and self.rng.random() < self.eagerness:
            self.run_one()


class ShuffledDone:
    def __init__(self, shuffle: Shuffle, job: Job, after: Sequence[Done]) -> None:
        self.shuffle, self.job = shuffle, job
        self.after = [done for done in after if isinstance(done, ShuffledDone)]
        self.over = False
        self.error: BaseException | None = None

    def perform(self) -> None:
        try:
            for earlier in self.after:
                if earlier.error is not None:
                    raise earlier.error
            self.job()
        except BaseException as error:
            self.error = error
        self.job, self.after, self.over = Finished().wait, [], True

    def ready(self) -> bool:
        self.shuffle.perhaps()
        return self.over

    def wait(self) -> None:
        while not self.over:
            self.shuffle.run_one()
        if self.error is not None:
            raise self.error

    order = wait


class ShuffledStream:
    def __init__(self, shuffle: Shuffle) -> None:
        self.shuffle = shuffle

    def run(self, job: Job, after: Sequence[Done] = ()) -> ShuffledDone:
        done = ShuffledDone(self.shuffle, job, after)
        self.shuffle.pending.append(done)
        self.shuffle.perhaps()
        return done

    def close(self) -> None:
        while self.shuffle.pending:
            self.shuffle.run_one()


def shuffled_copies(shuffle: Shuffle) -> Copies:
    stream = ShuffledStream(shuffle)
    return Copies(host_out=stream, host_back=stream, device_out=stream, device_back=stream)


class PoisoningTier(HostTier):
    """Overwrites what it is given back: whoever reads a buffer after its release computes with NaN."""

    def release(self, slot: Slot) -> None:
        slot.place.array[:] = 0xFF  # type: ignore[attr-defined]
        super().release(slot)


class PoisoningEngine(OffloadEngine):
    """Hands out room full of NaN: whoever reads before the copy is back computes with NaN."""

    def _room(self, nbytes: int) -> Tensor:
        return super()._room(nbytes).fill_(0xFF)


class Cubed(torch.autograd.Function):
    """Saves its input, an intermediate and its output."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        square = x * x
        out = square * x
        ctx.save_for_backward(x, square, out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        x, square, out = ctx.saved_tensors
        return grad * (3 * square + 0 * out * x)


class Awkward(nn.Module):
    """A layer that saves views, shared, non-contiguous, expanded, bf16, bool and complex tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.low = nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:  # x: [1, tokens, WIDTH]
        tokens = x.shape[1]
        q, k, v = self.qkv(self.norm(x)).view(1, tokens, 3, HEADS, -1).transpose(1, 3).unbind(2)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [1, HEADS, tokens, WIDTH / HEADS]
        x = x + self.out(attended.transpose(1, 2).reshape(1, tokens, WIDTH))
        x = x + F.dropout(x * x, 0.1) + Cubed.apply(torch.tanh(x)) + (0.5 * x).relu_()
        x = x + self.low(x.to(torch.bfloat16)).float() * self.scale.expand_as(x)
        pairs = torch.view_as_complex(x.reshape(1, tokens, -1, 2))
        turned = torch.view_as_real(
            pairs * torch.polar(torch.ones(tokens, 1), torch.arange(tokens)[:, None] * 0.1).conj()
        )
        return x + turned.reshape(x.shape) * torch.where(x > 0, x, 0.1 * x).transpose(1, 2).contiguous().transpose(1, 2)


class Zoo(nn.Module):
    def __init__(self, layers: int = LAYERS, *, wasteful: bool = False) -> None:
        super().__init__()
        self.wasteful = wasteful
        self.embedding = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(Awkward() for _ in range(layers))
        self.head = nn.Linear(WIDTH, 50)

    def forward(self, ids: Tensor) -> Tensor:  # [1, tokens] -> scalar
        x = self.embedding(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
            if self.wasteful:
                (x * 3.0).square()  # saved, and gone at once: its room may be given away only after its copy is over
        return F.cross_entropy(self.head(x)[0], ids[0])


def make_zoo(layers: int = LAYERS, *, wasteful: bool = False) -> Zoo:
    torch.manual_seed(0)
    return Zoo(layers, wasteful=wasteful)


def token_ids(tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 50, (1, tokens), generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> list[Tensor]:
    """The loss and all gradients of one forward and backward, dropout seeded."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    value = loss()
    value.backward()
    return [value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) > 1 and all(
        x.dtype == y.dtype and torch.equal(x.view(torch.uint8), y.view(torch.uint8))
        for x, y in zip((t.reshape(-1) for t in a), (t.reshape(-1) for t in b), strict=True)
    )
