"""Both sides of ``benchmarks/same_mesh.py`` train alike, and what is counted as attention holds its kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCHEDULES = ["ulysses", "all_gather", "ring"]


def trained(world: Any, heads: tuple[int, int]) -> dict[str, list[dict[str, Any]]]:
    """Steps by candidate. Raises RuntimeError where losses differ."""
    sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
    import same_mesh_worker as worker

    worker.BATCHES["tiny"] = worker.Batch([96, 50, 33, 7], 64)
    job = worker.Job(batch="tiny", heads=heads, schedules=SCHEDULES, rounds=1)
    return worker.run_job(job, world, worker.clocked())["steps"]


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=["multi-head", "grouped"])
def test_both_sides_train_alike(ranks: Callable[[int], Any], heads: tuple[int, int]) -> None:
    for steps in ranks(2).run(trained, heads):
        for schedule in SCHEDULES:
            (ours,), (theirs,) = (steps[f"{side}:{schedule}"] for side in ("hdp", "rival"))
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
            for process, thread, kernels in (ours["attention"], theirs["attention"]):
                assert process >= thread * 0.99 and thread > kernels > 0
