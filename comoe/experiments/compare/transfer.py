"""Transfer: the gain or loss of each task by joint training, and evidence for its reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from comoe.config.files import plain
from comoe.experiments.affinity import Affinity
from comoe.experiments.compare.arms import WITHOUT
from comoe.experiments.compare.differences import Differences
from comoe.experiments.compare.statistics import Difference


@dataclass(frozen=True, slots=True)
class Cosines:
    """Gradient cosines of one arm over its seeds; see ``comoe.experiments.affinity``."""

    tasks: tuple[str, ...]
    mean_TT: np.ndarray
    """Mean over seeds; the diagonal is the highest cosine that the noise permits."""
    highest_TT: np.ndarray
    """Maximum over seeds: below 0 the two are opposed in every seed."""
    seeds: int
    limit: int
    """Posts per task."""

    def to_dict(self) -> dict[str, Any]:
        """Plain lists; None without a gradient."""
        shared = {"tasks": list(self.tasks), "seeds": self.seeds, "posts_per_task": self.limit}
        return shared | plain({"mean": self.mean_TT, "highest": self.highest_TT})


@dataclass(frozen=True, slots=True)
class Reasons:
    """Evidence for one task's gain or loss."""

    opposed_by: tuple[tuple[str, float], ...]
    """Tasks with opposed gradients in every seed, with the mean cosine; most opposed first."""
    nearest: tuple[str, float] | None
    """The task with the highest cosine."""
    better_without: tuple[tuple[str, Difference], ...]
    """Tasks without which this one is better, best first. A significant difference proves harm, any
    other is a hint."""
    worse_without: tuple[tuple[str, Difference], ...]
    """Tasks without which this one is significantly worse."""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "opposed_by": dict(self.opposed_by), "nearest": dict([self.nearest] if self.nearest else []),
            "better_without": {task: change.to_dict() for task, change in self.better_without},
            "worse_without": {task: change.to_dict() for task, change in self.worse_without},
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Verdicts:
    """The tasks of an arm by the 95 % interval of their difference to the baseline."""

    gained: tuple[str, ...]
    """The interval is above 0."""
    lost: tuple[str, ...]
    """It is below 0: negative transfer, if the baseline is the tasks alone."""
    open: tuple[str, ...]
    """It contains 0."""

    @property
    def count(self) -> int:
        """Number of compared tasks."""
        return len(self.gained) + len(self.lost) + len(self.open)


def verdicts_of(differences: Mapping[str, Difference], tasks: Sequence[str]) -> Verdicts:
    """Sort an arm's differences to the baseline.

    Args:
        differences: name -> difference.
        tasks: the measured ones.
    """
    groups: dict[str, list[str]] = {"gained": [], "lost": [], "": []}
    for task in tasks:
        if task in differences:
            groups[differences[task].verdict].append(task)
    return Verdicts(*map(tuple, groups.values()))


def left_out_task(arm: str) -> str:
    """The task that an arm ``without.<task>`` drops; empty for other arms."""
    start, dot, task = arm.partition(".")
    return task if dot and start == WITHOUT else ""


def changes_without(differences: Differences) -> dict[str, dict[str, Difference]]:
    """Dropped task -> task -> its improvement without that one, from differences to the joint arm."""
    return {
        dropped: {task: change for task, change in of_arm.items() if task != dropped}
        for arm, of_arm in differences.items()
        if (dropped := left_out_task(arm))
    }


def mean_cosines(affinities: Sequence[Affinity]) -> Cosines | None:
    """Gradient cosines over the seeds of one arm; None without any."""
    if not affinities:
        return None
    stack_NTT = np.stack([affinity.cosine_TT for affinity in affinities])
    first = affinities[0]
    return Cosines(
        first.tasks, stack_NTT.mean(axis=0), stack_NTT.max(axis=0), len(affinities), first.limit
    )


def reasons_of(
    task: str, cosines: Cosines | None, changes: Mapping[str, Mapping[str, Difference]]
) -> Reasons:
    """Evidence about one task, from the joint arm's ``cosines`` and from ``changes_without``."""
    pairs: list[tuple[str, float, float]] = []
    if cosines is not None and task in cosines.tasks:
        row = cosines.tasks.index(task)
        pairs = [(other, float(cosines.mean_TT[row, place]), float(cosines.highest_TT[row, place]))
                 for place, other in enumerate(cosines.tasks)
                 if other != task and np.isfinite(cosines.mean_TT[row, place])]  # fmt: skip
    pairs.sort(key=lambda pair: pair[1])
    found = [(dropped, of_task[task]) for dropped, of_task in changes.items() if task in of_task]
    found.sort(key=lambda pair: -pair[1].mean)
    return Reasons(
        opposed_by=tuple((other, mean) for other, mean, highest in pairs if highest < 0),
        nearest=pairs[-1][:2] if pairs else None,
        better_without=tuple(pair for pair in found if pair[1].mean > 0),
        worse_without=tuple(pair for pair in reversed(found) if pair[1].verdict == "lost"),
    )
