"""All that somebody needs to run the same thing again, collected at the start of a run."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PACKAGES = ("hdp", "torch", "transformers", "numpy", "datasets", "tokenizers", "deepspeed", "triton", "flash-attn")


def collect(world_size: int, extra: dict[str, Any]) -> dict[str, Any]:
    """Command, versions, commit and machine, and whatever the script adds (its arguments, the model, the data)."""
    return {
        "command": command(world_size),
        "working_folder": str(Path.cwd()),
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "world_size": world_size,
        "commit": commit(Path(sys.argv[0]).resolve().parent),
        "versions": versions(),
        "machine": machine(),
        **extra,
    }


def command(world_size: int) -> str:
    """The command line that starts this job again, with the threads per rank, which decide the last bits of the sums."""
    script = shlex.join(sys.argv)
    if "LOCAL_WORLD_SIZE" not in os.environ:
        line = f"{shlex.quote(sys.executable)} {script}"
    else:
        per_node = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = world_size // per_node
        where = "--standalone" if nodes == 1 else f"--nnodes {nodes}"
        line = f"torchrun {where} --nproc-per-node {per_node} {script}"
    threads = os.environ.get("OMP_NUM_THREADS")
    return f"OMP_NUM_THREADS={threads} {line}" if threads else line


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads_per_rank": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        facts["cuda"] = torch.version.cuda
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit(folder: Path) -> dict[str, Any] | None:
    """Commit of the script's repository and whether files differ from it; None outside a repository."""
    try:
        head = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"hash": head, "changed_files": [line[2:].strip() for line in changed.splitlines()]}


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def write(path: Path, settings: dict[str, Any]) -> None:
    path.write_text(json.dumps(settings, indent=2, default=str) + "\n")
