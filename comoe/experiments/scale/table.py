"""The table of a scaling experiment, from what each run left: CSV, Markdown, TensorBoard hparams."""

from __future__ import annotations

import csv
import io
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from comoe.config.files import write_atomic
from comoe.evaluation.evaluate import mean_metric
from comoe.experiments.scale.grid import Point
from comoe.tasks.task import Task
from comoe.train.monitor.metrics_file import METRICS_FILE, read_metrics

SETTINGS = ("encoder", "experts", "top_k", "gate", "ep_size", "ranks", "zero_stage")
"""Columns that say what a run is, but for its seed."""


COSTS = (
    "step_ms",
    "tokens_per_second",
    "peak_mib",
    "parameters_experts",
    "parameters_active",
    "parameters_total",
)
"""Columns with what it costs: milliseconds per optimizer step, tokens of all ranks, most memory of
one rank."""


ROUTING = ("max_violation", "effective_experts", "task_information")
"""Columns with what its gates did on the validation posts at the end, means over layers."""


Row = dict[str, Any]
"""Column -> value; None where a run has none."""


def row_of(point: Point, folder: Path, *, problem: str = "") -> Row:
    """One line of the table.

    Args:
        point: the run.
        folder: its folder; without ``results.json`` there the row holds the settings and why.
        problem: why it failed; empty for one that was not tried yet.
    """
    row: Row = {
        "run": point.name, "status": "failed" if problem else "open", "encoder": point.encoder,
        "experts": point.experts, "top_k": point.top_k, "gate": point.gate, "ep_size": point.ep_size,
        "seed": point.seed, "problem": problem,
    }  # fmt: skip
    if not (folder / "results.json").is_file():
        return row
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    tasks = [
        Task.from_dict(plain)
        for plain in json.loads((folder / "tasks.json").read_text(encoding="utf-8"))
    ]
    records = read_metrics(folder / METRICS_FILE)
    return row | {
        "status": "done", "ranks": results["world_size"], "ep_size": results["ep_size"],
        "zero_stage": results["zero_stage"], **quality_of(results["metrics"], tasks), **costs_of(results, records),
        **routing_of(records), "best_step": results["best_step"], "steps": results["step"],
        "seconds": results["seconds"],
    }  # fmt: skip


def quality_of(
    metrics: Mapping[str, Mapping[str, Mapping[str, float]]], tasks: Sequence[Task]
) -> Row:
    """Main metric of each task and their mean (larger is better), on the test split, or validation
    where there is no test label. Auxiliary tasks are shown and in no mean."""
    split = "test" if metrics.get("test") else "validation"
    scored = metrics[split]
    present = [task for task in tasks if scored.get(task.name, {}).get(task.metric) is not None]
    mean = mean_metric(scored, present) if any(not task.auxiliary for task in present) else None
    values = {f"{task.name}/{task.metric}": scored[task.name][task.metric] for task in present}
    return {"split": split, "mean": mean, **values}


def costs_of(results: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> Row:
    """Time, memory and parameters of a run; times are medians over the log, without what is before its first line."""
    lines = [record for record in records if record.get("split") == "train"]
    intervals = [
        (after["seconds"] - before["seconds"]) / (after["step"] - before["step"])
        for before, after in itertools.pairwise(lines)
        if after["step"] > before["step"]
    ]
    # Medians: another program on the machine, or a checkpoint, slows some intervals and not the
    # run.
    step_seconds = statistics.median(intervals or [results["seconds"] / max(1, results["step"])])
    speeds = [line["tokens_per_second"] for line in (lines[1:] or lines)]
    parameters = results["parameters"]
    return {
        "step_ms": 1000 * step_seconds,
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "peak_mib": results["peak_memory_bytes_per_rank"] / 2**20,
        **{f"parameters_{kind}": parameters[kind] for kind in ("experts", "active", "total")},
    }


def routing_of(records: Sequence[Mapping[str, Any]]) -> Row:
    """Means over layers of the gates' measures in the last validation line; nothing without experts."""
    routing = last_routing(records)
    return {name: _mean(routing.get(name, ())) for name in ROUTING} if routing else {}


def last_routing(records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The routing block of the last validation line; empty without experts."""
    blocks = [
        record["routing"]
        for record in records
        if record.get("split") == "validation" and "routing" in record
    ]
    return blocks[-1] if blocks else {}


def write_tables(rows: Sequence[Row], output: Path) -> None:
    """``table.csv`` with every run and ``table.md`` with means over seeds first."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns_of(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(output / "table.csv", text.getvalue())
    write_atomic(output / "table.md", markdown(rows))


def columns_of(rows: Sequence[Row]) -> list[str]:
    """All columns, tasks in the middle."""
    first = ["run", "status", *SETTINGS, "seed", "split", "mean"]
    last = [*COSTS, *ROUTING, "best_step", "steps", "seconds", "problem"]
    return [*first, *tasks_of(rows), *last]


def tasks_of(rows: Sequence[Row]) -> list[str]:
    """Columns ``task/metric`` of any row, in order."""
    return list(dict.fromkeys(key for row in rows for key in row if "/" in key))


def markdown(rows: Sequence[Row]) -> str:
    """Means over seeds with the sample standard deviation behind, then every run, then what failed."""
    groups = grouped(rows)
    shown = [
        name
        for name in SETTINGS
        if len({row.get(name) for row in rows if row["status"] == "done"}) > 1
    ]
    shown = shown or ["experts", "top_k"]
    numbers = ["mean", *tasks_of(rows), *COSTS, *ROUTING]
    lines = ["# Scaling experiment", "", _scope(rows), ""]
    lines += _table(["seeds", *shown, *numbers], [
        [str(len(group)), *(_cell(group[0].get(name)) for name in shown), *(_spread(group, name) for name in numbers)]
        for group in groups
    ])  # fmt: skip
    lines += ["", "## Every run", ""]
    lines += _table(["run", "status", *numbers], [
        [row["run"], row["status"], *(_cell(row.get(name)) for name in numbers)] for row in rows
    ])  # fmt: skip
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
        numbers = {
            name: row[name]
            for name in ("mean", *tasks_of([row]), *COSTS, *ROUTING)
            if row.get(name) is not None
        }
        with SummaryWriter(str(folder)) as writer:
            writer.add_hparams(
                settings, {f"scale/{name}": value for name, value in numbers.items()}, run_name="."
            )


def _scope(rows: Sequence[Row]) -> str:
    done = [row for row in rows if row["status"] == "done"]
    open_ones = sum(row["status"] == "open" for row in rows)
    splits = sorted({row["split"] for row in done})
    parts = [
        f"{len(done)} of {len(rows)} runs done",
        f"{open_ones} open",
        f"{len(rows) - len(done) - open_ones} failed",
    ]
    scored = " and ".join(splits) or "nothing yet"
    return f"{', '.join(parts)}. Quality on {scored}; means over seeds ± their deviation."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _spread(group: Sequence[Row], name: str) -> str:
    values = [row[name] for row in group if row.get(name) is not None]
    if not values:
        return ""
    deviation = (
        f" ± {_cell(statistics.stdev(values))}" if len(values) > 1 and len(set(values)) > 1 else ""
    )
    return _cell(statistics.mean(values)) + deviation


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return (
            f"{value:,.0f}"
            if abs(value) >= 1000
            else f"{value:.1f}"
            if abs(value) >= 20
            else f"{value:.3f}"
        )
    return f"{value:,}" if isinstance(value, int) else str(value)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None
