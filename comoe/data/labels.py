"""Labels of a task in its posts: which, how many, and whether there is something to learn."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from comoe.config.recipe import TaskConfig
from comoe.data.posts import PostSplit
from comoe.data.report import DataReport
from comoe.tasks.kinds.base import Kind
from comoe.tasks.labels import appearance
from comoe.tasks.task import CONFIDENCE_STRATEGIES, Task, build_task
from comoe.types import IGNORED

MANY = 10
"""Labels from which on it is worth a word if most have one post."""


def discovered(kind: Kind, values: Iterable[Any]) -> tuple[str, ...]:
    """Label names in the training cells that the kind can read; the others are reported with their line later."""

    def readable(value: Any) -> bool:
        try:
            kind.parse(value, kind.discover([value]))
        except ValueError:
            return False
        return True

    return kind.discover(value for value in values if readable(value))


def resolved_task(
    name: str,
    config: TaskConfig,
    *,
    labels: tuple[str, ...],
    splits: Mapping[str, PostSplit],
    report: DataReport,
) -> Task:
    """One task, resolved against its posts and counted in the report.

    Args:
        name: key in the recipe.
        config: the task's options.
        labels: label names in the order of their ids.
        splits: train and validation at least.
        report: gets label counts, mean confidence and warnings.

    Raises:
        ValueError: no labeled training post, or all with the same label; or labels that do not fit
            the kind.
    """
    counts = {split: label_counts(posts.labels[name], labels) for split, posts in splits.items()}
    present = [value for value in splits["train"].labels[name] if value is not None]
    if not present:
        raise ValueError(
            f"tasks.{name}: no training post has a label in column {config.label!r}; correct it, or drop the task."
        )
    numbers = [value for value in present if isinstance(value, float)]
    moments = _moments(numbers) if numbers else None
    task = build_task(
        name, config, labels=labels, label_counts=counts["train"], label_moments=moments
    )
    if not task.rules.scored:
        return task
    distinct = (
        {item for value in present for item in value} - {IGNORED}
        if task.mode == "tokens"
        else set(present)
    )
    if task.rules.predicts and len(distinct) < 2:
        only = next(iter(counts["train"]), "none") if labels else next(iter(distinct))
        raise ValueError(
            f"tasks.{name}: all {len(present):,} training labels are the same ({only}), so there is nothing to learn; "
            f"add posts with other labels, raise data.limit_per_task or tasks.{name}.limit, or drop the task."
        )
    report.warnings += [f"task {name}: {problem}" for problem in _doubtful(labels, counts["train"])]
    report.labels[name] = {split: dict(found) for split, found in counts.items() if found}
    if absent := [label for label in labels if not counts["train"][label]]:
        report.warnings.append(f"task {name}: no training post has the label {', '.join(absent)}")
    if not counts["validation"].total():
        report.warnings.append(
            f"task {name}: no validation post has a label; it cannot be measured"
        )
    if config.confidence is not None:
        numbers = [number for number in splits["train"].confidences[name] if number is not None]
        report.confidence[name] = float(np.mean(numbers)) if numbers else float("nan")
        if not CONFIDENCE_STRATEGIES[task.confidence_strategy]:
            report.confidence_unused.append(name)
    return task


def _doubtful(labels: Sequence[str], counts: Counter[str]) -> list[str]:
    """What makes labels look like a mistake: two that look alike, or nearly one for each post."""
    found = []
    seen: dict[str, str] = {}
    for label in labels:
        other = seen.setdefault(appearance(label), label)
        if other != label:
            found.append(
                f"the labels {ascii(other)} ({counts[other]:,}) and {ascii(label)} ({counts[label]:,}) look alike and "
                "are two labels; spell them alike if they mean the same"
            )
    once = sum(count == 1 for count in counts.values())
    if len(labels) >= MANY and 2 * once > counts.total():
        found.append(
            f"{once:,} of its {len(labels):,} labels are those of one training post each, as in a "
            "column of ids or texts; is it the right column?"
        )
    return found


def _moments(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation, rounded once: a resume elsewhere finds the same bits."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))


def label_counts(values: Sequence[Any], labels: tuple[str, ...]) -> Counter[str]:
    """Label -> posts (words, for tags) that have it, in the order of ids; for numbers one entry, ``labelled``."""
    present = [value for value in values if value is not None]
    if not labels:
        return Counter({"labelled": len(present)} if present else {})
    ids = Counter(
        item
        for value in present
        for item in (value if isinstance(value, (list, tuple)) else (value,))
    )
    return Counter({label: ids[number] for number, label in enumerate(labels) if ids[number]})
