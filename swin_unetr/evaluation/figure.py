"""Pictures of an evaluation: every case's score with the mean and its interval, and the difference of two runs."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..names import shown
from .scores import HIGHER_IS_BETTER, METRICS
from .statistics import Estimate

TITLES = {"dice": "Dice", "nsd": "NSD", "hd95": "HD95 (mm)"}
INK, MUTED, DOTS, MARK = "#1d2733", "#68778a", "#9db4cc", "#0b5cad"
BETTER, WORSE = "#13803c", "#b3261e"


def draw_scores(
    values: Mapping[str, Mapping[str, list[float]]],
    estimates: Mapping[str, Mapping[str, Estimate]],
    title: str,
    caption: str,
) -> bytes:
    """A PNG with one panel per metric and one row per class.

    Args:
        values: the cases' scores by metric and row; NaN are left out.
        estimates: estimates by metric and row.
    """
    figure, panels = _panels(list(estimates[METRICS[0]]), title, caption)
    # Dots of equal scores would hide one another. The seed makes the picture reproducible.
    spread = np.random.default_rng(0)
    for metric, axes in zip(METRICS, panels, strict=True):
        for row, (name, estimate) in enumerate(estimates[metric].items()):
            known = [value for value in values[metric][name] if not math.isnan(value)]
            axes.scatter(
                known, row + spread.uniform(-0.22, 0.22, len(known)), s=16, color=DOTS, alpha=0.8, linewidths=0
            )
            _interval(axes, estimate, row, MARK, f"{estimate.mean:.3f}" if metric != "hd95" else f"{estimate.mean:.1f}")
        axes.set_title(f"{TITLES[metric]}  {'→' if HIGHER_IS_BETTER[metric] else '←'} better", color=INK, fontsize=11)
        axes.set_xlim(*((-0.02, 1.02) if metric != "hd95" else (-0.02 * axes.get_xlim()[1], None)))
    return _png(figure)


def draw_differences(estimates: Mapping[str, Mapping[str, Estimate]], title: str, caption: str) -> bytes:
    """A PNG of mean differences with their intervals, coloured where the interval excludes 0.

    Args:
        estimates: estimates of this run's scores minus the other's, by metric and row.
    """
    figure, panels = _panels(list(estimates[METRICS[0]]), title, caption)
    for metric, axes in zip(METRICS, panels, strict=True):
        axes.axvline(0, color=MUTED, linewidth=1)
        for row, estimate in enumerate(estimates[metric].values()):
            gain = estimate.low > 0 if HIGHER_IS_BETTER[metric] else estimate.high < 0
            loss = estimate.high < 0 if HIGHER_IS_BETTER[metric] else estimate.low > 0
            colour = BETTER if gain else WORSE if loss else MUTED
            _interval(
                axes, estimate, row, colour, f"{estimate.mean:+.3f}" if metric != "hd95" else f"{estimate.mean:+.1f}"
            )
        ends = [abs(end) for e in estimates[metric].values() for end in (e.low, e.high, e.mean) if math.isfinite(end)]
        reach = 1.15 * max(ends, default=0) or 1.0
        axes.set_xlim(-reach, reach)
        axes.set_title(f"Δ {TITLES[metric]}  {'→' if HIGHER_IS_BETTER[metric] else '←'} better", color=INK, fontsize=11)
    return _png(figure)


def _panels(rows: list[str], title: str, caption: str) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each metric, rows from the top."""
    height = 1.5 + 0.45 * len(rows)
    shown_rows = [shown(row) for row in rows]
    longest = max(len(row) for row in shown_rows)
    figure = Figure(figsize=(12, height), facecolor="white")
    left = 0.03 + min(0.25, 0.007 * longest)
    grid = {"left": left, "right": 0.985, "top": 1 - 0.85 / height, "bottom": 0.55 / height, "wspace": 0.1}
    panels = figure.subplots(1, len(METRICS), gridspec_kw=grid)
    for index, axes in enumerate(panels):
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), shown_rows if index == 0 else [""] * len(rows), color=INK, parse_math=False)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", colors=MUTED, labelsize=9)
        axes.grid(axis="x", color="#e4e9ef", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in axes.spines.values():
            side.set_visible(False)
    figure.text(
        0.015, 1 - 0.2 / height, shown(title), parse_math=False, color=INK, fontsize=13, weight="bold", va="center"
    )
    figure.text(0.015, 0.17 / height, caption, color=MUTED, fontsize=9, va="center")
    return figure, list(panels)


def _interval(axes: Axes, estimate: Estimate, row: int, colour: str, text: str) -> None:
    """The mean as a point with its number, the interval as a bar through it."""
    if math.isnan(estimate.mean):
        axes.text(0.5, row, "no case", transform=axes.get_yaxis_transform(), color=MUTED, fontsize=9, ha="center")
        return
    if not math.isnan(estimate.low):
        axes.plot([estimate.low, estimate.high], [row, row], color=colour, linewidth=2.5, solid_capstyle="butt")
    axes.plot(estimate.mean, row, "o", color=colour, markersize=6)
    axes.annotate(
        text, (estimate.mean, row), xytext=(0, 8), textcoords="offset points", color=colour, fontsize=9, ha="center"
    )


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(file, dpi=120, format="png")
    return file.getvalue()
