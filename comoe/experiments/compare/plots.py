"""The figures of a comparison: quality per arm, gates, what each expert is worth, gains and transfer per task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from comoe.experiments.compare.report import Comparison
from comoe.experiments.compare.statistics import MEAN, Difference, Interval
from comoe.train.monitor.plots import COLORS, save_figure

GATES = {
    "weight_monopoly": "largest share of one expert (weights)",
    "weight_effective_experts": "effective experts (weights)",
    "weight_task_information": "task information [nats]",
}
"""Measure -> title of its panel."""


def write_plots(comparison: Comparison, output: Path) -> None:
    """``plots/quality.png``, ``metrics.png``, ``gates.png``, ``removal.png``, and those of
    ``write_transfer_plots``, where there is something to show."""
    arms = comparison.arms
    if not arms:
        return
    write_transfer_plots(comparison, output)
    split = comparison.results[arms[0]][0].split
    names = [f"{name}/{task.metric}" for name, task in comparison.tasks.items()]
    panels = {MEAN: "mean of the main metrics", **{name: name for name in names}}
    reading = f"on the {split} posts: seeds, mean, 95 % interval (cut at the edge); dotted: {comparison.baseline}"
    title = f"Quality {reading}"
    save_figure(
        dots_figure(comparison, arms, panels, values="quality", title=title),
        output / "plots/quality.png",
    )
    if comparison.metrics:
        panels = {name: name for name in comparison.metrics}
        figure = dots_figure(
            comparison, arms, panels, values="figures", title=f"Metrics {reading}", told=True
        )
        save_figure(figure, output / "plots/metrics.png")
    gated = [arm for arm in arms if comparison.results[arm][0].routing]
    if gated:
        title = f"Gates on the {split} posts, means over layers"
        save_figure(
            dots_figure(comparison, gated, GATES, values="routing", title=title),
            output / "plots/gates.png",
        )
    measured = [arm for arm in arms if any(result.removal for result in comparison.results[arm])]
    if measured:
        save_figure(removal_figure(comparison, measured), output / "plots/removal.png")


def dots_figure(
    comparison: Comparison,
    arms: Sequence[str],
    panels: dict[str, str],
    *,
    values: str,
    title: str,
    told: bool = False,
) -> Figure:
    """One panel per number, one line per arm: a dot per seed, the mean and its interval; the baseline's mean dotted.

    Args:
        comparison: all runs.
        arms: from the top down.
        panels: name of a number -> title.
        values: quality, figures or routing.
        title: of the figure.
        told: write the means as numbers too.
    """
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    width, height = (3.4, 0.36) if told else (2.6, 0.24)
    figure = Figure(figsize=(width * columns + 1.2, (height * len(arms) + 0.65) * rows + 0.4), dpi=110,
                    layout="constrained")  # fmt: skip
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for panel, (name, text) in zip(axes, panels.items(), strict=False):
        _dots(panel, comparison, arms, values, name, told=told)
        panel.set_title(text, fontsize=8)
    for panel in axes[len(panels) :]:
        panel.set_visible(False)
    axes[0].set_ylim(len(arms) - 0.5, -0.5)
    figure.suptitle(title, fontsize=10)
    return figure


def removal_figure(comparison: Comparison, arms: Sequence[str]) -> Figure:
    """Rise of the held-out loss without one expert, experts of each layer from the most to the least needed.

    A line is the mean over seeds, the band their range. Experts are ordered in each run by
    themselves: expert 3 of one seed has nothing to do with expert 3 of another.
    """
    removals = {
        arm: [result.removal for result in comparison.results[arm] if result.removal]
        for arm in arms
    }
    layers = sorted({layer for found in removals.values() for layer in found[0].layers})
    figure = Figure(figsize=(2.7 * len(layers) + 0.4, 2.9), dpi=110, layout="constrained")
    axes = dict(
        zip(layers, figure.subplots(1, len(layers), squeeze=False, sharey=True)[0], strict=True)
    )
    for arm, found in removals.items():
        ordered_NLE = -np.sort(-np.stack([removal.loss_rise_LE for removal in found]), axis=2)
        ranks = np.arange(1, ordered_NLE.shape[2] + 1)
        colour = _colour(comparison, arm)
        for layer, runs_NE in zip(found[0].layers, ordered_NLE.transpose(1, 0, 2), strict=True):
            panel = axes[layer]
            panel.plot(
                ranks,
                runs_NE.mean(axis=0),
                color=colour,
                marker="o",
                markersize=3,
                linewidth=1.4,
                label=arm,
            )
            panel.fill_between(
                ranks,
                runs_NE.min(axis=0),
                runs_NE.max(axis=0),
                color=colour,
                alpha=0.15,
                linewidth=0,
            )
    shown = {}
    for layer, panel in axes.items():
        _style(panel)
        panel.set_title(f"layer {layer}", fontsize=9)
        panel.set_xlabel("experts, most needed first", fontsize=8)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        shown |= {
            label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
        }
    axes[layers[0]].set_ylabel("rise of the loss", fontsize=8)
    handles, labels = list(shown.values()), list(shown)
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(len(labels), 5),
        fontsize=7,
        frameon=False,
    )
    title = "Rise of the loss without one expert: mean and range of the seeds; below 0 it did harm"
    figure.suptitle(title, fontsize=10)
    return figure


def _dots(
    panel: Axes, comparison: Comparison, arms: Sequence[str], values: str, name: str, *, told: bool
) -> None:
    _style(panel)
    is_metric = values in ("quality", "figures")
    panel.set_yticks(range(len(arms)), arms)
    for place, arm in enumerate(arms):
        item = comparison.interval(arm, values, name)
        if item is None:
            continue
        colour = _colour(comparison, arm)
        seeds = comparison.seeds_of(arm, values, name)
        panel.plot(
            seeds,
            [place] * len(seeds),
            linestyle="",
            marker=".",
            markersize=5,
            color=colour,
            alpha=0.5,
        )
        panel.plot([item.mean], [place], marker="o", markersize=5, color=colour)
        if told:
            panel.annotate(f"{item.mean:.3f}", (item.mean, place), xytext=(0, 4), textcoords="offset points",
                           ha="center", fontsize=7)  # fmt: skip
        if math.isfinite(item.low):
            panel.plot([item.low, item.high], [place, place], color=colour, linewidth=1.3)
    # By the dots: the interval of two or three seeds can be wider than all that is known, and is
    # cut at the edge then.
    dots = [value for arm in arms for value in comparison.seeds_of(arm, values, name)]
    if dots:
        margin = 0.6 * (max(dots) - min(dots)) or 0.1 * abs(dots[0]) or 0.1
        right = max(dots) + margin
        # No metric goes beyond 1, errors and costs apart, whose values do.
        panel.set_xlim(
            min(dots) - margin, min(right, 1.005) if is_metric and max(dots) <= 1 else right
        )
        panel.xaxis.set_major_locator(MaxNLocator(4))
    if is_metric and (base := _mean_of(comparison, values, name)) is not None:
        panel.axvline(base.mean, color="#777777", linewidth=1, linestyle=":")


def _mean_of(comparison: Comparison, values: str, name: str) -> Interval | None:
    if not comparison.results.get(comparison.baseline):
        return None
    return comparison.interval(comparison.baseline, values, name)


def _colour(comparison: Comparison, arm: str) -> str:
    """An arm keeps its colour from picture to picture."""
    return COLORS[list(comparison.results).index(arm) % len(COLORS)]


def _style(panel: Axes) -> None:
    panel.grid(color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=7)


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
        figure = heatmap_figure(
            cosines.mean_TT, cosines.tasks, cosines.tasks, title=title, most=most
        )
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
    # By the bars: the intervals of two seeds are wider than all that is known, and are cut at the
    # edge.
    bars = [abs(item.mean) for found in comparison.against.values() for item in found.values()]
    axes[0].set_xlim(-2.2 * max(bars) or -0.01, 2.2 * max(bars) or 0.01)
    figure.suptitle(
        f"Gain over {comparison.baseline}, 95 % interval\n(coloured: 0 is outside)", fontsize=9
    )
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
    figure = Figure(
        figsize=(0.62 * len(columns) + 2.0, 0.42 * len(rows) + 1.6), dpi=120, layout="constrained"
    )
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
