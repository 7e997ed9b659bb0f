"""Paired differences between arms, task by task, on the posts that both predict for."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from comoe.experiments.compare.results import MEASURES, Result
from comoe.experiments.compare.statistics import (
    Difference,
    Predictions,
    measured,
    paired_difference,
    read_predictions,
    resampled,
    same_posts,
)
from comoe.tasks.task import Task

Differences = Mapping[str, Mapping[str, Difference]]
"""Arm -> task, or ``mean`` -> improvement over another arm."""


def seed_differences(
    results: Mapping[str, Sequence[Result]],
    baseline: str,
    arms: Sequence[str] | None = None,
    *,
    measure: str,
) -> Differences:
    """By how much the losses of arms, or another falling measure, are below the baseline's, over paired seeds.

    Args:
        results: arm -> its results.
        baseline: an arm.
        arms: None is all others.
        measure: a key of ``MEASURES``, but the metric.
    """
    field = MEASURES[measure]
    found: dict[str, dict[str, list[float]]] = {}
    of_base = {result.seed: result for result in results.get(baseline, ())}
    for arm in results if arms is None else arms:
        for result in results[arm] if arm != baseline else ():
            base = of_base.get(result.seed)
            counts = result.posts.get("validation", {})
            for name, value in getattr(result, field).items() if base else ():
                # Another limit or split has other posts, and another difficulty.
                same = base.posts.get("validation", {}).get(name) == counts.get(name)
                of_base_run = getattr(base, field)
                if name in of_base_run and same:
                    found.setdefault(arm, {}).setdefault(name, []).append(of_base_run[name] - value)
    return {
        arm: {name: paired_difference(values) for name, values in of_arm.items()}
        for arm, of_arm in found.items()
    }


class PairedDifferences:
    """Reads the predictions of finished runs, each once, and compares arms.

    Args:
        results: arm -> its results.
        runs: folder of the run folders.
        resamples: of the bootstrap; below 2 there are no differences.
    """

    def __init__(
        self, results: Mapping[str, Sequence[Result]], runs: Path, *, resamples: int
    ) -> None:
        self._results, self._runs = results, runs
        self.resamples = resamples
        self._read: dict[tuple[str, int], dict[str, Predictions]] = {}
        self._numbers: dict[tuple[int, str, int], int] = {}
        self.incomparable: dict[str, set[str]] = {}
        """Arm -> tasks whose posts or labels differ from those of the compared arm."""

    def against(self, baseline: str, arms: Sequence[str] | None = None) -> Differences:
        """Arms minus baseline, over the seeds that both have finished; larger is better.

        ``mean`` is present where both predict every measured task of the comparison.

        Args:
            baseline: an arm.
            arms: None is all others.
        """
        found: dict[str, dict[str, list[tuple[float, np.ndarray]]]] = {}
        others = [arm for arm in (self._results if arms is None else arms) if arm != baseline]
        for base in self._results.get(baseline, ()) if self.resamples > 1 else ():
            tasks = list(base.tasks.values())
            of_base = self._predictions(baseline, base)
            of_arms = {arm: self._comparable(arm, base, of_base) for arm in others}
            of_arms = {arm: own for arm, own in of_arms.items() if own}
            if not of_arms or not tasks:
                continue
            runs = [of_base, *of_arms.values()]
            drawn = resampled(runs, tasks, resamples=self.resamples)
            whole = [measured(run, tasks) for run in runs]
            for number, arm in enumerate(of_arms, start=1):
                for name, value in whole[number].items():
                    # An unfinished baseline has no mean of all tasks.
                    if not math.isnan(value) and (name in base.tasks or name in base.quality):
                        change = (value - whole[0][name], drawn[name][number] - drawn[name][0])
                        found.setdefault(arm, {}).setdefault(name, []).append(change)
        return {
            arm: {
                name: paired_difference(
                    [plain for plain, _ in seeds], np.stack([d for _, d in seeds])
                )
                for name, seeds in of_arm.items()
            }
            for arm, of_arm in found.items()
        }

    def _comparable(
        self, arm: str, base: Result, of_base: Mapping[str, Predictions]
    ) -> dict[str, Predictions]:
        result = next((item for item in self._results[arm] if item.seed == base.seed), None)
        if result is None:
            return {}
        both = set(result.tasks) & set(base.tasks)
        own = self._predictions(arm, result) if result.split == base.split else {}
        good = {task: own[task] for task in own
                if task in both and same_posts(own[task], of_base[task])}  # fmt: skip
        if bad := both - set(good):
            self.incomparable.setdefault(arm, set()).update(bad)
        return good

    def _predictions(self, arm: str, result: Result) -> dict[str, Predictions]:
        if (arm, result.seed) not in self._read:
            found = {}
            for name, task in result.tasks.items():
                folder = self._runs / result.folders[name] / "predictions" / result.split
                found[name] = self._of_task(folder, task, result.seed)
            self._read[arm, result.seed] = found
        return self._read[arm, result.seed]

    def _of_task(self, folder: Path, task: Task, seed: int) -> Predictions:
        """Predictions with post numbers that agree between runs.

        Rows depend on the tasks of a run, so a post is identified by its text and by its place
        among posts of the same text.
        """
        lines = (folder / f"{task.name}.jsonl").read_text(encoding="utf-8").split("\n")
        rows, seen = [], Counter[str]()
        for row in (json.loads(line) for line in lines if line):
            text = str(row.get("text", row["row"]))
            key = (seed, text, seen[text])
            seen[text] += 1
            rows.append(row | {"row": self._numbers.setdefault(key, len(self._numbers))})
        return read_predictions(sorted(rows, key=lambda row: row["row"]), task)
