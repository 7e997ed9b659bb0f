"""Options tuned per arm (``--tune``): a grid of values on seeds of their own; the best are used with ``--seeds``."""

from __future__ import annotations

import argparse
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from comoe.config.files import plain, read_json
from comoe.config.load import load_recipe
from comoe.evaluation.evaluate import mean_metric
from comoe.experiments.compare.plan import Arm, Plan, read_seeds
from comoe.experiments.compare.results import LOSS, METRIC
from comoe.experiments.runner import Experiment, Trial, is_done
from comoe.tasks.task import Task

FIRST_SEED = 1000
"""Default seeds of the tuning start here: seeds that are added to a comparison later are others."""

OF_EXPERTS = ("model.moe.", "train.expert_learning_rate", "train.router_learning_rate")
"""Beginnings of options that an arm without experts does not read."""

Point = tuple[str, ...]
"""``key=value`` overrides; empty: nothing to tune."""


@dataclass(frozen=True, slots=True)
class Grid:
    """What is tuned, and by what."""

    options: Mapping[str, tuple[str, ...]]
    """Option -> values."""
    seeds: tuple[int, ...]
    by: str
    """Key of ``MEASURES``, of the validation posts."""

    def points(self, trial: Trial) -> list[Point]:
        """All combinations of the options that this run reads and does not set itself; none: nothing to tune."""
        if trial.baseline:
            return []
        own = {override.partition("=")[0] for override in trial.part_overrides}
        keys = [
            key
            for key in self.options
            if key not in own and (trial.experts or not key.startswith(OF_EXPERTS))
        ]
        pairs = ([f"{key}={value}" for value in self.options[key]] for key in keys)
        return list(itertools.product(*pairs)) if keys else []


@dataclass(frozen=True, slots=True)
class Tuning:
    """The scores of all points, and the best one of each part."""

    grid: Grid
    scores: Mapping[str, Mapping[Point, Sequence[float]]]
    """Part -> point -> mean of the measure per finished seed; without parts that have
    nothing to tune."""

    def mean(self, part: str, point: Point) -> float:
        """Mean over the seeds; NaN unless all of them are finished."""
        values = self.scores[part][point]
        return float(np.mean(values)) if len(values) == len(self.grid.seeds) else math.nan

    def best(self, part: str) -> Point | None:
        """The point with the best mean, the first of equal ones; None without a finished one."""
        if part not in self.scores:
            return ()
        means = {point: self.mean(part, point) for point in self.scores[part]}
        known = [point for point, mean in means.items() if math.isfinite(mean)]
        sign = -1 if self.grid.by == METRIC else 1
        return min(known, key=lambda point: sign * means[point], default=None)

    @property
    def notes(self) -> list[str]:
        """Parts whose best value is the last of its grid, and points that did not finish."""
        found = []
        for part, points in self.scores.items():
            open_points = [point for point in points if not math.isfinite(self.mean(part, point))]
            found += [
                f"tuning of {part}: {', '.join(point)} did not finish" for point in open_points
            ]
            for pair in self.best(part) or ():
                key, _, value = pair.partition("=")
                values = [
                    number
                    for text in self.grid.options[key]
                    if (number := _number(text)) is not None
                ]
                if len(values) < 2 or (number := _number(value)) is None:
                    continue
                if number in (min(values), max(values)):
                    side = "smallest" if number == min(values) else "largest"
                    found.append(
                        f"tuning of {part}: {pair} is the {side} value tried; try a {side[:-3]}er one."
                    )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        parts = {
            part: {
                "chosen": list(self.best(part) or ()),
                "points": [
                    {
                        "overrides": list(point),
                        "mean": self.mean(part, point),
                        "values": list(values),
                    }
                    for point, values in points.items()
                ],
            }
            for part, points in self.scores.items()
        }
        return plain(
            {"by": self.grid.by, "seeds": self.grid.seeds, "parts": parts, "notes": self.notes}
        )


