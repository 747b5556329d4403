"""The engine: moves saved activations out during forward and back during backward.

    engine = OffloadEngine([HostTier(budget=64 << 30, device="cuda"), FileTier("/local/scratch", device="cuda")],
                           device="cuda")
    with engine.micro_batch(model, ratio=0.5, tokens=8192):
        loss = model(...)
        loss.backward()

One engine lives as long as the process; one context wraps forward and backward of one micro-batch. What happens at layer
borders is in :mod:`hdp.offload.micro_batch`, the life of storages in :mod:`hdp.offload.store`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from hdp.balance.machine import CopyRates, LayerWork
from hdp.offload.auto import Decision, choose, scaled_profile
from hdp.offload.auto import memo_fraction as solve_memo
from hdp.offload.bandwidth import PIECE, measure_bandwidth
from hdp.offload.errors import OffloadError
from hdp.offload.layers import find_layers
from hdp.offload.malloc import return_freed_blocks
from hdp.offload.micro_batch import MicroBatch
from hdp.offload.policy import layer_actions
from hdp.offload.store import ActivationStore
from hdp.offload.streams import Copies
from hdp.offload.tiers import Tier

MIN_BYTES = 64 << 10
LEAST_MEASURED = 1 << 20
"""Bytes below which a tier's time is mostly that of starting a copy."""


