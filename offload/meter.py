"""Bytes of saved activations on the device, now and at most."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Meter:
    """Counts of one engine. ``reset_peaks`` starts a new measurement."""

    device: int = 0
    """Bytes of saved activations on the device now: kept, on their way out or back, or back."""
    peak_device: int = 0
    """Most bytes on the device since the last reset."""
    left: int = 0
    """Bytes that have left since the last reset."""
    returned: int = 0
    """Bytes that have come back since the last reset."""
    stayed: int = 0
    """Bytes that were to leave but found no room, under a policy that allows it, since the last reset."""
    late: int = 0
    """Storages that backward needed before anything had asked for them."""
    waited_out: float = 0.0
    """Seconds that forward waited for copies out."""
    waited_back: float = 0.0
    """Seconds that backward waited for copies back."""

    def add(self, nbytes: int) -> None:
        self.device += nbytes
        self.peak_device = max(self.peak_device, self.device)

    def reset_peaks(self) -> None:
        self.peak_device = self.device
        self.left = self.returned = self.stayed = self.late = 0
        self.waited_out = self.waited_back = 0.0
