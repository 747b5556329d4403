"""The loss curve of a run, as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

INK, SOFT, LINE = "#1f2430", "#8a90a0", "#3b6fb6"


def pyplot() -> Any:
    """Matplotlib, drawing to files only. Raises ImportError when it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib: pip install 'hdp[plot]', or turn them off (figures=False)"
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw_loss(
    path: Path,
    *,
    steps: Sequence[int],
    losses: Sequence[float],
    evaluations: Sequence[tuple[int, float]] = (),
    title: str = "",
) -> None:
    """Training loss of each step, and held-out loss where it was measured (``evaluations``: step and loss)."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.2), dpi=150)
    marker = "o" if len(steps) == 1 else None
    axes.plot(steps, losses, color=LINE, linewidth=1.4, marker=marker, label="training, each step")
    if evaluations:
        at, held_out = zip(*evaluations, strict=True)
        axes.plot(at, held_out, color="#d1663b", linewidth=0.8, linestyle=":", zorder=2)
        axes.scatter(at, held_out, color="#d1663b", s=34, zorder=3, label="held-out documents")
        for step, loss in evaluations:
            first = step == min(at)
            axes.annotate(
                f"{loss:.3f}",
                (step, loss),
                xytext=(9, 0) if first else (0, -9),
                textcoords="offset points",
                ha="left" if first else "center",
                va="center" if first else "top",
                fontsize=9,
                color=INK,
                bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "linewidth": 0, "alpha": 0.85},
            )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(y=0.12)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("loss, nats a token", color=INK)
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.grid(axis="y", color="#e4e6ec", linewidth=0.8)
    axes.set_axisbelow(True)
    for edge in ("top", "right"):
        axes.spines[edge].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
