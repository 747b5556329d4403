"""The picture of a comparison: how long a step takes with each planner, and what ranks do in that time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hdp.balance.plan import PlanError

COMPUTE, WAIT, BEST = "#3b6ea8", "#d9dce3", "#1f2430"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One planner over all simulated steps."""

    planner: str
    seconds: float
    """Mean of a step."""
    waiting: float
    """Share of rank time in which nothing is computed."""
    busiest: float
    """Seconds of the busiest rank, mean over steps."""


def draw(path: Path, rows: Sequence[Row], title: str) -> None:
    """One bar a planner: computing, then waiting, of the average rank; a mark at the busiest rank. PNG or SVG by suffix."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlanError("a picture needs matplotlib: pip install 'hdp[plot]'") from error
    figure = Figure(figsize=(8.0, 1.1 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(rows))[::-1]
    computing = np.array([row.seconds * (1 - row.waiting) for row in rows])
    seconds = np.array([row.seconds for row in rows])
    axes.barh(places, computing, 0.62, color=COMPUTE, label="computing, average rank")
    axes.barh(places, seconds - computing, 0.62, left=computing, color=WAIT, label="waiting for links or other ranks")
    axes.plot([row.busiest for row in rows], places, "|", ms=15, mew=2, color=BEST, label="computing, busiest rank")
    for place, row in zip(places, rows, strict=True):
        text = f" {row.seconds:.3g} s, {seconds[0] / row.seconds:.2f}x"
        axes.text(max(row.seconds, row.busiest), place, text, va="center", fontsize=9)
    axes.set_yticks(places, [row.planner for row in rows])
    axes.set_xlim(0, float(seconds.max()) * 1.22)
    axes.set_xlabel("seconds a step")
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
