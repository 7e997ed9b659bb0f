"""How much better one arm is than another, task by task, on the posts that both answered."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from comoe.experiments.compare.results import Result
from comoe.experiments.compare.statistics import (
    Answers,
    Difference,
    measured,
    paired_difference,
    read_answers,
    resampled,
    same_posts,
)
from comoe.tasks.task import Task

Differences = Mapping[str, Mapping[str, Difference]]
"""Arm -> task, or ``mean`` -> how much better than another arm."""


class Differing:
    """Reads what finished runs answered, once, and holds arms against one another.

    Args:
        results: arm -> its results.
        runs: folder of the run folders.
        resamples: of the bootstrap; below 2 nothing is told.
    """

    def __init__(
        self, results: Mapping[str, Sequence[Result]], runs: Path, *, resamples: int
    ) -> None:
        self._results, self._runs, self._resamples = results, runs, resamples
        self._read: dict[tuple[str, int], dict[str, Answers]] = {}
        self._numbers: dict[tuple[int, str, int], int] = {}
        self.incomparable: dict[str, set[str]] = {}
        """Arm -> tasks of which it answered other posts than what it was held against, or posts
        with other labels."""

    def against(self, baseline: str, arms: Sequence[str] | None = None) -> Differences:
        """Arms minus baseline, over the seeds that both have finished; larger is better.

        ``mean`` is there where both answer every measured task of the comparison.

        Args:
            baseline: an arm.
            arms: which ones; None is all others.
        """
        plain: dict[str, dict[str, list[float]]] = {}
        drawn: dict[str, dict[str, list[np.ndarray]]] = {}
        others = [arm for arm in (self._results if arms is None else arms) if arm != baseline]
        for base in self._results.get(baseline, ()) if self._resamples > 1 else ():
            tasks = list(base.tasks.values())
            theirs = self._answers(baseline, base)
            found = {arm: self._comparable(arm, base, theirs) for arm in others}
            found = {arm: own for arm, own in found.items() if own}
            answers = [theirs, *found.values()]
            if not found or not tasks:
                continue
            values = resampled(answers, tasks, resamples=self._resamples)
            whole = [measured(run, tasks) for run in answers]
            for number, arm in enumerate(found, start=1):
                for name, value in whole[number].items():
                    # The mean of a baseline that is not finished would be one of fewer tasks.
                    if not math.isnan(value) and (name in base.tasks or name in base.quality):
                        plain.setdefault(arm, {}).setdefault(name, []).append(
                            value - whole[0][name]
                        )
                        drawn.setdefault(arm, {}).setdefault(name, []).append(
                            values[name][number] - values[name][0]
                        )
        return {
            arm: {
                name: paired_difference(seeds, np.stack(drawn[arm][name]))
                for name, seeds in of_arm.items()
            }
            for arm, of_arm in plain.items()
        }

    def _comparable(
        self, arm: str, base: Result, theirs: Mapping[str, Answers]
    ) -> dict[str, Answers]:
        result = next((item for item in self._results[arm] if item.seed == base.seed), None)
        if result is None:
            return {}
        if result.split != base.split:
            self.incomparable.setdefault(arm, set()).update(set(result.tasks) & set(base.tasks))
            return {}
        own = self._answers(arm, result)
        good = {
            task: own[task]
            for task in own
            if task in theirs and same_posts(own[task], theirs[task])
        }
        if bad := {task for task in own if task in theirs} - set(good):
            self.incomparable.setdefault(arm, set()).update(bad)
        return good

    def _answers(self, arm: str, result: Result) -> dict[str, Answers]:
        if (arm, result.seed) not in self._read:
            self._read[arm, result.seed] = {
                name: self._of_task(
                    self._runs / result.folders[name] / "predictions" / result.split,
                    task,
                    result.seed,
                )
                for name, task in result.tasks.items()
            }
        return self._read[arm, result.seed]

    def _of_task(self, folder: Path, task: Task, seed: int) -> Answers:
        """Answers under numbers that mean the same post in every run: rows count from another start
        where other tasks are read too, so a post is known by its text, and by how many of the same
        text came before."""
        lines = (folder / f"{task.name}.jsonl").read_text(encoding="utf-8").split("\n")
        rows, seen = [], Counter[str]()
        for row in (json.loads(line) for line in lines if line):
            text = str(row.get("text", row["row"]))
            key = (seed, text, seen[text])
            seen[text] += 1
            rows.append(row | {"row": self._numbers.setdefault(key, len(self._numbers))})
        return read_answers(sorted(rows, key=lambda row: row["row"]), task)
