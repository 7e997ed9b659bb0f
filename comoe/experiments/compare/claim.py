"""The one comparison that is named before any run (``--claim``), and whether it holds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from comoe.config.errors import unknown_name
from comoe.config.files import read_json, write_json
from comoe.config.load import load_recipe
from comoe.config.recipe import Recipe
from comoe.evaluation.evaluate import TEACHER_KL
from comoe.experiments.compare.arms import measured_tasks
from comoe.experiments.compare.differences import PairedDifferences
from comoe.experiments.compare.plan import Plan
from comoe.experiments.compare.results import MEASURES, METRIC, Result
from comoe.experiments.compare.statistics import MEAN, Difference, paired_difference
from comoe.experiments.runner import Experiment
from comoe.tasks.metrics import LOWER_IS_BETTER
from comoe.tasks.task import kind_of

FALLING = [measure for measure in MEASURES if measure != METRIC]
"""Measures that are not metrics."""

KEY = "claim"
"""Of the experiment's settings file."""


@dataclass(frozen=True, slots=True)
class Claim:
    """One arm is above or below another one in one measure."""

    arm: str
    sign: str
    """``>`` or ``<``: of the numbers as they are, so a lower loss is ``<``."""
    other: str
    measure: str
    """``mean`` of the main metrics, ``loss``, ``teacher_kl``, or a task's ``task/metric``."""
    seeds: tuple[int, ...] = ()
    """Seeds of the call that named it."""
    runs_before: int = 0
    """Runs that were finished then."""

    def __str__(self) -> str:
        return f"{self.arm} {self.sign} {self.other} on {self.measure}"


@dataclass(frozen=True, slots=True)
class ClaimResult:
    """A claim with its measured difference."""

    claim: Claim
    difference: Difference | None
    """``arm`` minus ``other`` in the measure's unit; None before both have a run of one seed."""

    @property
    def verdict(self) -> str:
        """``holds``, ``the opposite holds``, ``undecided``, or ``not measured``."""
        found = self.difference
        if found is None:
            return "not measured"
        if not found.verdict:
            return "undecided"
        return "holds" if (found.mean > 0) == (self.claim.sign == ">") else "the opposite holds"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        difference = self.difference.to_dict() if self.difference else None
        found = {"text": str(self.claim), "verdict": self.verdict, "difference": difference}
        return asdict(self.claim) | found


def parse_claim(text: str, plan: Plan, recipe: Recipe) -> Claim:
    """The claim of a text ``A > B``, ``A > B on task/metric`` or ``A < B on loss``.

    Raises:
        ValueError: another form, an unknown arm, or a number that these runs will not have.
    """
    found = re.fullmatch(r"\s*([^\s<>]+)\s*([<>])\s*([^\s<>]+)(?:\s+on\s+(\S+))?\s*", text)
    if found is None:
        raise ValueError(
            f'--claim {text!r} must read "A > B", "A > B on task/metric" or "A < B on loss", with two arms.'
        )
    arm, sign, other, measure = found.groups(default=MEAN)
    for name in (arm, other):
        plan.arm(name, flag="--claim")
    if arm == other:
        raise ValueError(f"--claim {text!r} compares an arm with itself; name two arms.")
    task, slash, metric = measure.partition("/")
    tasks = measured_tasks(recipe)
    if slash and task in tasks:
        # A slice or a label may follow the name of the metric.
        known = (*FALLING, *kind_of(recipe.tasks[task].kind).metrics)
        if not metric:
            raise ValueError(
                f"--claim {text!r} names no metric after {task}/ (one of: {', '.join(known)})"
            )
        if re.split("[@/]", metric)[0] not in known:
            raise unknown_name(f"metric of {task} (--claim)", metric, known)
    elif measure not in (MEAN, *FALLING):
        raise unknown_name(
            "measure of a claim (or task/metric)",
            measure,
            [MEAN, *FALLING, *(f"{task}/..." for task in tasks)],
        )
    if TEACHER_KL in (measure, metric):
        need_soft_labels(f"--claim {text!r}", recipe)
    return Claim(arm, sign, other, measure)


