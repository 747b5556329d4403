"""The process's own memory: what the memory model says is spared is spared, measured by the operating system."""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

LAYERS, WIDTH, TOKENS = 12, 256, 4096
SETTINGS: dict[str, dict[str, Any]] = {
    "r=0.5": {"policy": "offload", "ratio": 0.5},
    "r=1": {"policy": "offload", "ratio": 1.0},
    "recompute, inputs outside": {"policy": "recompute", "ratio": 1.0},
    "recompute, inputs stay": {"policy": "recompute", "ratio": 0.0},
}


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def step(folder: str, setting: dict[str, Any]) -> dict[str, int]:
    """In a process of its own: growth of the peak resident set in a second step, and what the model predicts, in bytes."""
    import torch
    from torch import nn

    from hdp.offload import FileTier, OffloadEngine, layer_actions
    from hdp.offload.model import LayerBytes, device_bytes

    torch.set_num_threads(1)
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(LAYERS))
    )
    x, grown = torch.randn(1, TOKENS, WIDTH), 0
    with OffloadEngine([FileTier(folder)]) as engine:
        for _ in range(2):
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
            before = status("VmRSS")
            with engine.micro_batch(model, tokens=TOKENS, layers=list(model), **setting):
                model(x).sum().backward()
            grown = status("VmHWM") - before
    layer_input = TOKENS * WIDTH * 4
    sizes = [LayerBytes(all=3 * layer_input, kept=layer_input)] * LAYERS  # the input, and tanh's output, twice as wide
    return {"grown": grown, "predicted": device_bytes(sizes, layer_actions(LAYERS, **setting))}


@functools.cache
def measured(folder: str, setting: str) -> dict[str, int]:
    code = f"import sys, json; sys.path.insert(0, {str(Path(__file__).parent)!r}); import {Path(__file__).stem} as t; "
    code += f"print(json.dumps(t.step({folder!r}, json.loads({setting!r}))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resets the peak as only Linux can")
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_process_spares_what_the_model_says(tmp_path_factory, setting):
    """Against everything kept, so that what every step needs beside saved activations falls out."""
    folder = str(tmp_path_factory.getbasetemp())
    keep = measured(folder, json.dumps({"policy": "keep"}))
    other = measured(folder, json.dumps(SETTINGS[setting]))
    spared = keep["grown"] - other["grown"]
    assert spared == pytest.approx(keep["predicted"] - other["predicted"], rel=0.1)
