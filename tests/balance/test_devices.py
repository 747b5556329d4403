"""Devices by the names that drivers give them: the right entry, or none."""

from __future__ import annotations

import pytest

from hdp.balance import PlanError
from hdp.balance.devices import DEVICES, Device, find_device, recognise
from hdp.balance.topology import Link

NAMES = {
    "Tesla V100-SXM2-16GB": "v100-sxm-16g",
    "Tesla V100-SXM2-32GB": "v100-sxm-32g",
    "Tesla V100-SXM3-32GB": "v100-sxm-32g",
    "Tesla V100-PCIE-16GB": "v100-pcie-16g",
    "Tesla V100-PCIE-32GB": "v100-pcie-32g",
    "NVIDIA A10": "a10",
    "NVIDIA A10G": "a10g",
    "NVIDIA L4": "l4",
    "NVIDIA L40": "l40",
    "NVIDIA L40S": "l40s",
    "NVIDIA A100-SXM4-40GB": "a100-40g",
    "A100-SXM4-40GB": "a100-40g",
    "NVIDIA A100-SXM4-80GB": "a100-80g",
    "NVIDIA A100-PCIE-40GB": "a100-pcie-40g",
    "NVIDIA A100 80GB PCIe": "a100-pcie-80g",
    "NVIDIA A800-SXM4-80GB": "a800",
    "NVIDIA H100 80GB HBM3": "h100-sxm",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H100 NVL": "h100-nvl",
    "NVIDIA H20": "h20",
    "NVIDIA H200": "h200",
    "NVIDIA H200 NVL": "h200-nvl",
    "NVIDIA B200": "b200",
    "NVIDIA GB200": "gb200",
    "NVIDIA GeForce RTX 3090": "rtx-3090",
    "NVIDIA GeForce RTX 4090": "rtx-4090",
    "NVIDIA GeForce RTX 5090": "rtx-5090",
    "NVIDIA RTX 6000 Ada Generation": "rtx-6000-ada",
    "AMD Instinct MI300X": "mi300x",
    "AMD Instinct MI300X OAM": "mi300x",
}

OTHERS = [
    "NVIDIA GeForce RTX 3090 Ti",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 5080",
    "Quadro RTX 6000",
    "NVIDIA RTX A6000",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition",
    "NVIDIA A100-SXM-64GB",
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
    "NVIDIA GH200 480GB",
    "NVIDIA B300 SXM6 AC",
    "Tesla T4",
    "AMD Instinct MI250X",
    "NVIDIA",
    "cpu",
    "",
]


@pytest.mark.parametrize(("name", "entry"), NAMES.items())
def test_names_as_drivers_give_them(name: str, entry: str) -> None:
    assert recognise(name) == entry


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_in_the_table_is_not_guessed_at(name: str) -> None:
    assert recognise(name) is None


def test_every_entry_but_the_cpu_has_a_name_that_finds_it() -> None:
    assert set(NAMES.values()) | {"h800", "cpu"} == set(DEVICES)
    for entry, device in DEVICES.items():
        assert all(recognise(name) == entry for name in device.names)


def test_figures_of_data_sheets() -> None:
    peaks = {
        "h100-sxm": 989,
        "h100-pcie": 756,
        "h100-nvl": 835,
        "a100-80g": 312,
        "l4": 121,
        "gb200": 2500,
        "rtx-3090": 71,
    }
    memory = {"a100-40g": 40, "a100-80g": 80, "h100-nvl": 94, "h200": 141, "mi300x": 192, "rtx-5090": 32}
    for entry, tera in peaks.items():
        assert find_device(entry).peak == tera * 1e12
    for entry, gigabytes in memory.items():
        assert find_device(entry).memory == gigabytes * 1e9
    for device in DEVICES.values():
        assert 0 < device.efficiency < 1 and device.intra.bandwidth >= device.inter.bandwidth


def test_a_device_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    link = Link(bandwidth=1e9)
    mine = Device(peak=1e14, efficiency=0.5, memory=8e9, intra=link, inter=link, copy_bandwidth=1e9, names=("acme x1",))
    assert recognise("ACME X1") is None
    monkeypatch.setitem(DEVICES, "x1", mine)
    assert recognise("ACME X1") == "x1" and find_device("x1") is mine
    with pytest.raises(PlanError, match="unknown device 'x2': choose one of"):
        find_device("x2")
