"""The figures of a scaling experiment: quality and cost against experts, and where the tokens of each run went."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from comoe.experiments.compare.plots import draw_line
from comoe.experiments.compare.results import last_routing
from comoe.experiments.scale.table import Row, tasks_of
from comoe.train.monitor.metrics_file import METRICS_FILE, read_metrics
from comoe.train.monitor.plots import (
    COLORS,
    GREY,
    legend_below,
    panel_grid,
    save_figure,
    share_figure,
)

STYLES = ("-", "--", ":", "-.")
"""One per gate, encoder and EP size; the color tells k."""

COST_PANELS = {
    "step_ms": "step time [ms]",
    "tokens_per_second": "tokens per second",
    "peak_mib": "peak memory per rank [MiB]",
    "parameters_total": "parameters",
}
"""Column -> title of its panel."""


def write_plots(rows: Sequence[Row], output: Path) -> None:
    """``plots/quality.png``, ``plots/cost.png``, and ``plots/share_<run>.png`` for each finished run with experts."""
    done = [row for row in rows if row["status"] == "done"]
    if not done:
        return
    plots = output / "plots"
    quality = {"mean": "mean of the main metrics", **{name: name for name in tasks_of(done)}}
    title = f"Quality ({done[0]['split']}) against experts"
    save_figure(lines_figure(done, quality, title=title), plots / "quality.png")
    costs = lines_figure(done, COST_PANELS, title="Cost against experts")
    save_figure(costs, plots / "cost.png")
    for row in done:
        records = read_metrics(output / "runs" / row["run"] / METRICS_FILE)
        routing, file = last_routing(records, "validation"), plots / f"share_{row['run']}.png"
        if routing and not file.is_file():
            layers = [str(layer) for layer in routing["layers"]]
            title = f"share of tokens per expert, in %\n{row['run']}"
            share_LE = np.array(routing["share"], dtype=np.float64)
            save_figure(share_figure(share_LE, rows=layers, title=title, row_axis="layer"), file)


def lines_figure(done: Sequence[Row], panels: Mapping[str, str], *, title: str) -> Figure:
    """One panel per column: its value over the number of experts, a line per k, the seeds as dots and their range.

    Runs without experts are a grey level across, with the range of their seeds.

    Args:
        done: finished runs.
        panels: column -> title of the panel.
        title: of the figure.
    """
    shown = [name for name in panels if any(row.get(name) is not None for row in done)]
    figure, axes = panel_grid(len(shown), size=(2.9, 2.4), title=title, most=4)
    with_experts = [row for row in done if row["experts"]]
    series = series_of(with_experts)
    ticks = sorted({row["experts"] for row in with_experts})
    for panel, name in zip(axes, shown, strict=True):
        panel.set_title(panels[name], fontsize=9)
        panel.set_xlabel("experts", fontsize=8)
        if ticks:
            panel.set_xscale("log", base=2)
            panel.set_xticks(ticks, [str(tick) for tick in ticks])
            panel.set_xticks([], minor=True)
            panel.set_xlim(ticks[0] / 1.3, ticks[-1] * 1.3)
        for label, runs in series.items():
            _line(panel, runs, name, label=label, **_style(label, series))
        if level := [row[name] for row in done if not row["experts"] and row.get(name) is not None]:
            panel.axhline(statistics.mean(level), color=GREY, linewidth=1.2, label="no experts")
            panel.axhspan(min(level), max(level), color=GREY, alpha=0.15, linewidth=0)
        if name in COST_PANELS:
            # After the lines: from here on the axis does not grow any more.
            panel.set_ylim(0, 1.05 * panel.get_ylim()[1])
    legend_below(figure, axes)
    return figure


def series_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Label of a line -> its runs, by k and by whatever else differs: gate, encoder, EP size."""
    prefixes = {"gate": "", "encoder": "", "ep_size": "EP "}
    varied = [name for name in prefixes if len({row[name] for row in rows}) > 1]
    found: dict[str, list[Row]] = {}
    order = ("top_k", "gate", "encoder", "ep_size")
    for row in sorted(rows, key=lambda row: tuple(row[name] for name in order)):
        parts = [f"k = {row['top_k']}", *(f"{prefixes[name]}{row[name]}" for name in varied)]
        found.setdefault(", ".join(parts), []).append(row)
    return found


def _line(panel: Axes, runs: Sequence[Row], name: str, **style: str) -> None:
    points: dict[int, list[float]] = {}
    for row in runs:
        if row.get(name) is not None:
            points.setdefault(row["experts"], []).append(row[name])
    if not points:
        return
    experts = sorted(points)
    draw_line(panel, experts, [points[count] for count in experts], **style)
    for count in experts:
        panel.plot(
            [count] * len(points[count]),
            points[count],
            ".",
            markersize=3,
            alpha=0.6,
            color=style["color"],
        )


def _style(label: str, series: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """A color per k and a dash per variant of the same k."""
    k_of = {name: rows[0]["top_k"] for name, rows in series.items()}
    same = [name for name in series if k_of[name] == k_of[label]]
    color = COLORS[sorted(set(k_of.values())).index(k_of[label]) % len(COLORS)]
    return {"color": color, "linestyle": STYLES[same.index(label) % len(STYLES)]}
