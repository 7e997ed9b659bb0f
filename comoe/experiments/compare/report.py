"""The results of a comparison, from its run folders: ``summary.json``, ``comparison.json`` and the CSV tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from comoe.config.errors import unknown_name
from comoe.config.files import csv_line, write_atomic, write_json
from comoe.experiments.affinity import read_affinity
from comoe.experiments.compare.claim import (
    FALLING,
    Claim,
    ClaimResult,
    claimed_cell,
    measure_claim,
)
from comoe.experiments.compare.differences import Differences, PairedDifferences, seed_differences
from comoe.experiments.compare.grouping import Proposal
from comoe.experiments.compare.plan import Plan
from comoe.experiments.compare.power import adjust, posts_needed, seeds_needed, smallest_difference
from comoe.experiments.compare.results import (
    COSTS,
    EXPERTS,
    MEASURES,
    METRIC,
    ROUTING,
    Result,
    main_metrics,
    read_arms,
)
from comoe.experiments.compare.splits import FurtherSet, further_sets, groups_of, with_adjusted
from comoe.experiments.compare.statistics import MEAN, Difference, Estimate, seed_interval
from comoe.experiments.compare.transfer import (
    Cosines,
    Reasons,
    Verdicts,
    changes_without,
    left_out_task,
    mean_cosines,
    reasons_of,
    verdicts_of,
)
from comoe.experiments.compare.tune import Tuning
from comoe.tasks.task import Task

AFFINITY_FILE = "affinity.json"
"""In a run folder: the cosines of the tasks' gradients."""

_JOINT = "joint"

_AGAINST = {"against_baseline": METRIC} | {f"{name}_against_baseline": name for name in FALLING}
"""Key of ``comparison.json`` -> measure."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """All finished runs, and the differences between their arms."""

    plan: Plan
    results: Mapping[str, Sequence[Result]]
    """Arm -> one result per seed, in the order of the seeds."""
    baseline: str
    differences: Mapping[str, Differences]
    """Measure -> arm -> ``mean`` or task -> difference to the baseline, larger is better; finished
    arms only."""
    changes: Mapping[str, Mapping[str, Difference]]
    """Dropped task -> task -> its improvement without that one."""
    cosines: Mapping[str, Cosines]
    """Arm -> measured gradient cosines of its tasks."""
    notes: Sequence[str]
    """What differs between the arms."""
    metrics: Sequence[str] = ()
    """``task/metric`` names with their own table and figure."""
    measure: str | None = None
    """Key of ``MEASURES`` that arms are ordered and compared by; None: by the metric, in the order
    of the plan."""
    claim: ClaimResult | None = None
    problems: Mapping[str, str] = field(default_factory=dict)
    """Run -> why it failed."""
    tuning: Tuning | None = None
    """How the options of the arms were chosen."""
    proposal: Proposal | None = None
    """A grouping of the tasks, where one was asked for."""
    proposal_command: str = ""
    """Trains it beside random ones."""
    further: Sequence[FurtherSet] = ()
    """Other sets that the arms are compared on."""

    @property
    def against(self) -> Differences:
        """The differences in the measure of the report."""
        return self.differences[self.measure or METRIC]

    @property
    def values(self) -> str:
        """The numbers of a ``Result`` in the measure of the report."""
        return MEASURES[self.measure or METRIC]

    @property
    def arms(self) -> list[str]:
        """Arms with a finished run; with a measure the best one first."""
        arms = [arm for arm, found in self.results.items() if found]
        if self.measure is None:
            return arms
        means = {arm: self.interval(arm, self.values, MEAN) for arm in arms}
        sign = -1 if self.measure == METRIC else 1
        return sorted(arms, key=lambda arm: sign * means[arm].mean if means[arm] else math.inf)

    @property
    def tasks(self) -> dict[str, Task]:
        """Tasks of all finished runs, in the order of the first arm that has them."""
        results = (result for found in self.results.values() for result in found)
        return {name: task for result in results for name, task in result.tasks.items()}

    @property
    def measured(self) -> list[str]:
        """Tasks that are not auxiliary."""
        return [name for name, task in self.tasks.items() if not task.auxiliary]

    def interval(self, arm: str, values: str, name: str) -> Estimate | None:
        """Mean over seeds of one number of an arm: ``values`` is quality, losses, figures, routing,
        experts or costs."""
        known = self.seeds_of(arm, values, name)
        return seed_interval(known) if known else None

    def seeds_of(self, arm: str, values: str, name: str) -> list[float]:
        """One number of an arm, per seed that has it."""
        found = [getattr(result, values).get(name) for result in self.results[arm]]
        return [value for value in found if value is not None]

    def smallest(self, measure: str) -> dict[str, dict[str, float | int | None]]:
        """``mean`` or task -> the smallest difference to the baseline that can be seen, the seeds
        that one of 0.01 needs (None: more posts), and how many times the posts at least; empty with
        fewer than two seeds."""
        found = {}
        for name in [MEAN, *self.tasks]:
            known = [
                of_arm[name] for of_arm in self.differences[measure].values() if name in of_arm
            ]
            size = smallest_difference(known)
            if math.isfinite(size):
                found[name] = {
                    "smallest": size,
                    "seeds_for_0.01": seeds_needed(known),
                    "posts_for_0.01": posts_needed(known),
                }
        return found

    def verdicts(self, arm: str) -> Verdicts:
        """The tasks that gained and lost against the baseline."""
        return verdicts_of(self.against.get(arm, {}), self.measured)

    def reasons(self, task: str) -> Reasons:
        """Evidence for a task's gain or loss in the joint arm."""
        return reasons_of(task, self.cosines.get(self.plan.joint or ""), self.changes)


