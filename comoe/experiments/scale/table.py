"""The table of a scaling experiment, from what each run left: CSV, Markdown, TensorBoard hparams."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from comoe.config.files import write_atomic
from comoe.evaluation.tables import markdown_table
from comoe.experiments.compare.plan import Plan
from comoe.experiments.compare.report import csv_text
from comoe.experiments.compare.results import (
    RUN_COSTS,
    last_routing,
    layer_means,
    read_json,
    read_run,
    with_means,
)
from comoe.experiments.compare.tables import number, spread
from comoe.experiments.runner import Experiment
from comoe.train.monitor.metrics_file import METRICS_FILE, read_metrics

SETTINGS = ("encoder", "experts", "top_k", "gate", "ep_size", "ranks", "zero_stage")
"""Columns that say what a run is, but for its seed."""

ROUTING = ("max_violation", "effective_experts", "task_information")
"""Columns with what its gates did on the validation posts at the end, means over layers."""

Row = dict[str, Any]
"""Column -> value; no value where a run has none."""


def read_rows(plan: Plan, experiment: Experiment) -> list[Row]:
    """A row per run: its settings, then what it left, or why it failed; empty for one that was not tried yet."""
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
    """``table.csv`` with every run and ``table.md`` with means over seeds first."""
    write_atomic(output / "table.csv", csv_text(rows))
    write_atomic(output / "table.md", markdown(rows))


def tasks_of(rows: Sequence[Row]) -> list[str]:
    """Columns ``task/metric`` of any row, in order."""
    return list(dict.fromkeys(key for row in rows for key in row if "/" in key))


def markdown(rows: Sequence[Row]) -> str:
    """Means over seeds with the sample standard deviation behind, then every run, then what failed."""
    counts = {state: sum(row["status"] == state for row in rows) for state in ("open", "failed")}
    done = [row for row in rows if row["status"] == "done"]
    scored = " and ".join(sorted({row["split"] for row in done})) or "nothing yet"
    varied = [name for name in SETTINGS if len({row[name] for row in done}) > 1]
    shown, numbers = varied or ["experts", "top_k"], ["mean", *tasks_of(rows), *RUN_COSTS, *ROUTING]
    lines = ["# Scaling experiment", ""]
    lines.append(
        f"{len(done)} of {len(rows)} runs done, {counts['open']} open, {counts['failed']} failed. "
        f"Quality on {scored}; means over seeds ± their deviation."
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
    """Finished runs that differ in nothing but the seed, together; in the order of encoder, gate, k, experts."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["status"] == "done":
            groups.setdefault(tuple(row[name] for name in SETTINGS), []).append(row)
    order = ("encoder", "gate", "top_k", "experts", "ep_size")
    return sorted(groups.values(), key=lambda group: tuple(group[0][name] for name in order))


def write_hparams(rows: Sequence[Row], output: Path) -> None:
    """One TensorBoard hparams entry per finished run, in ``tensorboard/<run>``; those that exist stay as they are."""
    for row in rows:
        folder = output / "tensorboard" / row["run"]
        if row["status"] != "done" or folder.is_dir():
            continue
        settings = {name: row[name] for name in (*SETTINGS, "seed")}
        names = ("mean", *tasks_of([row]), *RUN_COSTS, *ROUTING)
        numbers = {f"scale/{name}": row[name] for name in names if row.get(name) is not None}
        with SummaryWriter(str(folder)) as writer:
            writer.add_hparams(settings, numbers, run_name=".")
