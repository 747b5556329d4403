"""Known accelerators and their links: what to assume when nothing was measured.

Data-sheet peaks (dense bf16) and the part of them that training kernels of good libraries reach; links as one rank sees
them when all ranks of its node use them. ``hdp profile`` or the user's own numbers are better.
"""

from __future__ import annotations

from dataclasses import dataclass

from hdp.balance.plan import PlanError
from hdp.balance.topology import Link


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator and its place in a usual node."""

    peak: float
    """Dense bf16 operations per second."""
    efficiency: float
    """Part of the peak that kernels attain."""
    memory: float
    """Bytes of device memory."""
    intra: Link
    inter: Link
    copy_bandwidth: float
    """Bytes per second between device and host."""

    @property
    def attained(self) -> float:
        return self.peak * self.efficiency


def _device(
    tera: float, efficiency: float, gigabytes: float, intra: float, inter: float, copy: float, latency: float = 5e-6
) -> Device:
    return Device(
        peak=tera * 1e12,
        efficiency=efficiency,
        memory=gigabytes * 1e9,
        intra=Link(bandwidth=intra * 1e9, latency=latency),
        inter=Link(bandwidth=inter * 1e9, latency=2 * latency),
        copy_bandwidth=copy * 1e9,
    )


DEVICES: dict[str, Device] = {
    # name: peak TFLOP/s, part attained, GB, GB/s within a node, across (one NIC a rank), to the host
    "a100-40g": _device(312, 0.60, 40, 250, 25, 20),
    "a100-80g": _device(312, 0.60, 80, 250, 25, 20),
    "a800": _device(312, 0.60, 80, 160, 25, 20),
    "h100-sxm": _device(989, 0.45, 80, 370, 45, 45),
    "h100-pcie": _device(756, 0.40, 80, 50, 20, 45),
    "h800": _device(989, 0.45, 80, 160, 45, 45),
    "h20": _device(148, 0.80, 96, 370, 45, 45),
    "h200": _device(989, 0.45, 141, 370, 45, 45),
    "b200": _device(2250, 0.45, 180, 740, 45, 50),
    "mi300x": _device(1307, 0.35, 192, 50, 45, 45),
    "l40s": _device(362, 0.50, 48, 25, 20, 20),
    "rtx-4090": _device(165, 0.60, 24, 20, 10, 20),
    "cpu": _device(0.1, 0.60, 16, 5, 1, 10, latency=5e-5),
}


def find_device(name: str) -> Device:
    """A device by name; raises PlanError for one that is not in the table."""
    if name not in DEVICES:
        raise PlanError(f"unknown device {name!r}: choose one of {', '.join(DEVICES)}, or give the numbers themselves")
    return DEVICES[name]
