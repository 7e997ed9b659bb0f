"""Pictures of what training together did: gain per task, and which task helps which."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from comoe.comparing.intervals import MEAN, Difference
from comoe.comparing.report import Comparison
from comoe.train.plots import save_figure

VERDICTS = {"gained": "#2a7f4f", "lost": "#b5392f", "": "#9a9a9a"}
"""Verdict -> colour of its bar."""


def write_transfer_plots(comparison: Comparison, output: Path) -> None:
    """``plots/gains.png``, ``plots/gradients.png`` and ``plots/without.png``, where there is something to show."""
    if comparison.against:
        save_figure(gains_figure(comparison), output / "plots/gains.png")
    for arm, cosines in comparison.cosines.items():
        # The joint arm's picture has the plain name; others are asked for one by one.
        name = "gradients" if arm == comparison.plan.joint else f"gradients.{arm}"
        title = f"Gradient cosine of {arm}\n(diagonal: the most that noise allows)"
        apart = np.abs(cosines.mean_TT[~np.eye(len(cosines.tasks), dtype=bool)])
        most = float(np.nanmax(apart)) if np.isfinite(apart).any() else None
        figure = heatmap_figure(cosines.mean_TT, cosines.tasks, cosines.tasks, title=title, most=most)
        save_figure(figure, output / f"plots/{name}.png")
    if comparison.changes:
        save_figure(without_figure(comparison), output / "plots/without.png")


def gains_figure(comparison: Comparison) -> Figure:
    """One panel per arm, one bar per task and for the mean: gain over the baseline with its 95 % interval."""
    arms = list(comparison.against)
    names = [*(name for name in comparison.tasks), MEAN]
    columns = min(3, len(arms))
    rows = math.ceil(len(arms) / columns)
    figure = Figure(figsize=(3.1 * columns + 0.6, (0.26 * len(names) + 0.75) * rows + 0.5), dpi=110,
                    layout="constrained")  # fmt: skip
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for panel, arm in zip(axes, arms, strict=False):
        _bars(panel, comparison.against[arm], names)
        panel.set_title(arm, fontsize=9)
    for panel in axes[len(arms) :]:
        panel.set_visible(False)
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    # By the bars: the intervals of two seeds are wider than all that is known, and are cut at the edge.
    bars = [abs(item.mean) for found in comparison.against.values() for item in found.values()]
    axes[0].set_xlim(-2.2 * max(bars) or -0.01, 2.2 * max(bars) or 0.01)
    figure.suptitle(f"Gain over {comparison.baseline}, 95 % interval\n(coloured: 0 is outside)", fontsize=9)
    return figure


def without_figure(comparison: Comparison) -> Figure:
    """Heatmap of what dropping a task changes for the others."""
    tasks, dropped = list(comparison.tasks), list(comparison.changes)
    values, bold = np.full((len(dropped), len(tasks)), math.nan), set()
    for row, name in enumerate(dropped):
        for column, task in enumerate(tasks):
            if (change := comparison.changes[name].get(task)) is not None:
                values[row, column] = change.mean
                if change.verdict:
                    bold.add((row, column))
    title = f"Change of a task (column) without another one (row)\nagainst {comparison.plan.joint}; bold: 0 is outside"
    return heatmap_figure(values, dropped, tasks, title=title, bold=bold)


def heatmap_figure(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    bold: set[tuple[int, int]] | None = None,
    most: float | None = None,
) -> Figure:
    """Numbers on colours, red below 0 and blue above; cells that are NaN stay empty.

    Args:
        values: (rows, columns).
        rows: names from the top down.
        columns: names from the left.
        title: of the figure.
        bold: cells in bold.
        most: value from which on the colour is the strongest; None is the largest there is.
    """
    figure = Figure(figsize=(0.62 * len(columns) + 2.0, 0.42 * len(rows) + 1.6), dpi=120, layout="constrained")
    panel = figure.subplots()
    known = np.abs(values[np.isfinite(values)])
    limit = most or (float(known.max()) if known.size else 0.0) or 1.0
    panel.imshow(values, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    for row, column in zip(*np.nonzero(np.isfinite(values)), strict=True):
        value = values[row, column]
        panel.text(column, row, f"{value:+.3f}", ha="center", va="center", fontsize=7,
                   color="white" if abs(value) > 0.65 * limit else "black",
                   fontweight="bold" if (row, column) in (bold or ()) else "normal")  # fmt: skip
    panel.set_xticks(range(len(columns)), columns, rotation=35, ha="right", fontsize=8)
    panel.set_yticks(range(len(rows)), rows, fontsize=8)
    panel.set_title(title, fontsize=9)
    panel.spines[:].set_visible(False)
    return figure


def _bars(panel: Axes, differences: Mapping[str, Difference], names: Sequence[str]) -> None:
    panel.grid(axis="x", color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=7)
    panel.set_yticks(range(len(names)), names)
    panel.axvline(0, color="#555555", linewidth=0.8)
    for place, name in enumerate(names):
        if (item := differences.get(name)) is not None:
            panel.barh(place, item.mean, color=VERDICTS[item.verdict], height=0.62, alpha=0.85)
            panel.plot([item.low, item.high], [place, place], color="#333333", linewidth=1.1)
