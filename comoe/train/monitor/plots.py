"""The one style of all figures, and those of a run: curves, heatmaps, confusion, reliability.

Colors are Okabe and Ito's, which readers with any color vision tell apart; so are both ends of the
heatmaps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from comoe.config.files import atomic_file

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#000000")
BLUE, RED, GREEN, _, _, SKY, GREY, _ = COLORS
INK, GRID, EMPTY = "#333333", "#dddddd", "#eeeeee"

MAX_NAMED_CLASSES, MAX_COUNTED_CLASSES, MAX_LABEL = 30, 12, 18

Curve = Sequence[tuple[int, float]]
"""(step, value) pairs in the order of steps."""


def loss_figure(curves: Mapping[str, Curve], validation: Mapping[str, Curve]) -> Figure:
    """Loss over steps, each term in a panel of its own: training with its running mean, and validation as dots.

    Args:
        curves: name -> training curve; the name ``loss`` (the whole objective) comes first.
        validation: the same names -> loss at the evaluations, where there is one.
    """
    names = sorted(curves, key=lambda name: name != "loss")
    figure, axes = _over_steps(len(names), title="Loss over optimizer steps")
    for panel, name in zip(axes, names, strict=False):
        points = _finite(curves[name])
        panel.plot(*_columns(points), color=SKY, linewidth=0.8, alpha=0.7)
        panel.plot(*_columns(_smooth(points)), color=BLUE, linewidth=1.6, label="training")
        checks = _finite(validation.get(name, ()))
        if checks:
            panel.plot(
                *_columns(checks),
                color=RED,
                marker="o",
                markersize=3,
                linewidth=1.2,
                label="validation",
            )
            panel.legend(fontsize=7, frameon=False)
        panel.set_title("all terms" if name == "loss" else name, fontsize=9)
    return figure


def metric_figure(curves: Mapping[str, Curve], baselines: Mapping[str, float]) -> Figure:
    """Main metric per task over steps, one panel per task, the majority baseline as a dotted line.

    Args:
        curves: ``task: metric`` -> values at the evaluations.
        baselines: the same names -> score of always predicting the majority label, where there is one.
    """
    figure, axes = _over_steps(len(curves), title="Validation metric over optimizer steps")
    for panel, (name, curve) in zip(axes, curves.items(), strict=False):
        points = _finite(curve)
        panel.plot(*_columns(points), color=BLUE, marker="o", markersize=3, linewidth=1.6)
        if math.isfinite(baselines.get(name, math.nan)):
            panel.axhline(baselines[name], color=RED, linestyle=":", linewidth=1.4)
            place = dict(
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                fontsize=7,
                color=RED,
            )
            panel.annotate(
                "majority", (1.0, baselines[name]), xytext=(-2, 2), ha="right", va="bottom", **place
            )
        panel.set_title(name, fontsize=9)
        panel.margins(y=0.12)
    return figure


def experts_figure(curves: Mapping[str, Mapping[str, Curve]]) -> Figure:
    """Measures of the blocks over steps, a panel per measure and a line per layer.

    Args:
        curves: measure -> layer -> values at the evaluations.
    """
    figure, axes = _over_steps(len(curves), title="Blocks over optimizer steps (validation)")
    for panel, (measure, by_layer) in zip(axes, curves.items(), strict=True):
        for number, (layer, curve) in enumerate(by_layer.items()):
            style = {"color": COLORS[number % len(COLORS)], "marker": "o", "markersize": 3}
            panel.plot(*_columns(_finite(curve)), label=f"layer {layer}", linewidth=1.4, **style)
        panel.set_title(measure, fontsize=9)
    legend_below(figure, axes)
    return figure


def share_figure(share: np.ndarray, *, rows: Sequence[str], title: str, row_axis: str) -> Figure:
    """Heatmap rows x experts of shares in percent; white is an even share, purple more, orange less, gray no tokens.

    Args:
        share: (rows, E), each row sums to 1, or NaN for a row without tokens.
        rows: name of each row.
        title: what is shown.
        row_axis: what the rows are.
    """
    experts = share.shape[1]
    # A few experts make a narrow figure, and a title of two lines a high one.
    longest = max(len(line) for line in title.splitlines())
    width = max(1.9 + 0.52 * min(experts, 24), 0.08 * longest)
    figure = new_figure(width, 1.05 + 0.2 * len(title.splitlines()) + 0.34 * len(rows))
    panel = figure.add_subplot()
    _share_panel(panel, share, rows=rows)
    panel.set_ylabel(row_axis, fontsize=8)
    panel.set_xlabel("expert", fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def task_share_figure(
    share_LTE: np.ndarray,
    *,
    layers: Sequence[int | str],
    tasks: Sequence[str],
    what: str = "tokens",
) -> Figure:
    """Heatmaps task x expert, one panel per layer: which experts the tokens (or ``what``) of each task go to.

    Experts of different layers have nothing in common but their number, so the layers are not
    averaged.
    """
    experts = share_LTE.shape[-1]
    columns = min(len(layers), 2 if experts <= 16 else 1)
    rows = math.ceil(len(layers) / columns)
    wide, high = 1.2 + 0.42 * min(experts, 24), 0.75 + 0.28 * len(tasks)
    figure = new_figure(columns * wide + 0.6, rows * high + 0.6)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for panel, layer, share in zip(panels, layers, share_LTE, strict=False):
        _share_panel(panel, share, rows=tasks)
        panel.set_title(f"layer {layer}", fontsize=9)
    for panel in panels[len(layers) :]:
        panel.set_visible(False)
    figure.suptitle(f"Share of each task's {what} per expert, in %", fontsize=10)
    return figure


def confusion_figure(counts_YY: np.ndarray, *, labels: Sequence[str], title: str) -> Figure:
    """Confusion matrix: the color is the share of the gold label's posts, the number in a cell counts them.

    Args:
        counts_YY: posts by gold label (rows) and predicted label (columns).
        labels: names in the order of the ids; left out above 30 labels, as are the numbers above
            12.
        title: what is shown.
    """
    size = len(labels)
    edge = 1.6 + (0.5 * size if size <= MAX_COUNTED_CLASSES else min(0.3 * size, 7.0))
    figure = new_figure(max(edge + 0.6, 3.4), max(edge, 2.8))
    panel = figure.add_subplot()
    counts = counts_YY.astype(np.float64)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1.0)
    image = panel.imshow(share, cmap="Blues", vmin=0.0, vmax=1.0)
    if size <= MAX_COUNTED_CLASSES:
        for row, column in np.ndindex(*counts.shape):
            color = "white" if share[row, column] > 0.55 else INK
            number = int(counts[row, column])
            text = str(number) if number < 10_000 else f"{number / 1000:.0f}k"
            panel.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    if size <= MAX_NAMED_CLASSES:
        names = [short(label) for label in labels]
        upright = max(map(len, names)) <= 5 and size <= MAX_COUNTED_CLASSES
        slant = (
            dict(rotation=0, ha="center")
            if upright
            else dict(rotation=45, ha="right", rotation_mode="anchor")
        )
        panel.set_xticks(range(size), names, fontsize=7, **slant)
        panel.set_yticks(range(size), names, fontsize=7)
    panel.set_xlabel("predicted", fontsize=8)
    panel.set_ylabel("gold", fontsize=8)
    bar = figure.colorbar(image, ax=panel, shrink=0.8)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("share of gold label", fontsize=7)
    figure.suptitle(title, fontsize=10)
    return figure


def figure_pixels(figure: Figure) -> np.ndarray:
    """The figure as an image, uint8, (height, width, 3)."""
    canvas = FigureCanvasAgg(figure)
    # Labels may hold dollar signs, which else begin a formula.
    with rc_context({"text.parse_math": False}):
        for text in figure.findobj(Text):
            text.set_parse_math(False)
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save_figure(figure: Figure, path: Path) -> np.ndarray:
    """Write a PNG; a reader of the folder never sees half of one.

    Returns:
        the image, uint8, (height, width, 3): drawing takes long, so nobody draws a figure twice.
    """
    pixels = figure_pixels(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        imsave(file, pixels, format="png", dpi=figure.dpi)
    return pixels


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches, laid out so that labels do not overlap."""
    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def panel_grid(
    count: int, *, size: tuple[float, float], title: str, most: int = 3, **shared: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` panels in the style of the house.

    Args:
        count: panels, from the left, then down.
        size: inches of one panel, width and height.
        title: of the figure.
        most: panels side by side.
        shared: what ``Figure.subplots`` takes, such as ``sharey``.
    """
    columns = min(max(count, 1), most)
    rows = math.ceil(max(count, 1) / columns)
    figure = new_figure(size[0] * columns + 0.3, size[1] * rows + 0.5)
    panels = list(figure.subplots(rows, columns, squeeze=False, **shared).flatten())
    for panel in panels[count:]:
        panel.set_visible(False)
    for panel in panels[:count]:
        panel.grid(color=GRID, linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=10)
    return figure, panels[:count]


def legend_below(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend for all panels, each label once."""
    shown: dict[str, Any] = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        shown |= dict(zip(labels, handles, strict=True))
    if shown:
        place = {"loc": "outside lower center", "ncols": min(len(shown), 5)}
        figure.legend(list(shown.values()), list(shown), fontsize=7, frameon=False, **place)


def _over_steps(count: int, *, title: str) -> tuple[Figure, list[Axes]]:
    figure, panels = panel_grid(count, size=(2.7, 1.9), title=title)
    for panel in panels:
        panel.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    return figure, panels


def _share_panel(panel: Axes, share: np.ndarray, *, rows: Sequence[str]) -> None:
    """One heatmap of shares around the even share, with percent in the cells while they fit."""
    experts = share.shape[1]
    # 0 is the even share, +1 twice of it and more, -1 a dead expert.
    panel.imshow(
        np.clip(share * experts - 1.0, -1.0, 1.0), cmap="PuOr", vmin=-1.0, vmax=1.0, aspect="auto"
    )
    panel.set_facecolor(EMPTY)
    if experts <= 16:
        for row, column in np.ndindex(*share.shape):
            if math.isfinite(share[row, column]):
                strong = abs(min(share[row, column] * experts - 1.0, 1.0)) > 0.65
                text, color = f"{100 * share[row, column]:.0f}", "white" if strong else INK
                panel.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    panel.set_xticks(range(0, experts, max(1, experts // 16)))
    panel.set_yticks(range(len(rows)), [short(row) for row in rows])
    panel.tick_params(labelsize=7, length=0)


def _columns(points: Curve) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def _finite(points: Curve) -> list[tuple[int, float]]:
    return [(step, value) for step, value in points if value is not None and math.isfinite(value)]


def _smooth(points: Curve) -> list[tuple[int, float]]:
    """Centered running mean over a twentieth of the curve."""
    reach = len(points) // 40
    windows = (points[max(0, i - reach) : i + reach + 1] for i in range(len(points)))
    return [
        (step, sum(v for _, v in window) / len(window))
        for (step, _), window in zip(points, windows, strict=True)
    ]


def short(label: str) -> str:
    """Long labels often differ in their last letters only: the middle goes."""
    return label if len(label) <= MAX_LABEL else f"{label[: MAX_LABEL - 7]}…{label[-6:]}"


Bins = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Rows, sum of their probabilities, and rows that came true, per bin."""

BEFORE_AND_AFTER = (RED, BLUE)


def reliability_figure(curves: Mapping[str, Bins], *, title: str) -> Figure:
    """Frequency over probability, a dot per bin, its area the share of rows; on the diagonal both are equal.

    Args:
        curves: legend -> bins, two at most; the first in orange, the second in blue.
        title: of the figure.
    """
    figure = new_figure(4.6, 4.4)
    panel = figure.add_subplot()
    panel.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":")
    for color, (name, (counts, sums, hits)) in zip(BEFORE_AND_AFTER, curves.items(), strict=False):
        used = counts > 0
        sure, true, share = (
            sums[used] / counts[used],
            hits[used] / counts[used],
            counts[used] / counts.sum(),
        )
        panel.plot(sure, true, color=color, linewidth=1.2, label=name, clip_on=False)
        panel.scatter(
            sure, true, s=8 + 240 * share, color=color, alpha=0.55, linewidths=0, clip_on=False
        )
    panel.set(xlim=(0, 1), ylim=(0, 1), xlabel="probability given", ylabel="share that came true")
    panel.set_title(title, fontsize=9)
    panel.grid(color=GRID, linewidth=0.5)
    panel.tick_params(labelsize=7)
    panel.legend(fontsize=7, frameon=False, loc="upper left")
    return figure
