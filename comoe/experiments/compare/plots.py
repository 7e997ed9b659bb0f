"""The figures of a comparison: quality per arm, gates, ablated experts, gains, transfer per task."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from comoe.experiments.compare.claim import FALLING
from comoe.experiments.compare.report import Comparison
from comoe.experiments.compare.results import MEASURES
from comoe.experiments.compare.statistics import MEAN, Estimate
from comoe.train.monitor.plots import (
    COLORS,
    GREEN,
    GREY,
    INK,
    RED,
    legend_below,
    new_figure,
    panel_grid,
    save_figure,
)

GATES = {
    "weight_monopoly": "largest share of one expert (weights)",
    "weight_effective_experts": "effective experts (weights)",
    "weight_task_information": "task information [nats]",
}
"""Routing statistic -> title of its panel."""

VERDICTS = {"gained": GREEN, "lost": RED, "": GREY}
"""Verdict -> color of its bar."""


def write_plots(comparison: Comparison, output: Path) -> None:
    """``quality.png``, ``loss.png``, ``teacher_kl.png``, ``time.png``, ``metrics.png``,
    ``gates.png``, ``removal.png``, ``gains.png``, ``gradients.png`` and ``without.png`` in
    ``plots/``, if there are values."""
    arms = comparison.arms
    if not arms:
        return
    split = comparison.results[arms[0]][0].split
    legend = f"on the {split} posts: seeds, mean, 95 % interval (cut at the edge); dotted: {comparison.baseline}"
    names = [f"{name}/{task.metric}" for name, task in comparison.tasks.items()]
    panels = {MEAN: "mean of the main metrics"} | {name: name for name in names}
    title = f"Quality {legend}"
    figures = {"quality": dots_figure(comparison, arms, panels, values="quality", title=title)}
    for measure in FALLING:
        field = MEASURES[measure]
        known = [
            name
            for name in comparison.tasks
            if any(comparison.seeds_of(arm, field, name) for arm in arms)
        ]
        if known:
            panels = {MEAN: "mean of the tasks"} | {name: f"{name}/{measure}" for name in known}
            title = f"{measure} {legend.replace(split, 'validation', 1)}"
            figures[measure] = dots_figure(comparison, arms, panels, values=field, title=title)
    if (figure := time_figure(comparison, split)) is not None:
        figures["time"] = figure
    if comparison.metrics:
        panels = {name: name for name in comparison.metrics}
        figures["metrics"] = dots_figure(
            comparison, arms, panels, values="figures", title=f"Metrics {legend}", numbers=True
        )
    if gated := [arm for arm in arms if comparison.results[arm][0].routing]:
        title = f"Gates on the {split} posts, means over layers"
        figures["gates"] = dots_figure(comparison, gated, GATES, values="routing", title=title)
    if measured := [arm for arm in arms if any(one.removal for one in comparison.results[arm])]:
        figures["removal"] = removal_figure(comparison, measured)
    if comparison.against:
        figures["gains"] = gains_figure(comparison)
    for arm, cosines in comparison.cosines.items():
        # The joint arm's figure has the plain name.
        name = "gradients" if arm == comparison.plan.joint else f"gradients.{arm}"
        title = f"Gradient cosine of {arm}\n(diagonal: the highest that noise permits)"
        apart = np.abs(cosines.mean_TT[~np.eye(len(cosines.tasks), dtype=bool)])
        most = float(np.nanmax(apart)) if np.isfinite(apart).any() else None
        tasks = cosines.tasks
        figures[name] = heatmap_figure(cosines.mean_TT, tasks, tasks, title=title, most=most)
    if comparison.changes:
        figures["without"] = without_figure(comparison)
    for name, figure in figures.items():
        save_figure(figure, output / f"plots/{name}.png")


def dots_figure(
    comparison: Comparison,
    arms: Sequence[str],
    panels: Mapping[str, str],
    *,
    values: str,
    title: str,
    numbers: bool = False,
) -> Figure:
    """One panel per number, one row per arm: a dot per seed, the mean and its interval; the baseline's mean dotted.

    Args:
        comparison: all runs.
        arms: from top to bottom.
        panels: name of a number -> title.
        values: quality, losses, divergences, figures or routing.
        title: of the figure.
        numbers: label the means.
    """
    width, height = (3.4, 0.36) if numbers else (2.6, 0.24)
    size = (width + 0.3, height * len(arms) + 0.65)
    figure, axes = panel_grid(len(panels), size=size, title=title, sharey=True)
    for panel, (name, text) in zip(axes, panels.items(), strict=True):
        panel.set_title(text, fontsize=8)
        panel.set_yticks(range(len(arms)), arms)
        for place, arm in enumerate(arms):
            _dots(panel, comparison, arm, place, (values, name), numbers=numbers)
        _limits(panel, comparison, arms, values, name)
    axes[0].set_ylim(len(arms) - 0.5, -0.5)
    return figure


def time_figure(comparison: Comparison, split: str) -> Figure | None:
    """Mean metric and mean loss over the milliseconds per post in training and in prediction, a point per arm.

    An arm is worth its time where no other one is better and faster. None without times or means.
    """
    speeds = {"training": "posts_per_second", "prediction": "predicted_posts_per_second"}
    kinds = {"quality": f"mean metric, {split}"}
    kinds |= {MEASURES[measure]: f"mean {measure}, validation" for measure in FALLING}
    points: dict[tuple[str, str], list[tuple[str, float, Estimate]]] = {}
    for arm in comparison.arms:
        for values in kinds:
            for what, cost in speeds.items():
                speed, item = (
                    comparison.interval(arm, *key) for key in (("costs", cost), (values, MEAN))
                )
                if speed is not None and item is not None:
                    found = points.setdefault((values, what), [])
                    found.append((arm, 1000 / speed.mean, item))
    if not points:
        return None
    title = "Quality over time per post: mean and 95 % interval over seeds (cut at the edge)"
    figure, axes = panel_grid(len(points), size=(3.6, 2.6), title=title, most=2)
    for panel, ((values, what), found) in zip(axes, points.items(), strict=True):
        for arm, time, item in found:
            color = _color(comparison, arm)
            panel.plot([time], [item.mean], "o", markersize=5, color=color)
            if math.isfinite(item.low):
                panel.plot(
                    [time, time], [item.low, item.high], color=color, linewidth=1.1, alpha=0.6
                )
            near = {"xytext": (4, 3), "textcoords": "offset points", "fontsize": 7}
            panel.annotate(arm, (time, item.mean), color=color, **near)
        means = [item.mean for _, _, item in found]
        margin = 0.6 * (max(means) - min(means)) or 0.02
        panel.set_ylim(min(means) - margin, max(means) + margin)
        panel.margins(x=0.25)
        panel.set_xlabel(f"milliseconds per post, {what}", fontsize=8)
        panel.set_ylabel(kinds[values], fontsize=8)
    return figure


def _dots(
    panel: Axes,
    comparison: Comparison,
    arm: str,
    place: int,
    key: tuple[str, str],
    *,
    numbers: bool,
) -> None:
    item = comparison.interval(arm, *key)
    if item is None:
        return
    color, seeds = _color(comparison, arm), comparison.seeds_of(arm, *key)
    panel.plot(seeds, [place] * len(seeds), ".", markersize=5, color=color, alpha=0.5)
    panel.plot([item.mean], [place], "o", markersize=5, color=color)
    if numbers:
        above = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center", "fontsize": 7}
        panel.annotate(f"{item.mean:.3f}", (item.mean, place), **above)
    if math.isfinite(item.low):
        panel.plot([item.low, item.high], [place, place], color=color, linewidth=1.3)


def _limits(
    panel: Axes, comparison: Comparison, arms: Sequence[str], values: str, name: str
) -> None:
    """Limits by the dots: the interval of a few seeds can be much wider, and is then cut at the edge."""
    is_metric = values in ("quality", "figures")
    compared = is_metric or values in MEASURES.values()
    if dots := [value for arm in arms for value in comparison.seeds_of(arm, values, name)]:
        margin = 0.6 * (max(dots) - min(dots)) or 0.1 * abs(dots[0]) or 0.1
        right = max(dots) + margin
        # Metrics end at 1; errors and costs do not.
        right = min(right, 1.005) if is_metric and max(dots) <= 1 else right
        panel.set_xlim(min(dots) - margin, right)
        panel.xaxis.set_major_locator(MaxNLocator(4))
    if compared and comparison.results.get(comparison.baseline):
        if base := comparison.interval(comparison.baseline, values, name):
            panel.axvline(base.mean, color=GREY, linewidth=1, linestyle=":")


def removal_figure(comparison: Comparison, arms: Sequence[str]) -> Figure:
    """Rise of the held-out loss without one expert, experts of each layer from the most to the least needed.

    A line is the mean over seeds, the band their range. The order is that of each run, because
    expert 3 of one seed is unrelated to expert 3 of another.
    """
    removals = {
        arm: [one.removal for one in comparison.results[arm] if one.removal] for arm in arms
    }
    layers = sorted({layer for found in removals.values() for layer in found[0].layers})
    title = "Rise of the loss without one expert: mean and range of the seeds; below 0: harm"
    figure, axes = panel_grid(
        len(layers), size=(2.7, 2.4), title=title, most=len(layers), sharey=True
    )
    for arm, found in removals.items():
        ordered_NLE = -np.sort(-np.stack([removal.loss_rise_LE for removal in found]), axis=2)
        color = _color(comparison, arm)
        for layer, runs_NE in zip(found[0].layers, ordered_NLE.transpose(1, 0, 2), strict=True):
            draw_line(axes[layers.index(layer)], range(1, runs_NE.shape[1] + 1), runs_NE.T,
                      label=arm, color=color)  # fmt: skip
    for layer, panel in zip(layers, axes, strict=True):
        panel.set_title(f"layer {layer}", fontsize=9)
        panel.set_xlabel("experts, most needed first", fontsize=8)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel("rise of the loss", fontsize=8)
    legend_below(figure, axes)
    return figure


def draw_line(
    panel: Axes, places: Sequence[float], seeds: Sequence[Sequence[float]], **style: str
) -> None:
    """A line through the means over seeds, a band over their range; ``seeds`` has a list per x."""
    means = [float(np.mean(values)) for values in seeds]
    panel.plot(places, means, marker="o", markersize=3, linewidth=1.5, **style)
    low, high = [min(values) for values in seeds], [max(values) for values in seeds]
    panel.fill_between(places, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _color(comparison: Comparison, arm: str) -> str:
    """An arm has the same color in all figures."""
    return COLORS[list(comparison.results).index(arm) % len(COLORS)]


def gains_figure(comparison: Comparison) -> Figure:
    """One panel per arm, one bar per task and for the mean: gain over the baseline with its 95 % interval."""
    names = [*comparison.tasks, MEAN]
    title = f"Gain over {comparison.baseline}, 95 % interval\n(colored: significant)"
    size = (3.1, 0.26 * len(names) + 0.75)
    gains = comparison.against
    figure, axes = panel_grid(len(gains), size=size, title=title, sharex=True, sharey=True)
    for panel, (arm, differences) in zip(axes, gains.items(), strict=True):
        panel.set_yticks(range(len(names)), names)
        panel.axvline(0, color=INK, linewidth=0.8)
        for place, name in enumerate(names):
            if (item := differences.get(name)) is not None:
                panel.barh(place, item.mean, color=VERDICTS[item.verdict], height=0.62, alpha=0.85)
                panel.plot([item.low, item.high], [place, place], color=INK, linewidth=1.1)
        panel.set_title(arm, fontsize=9)
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    # Limits by the bars: the intervals of two seeds can be much wider.
    edge = 2.2 * max(abs(item.mean) for found in gains.values() for item in found.values()) or 0.01
    axes[0].set_xlim(-edge, edge)
    return figure


def without_figure(comparison: Comparison) -> Figure:
    """Heatmap of the change of each task without each other one."""
    tasks, dropped = list(comparison.tasks), list(comparison.changes)
    values, bold = np.full((len(dropped), len(tasks)), math.nan), set()
    for row, column in np.ndindex(*values.shape):
        change = comparison.changes[dropped[row]].get(tasks[column])
        if change is not None:
            values[row, column] = change.mean
            bold |= {(row, column)} if change.verdict else set()
    title = f"Change of a task (column) without another one (row)\nagainst {comparison.plan.joint}; bold: significant"
    return heatmap_figure(values, dropped, tasks, title=title, bold=bold)


def heatmap_figure(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    bold: Collection[tuple[int, int]] = (),
    most: float | None = None,
) -> Figure:
    """Numbers on colors, red below 0 and blue above; NaN cells stay empty.

    Args:
        values: (rows, columns).
        rows: names from top to bottom.
        columns: names from left to right.
        title: of the figure.
        bold: cells in bold.
        most: value of the strongest color; None is the largest of ``values``.
    """
    figure = new_figure(0.62 * len(columns) + 2.0, 0.42 * len(rows) + 1.6)
    panel = figure.subplots()
    known = np.abs(values[np.isfinite(values)])
    limit = most or (float(known.max()) if known.size else 0.0) or 1.0
    panel.imshow(values, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    for row, column in zip(*np.nonzero(np.isfinite(values)), strict=True):
        value = values[row, column]
        panel.text(column, row, f"{value:+.3f}", ha="center", va="center", fontsize=7,
                   color="white" if abs(value) > 0.65 * limit else INK,
                   fontweight="bold" if (row, column) in bold else "normal")  # fmt: skip
    panel.set_xticks(range(len(columns)), columns, rotation=35, ha="right", fontsize=8)
    panel.set_yticks(range(len(rows)), rows, fontsize=8)
    panel.set_title(title, fontsize=9)
    panel.spines[:].set_visible(False)
    return figure
