"""``auto``: from measured times, bytes and bandwidth to a policy. Pure: no torch.

The largest fraction whose copies hide behind one layer's compute costs nothing (ByteScale Eq. 3, T >= r Act / B), so it
is taken. Only when that does not fit the memory given does ``auto`` pay: with MEMO's mix of offload and recomputation, or
with copies that do not hide, whichever is predicted to be faster; and it says what it costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hdp.balance.machine import LayerWork
from hdp.offload.model import LayerBytes, device_bytes, tier_bytes
from hdp.offload.policy import layer_actions

RATIO_STEPS = 64
"""Ratios weighed when copies must show: multiples of 1/64."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """A policy and what it is predicted to take."""

    policy: str
    ratio: float
    """Fraction that leaves."""
    memo_fraction: float
    """Of ``memo``: fraction of the layers that offload instead of recomputing."""
    device_bytes: int
    """Peak bytes of saved activations on the device."""
    tier_bytes: int
    """Bytes outside the device."""
    extra_seconds: float
    """Time beyond that of keeping everything, forward and backward."""
    reason: str


def hiding_ratio(profile: LayerWork, bandwidth: float) -> float:
    """Largest fraction of a layer's activations that moves within the time of its forward."""
    if profile.bytes_all <= 0:
        return 0.0
    return min(1.0, profile.forward_seconds * bandwidth / profile.bytes_all)


def late_seconds(profile: LayerWork, ratio: float, bandwidth: float) -> float:
    """By how much the copies of one layer outlast its forward, and its backward, which takes twice as long."""
    copy = ratio * profile.bytes_all / bandwidth
    return max(copy - profile.forward_seconds, 0.0) + max(copy - 2.0 * profile.forward_seconds, 0.0)


def scaled_profile(profiles: Mapping[int, LayerWork], tokens: int) -> LayerWork:
    """The profile of a micro-batch of ``tokens`` tokens from that of the nearest count measured.

    Bytes grow linearly. Time is scaled so that it is never overstated, whatever attention's share: linearly to more
    tokens, quadratically to fewer.
    """
    near = min(profiles, key=lambda n: (abs(n - tokens), n))
    profile, factor = profiles[near], tokens / near
    slower = factor if factor > 1.0 else factor * factor
    return LayerWork(
        forward_seconds=profile.forward_seconds * slower,
        bytes_all=round(profile.bytes_all * factor),
        bytes_kept=round(profile.bytes_kept * factor),
        attention_seconds=profile.attention_seconds * slower,
    )


def memo_fraction(profile: LayerWork, *, bandwidth: float, movable_layers: int, room: int | None) -> float | None:
    """MEMO's swap fraction: the largest a with (kept + a * others) / B <= T and layers * (kept + a * others) <= room.

    None when not even the input and the attention output hide or find room.
    """
    limit = profile.forward_seconds * bandwidth
    if room is not None and movable_layers > 0:
        limit = min(limit, room / movable_layers)
    others = profile.bytes_all - profile.bytes_kept
    if limit < profile.bytes_kept:
        return None
    return 1.0 if others <= 0 else min(1.0, (limit - profile.bytes_kept) / others)


def choose(
    profile: LayerWork,
    *,
    layers: int,
    bandwidth: float,
    room: int | None = None,
    device_budget: int | None = None,
    keep_first: int = 1,
    keep_last: int = 1,
) -> Decision:
    """The policy of one micro-batch.

    Args:
        profile: one of the model's layers on this micro-batch.
        layers: layers of the model.
        bandwidth: bytes per second of the slower direction, all ranks of the node copying at once.
        room: bytes that the tiers can take; None for no limit.
        device_budget: bytes of saved activations that the device can hold; None takes what is free and no more.

    Raises:
        ValueError: nothing fits ``device_budget`` and ``room``.
    """
    if bandwidth < 0 or profile.forward_seconds <= 0:
        raise ValueError(
            f"bandwidth is {bandwidth} bytes/s and a layer's forward takes {profile.forward_seconds} s: measure them first"
        )
    sizes = [LayerBytes(all=profile.bytes_all, kept=profile.bytes_kept)] * layers
    movable = max(layers - keep_first - keep_last, 0)

    def decide(policy: str, ratio: float, fraction: float, extra: float, reason: str) -> Decision:
        actions = layer_actions(
            layers, policy=policy, ratio=ratio, memo_fraction=fraction, keep_first=keep_first, keep_last=keep_last
        )
        return Decision(
            policy=policy,
            ratio=ratio,
            memo_fraction=fraction,
            device_bytes=device_bytes(sizes, actions),
            tier_bytes=tier_bytes(sizes, actions),
            extra_seconds=extra,
            reason=reason,
        )

    fits_room = 1.0 if room is None or movable * profile.bytes_all == 0 else room / (movable * profile.bytes_all)
    hidden = min(hiding_ratio(profile, bandwidth), fits_room)
    keep = decide("keep", 0.0, 0.0, 0.0, "everything fits and nothing is gained by moving it")
    free = decide(
        "offload", hidden, 0.0, 0.0, f"copies of {hidden:.2f} of the activations hide behind a layer's forward"
    )
    if free.device_bytes >= keep.device_bytes:
        free = keep
    if device_budget is None or free.device_bytes <= device_budget:
        return free
    options = _paid_options(profile, decide, movable=movable, bandwidth=bandwidth, room=room)
    fitting = [d for d in options if d.device_bytes <= device_budget and (room is None or d.tier_bytes <= room)]
    if keep.device_bytes <= device_budget:
        fitting.append(keep)
    if not fitting:
        least = min((d.device_bytes for d in options), default=keep.device_bytes)
        raise ValueError(
            f"saved activations need at least {least} bytes on the device, the budget is {device_budget}, tiers take "
            f"{room}: use shorter micro-batches, more ranks, or a larger tier"
        )
    return min(fitting, key=lambda d: (d.extra_seconds, d.device_bytes))


def _paid_options(
    profile: LayerWork,
    decide: Callable[[str, float, float, float, str], Decision],
    *,
    movable: int,
    bandwidth: float,
    room: int | None,
) -> list[Decision]:
    """Policies that cost time: MEMO's mix, full recomputation, and offload that does not hide."""
    again = profile.forward_seconds - profile.attention_seconds
    options = [
        decide("recompute", 0.0, 0.0, movable * again, f"recomputes {movable} layers, {again:.3g} s each"),
    ]
    if bandwidth > 0:
        fraction = memo_fraction(profile, bandwidth=bandwidth, movable_layers=movable, room=room)
        if fraction is not None:
            cost = (1.0 - fraction) * movable * again
            options.append(
                decide("memo", 1.0, fraction, cost, f"offloads {fraction:.2f} of the layers, recomputes the rest")
            )
        for step in range(1, RATIO_STEPS + 1):
            ratio = step / RATIO_STEPS
            late = movable * late_seconds(profile, ratio, bandwidth)
            options.append(decide("offload", ratio, 0.0, late, f"copies of {ratio:.2f} show for {late:.3g} s"))
        exposed = max(profile.bytes_kept / bandwidth - profile.forward_seconds, 0.0) * movable
        options.append(
            decide("recompute", 1.0, 0.0, movable * again + exposed, "recomputes all layers, their inputs outside")
        )
    return options