class OffloadEngine(ActivationStore):
    """Moves saved activations of one device through a chain of tiers. Thread-safe."""

    def __init__(
        self,
        tiers: Sequence[Tier],
        *,
        device: torch.device | str = "cpu",
        min_bytes: int = MIN_BYTES,
        copies: Copies | None = None,
        tune_malloc: bool = True,
    ) -> None:
        """
        Args:
            tiers: where activations go, in order of preference; the engine closes them.
            device: device of the activations.
            min_bytes: smaller storages are left alone.
            copies: the copy streams; None makes those of ``device``.
            tune_malloc: on a CPU, fix glibc's thresholds for the whole process so that freed activations leave it at
                once (see :mod:`hdp.offload.malloc`).
        """
        if tune_malloc and torch.device(device).type == "cpu":
            return_freed_blocks()
        super().__init__(tiers, device=torch.device(device), min_bytes=min_bytes, copies=copies)
        self.bandwidth: CopyRates | None = None
        self.profiles: dict[int, LayerWork] = {}
        """Last measured layer of micro-batches of so many tokens."""
        self.decision: Decision | None = None
        """What ``auto`` chose last, and what it is predicted to take."""
        self._closed = False

    def micro_batch(
        self,
        model: nn.Module,
        *,
        ratio: float = 1.0,
        policy: str = "offload",
        tokens: int | None = None,
        layer: LayerWork | None = None,
        layers: Sequence[nn.Module] | None = None,
        memo_fraction: float | None = None,
        recompute_layers: int | None = None,
        device_budget: int | None = None,
        keep_first: int = 1,
        keep_last: int = 1,
        keep_ops: frozenset[Any] = frozenset(),
    ) -> MicroBatch:
        """The context around forward and backward of one micro-batch.

        Args:
            model: the module that forward calls.
            ratio: fraction of each saved activation that leaves, 0 to 1.
            policy: ``keep``, ``offload``, ``recompute``, ``memo`` (see :mod:`hdp.offload.policy`), or ``auto``: the
                largest ratio, up to ``ratio``, whose copies hide behind compute and find room, from the bandwidth of
                :meth:`measure` and the layer times of the last micro-batch of about as many tokens; of the first
                one, which is timed, from ``layer``, or without it ``ratio`` as far as there is room. What finds no room in any
                tier stays.
            tokens: tokens of the micro-batch; saved tensors with a dimension of that size are split by whole tokens.
            layer: what one of the model's layers is expected to take on it (``hdp.balance.Machine.layer``).
            layers: the model's layers in forward order; None finds them.
            memo_fraction: fraction of layers that ``memo`` offloads instead of recomputing; None solves for the largest that
                hides and finds room (MEMO), from what ``auto`` measures, and recomputes nothing until something is measured.
            recompute_layers: ``recompute``: how many layers run again (see :func:`layer_actions`); None: all that do not keep
                everything.
            device_budget: ``auto``: bytes of saved activations that the device can hold. When what is free does not fit, it
                pays with recomputation or with copies that show, whichever costs less; see :attr:`decision`.
            keep_first, keep_last: layers at each end that keep everything.
            keep_ops: operator overloads whose outputs recomputation keeps, attention's above all.
        """
        if self._closed:
            raise OffloadError(
                "this engine of saved activations is closed: make a new one, or close it after the last step"
            )
        found = find_layers(model, layers)
        solves = policy == "auto" or (policy == "memo" and memo_fraction is None)
        if solves and (tokens is None or self.bandwidth is None):
            raise ValueError(f"policy {policy!r} needs the micro-batch's tokens and a measured bandwidth: pass tokens=..., "
                             "and call engine.measure() once at start")  # fmt: skip
        kept = {"keep_first": keep_first, "keep_last": keep_last}
        if policy == "auto":
            policy, ratio, memo_fraction = self._auto(
                ratio, self._layer(tokens, layer), len(found), device_budget, **kept
            )
        elif solves:
            policy, ratio, memo_fraction = self._memo(self._layer(tokens, layer), len(found), **kept)
        again = None if solves else recompute_layers
        actions = layer_actions(
            len(found), policy=policy, ratio=ratio, memo_fraction=memo_fraction or 0.0, recompute_layers=again, **kept
        )
        return MicroBatch(
            self, model, found, actions, tokens=tokens, keep_ops=keep_ops, timed=solves, may_stay=solves
        )  # fmt: skip

    def measure(
        self,
        *,
        nbytes: int = 256 << 20,
        barrier: Callable[[], None] = lambda: None,
        slowest: Callable[[float], float] = lambda seconds: seconds,
    ) -> CopyRates:
        """Measures the tiers, for ``auto``; every rank of the node calls it (see :func:`measure_bandwidth`).

        Of a chain the slowest tier counts; one whose budget is smaller than ``nbytes`` is measured with what it holds.
        """
        found = []
        for tier in self.chain.tiers:
            size = nbytes if tier.budget is None else min(nbytes, tier.budget)
            if size >= LEAST_MEASURED:
                piece = min(PIECE, size)
                found.append(
                    measure_bandwidth(
                        tier, nbytes=size, piece=piece, device=self.device, barrier=barrier, slowest=slowest
                    )
                )
        if not found:
            raise OffloadError(f"no tier has a budget of {LEAST_MEASURED} bytes to measure with: give more")
        self.bandwidth = min(found, key=lambda b: b.least)
        return self.bandwidth

    def _layer(self, tokens: int | None, expected: LayerWork | None) -> LayerWork | None:
        """One layer on a micro-batch, as measured or else as expected; None: neither is known."""
        if not self.profiles:
            return expected
        assert tokens is not None
        return scaled_profile(self.profiles, tokens)

    def _auto(
        self,
        most: float,
        layer: LayerWork | None,
        layers: int,
        device_budget: int | None,
        *,
        keep_first: int,
        keep_last: int,
    ) -> tuple[str, float, float]:
        """(policy, ratio, MEMO's fraction) of a micro-batch under ``auto``."""
        if layer is None:
            return "offload", most, 0.0
        assert self.bandwidth is not None
        self.decision = found = choose(
            layer,
            layers=layers,
            bandwidth=self.bandwidth.least,
            room=self.chain.room,
            device_budget=device_budget,
            keep_first=keep_first,
            keep_last=keep_last,
        )
        ratio = min(most, found.ratio) if found.policy == "offload" else found.ratio
        return found.policy, ratio, found.memo_fraction

    def _memo(
        self, layer: LayerWork | None, layers: int, *, keep_first: int, keep_last: int
    ) -> tuple[str, float, float]:
        """The same under ``memo``: its fraction solved for; full recomputation where not even layer inputs hide."""
        if layer is None:
            return "offload", 1.0, 0.0
        assert self.bandwidth is not None
        fraction = solve_memo(
            layer,
            bandwidth=self.bandwidth.least,
            movable_layers=max(layers - keep_first - keep_last, 0),
            room=self.chain.room,
        )
        return ("recompute", 0.0, 0.0) if fraction is None else ("memo", 1.0, fraction)

    def trim(self) -> None:
        """Gives unused host memory and file space back to the system."""
        self.finish(failed=False)
        self.chain.trim()

    def close(self) -> None:
        """Ends the streams and gives everything back. Raises if a copy has failed, or activations are still out."""
        try:
            self.finish(failed=False)
        finally:
            out = {name: used for name, used in self.chain.bytes_by_tier().items() if used}
            self._end()
        if out:
            raise OffloadError(
                f"closed with activations still out ({out} bytes): finish backward or drop the loss first"
            )

    def __enter__(self) -> OffloadEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        self.finish(failed=True)
        self._end()

    def _end(self) -> None:
        self._closed = True
        self._copies.close()
        self.chain.close()
