"""The report of a scaling experiment, from its run folders: CSV and Markdown tables, figures, TensorBoard hparams."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from comoe.config.files import write_atomic
from comoe.evaluation.tables import markdown_table
from comoe.experiments.compare.cells import number, spread
from comoe.experiments.compare.plan import Plan
from comoe.experiments.compare.plots import draw_line
from comoe.experiments.compare.report import csv_text
from comoe.experiments.compare.results import (
    RUN_COSTS,
    last_routing,
    layer_means,
    read_json,
    read_run,
    with_means,
)
from comoe.experiments.runner import Experiment
from comoe.train.monitor.metrics_file import METRICS_FILE, read_metrics
from comoe.train.monitor.plots import (
    COLORS,
    GREY,
    legend_below,
    panel_grid,
    save_figure,
    share_figure,
)

SETTINGS = ("encoder", "experts", "top_k", "gate", "ep_size", "ranks", "zero_stage")
"""Columns that identify a run, without its seed."""

ROUTING = ("max_violation", "effective_experts", "task_information")
"""Routing statistics on the validation posts at the end, means over layers."""

Row = dict[str, Any]
"""Column -> value."""


def read_rows(plan: Plan, experiment: Experiment) -> list[Row]:
    """A row per run: its settings, then its results, or why it failed; open before its start."""
    rows = []
    for arm in plan.arms:
        for trial in arm.trials:
            folder, problem = experiment.runs / trial.name, experiment.problem(trial)
            row: Row = {"run": trial.name, "status": "failed" if problem else "open", **arm.settings,
                        "ranks": None, "zero_stage": None, "seed": trial.seed}  # fmt: skip
            if (result := read_run(trial, folder)) is not None:
                results = read_json(folder / "results.json")
                records = read_metrics(folder / METRICS_FILE)
                (result,) = with_means({arm.name: [result]})[arm.name]
                row |= {"status": "done", "ranks": results["world_size"], "split": result.split}
                row |= {name: results[name] for name in ("ep_size", "zero_stage", "best_step")}
                row |= {"mean": None, **result.quality, **result.costs}
                row |= layer_means(last_routing(records, "validation"), ROUTING)
            rows.append(row | {"problem": problem})
    return rows


def write_tables(rows: Sequence[Row], output: Path) -> None:
    """``table.csv`` with all runs, and ``table.md`` with means over seeds."""
    write_atomic(output / "table.csv", csv_text(rows))
    write_atomic(output / "table.md", markdown(rows))


def tasks_of(rows: Sequence[Row]) -> list[str]:
    """Columns ``task/metric`` of all rows, in order."""
    return list(dict.fromkeys(key for row in rows for key in row if "/" in key))


def markdown(rows: Sequence[Row]) -> str:
    """Means over seeds with the sample standard deviation, then all runs, then failures."""
    counts = {state: sum(row["status"] == state for row in rows) for state in ("open", "failed")}
    done = [row for row in rows if row["status"] == "done"]
    scored = " and ".join(sorted({row["split"] for row in done})) or "nothing yet"
    varied = [name for name in SETTINGS if len({row[name] for row in done}) > 1]
    shown, numbers = varied or ["experts", "top_k"], ["mean", *tasks_of(rows), *RUN_COSTS, *ROUTING]
    lines = ["# Scaling experiment", ""]
    lines.append(
        f"{len(done)} of {len(rows)} runs done, {counts['open']} open, {counts['failed']} failed. "
        f"Quality on {scored}; means over seeds ± their standard deviation."
    )
    lines += ["", *markdown_table(["seeds", *shown, *numbers], [
        [str(len(group)), *(number(group[0][name]) for name in shown),
         *(spread([row[name] for row in group if row.get(name) is not None]) for name in numbers)]
        for group in grouped(rows)
    ])]  # fmt: skip
    lines += ["", "## Every run", "", *markdown_table(["run", "status", *numbers], [
        [row["run"], row["status"], *(number(row.get(name)) for name in numbers)] for row in rows
    ])]  # fmt: skip
    failures = [f"* {row['run']}: {row['problem']}" for row in rows if row["status"] == "failed"]
    return "\n".join([*lines, *(["", "## Failed", "", *failures] if failures else []), ""])


def grouped(rows: Sequence[Row]) -> list[list[Row]]:
    """Finished runs grouped by everything except the seed; in the order of encoder, gate, k, experts."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["status"] == "done":
            groups.setdefault(tuple(row[name] for name in SETTINGS), []).append(row)
    order = ("encoder", "gate", "top_k", "experts", "ep_size")
    return sorted(groups.values(), key=lambda group: tuple(group[0][name] for name in order))


def write_hparams(rows: Sequence[Row], output: Path) -> None:
    """One TensorBoard hparams entry per finished run, in ``tensorboard/<run>``; existing ones are kept."""
    for row in rows:
        folder = output / "tensorboard" / row["run"]
        if row["status"] != "done" or folder.is_dir():
            continue
        settings = {name: row[name] for name in (*SETTINGS, "seed")}
        names = ("mean", *tasks_of([row]), *RUN_COSTS, *ROUTING)
        numbers = {f"scale/{name}": row[name] for name in names if row.get(name) is not None}
        with SummaryWriter(str(folder)) as writer:
            writer.add_hparams(settings, numbers, run_name=".")


STYLES = ("-", "--", ":", "-.")
"""One per gate, encoder and EP size; the color shows k."""

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

    Runs without experts are a horizontal gray line with the range of their seeds.

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
    # A color per k, and a dash per variant of the same k.
    dashes: dict[int, int] = {k: 0 for k in sorted({row["top_k"] for row in with_experts})}
    styles = {}
    for label, (row, *_) in series.items():
        color = COLORS[list(dashes).index(row["top_k"]) % len(COLORS)]
        styles[label] = {"color": color, "linestyle": STYLES[dashes[row["top_k"]] % len(STYLES)]}
        dashes[row["top_k"]] += 1
    for panel, name in zip(axes, shown, strict=True):
        panel.set_title(panels[name], fontsize=9)
        panel.set_xlabel("experts", fontsize=8)
        if ticks:
            panel.set_xscale("log", base=2)
            panel.set_xticks(ticks, [str(tick) for tick in ticks])
            panel.set_xticks([], minor=True)
            panel.set_xlim(ticks[0] / 1.3, ticks[-1] * 1.3)
        for label, runs in series.items():
            _line(panel, runs, name, label=label, **styles[label])
        if level := [row[name] for row in done if not row["experts"] and row.get(name) is not None]:
            panel.axhline(statistics.mean(level), color=GREY, linewidth=1.2, label="no experts")
            panel.axhspan(min(level), max(level), color=GREY, alpha=0.15, linewidth=0)
        if name in COST_PANELS:
            # After the lines, because this fixes the axis.
            panel.set_ylim(0, 1.05 * panel.get_ylim()[1])
    legend_below(figure, axes)
    return figure


def series_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Label of a line -> its runs, by k and by what else varies: gate, encoder, EP size."""
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
    dots = {"linestyle": "", "marker": ".", "markersize": 3, "alpha": 0.6, "color": style["color"]}
    for count in experts:
        panel.plot([count] * len(points[count]), points[count], **dots)
