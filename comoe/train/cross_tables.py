"""Cross-tables of a run's tasks, of gold labels and of predictions: ``cross_tables.json``, ``.csv`` and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from comoe.config.files import csv_line, write_atomic, write_json
from comoe.evaluation.cross_tables import Choice, CrossTable, cross_tables
from comoe.evaluation.evaluate import Evaluation
from comoe.tasks.task import Task
from comoe.train.monitor.monitor import Monitor

SOURCES = {"gold": "gold", "predicted": "label"}
"""What labels are -> their key in a prediction."""


def write_cross_tables(
    folder: Path,
    evaluations: Mapping[str, Evaluation],
    tasks: Sequence[Task],
    *,
    monitor: Monitor,
    step: int,
) -> None:
    """For each split and pair of tasks with one label per post; nothing where no two share posts.

    Args:
        folder: of the run.
        evaluations: split -> evaluation with predictions.
        tasks: of the run.
        monitor: draws the tables of a pair side by side.
        step: of the evaluated weights.
    """
    plain, cells = [], []
    for split, evaluation in evaluations.items():
        pairs: dict[tuple[str, str], dict[str, CrossTable]] = {}
        for source, key in SOURCES.items():
            for table in cross_tables(choices_of(evaluation, tasks, key)):
                head = {"split": split, "labels": source}
                plain += [head | one.to_dict() for one in (table, table.turned)]
                cells += [head | cell for cell in table.cells()]
                pairs.setdefault((table.rows, table.columns), {})[source] = table
        for pair, tables in pairs.items():
            monitor.log_cross_tables(step, split=split, tasks=pair, tables=tables)
    if plain:
        write_json(folder / "cross_tables.json", plain)
        lines = [list(cells[0]), *(list(cell.values()) for cell in cells)]
        write_atomic(folder / "cross_tables.csv", "".join(map(csv_line, lines)))


def choices_of(evaluation: Evaluation, tasks: Sequence[Task], key: str) -> dict[str, Choice]:
    """Task with one label per post -> its labels and the label id of each post; -1 where it has none.

    Args:
        evaluation: with predictions.
        tasks: of the evaluation.
        key: of a prediction, ``gold`` or ``label``.
    """
    kept = [task for task in tasks if task.rules.exclusive]
    rows = [row["row"] for task in kept for row in evaluation.predictions.get(task.name, ())]
    choices = {}
    for task in kept:
        ids = {label: number for number, label in enumerate(task.labels)}
        ids_N = np.full(max(rows, default=-1) + 1, -1, dtype=np.int64)
        for row in evaluation.predictions.get(task.name, ()):
            if row[key] is not None:
                ids_N[row["row"]] = ids[row[key]]
        choices[task.name] = (task.labels, ids_N)
    return choices
