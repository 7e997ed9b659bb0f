"""Tables in one format, as text and as Markdown: metrics per split and slice, under noise, and calibration."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from comoe.data.posts import UNSEEN
from comoe.data.text.noise import SEPARATOR
from comoe.evaluation.gaps import Gaps
from comoe.tasks.task import Task

Metrics = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Split -> task -> metric -> value, as in ``results.json``."""


_COUNT = "n@"


def slice_lines(metrics: Metrics, tasks: Sequence[Task]) -> list[str]:
    """Metrics of every value of the tasks' slices, a column per split; no lines without any.

    ``n`` is the number of posts in the last split that has the slice.
    """
    splits = [split for split in metrics if SEPARATOR not in split]
    rows = []
    for task in tasks:
        found = [metrics[split].get(task.name, {}) for split in splits]
        names = dict.fromkeys(name for values in found for name in values)
        # By their counts: a label's name may hold any sign too.
        for where in [name.removeprefix(_COUNT) for name in names if name.startswith(_COUNT)]:
            count = next(
                values[_COUNT + where] for values in reversed(found) if _COUNT + where in values
            )
            for name in [
                name for name in names if name.endswith(f"@{where}") and name != _COUNT + where
            ]:
                shown = [decimal(values.get(name)) for values in found]
                rows.append(
                    (marked(task), where, name.removesuffix(f"@{where}"), *shown, f"{count:.0f}")
                )
    return (
        ["", *in_columns(("task", "slice", "metric", *splits, "n"), rows, left=3)] if rows else []
    )


def gap_lines(gaps: Mapping[str, Mapping[str, Gaps]], tasks: Sequence[Task]) -> list[str]:
    """How far the values of a column lie apart, on the last split that has gaps; no lines without any.

    Args:
        gaps: split -> task -> its gaps.
        tasks: in the order of the lines.
    """
    rows = []
    for split, of_split in list(gaps.items())[-1:]:
        for task in tasks:
            for entry, measured in of_split.get(task.name, {}).items():
                for metric, gap in measured.items():
                    ends = " to ".join(decimal(gap[end]) for end in ("low", "high"))
                    sides = (
                        f"{gap[end]} {decimal(gap['groups'][gap[end]]['value'])}"
                        for end in ("largest", "smallest")
                    )
                    shown = (decimal(gap["gap"]), ends, decimal(gap["by_chance"]))
                    rows.append((marked(task), split, entry, metric, *sides, *shown))
    head = ("task", "split", "slice", "metric", "largest", "smallest", "gap", "95 %", "by chance")
    return ["", *in_columns(head, rows, left=6)] if rows else []


def noise_lines(metrics: Metrics, tasks: Sequence[Task]) -> list[str]:
    """Main metric of each task on clean posts and under each noise, with the change; no lines without noise."""
    lines = []
    for split in dict.fromkeys(
        name.partition(SEPARATOR)[0] for name in metrics if SEPARATOR in name
    ):
        noises = [
            name.partition(SEPARATOR)[2]
            for name in metrics
            if name.startswith(f"{split}{SEPARATOR}")
        ]
        rows = []
        for task in tasks:
            clean = metrics[split].get(task.name, {}).get(task.metric)
            if clean is None:
                continue
            noisy = [
                metrics[f"{split}{SEPARATOR}{noise}"].get(task.name, {}).get(task.metric)
                for noise in noises
            ]
            shown = [
                "-" if value is None else f"{value:.3f} ({value - clean:+.3f})" for value in noisy
            ]
            rows.append((marked(task), task.metric, decimal(clean), *shown))
        lines += ["", *in_columns(("task", "metric", split, *noises), rows, left=2)]
    return lines


def decimal(value: float | None) -> str:
    """A metric as every table shows it; a dash for None."""
    return "-" if value is None else f"{value:.3f}"


Report = Mapping[str, Mapping[str, Any]]
"""What ``comoe.evaluation.calibration.Calibrator.report`` gives."""