def need_soft_labels(flag: str, recipe: Recipe) -> None:
    """Refuse what reads ``teacher_kl`` where no task has soft labels; ``flag`` is named in the message."""
    if not recipe.distill.teachers and not any(task.soft_label for task in recipe.tasks.values()):
        raise ValueError(
            f"{flag} is about {TEACHER_KL}, and the recipe has neither teachers (distill.teachers) "
            "nor a column of soft labels (tasks.<name>.soft_label)."
        )


def record_claim(
    experiment: Experiment, plan: Plan, text: str | None, *, file_name: str
) -> Claim | None:
    """Write the claim to the settings file, or return the one that stands there.

    Args:
        experiment: its settings file exists.
        plan: all runs.
        text: of the command line; None keeps what is recorded.
        file_name: of the settings.

    Raises:
        ValueError: a wrong claim, or another one than the recorded one.
    """
    file = experiment.output / file_name
    settings = read_json(file)
    recorded = settings.get(KEY)
    before = None
    if recorded is not None:
        before = Claim(**{**recorded, "seeds": tuple(recorded["seeds"])})
    if text is None:
        return before
    now = parse_claim(text, plan, load_recipe(experiment.config, experiment.overrides))
    if before is not None:
        if str(before) != str(now):
            raise ValueError(
                f'--claim is "{now}", but {file} recorded "{before}" before: a claim that follows '
                "the results proves nothing. Leave --claim out, or choose another --output."
            )
        return before
    # Runs of other arms and of a tuning have shown something, too.
    done = len([*experiment.runs.glob("*/results.json")])
    now = replace(now, seeds=plan.seeds, runs_before=done)
    write_json(file, {**settings, KEY: asdict(now)})
    return now


def claimed_cell(
    claim: Claim | None, baseline: str, mains: Mapping[str, str]
) -> tuple[str, str, str] | None:
    """Where the tables of differences to the baseline show the claimed comparison.

    Args:
        claim: None: nowhere.
        baseline: an arm.
        mains: task -> its main metric.

    Returns:
        Measure, arm, and name; None where they do not show it, or where
        the claim was not named before the runs.
    """
    if claim is None or claim.runs_before or baseline not in (claim.arm, claim.other):
        return None
    arm = claim.other if claim.arm == baseline else claim.arm
    task, _, metric = claim.measure.partition("/")
    measure = next((name for name in FALLING if name in (claim.measure, metric)), METRIC)
    if measure == METRIC and metric and mains.get(task) != metric:
        # A slice or another metric is in no table of differences.
        return None
    return measure, arm, task if metric else MEAN


def measure_claim(
    claim: Claim, results: Mapping[str, Sequence[Result]], differences: PairedDifferences
) -> Difference | None:
    """The difference of the two arms in the claimed measure, ``arm`` minus ``other``.

    With the posts resampled for the mean and the main metrics, else over paired seeds only.
    """
    if not results.get(claim.arm) or not results.get(claim.other):
        return None
    task, _, metric = claim.measure.partition("/")
    known = results[claim.other][0].tasks
    main = claim.measure == MEAN or (task in known and known[task].metric == metric)
    if main and differences.resamples > 1:
        found = differences.against(claim.other, [claim.arm]).get(claim.arm, {}).get(task)
        if found is None or metric not in LOWER_IS_BETTER:
            return found
        # The improvement of an error is a fall.
        return replace(found, mean=-found.mean, low=-found.high, high=-found.low)
    of_arm, of_other = (
        {
            one.seed: value
            for one in results[arm]
            if (value := _value(one, claim.measure)) is not None
        }
        for arm in (claim.arm, claim.other)
    )
    pairs = [of_arm[seed] - of_other[seed] for seed in of_arm if seed in of_other]
    return paired_difference(pairs) if pairs else None


def _value(result: Result, measure: str) -> float | None:
    task, _, metric = measure.partition("/")
    if measure == MEAN:
        return result.quality.get(MEAN)
    for name in FALLING:
        if name in (measure, metric):
            return getattr(result, MEASURES[name]).get(task if metric else MEAN)
    return result.figures.get(measure)
