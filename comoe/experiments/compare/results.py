"""What one arm with one seed says: read from a run folder, or put together from one run per task."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from comoe.evaluation.evaluate import rising
from comoe.experiments.ablate import Removal, read_removal
from comoe.experiments.compare.plan import Arm, Trial
from comoe.experiments.compare.statistics import MEAN
from comoe.experiments.scale.table import COSTS as RUN_COSTS
from comoe.experiments.scale.table import costs_of
from comoe.tasks.task import Task
from comoe.train.monitor.metrics_file import METRICS_FILE, read_metrics

ROUTING = ("weight_monopoly", "weight_effective_experts", "monopoly", "max_violation", "dead_share", "cooperation",
           "weight_task_information")  # fmt: skip
"""Measures of the gates on the held-out posts, means over layers; those of the weights are fair to
every k."""


COSTS = ("seconds", "steps", "posts", "posts_per_second", *RUN_COSTS)
"""Time of training, optimizer steps, posts gone over; then as in a scaling table."""


LARGEST = "peak_mib"
"""The cost that several runs do not add up to: the machine is free again when the next one
begins."""


REMOVAL_FILE = "removal.json"
"""In a run folder: what each expert is worth."""


@dataclass(frozen=True, slots=True)
class Result:
    """An arm with one seed."""

    seed: int
    """The seed."""
    trials: tuple[Trial, ...]
    """Its finished runs."""
    split: str
    """Split of the quality."""
    tasks: Mapping[str, Task]
    """Tasks that were scored, by name."""
    folders: Mapping[str, str]
    """Task -> run folder that answered it."""
    metrics: Mapping[str, Mapping[str, float]]
    """Task -> every metric of the split."""
    quality: Mapping[str, float]
    """``mean`` of the main metrics (larger is better), where the arm answers all that is compared;
    ``task/metric``."""
    routing: Mapping[str, float]
    """Measures of the gates, means over layers; empty without experts, and for several runs."""
    costs: Mapping[str, float | None]
    """Keys of ``COSTS``; of several runs the sums, because one would train and deploy them all."""
    train_posts: Mapping[str, int]
    """Data set -> training posts."""
    removal: Removal | None
    """Where it was measured."""

    @property
    def figures(self) -> dict[str, float]:
        """Every metric of the split, by ``task/metric``."""
        return {
            f"{task}/{name}": value
            for task, of_task in self.metrics.items()
            for name, value in of_task.items()
            if isinstance(value, (int, float))
        }


def read_arm(arm: Arm, runs: Path, *, seed: int) -> Result | None:
    """What the finished runs of an arm with one seed say together; None while none is finished."""
    read = [read_run(trial, runs / trial.name) for trial in arm.of_seed(seed)]
    found = [result for result in read if result is not None]
    if len(found) < 2:
        return found[0] if found else None
    # As one run of all tasks would: test posts where any task has labels there.
    split = next(
        (name for name in ("test", "validation") if any(result.split == name for result in found)),
        "",
    )
    scored = [result for result in found if result.split == split]
    whole = len(found) == len(read)
    return Result(
        seed=seed,
        trials=tuple(trial for result in found for trial in result.trials),
        split=split,
        tasks=_merged([result.tasks for result in scored]),
        folders=_merged([result.folders for result in scored]),
        metrics=_merged([result.metrics for result in scored]),
        quality=_merged([result.quality for result in scored]),
        routing={},
        # The cost of a part would look like that of the whole.
        costs=_summed([result.costs for result in found]) if whole else {},
        train_posts=_merged([result.train_posts for result in found]),
        removal=None,
    )


def read_run(trial: Trial, folder: Path) -> Result | None:
    """What a run left; None while it is not finished."""
    if not (folder / "results.json").is_file():
        return None
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    records = read_metrics(folder / METRICS_FILE)
    split = "test" if results["metrics"].get("test") else "validation"
    metrics = results["metrics"][split]
    plain = json.loads((folder / "tasks.json").read_text(encoding="utf-8"))
    tasks = {task.name: task for task in map(Task.from_dict, plain)}
    scored = {
        name: task
        for name, task in tasks.items()
        if metrics.get(name, {}).get(task.metric) is not None
    }
    removal = folder / REMOVAL_FILE
    return Result(
        seed=trial.seed,
        trials=(trial,),
        split=split,
        tasks=scored,
        folders=dict.fromkeys(scored, folder.name),
        metrics={name: metrics[name] for name in scored},
        quality={
            f"{name}/{task.metric}": metrics[name][task.metric] for name, task in scored.items()
        },
        routing=_routing(records, split),
        costs=_costs(results, records),
        train_posts={
            name: found.get("train", 0) for name, found in results["data"]["posts"].items()
        },
        removal=read_removal(removal) if removal.is_file() else None,
    )


def with_means(results: Mapping[str, Sequence[Result]]) -> dict[str, list[Result]]:
    """Arm -> results with ``mean`` in their quality: of all tasks that any arm measures for its own sake.

    An arm that lacks one of them has no mean: that of fewer tasks is another number.
    """
    tasks = {
        task.name: task
        for found in results.values()
        for result in found
        for task in result.tasks.values()
    }
    wanted = [task for task in tasks.values() if not task.auxiliary]
    return {arm: [_with_mean(result, wanted) for result in found] for arm, found in results.items()}


def _with_mean(result: Result, wanted: Sequence[Task]) -> Result:
    values = [rising(task.metric, result.metrics[task.name][task.metric]) for task in wanted
              if task.name in result.metrics]  # fmt: skip
    if not values or len(values) < len(wanted):
        return result
    return replace(result, quality={MEAN: float(np.mean(values)), **result.quality})


def _costs(
    results: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> dict[str, float | None]:
    seconds, steps, posts = (results.get(name) for name in ("seconds", "step", "posts"))
    return {"seconds": seconds, "steps": steps, "posts": posts,
            "posts_per_second": posts / seconds if posts and seconds else None,
            **costs_of(results, records)}  # fmt: skip


def _summed(costs: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    def column(name: str) -> list[float]:
        return [value for cost in costs if (value := cost[name]) is not None]

    found = {
        name: sum(column(name)) if len(column(name)) == len(costs) else None for name in costs[0]
    }
    found[LARGEST] = max(column(LARGEST), default=None)
    # Speeds are those of the whole time, not of any one run.
    seconds, steps = column("seconds"), column("steps")
    if len(seconds) == len(steps) == len(costs):
        speeds = {"posts_per_second": seconds, "tokens_per_second": seconds, "step_ms": steps}
        for name, weights in speeds.items():
            known = column(name)
            found[name] = (
                float(np.average(known, weights=weights)) if len(known) == len(costs) else None
            )
    return found


def _routing(records: Sequence[Mapping[str, Any]], split: str) -> dict[str, float]:
    blocks = [
        record["routing"]
        for record in records
        if record.get("split") == split and "routing" in record
    ]
    # One block that every token visits has no gate to speak of.
    if not blocks or len(blocks[-1]["share"][0]) == 1:
        return {}
    means = {
        name: [value for value in blocks[-1].get(name, ()) if value is not None] for name in ROUTING
    }
    return {name: float(np.mean(values)) for name, values in means.items() if values}


def _merged(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: value for part in parts for name, value in part.items()}