def compare(
    plan: Plan,
    runs: Path,
    *,
    baseline: str,
    resamples: int,
    measure: str | None = None,
    claim: Claim | None = None,
    further: Mapping[str, str] | None = None,
) -> Comparison:
    """Read every finished run and compare the arms with the baseline, on the seeds that both have finished.

    Args:
        plan: all runs.
        runs: folder of the run folders.
        baseline: an arm.
        resamples: of the bootstrap; below 2 there are no differences.
        measure: see ``Comparison.measure``.
        claim: the comparison named beforehand; the p-values of all others are adjusted.
        further: another evaluated set -> the arm that the others are compared with there.
    """
    results = read_arms(plan, runs)
    pairs = PairedDifferences(results, runs, resamples=resamples)
    dropping = [arm for arm in results if left_out_task(arm)]
    to_joint: Differences = {}
    if plan.joint and dropping:
        to_joint = (
            pairs.against(plan.joint, dropping)
            if measure in (None, METRIC)
            else seed_differences(results, plan.joint, dropping, measure=measure)
        )
    differences = {METRIC: pairs.against(baseline)}
    differences |= {name: seed_differences(results, baseline, measure=name) for name in FALLING}
    claimed = measure_claim(claim, results, pairs) if claim else None
    sets = further_sets(plan, runs, further or {}, main=results, resamples=resamples)
    # The claim alone was named beforehand; all other comparisons are one family.
    differences = adjust(
        differences | {_JOINT: to_joint} | groups_of(sets),
        exempt=claimed_cell(claim, baseline, main_metrics(results)),
    )
    sets = with_adjusted(sets, differences)
    changes = changes_without(differences.pop(_JOINT))
    return Comparison(
        plan, results, baseline, differences, changes, _cosines(results, runs),
        [*plan.notes, *_notes(results, pairs)], measure=measure,
        claim=ClaimResult(claim, claimed) if claim else None, further=sets,
    )  # fmt: skip


def with_metrics(comparison: Comparison, metrics: Sequence[str]) -> Comparison:
    """The comparison with a table of these ``task/metric`` names; a note names each that no run has."""
    found = [result for results in comparison.results.values() for result in results]
    known = {name for result in found for name in result.figures}
    missing = [name for name in metrics if found and name not in known]
    what = "metric of these runs (--metrics)"
    notes = [str(unknown_name(what, name, sorted(known))) for name in missing]
    shown = [name for name in metrics if name in known]
    return replace(comparison, metrics=shown, notes=[*comparison.notes, *notes])


def _notes(results: Mapping[str, Sequence[Result]], pairs: PairedDifferences) -> list[str]:
    """What could not be compared or predicted."""
    notes = [
        f"{arm} predicts for other posts of {', '.join(sorted(tasks))} than the arm that it is "
        "compared with (another validation split or limit): there is no difference for them."
        for arm, tasks in pairs.incomparable.items()
    ]
    return notes + [
        f"{arm} skips {task}: {why}."
        for arm, found in results.items()
        for task, why in (found[0].skipped.items() if found else ())
    ]


def _cosines(results: Mapping[str, Sequence[Result]], runs: Path) -> dict[str, Cosines]:
    cosines = {}
    for arm, found in results.items():
        folders = [runs / one.trials[0].name for one in found if len(one.trials) == 1]
        files = [folder / AFFINITY_FILE for folder in folders]
        if mean := mean_cosines([read_affinity(file) for file in files if file.is_file()]):
            cosines[arm] = mean
    return cosines