def calibration_table(report: Report) -> list[tuple[str, ...]]:
    """Head and rows: per task its temperature, its thresholds, and the calibration error before and after."""
    splits = list(dict.fromkeys(split for entry in report.values() for split in entry["ece"]))
    rows = [("task", "temperature", "thresholds", *(f"ece {split}" for split in splits))]
    for task, entry in report.items():
        edges = " ".join(f"{edge:.2f}" for edge in entry["thresholds"] or ()) or "-"
        fitted = entry["temperature"]
        temperature = "-" if fitted is None else f"{fitted:.2f}"
        changes = []
        for split in splits:
            both = (entry["ece"].get(split) or {}).values()
            known = [f"{value:.3f}" for value in both if value is not None]
            changes.append(" -> ".join(known) or "-")
        rows.append((task, temperature, edges, *changes))
    return rows


def calibration_lines(report: Report) -> list[str]:
    """The table as lines of text; none where no task has probabilities."""
    if not report:
        return []
    rows = calibration_table(report)
    title = "calibration (expected calibration error, 0 is best)"
    lines = [title, *in_columns(rows[0], rows[1:], left=len(rows[0]))]
    if any(entry["thresholds"] is not None for entry in report.values()):
        lines.append(
            "Thresholds were chosen on validation: its results are with 0.5, other splits are decided by them."
        )
    return lines


def calibration_sentences(report: Report) -> list[str]:
    """What a reader of the card must know of the table."""
    lines = [
        "Expected calibration error in 15 bins, before and after the temperature. Temperatures are fitted on "
        "validation; its column shows each half of the posts under the temperature of the other half."
    ]
    for task, entry in report.items():
        if entry["thresholds"] is not None:
            chosen = entry["decision"]
            lines.append(
                f"{task}: thresholds chosen on validation, {chosen['metric']} {chosen['at_half']:.3f} with 0.5, "
                f"{chosen['held_out']:.3f} on posts that did not choose them. Validation results above are with 0.5."
            )
    return lines


def format_results_table(
    metrics: Mapping[str, Mapping[str, Mapping[str, float]]], tasks: Sequence[Task]
) -> str:
    """The table that ends a run: each task's main metric on each split, beside the majority baseline.

    Args:
        metrics: split (validation, test, unseen) -> task -> metric -> value; a split or task
            without labels may be absent. The baseline is that of the test posts, or of the
            validation posts where these have no labels, n the rows with a label there.
        tasks: in the order of the lines; auxiliary ones are marked.
    """
    splits = ("validation", "test", *(split for split in metrics if split == UNSEEN))
    rows = []
    for task in tasks:
        if not task.rules.scored:
            continue
        found = {split: metrics.get(split, {}).get(task.name, {}) for split in splits}
        last = found["test"] or found["validation"]
        scores = [decimal(values.get(task.metric)) for values in found.values()]
        count = f"{int(last['n'])}" if "n" in last else "-"
        rows.append(
            (
                marked(task),
                task.metric,
                *scores,
                decimal(last.get(f"majority/{task.metric}")),
                count,
            )
        )
    return "\n".join(in_columns(("task", "metric", *splits, "majority", "n"), rows, left=2))


def marked(task: Task) -> str:
    """A task's name as tables show it."""
    return f"{task.name} (auxiliary)" if task.auxiliary else task.name


def in_columns(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Lines of a table: the first ``left`` columns begin flush, the others end flush; a rule under the head."""
    table = [head, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    form = "  ".join(["{:<{}}"] * left + ["{:>{}}"] * (len(head) - left))
    lines = [
        form.format(*(part for pair in zip(row, widths, strict=True) for part in pair)).rstrip()
        for row in table
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; a bar or a line break inside of a cell would end it, and is escaped."""
    table = [
        [re.sub(r"\s+", " ", str(cell)).replace("|", "\\|") for cell in row]
        for row in (head, *rows)
    ]
    lines = [f"| {' | '.join(row)} |" for row in table]
    return [lines[0], f"| {' | '.join(['---'] * len(head))} |", *lines[1:]]


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, in about two digits."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
