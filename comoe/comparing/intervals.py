"""Means and differences with 95 % intervals: Student's t over seeds, and a paired bootstrap over posts and seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from comoe.evaluate import rising
from comoe.tasks.catalog import Task

CONFIDENCE = 0.95
"""Share of intervals that hold the true value, were the experiment repeated."""
MEAN = "mean"
"""Key of the mean over tasks, beside the tasks' names."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A number and how far it may be off; the ends are NaN where one value cannot tell."""

    mean: float
    """The estimate."""
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end."""

    def to_dict(self) -> dict[str, float | None]:
        """Plain numbers; None where there is no interval."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Answers:
    """What one run answered to one task's posts, decided."""

    rows: np.ndarray
    """Row of each post in the split, int64, rising."""
    gold: Any
    """As ``Kind.compared`` gives it."""
    predicted: Any
    """The same."""


def seed_interval(values: Sequence[float]) -> Interval:
    """Mean over seeds with Student's t interval.

    Args:
        values: one number per seed, at least one.
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    half = stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return Interval(mean, mean - float(half), mean + float(half))


def read_answers(rows: Sequence[Mapping[str, Any]], task: Task) -> Answers:
    """The labelled rows of a predictions file."""
    known = [row for row in rows if row["gold"] is not None]
    return Answers(np.array([row["row"] for row in known], dtype=np.int64), *task.rules.compared(known, task))


def resampled(
    runs: Sequence[Mapping[str, Answers]], tasks: Sequence[Task], *, resamples: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Main metric of each task in bootstrap resamples of the posts, for every run on the same resamples.

    Posts are drawn with replacement among those that carry the same tasks' labels, and a post is drawn for all of its
    tasks at once. Larger is better: a metric that falls as a model gets better enters negated.

    Args:
        runs: per run, task -> answers. Runs of one seed answered the same posts; other seeds may have drawn others.
        tasks: the tasks.
        resamples: how many.
        seed: of the draws; the same seed and posts give the same draws, so that runs can be paired.

    Returns:
        Task, and ``mean`` -> (runs, resamples).
    """
    generator = np.random.default_rng(seed)
    strata = _strata(runs[0], tasks)
    found = {task.name: np.empty((len(runs), resamples)) for task in tasks}
    for turn in range(resamples):
        drawn = np.concatenate([generator.choice(rows, len(rows)) for rows in strata])
        for task in tasks:
            for number, run in enumerate(runs):
                answers = run[task.name]
                places = _places(answers.rows, drawn)
                value = task.rules.measure(_take(answers.gold, places), _take(answers.predicted, places), task)
                found[task.name][number, turn] = rising(task.metric, value)
    return found | {MEAN: np.mean([found[task.name] for task in tasks], axis=0)}


def paired_difference(arm: np.ndarray, baseline: np.ndarray, *, plain: float, seed: int = 0) -> Interval:
    """Difference of two arms with a bootstrap interval over posts and seeds together.

    Each resample of the posts is paired with a draw of seeds with replacement, the same seeds in both arms.

    Args:
        arm: (seeds, resamples) of one arm, from ``resampled``.
        baseline: the same of the other.
        plain: the difference on the posts as they are, means over seeds.
        seed: of the draws of seeds.
    """
    seeds, resamples = arm.shape
    drawn = np.random.default_rng(seed).integers(0, seeds, (seeds, resamples))
    differences = np.take_along_axis(arm - baseline, drawn, axis=0).mean(axis=0)
    low, high = np.quantile(differences, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
    return Interval(plain, float(low), float(high))


def _strata(run: Mapping[str, Answers], tasks: Sequence[Task]) -> list[np.ndarray]:
    """Rows by which tasks have a label there."""
    rows = np.unique(np.concatenate([run[task.name].rows for task in tasks]))
    present = np.stack([np.isin(rows, run[task.name].rows) for task in tasks], axis=1)
    _, kind = np.unique(present, axis=0, return_inverse=True)
    return [rows[kind.reshape(-1) == number] for number in range(kind.max() + 1)]


def _places(rows: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Where the drawn rows stand among ``rows``; those that are not there are left out."""
    places = np.searchsorted(rows, drawn).clip(max=len(rows) - 1)
    return places[rows[places] == drawn]


def _take(values: Any, places: np.ndarray) -> Any:
    return values[places] if isinstance(values, np.ndarray) else [values[place] for place in places]
