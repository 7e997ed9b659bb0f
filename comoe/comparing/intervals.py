"""Means and differences with 95 % intervals: Student's t over seeds, and a paired bootstrap over posts."""

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
        runs: per run, task -> answers; all runs answered the same posts (``same_posts``).
        tasks: the tasks.
        resamples: how many.
        seed: of the draws.

    Returns:
        Task, and ``mean`` -> (runs, resamples).
    """
    generator = np.random.default_rng(seed)
    strata = _strata(runs[0], tasks)
    found = {task.name: np.empty((len(runs), resamples)) for task in tasks}
    for turn in range(resamples):
        drawn = np.concatenate([generator.choice(rows, len(rows)) for rows in strata])
        for task in tasks:
            places = _places(runs[0][task.name].rows, drawn)
            for number, run in enumerate(runs):
                found[task.name][number, turn] = _value(run[task.name], task, places)
    return found | {MEAN: np.mean([found[task.name] for task in tasks], axis=0)}


def measured(run: Mapping[str, Answers], tasks: Sequence[Task]) -> dict[str, float]:
    """Main metric of each task on the posts as they are, and ``mean``; larger is better."""
    values = {task.name: _value(run[task.name], task, None) for task in tasks}
    return values | {MEAN: float(np.mean(list(values.values())))}


def same_posts(run: Mapping[str, Answers], other: Mapping[str, Answers]) -> bool:
    """Whether two runs answered the same posts of the same tasks."""
    return run.keys() == other.keys() and all(np.array_equal(run[task].rows, other[task].rows) for task in run)


def paired_difference(differences: Sequence[float], resampled_differences: np.ndarray) -> Interval:
    """Mean difference of two arms with an interval that holds for other posts and other seeds.

    Half its width is t(n - 1) * sqrt(s^2 / n + v): s^2 is the variance of the seeds' differences, v that of their mean
    over bootstrap resamples of the posts. A percentile bootstrap over a handful of seeds would be little wider than
    their range, and so far too sure. Where seeds test on posts of their own, s^2 holds some of v as well, and the
    interval is a little too wide. With one seed it speaks of the posts alone.

    Args:
        differences: arm minus baseline on the posts as they are, one number per seed.
        resampled_differences: the same in each resample, (seeds, resamples).
    """
    seeds, mean = len(differences), float(np.mean(differences))
    variance = float(np.var(resampled_differences.mean(axis=0), ddof=1))
    quantile = stats.norm.ppf(0.5 + CONFIDENCE / 2)
    if seeds > 1:
        variance += float(np.var(differences, ddof=1)) / seeds
        quantile = stats.t.ppf(0.5 + CONFIDENCE / 2, seeds - 1)
    half = float(quantile) * math.sqrt(variance)
    return Interval(mean, mean - half, mean + half)


def _value(answers: Answers, task: Task, places: np.ndarray | None) -> float:
    gold, predicted = answers.gold, answers.predicted
    if places is not None:
        gold, predicted = _take(gold, places), _take(predicted, places)
    return rising(task.metric, task.rules.measure(gold, predicted, task))


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
