"""Suspicious labels of a scored data set as a table: what ``comoe eval --suspicious`` writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from comoe.config.files import csv_line, write_atomic
from comoe.evaluation.label_noise import LabelNoise, estimate_label_noise
from comoe.inference.score import Scores
from comoe.tasks.task import Task

HEAD = ("place", "task", "label", "likely_label", "score", "likely_score", "text")
SHOWN = 3
"""Pairs of labels that the summary names."""


@dataclass(frozen=True, slots=True)
class Suspects:
    """The labels of a task, or of one label of a task whose labels do not exclude one another."""

    task: str
    name: str
    """The task's name, or ``<task>/<label>``."""
    labels: tuple[str, ...]
    rows_N: np.ndarray
    """Post of each entry of ``given_N``, int64."""
    given_N: np.ndarray
    scores_NY: np.ndarray
    noise: LabelNoise


def doubted_tasks(tasks: Sequence[Task]) -> list[Task]:
    """Those whose predictions have a probability for each label of a post.

    Raises:
        ValueError: there is no such task.
    """
    found = [task for task in tasks if task.mode != "tokens" and task.labels]
    if not found:
        names = ", ".join(task.name for task in tasks)
        raise ValueError(
            f"--suspicious compares labels with their probabilities, and {names} has none: it is "
            "for single_label, label_words and multi_label tasks. Name such a task with --task."
        )
    return found


def find_suspicious(scores: Scores) -> list[Suspects]:
    """What is wrong with the labels, per task; of a task with any number of labels per label.

    Raises:
        ValueError: as of ``doubted_tasks``.
    """
    return [found for task in doubted_tasks(scores.tasks) for found in _of_task(scores, task)]


def _of_task(scores: Scores, task: Task) -> Iterator[Suspects]:
    outputs = scores.evaluation.outputs[task.name]
    _, targets = task.rules.stack(outputs, task)
    labelled = np.flatnonzero(task.rules.labelled(targets))
    if not len(labelled):
        return
    rows = np.array([outputs[place].row for place in labelled], dtype=np.int64)
    gold, scores_NY = task.rules.gold_and_scores(outputs, task)
    scores_NY = np.asarray(scores_NY, dtype=np.float64)
    if task.rules.exclusive:
        parts = [(task.name, task.labels, gold, scores_NY)]
    else:
        parts = [
            (
                f"{task.name}/{label}",
                (f"not {label}", label),
                gold[:, y],
                np.stack([1 - p_N, p_N], axis=1),
            )
            for y, (label, p_N) in enumerate(zip(task.labels, scores_NY.T, strict=True))
        ]
    for name, labels, given_N, shares_NY in parts:
        noise = estimate_label_noise(given_N, shares_NY)
        yield Suspects(task.name, name, tuple(labels), rows, given_N, shares_NY, noise)


def write_suspicious(path: Path, found: Sequence[Suspects], scores: Scores) -> None:
    """A line per suspicious label, the most suspicious of each task first."""
    lines = [csv_line(HEAD)]
    for one in found:
        for place, likely in zip(one.noise.rows_S, one.noise.likely_S, strict=True):
            row, given = one.rows_N[place], one.given_N[place]
            score, likely_score = one.scores_NY[place, [given, likely]]
            lines.append(
                csv_line(
                    (
                        scores.read.origins[row],
                        one.task,
                        one.labels[given],
                        one.labels[likely],
                        f"{score:.4f}",
                        f"{likely_score:.4f}",
                        scores.read.texts[row],
                    )
                )
            )
    write_atomic(path, "".join(lines))


def suspicious_lines(found: Sequence[Suspects]) -> list[str]:
    """Per task the estimated share of wrong labels, the suspicious ones, and what is taken for what."""
    lines = []
    for one in found:
        joint_YY = one.noise.joint_YY * (1 - np.eye(len(one.labels)))
        order = np.argsort(-joint_YY, axis=None, kind="stable")[:SHOWN]
        pairs = [np.unravel_index(place, joint_YY.shape) for place in order]
        named = ", ".join(
            f"{one.labels[given]} for {one.labels[likely]} {joint_YY[given, likely]:.3f}"
            for given, likely in pairs
            if joint_YY[given, likely] > 0
        )
        lines.append(
            f"{one.name}: about {one.noise.wrong:.1%} of {len(one.given_N):,} labels are wrong; "
            f"suspicious are {len(one.noise.rows_S):,}" + (f" ({named})" if named else "")
        )
    return lines
