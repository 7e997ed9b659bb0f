"""The files that a run's numbers are kept in, ``metrics.jsonl`` and ``results.json``, and the table that ends a run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from comoe.data.posts import UNSEEN
from comoe.tasks.catalog import Task

METRICS_FILE = "metrics.jsonl"
"""One JSON object per line: a training line, an evaluation, an event, or a resume."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``; a line that was cut short by a crash is left out; no file is no records."""
    records = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def truncate_metrics(path: Path, *, after_step: int) -> None:
    """Drop what a run logged after the step that it goes on from, then add ``{"split": "resume", "step": after_step}``.

    Lines without a step stay; a line cut short by a crash goes. The file is written aside and renamed.
    """
    kept = [record for record in read_metrics(path) if record.get("step", after_step) <= after_step]
    kept.append({"split": "resume", "step": after_step})
    write_aside(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))


def write_results(run_dir: Path, results: Mapping[str, Any]) -> None:
    """Write ``results.json``, whole or not at all; numbers that are not finite become null."""
    write_aside(run_dir / "results.json", json.dumps(plain(results), ensure_ascii=False, indent=2) + "\n")


def format_results_table(metrics: Mapping[str, Mapping[str, Mapping[str, float]]], tasks: Sequence[Task]) -> str:
    """The table that ends a run: main metric of each task on each split, beside the majority baseline.

    Args:
        metrics: split (validation, test, unseen) -> task -> metric -> value; a split or task without labels may be
            absent. The baseline is that of the test posts, or of the validation posts where these have no labels, n
            the rows with a label there.
        tasks: in the order of the lines; auxiliary ones are marked.
    """
    splits = ("validation", "test", *(split for split in metrics if split == UNSEEN))
    rows = []
    for task in tasks:
        if not task.rules.scored:
            continue
        found = {split: metrics.get(split, {}).get(task.name, {}) for split in splits}
        last = found["test"] or found["validation"]
        scores = [_decimal(values.get(task.metric)) for values in found.values()]
        count = f"{int(last['n'])}" if "n" in last else "-"
        rows.append((marked(task), task.metric, *scores, _decimal(last.get(f"majority/{task.metric}")), count))
    return "\n".join(in_columns(("task", "metric", *splits, "majority", "n"), rows, left=2))


def marked(task: Task) -> str:
    """A task's name as tables show it."""
    return f"{task.name} (auxiliary)" if task.auxiliary else task.name


def in_columns(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Lines of a table: the first ``left`` columns begin flush, the others end flush; a rule under the head."""
    table = [head, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    form = "  ".join(["{:<{}}"] * left + ["{:>{}}"] * (len(head) - left))
    lines = [form.format(*(part for pair in zip(row, widths, strict=True) for part in pair)) for row in table]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def plain(value: Any) -> Any:
    """What JSON can hold: numbers of torch and NumPy become Python's, and what is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_aside(path: Path, text: str) -> None:
    """Write a file such that a reader, or a crash, never sees half of it."""
    aside = path.with_name(f".{path.name}.part")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
