"""Reliability diagrams: how often what was said with a certain probability came true."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from comoe.train.plots import BLUE, GRID, INK, RED

Bins = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Rows, sum of their probabilities, and rows that came true, per bin."""
COLOURS = (RED, BLUE)


def reliability_figure(curves: Mapping[str, Bins], *, title: str) -> Figure:
    """Frequency over probability, a dot per bin, its area the share of rows; on the diagonal both are equal.

    Args:
        curves: legend -> bins, two at most; the first in orange, the second in blue.
        title: of the figure.
    """
    figure = Figure(figsize=(4.6, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.add_subplot()
    panel.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":")
    for colour, (name, (counts, sums, hits)) in zip(COLOURS, curves.items(), strict=False):
        used = counts > 0
        sure, true, share = sums[used] / counts[used], hits[used] / counts[used], counts[used] / counts.sum()
        panel.plot(sure, true, color=colour, linewidth=1.2, label=name, clip_on=False)
        panel.scatter(sure, true, s=8 + 240 * share, color=colour, alpha=0.55, linewidths=0, clip_on=False)
    panel.set(xlim=(0, 1), ylim=(0, 1), xlabel="probability given", ylabel="share that came true")
    panel.set_title(title, fontsize=9)
    panel.grid(color=GRID, linewidth=0.5)
    panel.tick_params(labelsize=7)
    panel.legend(fontsize=7, frameon=False, loc="upper left")
    return figure
