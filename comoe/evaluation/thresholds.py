"""Decision thresholds: the probability that a label needs, where 0.5 is not the best choice.

A threshold is chosen on the posts of the validation split, and kept only where it also pays on
posts that did not choose it: each fifth of the posts is decided by the threshold of the other four,
and what that gains over 0.5 must be more than twice its own standard error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from comoe.tasks.task import Task

FOLDS = 5
"""Parts of the posts, each decided by what the others chose."""


FEWEST = 5
"""Posts with the label, and without it, below which no threshold is fitted."""


MOST_CANDIDATES = 60
"""Thresholds that are tried."""


RESAMPLES = 100
"""Bootstrap samples behind a standard error."""


HALF = 0.5


Measure = Callable[[np.ndarray, np.ndarray], float]
"""(gold, decided) -> a number that is better when larger; 0/1 arrays, (N,) or (N, Y)."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a search for thresholds came to."""

    thresholds: tuple[float, ...] | None
    """As ``Task.thresholds``; None where 0.5 stays for all."""
    at_half: float
    """The task's main metric with 0.5."""
    held_out: float
    """The same metric where each post is decided by thresholds that other posts chose (0.5 where
    none is kept)."""


def choose_for_two_classes(
    scores_N: np.ndarray, gold_N: np.ndarray, *, folds_N: np.ndarray, task: Task
) -> Chosen:
    """The threshold of the label with id 1 that makes the task's main metric largest.

    Args:
        scores_N: its probabilities.
        gold_N: label ids, 0 or 1.
        folds_N: part of each post, from 0; posts that belong together are in one.
        task: whose metric counts.
    """

    def measure(gold: np.ndarray, decided: np.ndarray) -> float:
        return task.rules.measure(gold, decided, task)

    return _choose(
        scores_N[:, None],
        gold_N[:, None],
        folds_N,
        by_label=measure,
        whole=lambda gold, decided: measure(gold[:, 0], decided[:, 0]),
    )


def choose_for_labels(
    scores_NY: np.ndarray, gold_NY: np.ndarray, *, folds_N: np.ndarray, task: Task
) -> Chosen:
    """The threshold of each label that makes its own F1 largest; none where the task's main metric would fall.

    Args:
        scores_NY: probabilities.
        gold_NY: 0/1.
        folds_N: part of each post, from 0.
        task: whose metric must not fall.
    """
    return _choose(
        scores_NY,
        gold_NY,
        folds_N,
        by_label=f1,
        whole=lambda gold, decided: task.rules.measure(gold, decided, task),
    )


def best_threshold(scores_N: np.ndarray, gold_N: np.ndarray, measure: Measure) -> float:
    """The threshold with the largest measure; of equal ones that next to 0.5.

    Tried are 0.5 and the middles between neighboring scores: all of them, or ``MOST_CANDIDATES``,
    half of these right below posts that have the label.
    """
    values = np.unique(scores_N)
    middles = (values[1:] + values[:-1]) / 2
    if len(middles) > MOST_CANDIDATES:
        below = np.clip(np.searchsorted(values, np.unique(scores_N[gold_N == 1])) - 1, 0, None)
        kept = [
            _spread(below, MOST_CANDIDATES // 2),
            _spread(np.arange(len(middles)), MOST_CANDIDATES // 2),
        ]
        middles = middles[np.unique(np.concatenate(kept))]
    tried = sorted([HALF, *middles.tolist()], key=lambda edge: (abs(edge - HALF), edge))
    found = [measure(gold_N, (scores_N >= edge).astype(np.int64)) for edge in tried]
    return tried[int(np.argmax(found))]


def f1(gold_N: np.ndarray, decided_N: np.ndarray) -> float:
    """F1 of one label, 0 where there is nothing to find and nothing found."""
    total = int(gold_N.sum() + decided_N.sum())
    return 2.0 * int((gold_N & decided_N).sum()) / total if total else 0.0


def _choose(
    scores_NY: np.ndarray,
    gold_NY: np.ndarray,
    folds_N: np.ndarray,
    *,
    by_label: Measure,
    whole: Measure,
) -> Chosen:
    plain_NY = (scores_NY >= HALF).astype(np.int64)
    held_NY, edges = plain_NY.copy(), []
    for label in range(scores_NY.shape[1]):
        scores_N, gold_N = scores_NY[:, label], gold_NY[:, label]
        edge = HALF
        if min(gold_N.sum(), (1 - gold_N).sum()) >= FEWEST:
            # Every post is decided by the threshold of the other folds.
            held_N = np.zeros(len(scores_N), dtype=np.int64)
            for fold in np.unique(folds_N):
                here_N = folds_N == fold
                best = best_threshold(scores_N[~here_N], gold_N[~here_N], by_label)
                held_N[here_N] = scores_N[here_N] >= best
            if _gains(gold_N, held_N, plain_NY[:, label], by_label):
                held_NY[:, label] = held_N
                edge = best_threshold(scores_N, gold_N, by_label)
        edges.append(edge)
    at_half, held_out = whole(gold_NY, plain_NY), whole(gold_NY, held_NY)
    if all(edge == HALF for edge in edges) or held_out < at_half:
        return Chosen(None, at_half, at_half)
    return Chosen(tuple(edges), at_half, held_out)


def _gains(gold_N: np.ndarray, held_N: np.ndarray, plain_N: np.ndarray, measure: Measure) -> bool:
    """Whether the gain is larger than twice its standard error over resampled posts."""
    gain = measure(gold_N, held_N) - measure(gold_N, plain_N)
    if gain <= 0:
        return False
    draw = np.random.default_rng(0)
    gains = []
    for _ in range(RESAMPLES):
        posts = draw.integers(len(gold_N), size=len(gold_N))
        gains.append(measure(gold_N[posts], held_N[posts]) - measure(gold_N[posts], plain_N[posts]))
    return gain > 2 * float(np.std(gains))


def _spread(values: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
    """At most ``count`` of the values, evenly over their order."""
    return np.asarray(values)[np.unique(np.linspace(0, len(values) - 1, count).round().astype(int))]