def write_comparison(comparison: Comparison, output: Path) -> None:
    """Write both JSON files and the CSV tables."""
    changes, joint = comparison.changes, comparison.plan.joint
    rest: dict[str, Any] = {
        "baseline": comparison.baseline, "joint": joint, "notes": list(comparison.notes),
        "tuning": comparison.tuning.to_dict() if comparison.tuning else None,
        "claim": comparison.claim.to_dict() if comparison.claim else None,
        "smallest_difference": {measure: comparison.smallest(measure) for measure in comparison.differences},
        "failed": dict(comparison.problems),
        "arms": {arm: _about(comparison, arm) for arm in comparison.arms},
        "without": {dropped: {task: change.to_dict() for task, change in of_task.items()}
                    for dropped, of_task in changes.items()},
        "groups": comparison.proposal.to_dict() if comparison.proposal else None,
        "splits": {one.name: one.to_dict() for one in comparison.further},
        "gradient_cosine": {arm: found.to_dict() for arm, found in comparison.cosines.items()},
        "reasons": {task: comparison.reasons(task).to_dict() for task in comparison.measured if joint},
    }  # fmt: skip
    summary = {arm: _quality_tree(comparison, arm) for arm in comparison.arms}
    write_json(output / "summary.json", summary)
    write_json(output / "comparison.json", rest)
    runs = [
        {
            "arm": arm,
            **next(item.settings for item in comparison.plan.arms if item.name == arm),
            "seed": one.seed,
            "split": one.split,
            **one.quality,
            **{
                measure if name == MEAN else f"{name}/{measure}": value
                for measure in FALLING
                for name, value in getattr(one, MEASURES[measure]).items()
            },
            **one.routing,
            **one.experts,
            **one.costs,
        }
        for arm, results in comparison.results.items()
        for one in results
    ]
    gains = [
        {"arm": arm, "against": comparison.baseline, "task": name}
        | {**item.to_dict(), "verdict": item.verdict, "measure": measure}
        for measure, differences in comparison.differences.items()
        for arm, of_arm in differences.items()
        for name, item in of_arm.items()
    ]
    for name, rows in {"table": runs, "gains": gains, "affinity": _pairs(comparison)}.items():
        if rows:
            write_atomic(output / f"{name}.csv", csv_text(rows))


def _about(comparison: Comparison, arm: str) -> dict[str, Any]:
    results = comparison.results[arm]
    verdicts = comparison.verdicts(arm)
    return {
        "runs": next(item.parts for item in comparison.plan.arms if item.name == arm),
        "seeds": [result.seed for result in results],
        "split": results[0].split,
        "mean": _entry(comparison.seeds_of(arm, "quality", MEAN)),
        **{measure: _entry(comparison.seeds_of(arm, MEASURES[measure], MEAN)) for measure in FALLING},
        **{key: {name: item.to_dict() | {"verdict": item.verdict}
                 for name, item in comparison.differences[measure].get(arm, {}).items()}
           for key, measure in _AGAINST.items()},
        **{name: list(getattr(verdicts, name)) for name in ("gained", "lost", "open")},
        "train_posts": dict(results[0].train_posts),
        "routing": {name: _entry(comparison.seeds_of(arm, "routing", name)) for name in ROUTING if results[0].routing},
        "experts": {name: _entry(comparison.seeds_of(arm, "experts", name)) for name in EXPERTS if results[0].experts},
        "costs": {name: _entry(comparison.seeds_of(arm, "costs", name)) for name in COSTS},
        "removal": {result.trials[0].name: result.removal.to_dict() for result in results if result.removal},
    }  # fmt: skip


def _quality_tree(comparison: Comparison, arm: str) -> dict[str, dict[str, Any]]:
    """Task -> metric -> mean and spread; the main metric first."""
    tree: dict[str, dict[str, Any]] = {}
    results = comparison.results[arm]
    for name, task in comparison.tasks.items():
        found = [result.metrics[name] for result in results if name in result.metrics]
        for metric in dict.fromkeys([task.metric, *(key for one in found for key in one)]):
            values = [one.get(metric) for one in found]
            if values := [value for value in values if isinstance(value, (int, float))]:
                tree.setdefault(name, {})[metric] = _entry(values)
    return tree


def _entry(values: Sequence[float]) -> dict[str, Any] | None:
    if not values:
        return None
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    interval = seed_interval(values).to_dict()
    return {"mean": interval["mean"], "spread": spread, **interval, "values": list(values)}


def _pairs(comparison: Comparison) -> list[dict[str, Any]]:
    """Task and other task: cosine of their gradients, and improvement of the first without the second."""
    cosines = comparison.cosines.get(comparison.plan.joint or "")
    tasks = list(dict.fromkeys([*(cosines.tasks if cosines else ()), *comparison.tasks]))
    rows = []
    for task in tasks:
        for other in tasks:
            known = cosines is not None and {task, other} <= set(cosines.tasks)
            place = (cosines.tasks.index(task), cosines.tasks.index(other)) if known else None
            cosine = None if place is None else round(float(cosines.mean_TT[place]), 6)
            change = comparison.changes.get(other, {}).get(task)
            if cosine is None and change is None:
                continue
            numbers = change.to_dict() if change else {}
            without = {f"without_{key}": value for key, value in numbers.items()}
            rows.append({"task": task, "other": other, "cosine": cosine, **without})
    return rows


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """A CSV file with the keys of all rows, in the order of their first appearance."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    lines = [names, *([row.get(name) for name in names] for row in rows)]
    return "".join(map(csv_line, lines))
