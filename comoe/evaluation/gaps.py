"""Gaps between groups of posts: what a task's metrics differ by over the values of a column, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from comoe.evaluation.evaluate import LEAST_POSTS, SLICED_METRICS, take_rows
from comoe.tasks.kinds.base import PostOutput
from comoe.tasks.slices import slice_values
from comoe.tasks.task import Task

RESAMPLES = 500
"""Draws for the intervals, and as many shuffles."""

Gap = dict[str, Any]
"""``gap``, the ends ``low`` and ``high`` of its interval, ``by_chance``, the groups ``largest`` and
``smallest``, and ``groups``: value of the column -> ``value``, ``low``, ``high``, ``n``."""

Gaps = Mapping[str, Mapping[str, Gap]]
"""Entry of ``tasks.<name>.slices`` -> metric -> gap."""


def gaps_of(
    outputs: Mapping[str, Sequence[PostOutput]],
    tasks: Sequence[Task],
    columns: Mapping[str, Sequence[str | None]],
) -> dict[str, Gaps]:
    """Task -> its gaps; tasks without any are left out.

    Args:
        outputs: ``Evaluation.outputs``.
        tasks: as the outputs are to be read, with their ``slices``.
        columns: column -> its cell per row of the split.
    """
    found = {}
    for task in tasks:
        if not task.slices or not task.rules.scored or not outputs.get(task.name):
            continue
        _, targets = task.rules.stack(outputs[task.name], task)
        labelled = np.flatnonzero(task.rules.labelled(targets))
        rows = [outputs[task.name][place].row for place in labelled]
        gold, scores = task.rules.gold_and_scores(outputs[task.name], task)
        predicted = task.rules.decided(scores, task)
        cells = {name: [column[row] for row in rows] for name, column in columns.items()}
        gaps = {
            entry: measured
            for entry in task.slices
            if (measured := measure_gaps(gold, predicted, task, *slice_values(entry, cells)))
        }
        if gaps:
            found[task.name] = gaps
    return found


def measure_gaps(
    gold: Any,
    predicted: Any,
    task: Task,
    cells: Sequence[str | None],
    different: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Gap]:
    """The gap of each metric between the groups of posts with one value of a column; none of fewer than two groups.

    A gap is the largest value of a group minus the smallest. Its interval is a 95 % percentile
    bootstrap of the difference of these two groups, posts drawn within each. Of many groups two
    differ by chance alone, and these two were chosen for it: ``by_chance`` is the largest gap that
    95 % of random groups of the same sizes have, and a gap below it says nothing.

    Args:
        gold: of ``Kind.gold_and_scores``, one entry per labeled post.
        predicted: of ``Kind.decided``.
        task: measured by its main metric and ``SLICED_METRICS``.
        cells: value of the column of each post, None for no group.
        different: the values; those of fewer than ``LEAST_POSTS`` posts are left out.
        resamples: draws.
        seed: of the draws.
    """
    groups = {value: np.flatnonzero([cell == value for cell in cells]) for value in different}
    groups = {value: rows for value, rows in groups.items() if len(rows) >= LEAST_POSTS}
    if len(groups) < 2:
        return {}
    names = [task.metric, *(name for name in SLICED_METRICS if name in task.rules.metrics)]
    measures = {name: replace(task, metric=name) for name in dict.fromkeys(names)}

    def values_of(parts: Sequence[np.ndarray]) -> np.ndarray:
        """(metrics, groups)."""
        taken = [(take_rows(gold, rows), take_rows(predicted, rows)) for rows in parts]
        return np.array(
            [[one.rules.measure(*pair, one) for pair in taken] for one in measures.values()]
        )

    generator = np.random.default_rng(seed)
    parts, sizes = list(groups.values()), [len(rows) for rows in groups.values()]
    whole_MG = values_of(parts)
    drawn_RMG = np.array(
        [values_of([generator.choice(rows, len(rows)) for rows in parts]) for _ in range(resamples)]
    )
    everything, ends = np.concatenate(parts), np.cumsum(sizes)[:-1]
    shuffled_RMG = np.array(
        [values_of(np.split(generator.permutation(everything), ends)) for _ in range(resamples)]
    )
    return {
        name: _gap(
            dict(zip(groups, sizes, strict=True)),
            whole_MG[number],
            drawn_RMG[:, number],
            shuffled_RMG[:, number],
        )
        for number, name in enumerate(measures)
    }


def _gap(
    sizes: Mapping[str, int], values_G: np.ndarray, drawn_RG: np.ndarray, shuffled_RG: np.ndarray
) -> Gap:
    """One metric of groups of these sizes: on the posts as they are, in resamples, and in shuffles."""
    names, best, worst = list(sizes), int(values_G.argmax()), int(values_G.argmin())
    low, high = _interval(drawn_RG[:, best] - drawn_RG[:, worst])
    groups = {}
    for name, value, drawn_R in zip(names, values_G, drawn_RG.T, strict=True):
        ends = dict(zip(("low", "high"), _interval(drawn_R), strict=True))
        groups[name] = {"value": float(value), **ends, "n": sizes[name]}
    return {
        "gap": float(values_G[best] - values_G[worst]),
        "low": low,
        "high": high,
        "by_chance": float(np.quantile(np.ptp(shuffled_RG, axis=1), 0.95)),
        "largest": names[best],
        "smallest": names[worst],
        "groups": groups,
    }


def _interval(values_R: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values_R, (0.025, 0.975))
    return float(low), float(high)
