"""What is told of calibration: lines at the end of a run, a section of the model card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Report = Mapping[str, Mapping[str, Any]]
"""What ``comoe.calibration.Calibrator.report`` gives."""


def calibration_table(report: Report) -> list[tuple[str, ...]]:
    """Head and rows: per task its temperature, its thresholds, and the calibration error before and after."""
    splits = list(dict.fromkeys(split for entry in report.values() for split in entry["ece"]))
    rows = [("task", "temperature", "thresholds", *(f"ece {split}" for split in splits))]
    for task, entry in report.items():
        edges = " ".join(f"{edge:.2f}" for edge in entry["thresholds"] or ()) or "-"
        fitted = entry["temperature"]
        temperature = "-" if fitted is None else f"{fitted:.2f}"
        rows.append((task, temperature, edges, *(_change(entry["ece"].get(split)) for split in splits)))
    return rows


def calibration_lines(report: Report) -> list[str]:
    """The table as lines of text; none where no task has probabilities."""
    if not report:
        return []
    rows = calibration_table(report)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    told = ["calibration (expected calibration error, 0 is best)", lines[0], "-" * len(lines[0]), *lines[1:]]
    if any(entry["thresholds"] is not None for entry in report.values()):
        told.append("Thresholds were chosen on validation: its results are with 0.5, other splits are decided by them.")
    return told


def calibration_sentences(report: Report) -> list[str]:
    """What a reader of the card must know of the table."""
    told = [
        "Expected calibration error in 15 bins, before and after the temperature. Temperatures are fitted on "
        "validation; its column shows each half of the posts under the temperature of the other half."
    ]
    for task, entry in report.items():
        if entry["thresholds"] is not None:
            chosen = entry["decision"]
            told.append(
                f"{task}: thresholds chosen on validation, {chosen['metric']} {chosen['at_half']:.3f} with 0.5, "
                f"{chosen['held_out']:.3f} on posts that did not choose them. Validation results above are with 0.5."
            )
    return told


def _change(both: Mapping[str, float | None] | None) -> str:
    return " -> ".join(_numbers(both)) or "-"


def _numbers(both: Mapping[str, float | None] | None) -> Iterator[str]:
    return (f"{value:.3f}" for value in (both or {}).values() if value is not None)
