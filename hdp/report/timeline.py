"""The picture of one step: ranks down, time across, one colour a document, waiting hatched.

Documents that share a micro-batch run together: their strips lie one above the other, as thick as their share of its tokens. A
document that several ranks share has the same colour on each of them and carries its name.
"""

from __future__ import annotations

import colorsys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hdp.report.curve import INK, SOFT, pyplot

if TYPE_CHECKING:
    from hdp.balance import Plan

NOTHING = "#d8dae0"  # a rank that takes part without a token of its own
LANE = 0.78  # of the distance between two ranks
MARGINS = 1.35  # inches above and below the lanes: title, time axis, legend
GAP = 0.75  # inches between two steps


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step to draw."""

    plan: Plan
    spans: Sequence[Any]
    """As in ``hdp.StepResult``: ``rank, slot, kind, start, stop`` (seconds from the step's begin), ``sequences``."""
    seconds: float
    """How long the step took."""
    title: str


@dataclass(frozen=True, kw_only=True)
class Strip:
    """One rectangle of the picture."""

    rank: int
    start: float
    """Seconds from the beginning of the step."""
    stop: float
    bottom: float
    """0 to 1, within the rank's lane."""
    top: float
    sequence: int | None
    """The document; None: waiting, or a dummy micro-batch."""
    kind: str
    """``"compute"`` or ``"wait"``."""


def strips(plan: Plan, spans: Iterable[Any]) -> list[Strip]:
    """Cuts every compute span (``rank, slot, kind, start, stop, sequences``) into one strip a document."""
    tokens: dict[tuple[int, int], dict[int, int]] = {}
    for rank in range(plan.world_size):
        for micro_batch in plan.micro_batches(rank):
            tokens[rank, micro_batch.slot] = {shard.sequence: shard.tokens for shard in micro_batch.shards}
    cut = []
    for span in spans:
        place = {"rank": span.rank, "start": span.start, "stop": span.stop, "kind": span.kind}
        held = tokens.get((span.rank, span.slot), {})
        weights = [(sequence, held.get(sequence, 0)) for sequence in span.sequences]
        total = sum(weight for _, weight in weights)
        if span.kind == "wait" or total == 0:
            cut.append(Strip(**place, bottom=0.0, top=1.0, sequence=None))
            continue
        bottom = 0.0
        for sequence, weight in weights:
            top = bottom + weight / total
            cut.append(Strip(**place, bottom=bottom, top=top, sequence=sequence))
            bottom = top
    return cut


def colours(plan: Plan) -> dict[int, str]:
    """One colour a document: hues a golden angle apart, shared documents strong, whole ones pale.

    Hues follow the lengths alone, so a document looks alike in two plans of the same batch.
    """
    chosen = {}
    for place, sequence in enumerate(np.argsort(-plan.lengths, kind="stable").tolist()):
        hue = (0.58 + place * 0.381966) % 1.0
        is_shared = len(plan.group(sequence)) > 1
        lightness, saturation = (0.47, 0.62) if is_shared else (0.70 + 0.06 * (place % 3), 0.42)
        red, green, blue = colorsys.hls_to_rgb(hue, lightness, saturation)
        chosen[sequence] = f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"
    return chosen


def draw_steps(path: Path, steps: Sequence[Step]) -> None:
    """Draws one or more steps, one below the other, on one time scale, so that their lengths compare by eye."""
    plt = pyplot()
    lanes = [step.plan.world_size for step in steps]
    panels = [0.75 * count for count in lanes]
    height = sum(panels) + GAP * (len(steps) - 1) + MARGINS
    shrink = min(1.0, 40 / height)
    figure, all_axes = plt.subplots(
        len(steps), 1, figsize=(11, height * shrink), dpi=150, sharex=True, squeeze=False, height_ratios=panels
    )
    seconds = max(step.seconds for step in steps)
    any_dummy = False
    for step, axes in zip(steps, all_axes[:, 0], strict=True):
        cut = strips(step.plan, step.spans)
        any_dummy |= any(strip.sequence is None and strip.kind == "compute" for strip in cut)
        _draw_panel(axes, step, cut, seconds)
    all_axes[-1, 0].set_xlabel("seconds", color=INK)
    _draw_legend(figure, any_dummy)
    figure.subplots_adjust(
        left=0.065, right=0.985, bottom=0.95 / height, top=1 - 0.4 / height, hspace=GAP * len(panels) / sum(panels)
    )
    figure.savefig(path)
    plt.close(figure)


def _draw_panel(axes: Any, step: Step, cut: Sequence[Strip], seconds: float) -> None:
    ranks, colour = step.plan.world_size, colours(step.plan)
    _draw_strips(axes, cut, colour)
    axes.set_xlim(0, seconds)
    axes.set_ylim(ranks - 0.5, -0.5)
    if ranks <= 16:
        _draw_names(axes, step.plan, cut, seconds, colour)
        axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    else:
        axes.set_ylabel("rank", color=INK)
    axes.tick_params(axis="y", length=0, colors=INK)
    axes.tick_params(axis="x", colors=SOFT)
    axes.set_title(step.title, loc="left", fontsize=10, color=INK, pad=10)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _draw_strips(axes: Any, cut: Sequence[Strip], colour: dict[int, str]) -> None:
    from matplotlib.collections import PolyCollection

    compute = [s for s in cut if s.kind == "compute"]
    faces = [NOTHING if s.sequence is None else colour[s.sequence] for s in compute]
    # Thin borders of the same colour close the hair lines that anti-aliasing leaves between neighbours.
    axes.add_collection(
        PolyCollection([_corners(s) for s in compute], facecolors=faces, edgecolors=faces, linewidths=0.3)
    )
    waits = [_corners(s) for s in cut if s.kind == "wait"]
    axes.add_collection(
        PolyCollection(waits, facecolors="#ffffff", edgecolors="#a4a9b5", hatch="/////", linewidths=0.0, zorder=3)
    )


def _corners(strip: Strip) -> list[tuple[float, float]]:
    upper = strip.rank - LANE / 2
    top, bottom = upper + LANE * strip.bottom, upper + LANE * strip.top
    return [(strip.start, top), (strip.stop, top), (strip.stop, bottom), (strip.start, bottom)]


def _draw_names(axes: Any, plan: Plan, cut: Sequence[Strip], seconds: float, colour: dict[int, str]) -> None:
    """Writes the length of a document where its strips of one rank are long and thick enough to hold it."""
    places: dict[tuple[int, int], list[Strip]] = defaultdict(list)
    for strip in cut:
        if strip.sequence is not None:
            places[strip.rank, strip.sequence].append(strip)
    for (rank, sequence), pieces in places.items():
        start, stop = min(p.start for p in pieces), max(p.stop for p in pieces)
        thick = pieces[0].top - pieces[0].bottom
        group = plan.group(sequence)
        long_name = f"document {sequence}: {plan.lengths[sequence]:,} tokens" + (
            f" on {len(group)} ranks" if len(group) > 1 else ""
        )
        room = (stop - start) / seconds * 150  # characters of this size across the picture
        name = next((n for n in (long_name, f"{plan.lengths[sequence]:,}") if len(n) + 2 <= room), None)
        if name is None or thick < 0.2:
            continue
        middle = rank - LANE / 2 + LANE * (pieces[0].bottom + pieces[0].top) / 2
        shared = len(group) > 1
        axes.text(
            (start + stop) / 2,
            middle,
            name,
            ha="center",
            va="center",
            fontsize=7.5,
            color="white" if shared else INK,
            zorder=4,
            bbox={"boxstyle": "round,pad=0.3", "facecolor": colour[sequence], "linewidth": 0} if shared else None,
        )


def _draw_legend(figure: Any, any_dummy: bool) -> None:
    from matplotlib.patches import Patch

    entries = [
        Patch(facecolor=colorsys.hls_to_rgb(0.58, 0.47, 0.62), label="document shared by several ranks"),
        Patch(facecolor=colorsys.hls_to_rgb(0.58, 0.76, 0.42), label="document whole on one rank (one colour each)"),
        Patch(facecolor="white", edgecolor="#a4a9b5", hatch="/////", linewidth=0, label="waiting"),
    ]
    if any_dummy:
        entries.append(Patch(facecolor=NOTHING, label="nothing to compute"))
    style = {"frameon": False, "fontsize": 8, "labelcolor": INK, "handlelength": 1.6}
    figure.legend(handles=entries, loc="lower center", ncol=len(entries), **style)
