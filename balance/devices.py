"""Known accelerators and their links: what to assume when nothing was measured.

Data-sheet peaks (dense bf16) and the part of them that training kernels of good libraries reach; links as one rank sees
them when all ranks of its node use them. ``hdp profile`` or the user's own numbers are better.

A device that is not in the table is not guessed at. It can be given: ``DEVICES["mine"] = Device(names=("acme x1",), ...)``
before the engine is made, with the name that ``torch.cuda.get_device_name`` has for it.
"""

from __future__ import annotations

import re
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
    names: tuple[str, ...] = ()
    """What drivers call it, in words as :func:`recognise` reads them: ``"h100 pcie"``."""

    @property
    def attained(self) -> float:
        return self.peak * self.efficiency


def _device(
    tera: float,
    efficiency: float,
    gigabytes: float,
    intra: float,
    inter: float,
    copy: float,
    *names: str,
    latency: float = 5e-6,
) -> Device:
    return Device(
        peak=tera * 1e12,
        efficiency=efficiency,
        memory=gigabytes * 1e9,
        intra=Link(bandwidth=intra * 1e9, latency=latency),
        inter=Link(bandwidth=inter * 1e9, latency=2 * latency),
        copy_bandwidth=copy * 1e9,
        names=names,
    )


DEVICES: dict[str, Device] = {
    # Peaks and memory: NVIDIA's data sheets (V100, A100, A10, A10G, L4, L40, L40S, H100, H200, HGX B200, GB200 NVL72, RTX 6000
    # Ada), its architecture white papers of GA102, AD102 and GB202 for GeForce (16 bits, fp32 sums), AMD's data sheet of the
    # MI300X. Sheets that give peaks with sparsity are halved. V100: fp16, it has no bf16.
    # Links: about 0.82 of NVLink's rate one way (data sheets: 150, 300, 450 and 900 GB/s), two thirds of PCIe's (16, 32 and
    # 64 GB/s one way) where several cards use it; NICs of 100 to 400 Gbit/s a rank, as usual nodes have them. The part that
    # kernels attain is an estimate.
    # name: peak TFLOP/s, part attained, GB, GB/s within a node, across (one NIC a rank), to the host, what drivers call it
    "v100-sxm-16g": _device(125, 0.55, 16, 125, 6, 10, "v100 sxm 16gb"),
    "v100-sxm-32g": _device(125, 0.55, 32, 125, 6, 10, "v100 sxm 32gb"),
    "v100-pcie-16g": _device(112, 0.55, 16, 10, 6, 10, "v100 pcie 16gb"),
    "v100-pcie-32g": _device(112, 0.55, 32, 10, 6, 10, "v100 pcie 32gb"),
    "a10": _device(125, 0.50, 24, 20, 10, 20, "a10"),
    "a10g": _device(70, 0.60, 24, 20, 10, 20, "a10g"),
    "a100-40g": _device(312, 0.60, 40, 250, 25, 20, "a100 sxm 40gb"),
    "a100-80g": _device(312, 0.60, 80, 250, 25, 20, "a100 sxm 80gb"),
    "a100-pcie-40g": _device(312, 0.55, 40, 20, 20, 20, "a100 pcie 40gb"),
    "a100-pcie-80g": _device(312, 0.55, 80, 20, 20, 20, "a100 pcie 80gb"),
    "a800": _device(312, 0.60, 80, 160, 25, 20, "a800 sxm 80gb"),
    "h100-sxm": _device(989, 0.45, 80, 370, 45, 45, "h100 hbm3", "h100 sxm"),
    "h100-pcie": _device(756, 0.40, 80, 50, 20, 45, "h100 pcie"),
    "h100-nvl": _device(835, 0.40, 94, 50, 20, 45, "h100 nvl"),
    "h800": _device(989, 0.45, 80, 160, 45, 45, "h800"),
    "h20": _device(148, 0.80, 96, 370, 45, 45, "h20"),
    "h200": _device(989, 0.45, 141, 370, 45, 45, "h200"),
    "h200-nvl": _device(835, 0.40, 141, 50, 20, 45, "h200 nvl"),
    "b200": _device(2250, 0.45, 180, 740, 45, 50, "b200"),
    "gb200": _device(2500, 0.45, 186, 740, 45, 180, "gb200"),  # NVLink-C2C to the host, shared by two
    "mi300x": _device(1307, 0.35, 192, 50, 45, 45, "mi300x"),
    "l4": _device(121, 0.45, 24, 20, 10, 20, "l4"),
    "l40": _device(181, 0.50, 48, 25, 20, 20, "l40"),
    "l40s": _device(362, 0.50, 48, 25, 20, 20, "l40s"),
    "rtx-3090": _device(71, 0.60, 24, 20, 10, 20, "rtx 3090"),
    "rtx-4090": _device(165, 0.60, 24, 20, 10, 20, "rtx 4090"),
    "rtx-5090": _device(209, 0.60, 32, 40, 10, 45, "rtx 5090"),
    "rtx-6000-ada": _device(364, 0.50, 48, 20, 10, 20, "rtx 6000 ada"),
    "cpu": _device(0.1, 0.60, 16, 5, 1, 10, latency=5e-5),
}

_SAYS_NOTHING = {"nvidia", "amd", "tesla", "geforce", "quadro", "instinct", "gpu", "generation", "oam", "vf"}
_MEMORY = re.compile(r"\d+gb|hbm\d?e?|sxm")


def find_device(name: str) -> Device:
    """A device by its name in the table; raises PlanError for one that is not there."""
    if name not in DEVICES:
        raise PlanError(f"unknown device {name!r}: choose one of {', '.join(DEVICES)}, or give the numbers themselves")
    return DEVICES[name]


def recognise(name: str) -> str | None:
    """The entry of a device by what its driver calls it (``torch.cuda.get_device_name``), such as ``"NVIDIA H100 PCIe"``.

    The longest of the table's names wins. None for one that is not there, and for part of a device (MIG) or a kindred one: a
    word that no name accounts for ("Laptop", "Ti", "MIG") makes it another.
    """
    words = {re.sub(r"^sxm\d$", "sxm", word) for word in re.split(r"[^a-z0-9.]+", name.lower()) if word} - _SAYS_NOTHING
    best: tuple[int, str | None] = (0, None)
    for entry, device in DEVICES.items():
        for known in device.names:
            needed = set(known.lower().split())
            left = [word for word in words - needed if not _MEMORY.fullmatch(word)]
            if needed <= words and not left and len(needed) > best[0]:
                best = (len(needed), entry)
    return best[1]
