"""Scores of parts of a split: the posts with one value of a column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from comoe.tasks.catalog import Task
from comoe.tasks.labels import natural_order

SLICED_METRICS = ("accuracy", "macro_f1")
"""Metrics that a slice has beside the task's main one, where its kind has them."""


def slice_scores(gold: Any, scores: Any, task: Task, columns: Mapping[str, Sequence[str | None]]) -> dict[str, float]:
    """``<metric>@<column>=<value>`` and ``n@<column>=<value>`` for every value of the task's slices.

    A post whose cell is empty is in no slice.

    Args:
        gold: of ``Kind.answers``: an array, or for tags a list, with one entry per labelled post.
        scores: as ``gold``.
        task: names the columns.
        columns: column -> its cell for each of these posts; a column that is not there has no slices.
    """
    found: dict[str, float] = {}
    for column in task.slices:
        cells = columns.get(column, ())
        for value in natural_order(cell for cell in cells if cell is not None):
            rows = np.flatnonzero([cell == value for cell in cells])
            values = task.rules.score(_picked(gold, rows), _picked(scores, rows), task)
            names = dict.fromkeys((task.metric, *(name for name in SLICED_METRICS if name in values)))
            found |= {f"{name}@{column}={value}": values[name] for name in names}
            found[f"n@{column}={value}"] = float(len(rows))
    return found


def _picked(values: Any, rows: np.ndarray) -> Any:
    return [values[row] for row in rows] if isinstance(values, list) else values[rows]