def read_grid(given: argparse.Namespace, plan: Plan, experiment: Experiment) -> Grid | None:
    """The grid of ``--tune``; None without one.

    Raises:
        ValueError: no values, an option that an arm cannot have, or seeds that are those of the
            comparison.
    """
    if not given.tune:
        for flag, value in (("--tune-by", given.tune_by), ("--tune-seeds", given.tune_seeds)):
            if value is not None:
                raise ValueError(f"{flag} {value} tunes nothing; give --tune option=a,b,c too.")
        return None
    options: dict[str, tuple[str, ...]] = {}
    for text in given.tune:
        key, equals, rest = text.partition("=")
        values = tuple(dict.fromkeys(_normal(value) for value in rest.split(",")))
        if not equals or len(values) < 2 or not all(re.fullmatch(r"[\w.+-]+", v) for v in values):
            raise ValueError(
                f"--tune {text!r} must read option=a,b,c, with two or more different numbers or words."
            )
        if key.strip() in options:
            raise ValueError(f"--tune gives {key.strip()} twice; list all of its values at once.")
        options[key.strip()] = values
    replace(experiment, overrides=tuple(options)).refuse((), "--seeds and --output")
    seeds = list(
        itertools.islice((s for s in itertools.count(FIRST_SEED) if s not in plan.seeds), 2)
    )
    if given.tune_seeds:
        seeds = read_seeds(given.tune_seeds, flag="--tune-seeds")
    if both := set(seeds) & set(plan.seeds):
        raise ValueError(
            f"--tune-seeds and --seeds both have {min(both)}: values that are chosen on the runs "
            "they are compared by look too good. Give other seeds."
        )
    grid = Grid(options, tuple(seeds), given.tune_by or LOSS)
    for trial in grid_trials(grid, plan):
        # A wrong option is refused before anything runs.
        load_recipe(experiment.config, [*experiment.overrides, *trial.overrides])
    return grid


def grid_trials(grid: Grid, plan: Plan) -> list[Trial]:
    """The runs of the tuning, seeds in the outer loop; a part that two arms share once."""
    parts = {trial.part: trial for trial in plan.trials}
    return [
        replace(_at(trial, point), seed=seed)
        for seed in grid.seeds
        for trial in parts.values()
        for point in grid.points(trial)
    ]


def read_tuning(grid: Grid, plan: Plan, experiment: Experiment) -> Tuning:
    """The scores of the finished runs."""
    scores: dict[str, dict[Point, list[float]]] = {}
    for trial in {trial.part: trial for trial in plan.trials}.values():
        for point in grid.points(trial):
            runs = [replace(_at(trial, point), seed=seed) for seed in grid.seeds]
            found = [
                score(experiment.runs / run.name, grid.by)
                for run in runs
                if is_done(experiment, run)
            ]
            scores.setdefault(trial.part, {})[point] = [
                value for value in found if math.isfinite(value)
            ]
    return Tuning(grid, scores)


def tuned_plan(plan: Plan, tuning: Tuning) -> Plan:
    """The runs of the comparison with the best values; an arm without any finished one has no run."""
    arms = []
    for arm in plan.arms:
        best = {trial.part: tuning.best(trial.part) for trial in arm.trials}
        trials = () if None in best.values() else tuple(_at(t, best[t.part]) for t in arm.trials)
        arms.append(Arm(arm.name, trials, _chosen(tuning.grid, best)))
    notes = [
        f"{arm.name} has no run: no value of its tuning finished." for arm in arms if not arm.trials
    ]
    return replace(plan, arms=tuple(arms), notes=(*plan.notes, *tuning.notes, *notes))


def score(folder: Path, by: str) -> float:
    """Mean of a key of ``MEASURES`` on the validation posts of a finished run, without auxiliary tasks."""
    metrics = read_json(folder / "results.json")["metrics"]["validation"]
    tasks = [Task.from_dict(task) for task in read_json(folder / "tasks.json")]
    if by == METRIC:
        return mean_metric(metrics, tasks)
    found = [metrics.get(task.name, {}).get(by) for task in tasks if not task.auxiliary]
    known = [value for value in found if value is not None]
    return float(np.mean(known)) if known else math.nan


def _at(trial: Trial, point: Point) -> Trial:
    """The run with these values, in a folder named by them."""
    name = ".".join([trial.part, *(pair.replace("=", "_") for pair in point)])
    return replace(trial, part=name, part_overrides=(*trial.part_overrides, *point))


def _chosen(grid: Grid, best: Mapping[str, Point | None]) -> dict[str, str]:
    """Option -> the value of an arm; for an arm with several runs one of each."""
    found = {}
    for key in grid.options:
        values = {
            part: pair.partition("=")[2]
            for part, point in best.items()
            for pair in point or ()
            if pair.partition("=")[0] == key
        }
        alike = len(best) == 1 or len(set(values.values())) == 1
        texts = dict.fromkeys(values.values()) if alike else (f"{p} {v}" for p, v in values.items())
        found[key] = ", ".join(texts)
    return found


def _normal(text: str) -> str:
    """A number in one form, so that 1e-3 and 0.001 are one run."""
    number = _number(text.strip())
    if number is None:
        return text.strip()
    return str(int(number)) if number.is_integer() else repr(number)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
