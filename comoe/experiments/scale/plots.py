"""The pictures of a scaling experiment: quality and cost against experts, and where the tokens of each run went."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from comoe.experiments.scale.table import Row, last_routing, tasks_of
from comoe.train.monitor.metrics_file import METRICS_FILE, read_metrics
from comoe.train.monitor.plots import COLORS, save_figure, share_figure

STYLES = ("-", "--", ":", "-.")
"""One per gate, encoder and EP size."""


COST_PANELS = {
    "step_ms": "step time [ms]",
    "tokens_per_second": "tokens per second",
    "peak_mib": "peak memory per rank [MiB]",
    "parameters_total": "parameters",
}
"""Column -> title of its panel."""


Series = Mapping[str, Sequence[Row]]
"""Label of a line -> its runs."""


def write_plots(rows: Sequence[Row], output: Path) -> None:
    """``plots/quality.png``, ``plots/cost.png``, and ``plots/share_<run>.png`` for each finished run with experts."""
    done = [row for row in rows if row["status"] == "done"]
    if not done:
        return
    plots = output / "plots"
    quality = {"mean": "mean of the main metrics", **{name: name for name in tasks_of(done)}}
    save_figure(
        lines_figure(done, quality, title=f"Quality ({done[0]['split']}) against experts"),
        plots / "quality.png",
    )
    save_figure(lines_figure(done, COST_PANELS, title="Cost against experts"), plots / "cost.png")
    for row in done:
        routing = last_routing(read_metrics(output / "runs" / row["run"] / METRICS_FILE))
        file = plots / f"share_{row['run']}.png"
        if routing and not file.is_file():
            save_figure(shares(routing, row["run"]), file)


def lines_figure(done: Sequence[Row], panels: Mapping[str, str], *, title: str) -> Figure:
    """One panel per column: its value over the number of experts, a line per k, the seeds as dots and their range.

    Runs without experts are a grey level across, with the range of their seeds.

    Args:
        done: finished runs.
        panels: column -> title of the panel.
        title: of the figure.
    """
    shown = {
        name: text
        for name, text in panels.items()
        if any(row.get(name) is not None for row in done)
    }
    columns = min(len(shown), 4)
    lines = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(2.9 * columns + 0.4, 2.3 * lines + 0.9), dpi=110, layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flatten())
    with_experts = [row for row in done if row["experts"]]
    series = series_of(with_experts)
    ticks = sorted({row["experts"] for row in with_experts})
    for panel, (name, text) in zip(axes, shown.items(), strict=False):
        _panel(panel, text, ticks=ticks)
        for number, (label, runs) in enumerate(series.items()):
            _line(panel, runs, name, label, style=_style(number, runs, series))
        _baseline(
            panel, [row[name] for row in done if not row["experts"] and row.get(name) is not None]
        )
        if name in COST_PANELS:
            # After the lines: from here on the axis does not grow any more.
            panel.set_ylim(0, 1.05 * panel.get_ylim()[1])
    for panel in axes[len(shown) :]:
        panel.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=min(len(labels), 5),
            fontsize=7,
            frameon=False,
        )
    figure.suptitle(title, fontsize=10)
    return figure


def series_of(rows: Sequence[Row]) -> Series:
    """Runs by k, and by whatever else differs: gate, encoder, EP size."""
    varying = [
        name for name in ("gate", "encoder", "ep_size") if len({row[name] for row in rows}) > 1
    ]
    found: dict[str, list[Row]] = {}
    for row in sorted(
        rows, key=lambda row: (row["top_k"], row["gate"], row["encoder"], row["ep_size"])
    ):
        parts = [f"k = {row['top_k']}", *(f"{_NAMES[name]}{row[name]}" for name in varying)]
        found.setdefault(", ".join(parts), []).append(row)
    return found


def shares(routing: Mapping[str, Any], name: str) -> Figure:
    """Heatmap layer x expert of the routes' shares at the last evaluation."""
    share_LE = np.array(
        [[np.nan if value is None else value for value in row] for row in routing["share"]]
    )
    rows = [str(layer) for layer in routing["layers"]]
    return share_figure(
        share_LE, rows=rows, title=f"share of tokens per expert, in %\n{name}", row_axis="layer"
    )


def _panel(panel: Axes, text: str, *, ticks: Sequence[int]) -> None:
    panel.set_title(text, fontsize=9)
    panel.grid(color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=7)
    if ticks:
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.set_xticks([], minor=True)
        panel.set_xlim(ticks[0] / 1.3, ticks[-1] * 1.3)
    panel.set_xlabel("experts", fontsize=8)


def _line(
    panel: Axes, runs: Sequence[Row], name: str, label: str, *, style: dict[str, Any]
) -> None:
    points: dict[int, list[float]] = {}
    for row in runs:
        if row.get(name) is not None:
            points.setdefault(row["experts"], []).append(row[name])
    if not points:
        return
    experts = sorted(points)
    means = [statistics.mean(points[count]) for count in experts]
    panel.plot(experts, means, label=label, marker="o", markersize=3.5, linewidth=1.5, **style)
    panel.fill_between(
        experts,
        [min(points[count]) for count in experts],
        [max(points[count]) for count in experts],
        color=style["color"],
        alpha=0.15,
        linewidth=0,
    )
    for count in experts:
        seeds = points[count]
        panel.plot(
            [count] * len(seeds),
            seeds,
            linestyle="",
            marker=".",
            markersize=3,
            alpha=0.6,
            color=style["color"],
        )


def _baseline(panel: Axes, values: Sequence[float]) -> None:
    if values:
        panel.axhline(statistics.mean(values), color="#777777", linewidth=1.2, label="no experts")
        panel.axhspan(min(values), max(values), color="#777777", alpha=0.15, linewidth=0)


def _style(number: int, runs: Sequence[Row], series: Series) -> dict[str, Any]:
    """A colour per k and a dash per variant of the same k."""
    ks = sorted({rows[0]["top_k"] for rows in series.values()})
    same = [label for label, rows in series.items() if rows[0]["top_k"] == runs[0]["top_k"]]
    variant = same.index(list(series)[number])
    return {
        "color": COLORS[ks.index(runs[0]["top_k"]) % len(COLORS)],
        "linestyle": STYLES[variant % len(STYLES)],
    }


_NAMES = {"gate": "", "encoder": "", "ep_size": "EP "}
