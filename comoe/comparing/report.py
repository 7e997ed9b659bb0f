"""What a comparison found, from its run folders: ``summary.json``, ``comparison.json``, ``table.csv``."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from comoe.comparing.arms import Trial
from comoe.comparing.intervals import (
    MEAN,
    Answers,
    Interval,
    measured,
    paired_difference,
    read_answers,
    resampled,
    same_posts,
    seed_interval,
)
from comoe.removal import Removal, read_removal
from comoe.scaling_table import COSTS, costs_of, quality_of
from comoe.tasks.catalog import Task
from comoe.train.records import METRICS_FILE, read_metrics, write_aside

ROUTING = ("weight_monopoly", "weight_effective_experts", "monopoly", "max_violation", "dead_share", "cooperation",
           "weight_task_information")  # fmt: skip
"""Measures of the gates on the held-out posts, means over layers; those of the weights are fair to every k."""
REMOVAL_FILE = "removal.json"
"""In a run folder: what each expert is worth."""


@dataclass(frozen=True, slots=True)
class Result:
    """What one finished run says."""

    trial: Trial
    """Which run."""
    split: str
    """Split of the quality."""
    quality: Mapping[str, float]
    """``mean`` (larger is better) and ``task/metric``."""
    routing: Mapping[str, float]
    """Measures of the gates, means over layers; empty without experts."""
    costs: Mapping[str, float | None]
    """As in a scaling table."""
    removal: Removal | None
    """Where it was measured."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """All finished runs, and what they say together."""

    results: Mapping[str, Sequence[Result]]
    """Arm -> runs, in the order of the seeds."""
    baseline: str
    """The arm that the others are held against."""
    against: Mapping[str, Mapping[str, Interval]]
    """Arm -> ``mean`` or task -> difference to the baseline, larger is better; empty for an unfinished arm."""
    problems: Mapping[str, str]
    """Run -> why it failed."""

    def interval(self, arm: str, values: str, name: str) -> Interval | None:
        """Mean over seeds of one number of an arm: ``values`` is quality, routing or costs."""
        found = [getattr(result, values).get(name) for result in self.results[arm]]
        known = [value for value in found if value is not None]
        return seed_interval(known) if known else None


def read_result(trial: Trial, folder: Path) -> Result | None:
    """What a run left; None while it is not finished."""
    if not (folder / "results.json").is_file():
        return None
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    records = read_metrics(folder / METRICS_FILE)
    quality = quality_of(results["metrics"], read_tasks(folder))
    split = quality.pop("split")
    removal = folder / REMOVAL_FILE
    return Result(
        trial=trial,
        split=split,
        quality={name: value for name, value in quality.items() if value is not None},
        routing=_routing(records, split),
        costs=costs_of(results, records),
        removal=read_removal(removal) if removal.is_file() else None,
    )


def compare(
    trials: Sequence[Trial], runs: Path, *, baseline: str, resamples: int, problems: Mapping[str, str]
) -> Comparison:
    """Read every finished run and hold the arms against the baseline, on the seeds that both have finished.

    Args:
        trials: all runs.
        runs: folder of the run folders.
        baseline: an arm.
        resamples: of the bootstrap; below 2 the differences are left out.
        problems: run -> why it failed.
    """
    results: dict[str, list[Result]] = {trial.arm: [] for trial in trials}
    for trial in trials:
        if (result := read_result(trial, runs / trial.name)) is not None:
            results[trial.arm].append(result)
    against = _differences(results, runs, baseline=baseline, resamples=resamples) if resamples > 1 else {}
    return Comparison(results, baseline, against, problems)


def read_tasks(folder: Path) -> list[Task]:
    """The tasks of a run folder."""
    return [Task.from_dict(plain) for plain in json.loads((folder / "tasks.json").read_text(encoding="utf-8"))]


def write_comparison(comparison: Comparison, output: Path) -> None:
    """Write the tables and both JSON files."""
    summary: dict[str, Any] = {}
    rest: dict[str, Any] = {"baseline": comparison.baseline, "failed": dict(comparison.problems), "arms": {}}
    for arm, results in comparison.results.items():
        if not results:
            continue
        summary[arm] = _quality_tree(comparison, arm)
        rest["arms"][arm] = {
            "overrides": list(results[0].trial.words),
            "seeds": [result.trial.seed for result in results],
            "split": results[0].split,
            "mean": _entry(comparison, arm, "quality", MEAN),
            "against_baseline": {name: item.to_dict() for name, item in comparison.against.get(arm, {}).items()},
            "routing": {name: _entry(comparison, arm, "routing", name) for name in ROUTING if results[0].routing},
            "costs": {name: _entry(comparison, arm, "costs", name) for name in COSTS},
            "removal": {result.trial.name: result.removal.to_dict() for result in results if result.removal},
        }
    write_aside(output / "summary.json", json.dumps(summary, indent=1) + "\n")
    write_aside(output / "comparison.json", json.dumps(rest, indent=1) + "\n")
    write_aside(output / "table.csv", _csv(comparison))


def _differences(
    results: Mapping[str, Sequence[Result]], runs: Path, *, baseline: str, resamples: int
) -> dict[str, dict[str, Interval]]:
    """Arm -> ``mean`` or task -> difference, over the seeds in which both arms answered the same posts."""
    plain: dict[str, list[dict[str, float]]] = {}
    drawn: dict[str, list[dict[str, np.ndarray]]] = {}
    for base in results.get(baseline, ()):
        tasks = [task for task in read_tasks(runs / base.trial.name) if f"{task.name}/{task.metric}" in base.quality]
        theirs = _answers(runs / base.trial.name, base.split, tasks)
        arms, answers = [], [theirs]
        for arm, finished in results.items():
            for result in finished:
                if arm == baseline or result.trial.seed != base.trial.seed or result.split != base.split:
                    continue
                own = _answers(runs / result.trial.name, result.split, tasks)
                if same_posts(own, theirs):
                    arms.append(arm)
                    answers.append(own)
        values = resampled(answers, tasks, resamples=resamples)
        whole = [measured(run, tasks) for run in answers]
        for number, arm in enumerate(arms, start=1):
            plain.setdefault(arm, []).append({name: whole[number][name] - whole[0][name] for name in whole[0]})
            drawn.setdefault(arm, []).append({name: values[name][number] - values[name][0] for name in values})
    return {
        arm: {
            name: paired_difference([seed[name] for seed in seeds], np.stack([seed[name] for seed in drawn[arm]]))
            for name in seeds[0]
        }
        for arm, seeds in plain.items()
    }


def _answers(folder: Path, split: str, tasks: Sequence[Task]) -> dict[str, Answers]:
    found = {}
    for task in tasks:
        lines = (folder / "predictions" / split / f"{task.name}.jsonl").read_text(encoding="utf-8").split("\n")
        found[task.name] = read_answers([json.loads(line) for line in lines if line], task)
    return found


def _routing(records: Sequence[Mapping[str, Any]], split: str) -> dict[str, float]:
    blocks = [record["routing"] for record in records if record.get("split") == split and "routing" in record]
    # One block that every token visits has no gate to speak of.
    if not blocks or len(blocks[-1]["share"][0]) == 1:
        return {}
    means = {name: [value for value in blocks[-1].get(name, ()) if value is not None] for name in ROUTING}
    return {name: float(np.mean(values)) for name, values in means.items() if values}


def _quality_tree(comparison: Comparison, arm: str) -> dict[str, dict[str, Any]]:
    tree: dict[str, dict[str, Any]] = {}
    for name in comparison.results[arm][0].quality:
        task, _, metric = name.partition("/")
        if metric:
            tree.setdefault(task, {})[metric] = _entry(comparison, arm, "quality", name)
    return tree


def _entry(comparison: Comparison, arm: str, values: str, name: str) -> dict[str, Any] | None:
    interval = comparison.interval(arm, values, name)
    if interval is None:
        return None
    found = [getattr(result, values).get(name) for result in comparison.results[arm]]
    known = [value for value in found if value is not None]
    spread = float(np.std(known, ddof=1)) if len(known) > 1 else None
    return interval.to_dict() | {"spread": spread, "values": known}


def _csv(comparison: Comparison) -> str:
    rows = [
        {"arm": arm, "seed": result.trial.seed, "split": result.split, **result.quality, **result.routing,
         **result.costs}
        for arm, results in comparison.results.items()
        for result in results
    ]  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(key for row in rows for key in row)),
                            lineterminator="\n")  # fmt: skip
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
