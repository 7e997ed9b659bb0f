"""The result of one arm with one seed: read from a run folder, or merged from one run per task."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from comoe.config.files import read_json
from comoe.data.posts import PART_NAMES
from comoe.evaluation.evaluate import TEACHER_KL, higher_is_better
from comoe.evaluation.experts_off import CONDITIONS
from comoe.experiments.ablate import Removal, read_removal
from comoe.experiments.compare.plan import Arm, Plan
from comoe.experiments.compare.statistics import MEAN
from comoe.experiments.runner import Trial
from comoe.tasks.task import Task
from comoe.train.monitor.metrics_file import METRICS_FILE, read_metrics

ROUTING = ("weight_monopoly", "weight_effective_experts", "monopoly", "max_violation", "dead_share", "cooperation",
           "weight_task_information")  # fmt: skip
"""Gate statistics on the held-out posts, means over layers; those of the weights are comparable
across k."""

METRIC, LOSS = "metric", "loss"

MEASURES = {METRIC: "quality", LOSS: "losses", TEACHER_KL: "divergences"}
"""What arms are compared by -> the field of ``Result`` with its mean and its tasks. All but the
metric are of the validation posts and fall as a model gets better."""

EXPERTS = tuple(f"{key}_{measure}" for key in CONDITIONS for measure in ("loss", "metric"))
"""Without the experts (or the one block), and with experts in turn, on validation posts: relative
rise of the mean loss, change of the mean metric."""

RUN_COSTS = ("step_ms", "tokens_per_second", "peak_mib", "parameters_experts", "parameters_active",
             "parameters_total")  # fmt: skip
"""Milliseconds per optimizer step, tokens of all ranks, peak memory of one rank, parameters."""

COSTS = ("seconds", "steps", "posts", "posts_per_second", "predicted_posts_per_second", *RUN_COSTS)
"""Training time, optimizer steps, posts processed, posts per second in training and in the forward
passes of the final evaluation; then ``RUN_COSTS``."""

LARGEST = "peak_mib"
"""The cost of several runs that is a maximum and not a sum: they run one after another."""

REMOVAL_FILE = "removal.json"
"""In a run folder: the ablation of its experts."""


@dataclass(frozen=True, slots=True)
class Result:
    """An arm with one seed."""

    seed: int
    trials: tuple[Trial, ...]
    """Its finished runs."""
    split: str
    """Split of the quality; ``validation+typos`` is one, too."""
    tasks: Mapping[str, Task]
    """Scored tasks by name."""
    folders: Mapping[str, str]
    """Task -> run folder with its predictions."""
    metrics: Mapping[str, Mapping[str, float]]
    """Task -> every metric of the split."""
    quality: Mapping[str, float]
    """``task/metric``, and ``mean`` of the main metrics (larger is better) if the arm predicts all
    measured tasks."""
    losses: Mapping[str, float]
    """Task -> loss of the validation posts, and ``mean`` if the arm has that of all measured tasks."""
    divergences: Mapping[str, float]
    """The same of the divergence from the teachers; empty without them."""
    posts: Mapping[str, Mapping[str, int]]
    """Split -> task -> labeled posts."""
    routing: Mapping[str, float]
    """Gate statistics, means over layers; empty without experts, and for several runs."""
    experts: Mapping[str, float]
    """Keys of ``EXPERTS``; empty without a block, and for several runs."""
    costs: Mapping[str, float | None]
    """Keys of ``COSTS``; sums over several runs, because all of them are trained and deployed."""
    train_posts: Mapping[str, int]
    """Data set -> training posts."""
    removal: Removal | None
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Task that the arm cannot predict -> why."""

    @property
    def passes(self) -> str:
        """Posts seen over training posts, as a table has them; empty where they are not known."""
        posts, train_posts = self.costs.get("posts"), sum(self.train_posts.values())
        return f"{posts / train_posts:.1f}" if posts and train_posts else ""

    @property
    def figures(self) -> dict[str, float]:
        """Every metric of the split, by ``task/metric``."""
        items = ((task, item) for task, found in self.metrics.items() for item in found.items())
        return {
            f"{task}/{name}": value
            for task, (name, value) in items
            if isinstance(value, (int, float))
        }


def read_arms(plan: Plan, runs: Path, *, split: str | None = None) -> dict[str, list[Result]]:
    """Arm -> the results of its finished runs, one per seed; ``split`` as in ``read_run``."""
    read = {
        arm.name: [read_arm(arm, runs, seed=seed, split=split) for seed in plan.seeds]
        for arm in plan.arms
    }
    return with_means({arm: [one for one in found if one] for arm, found in read.items()})


def read_arm(arm: Arm, runs: Path, *, seed: int, split: str | None = None) -> Result | None:
    """The merged result of an arm's finished runs with one seed; None if none is finished."""
    read = [read_run(trial, runs / trial.name, split=split) for trial in arm.of_seed(seed)]
    found = [result for result in read if result is not None]
    if len(found) < 2:
        return found[0] if found else None
    # As for one run of all tasks: the test posts if any task has labels there.
    splits = [result.split for result in found]
    split = split or next((name for name in ("test", "validation") if name in splits), "")
    scored = [result for result in found if result.split == split]
    merged = {
        name: _merged([getattr(result, name) for result in scored])
        for name in ("tasks", "folders", "metrics", "quality")
    }
    for name in ("losses", "divergences"):
        merged[name] = _merged([getattr(result, name) for result in found])
    names = dict.fromkeys(name for result in found for name in result.posts)
    merged["posts"] = {
        name: _merged([result.posts.get(name, {}) for result in found]) for name in names
    }
    return Result(
        seed=seed,
        trials=tuple(trial for result in found for trial in result.trials),
        split=split,
        **merged,
        routing={},
        experts={},
        # The cost of some of the runs would look like that of all.
        costs=_summed([result.costs for result in found]) if len(found) == len(read) else {},
        train_posts=_merged([result.train_posts for result in found]),
        removal=None,
    )


def read_run(trial: Trial, folder: Path, *, split: str | None = None) -> Result | None:
    """The result of one run on a set of its ``results.json``, by default that of ``split_of``; None
    if it is not finished, or was not scored there."""
    if not (folder / "results.json").is_file():
        return None
    results = read_json(folder / "results.json")
    if split is not None and not results["metrics"].get(split):
        return None
    records = read_metrics(folder / METRICS_FILE)
    split = split or split_of(results)
    metrics = results["metrics"][split]
    tasks = {task.name: task for task in map(Task.from_dict, read_json(folder / "tasks.json"))}
    scored = {
        name: task
        for name, task in tasks.items()
        if metrics.get(name, {}).get(task.metric) is not None
    }
    routing = last_routing(records, split)
    # A single block for every token has no gate.
    gated = bool(routing) and len(routing["share"][0]) > 1
    posts = results.get("data", {}).get("posts", {})
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
        **{
            MEASURES[key]: {
                name: found[key]
                for name, found in results["metrics"].get("validation", {}).items()
                if name in tasks and found.get(key) is not None
            }
            for key in (LOSS, TEACHER_KL)
        },
        posts={
            part: {name: int(found["n"]) for name, found in of_part.items() if "n" in found}
            for part, of_part in results["metrics"].items()
            if part in PART_NAMES
        },
        routing=layer_means(routing, ROUTING) if gated else {},
        experts={
            f"{key}_{measure}": results[key]["mean"][measure]
            for key in CONDITIONS
            for measure in ("loss", "metric")
            if key in results
        },
        costs=_costs(results, records),
        train_posts={name: found.get("train", 0) for name, found in posts.items()},
        removal=read_removal(removal) if removal.is_file() else None,
        skipped=results.get("skipped", {}),
    )


def split_of(results: Mapping[str, Any]) -> str:
    """The split that a run is scored on: test if it has labels, else validation."""
    return "test" if results["metrics"].get("test") else "validation"


def main_metrics(results: Mapping[str, Sequence[Result]]) -> dict[str, str]:
    """Task -> its main metric, of all finished runs."""
    tasks = _merged([result.tasks for found in results.values() for result in found])
    return {name: task.metric for name, task in tasks.items()}


def with_means(results: Mapping[str, Sequence[Result]]) -> dict[str, list[Result]]:
    """Arm -> results with ``mean`` in their quality, losses and divergences: of all tasks that have
    them in some arm and are not auxiliary.

    An arm without one of them has no mean, because means of different tasks are not comparable.
    """
    tasks = _merged([result.tasks for found in results.values() for result in found])
    wanted = [task for task in tasks.values() if not task.auxiliary]
    everything = [result for found in results.values() for result in found]
    falling = {
        field: [
            task.name
            for task in wanted
            if any(task.name in getattr(one, field) for one in everything)
        ]
        for field in ("losses", "divergences")
    }

    def completed(result: Result) -> Result:
        values = [
            higher_is_better(task.metric, result.metrics[task.name][task.metric])
            for task in wanted
            if task.name in result.metrics
        ]
        changed = {"quality": _with_mean(result.quality, values, len(wanted))}
        for name, known in falling.items():
            of_tasks = getattr(result, name)
            values = [of_tasks[task] for task in known if task in of_tasks]
            changed[name] = _with_mean(of_tasks, values, len(known))
        return replace(result, **changed)

    return {arm: [completed(result) for result in found] for arm, found in results.items()}


def _with_mean(
    of_tasks: Mapping[str, float], values: Sequence[float], wanted: int
) -> dict[str, float]:
    mean = {MEAN: float(np.mean(values))} if values and len(values) == wanted else {}
    return mean | dict(of_tasks)


def last_routing(records: Sequence[Mapping[str, Any]], split: str) -> Mapping[str, Any]:
    """The routing statistics of the last evaluation of a split; empty without experts."""
    blocks = [record["routing"] for record in records
              if record.get("split") == split and "routing" in record]  # fmt: skip
    return blocks[-1] if blocks else {}


def layer_means(routing: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """Means over layers of some routing statistics."""
    known = {
        name: [value for value in routing.get(name, ()) if value is not None] for name in names
    }
    return {name: float(np.mean(values)) for name, values in known.items() if values}


def _costs(
    results: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> dict[str, float | None]:
    """Time, memory and parameters of a run; times are medians over the log lines after the first one."""
    seconds, steps, posts = (results.get(name) for name in ("seconds", "step", "posts"))
    lines = [record for record in records if record.get("split") == "train"]
    intervals = [
        (after["seconds"] - before["seconds"]) / (after["step"] - before["step"])
        for before, after in itertools.pairwise(lines)
        if after["step"] > before["step"]
    ]
    # Medians: another program on the machine, or a checkpoint, slows down some intervals only.
    # A model that is fitted has no steps.
    step_seconds = statistics.median(intervals or [seconds / max(1, steps or 0)])
    memory = results.get("peak_memory_bytes_per_rank")
    speeds = [line["tokens_per_second"] for line in (lines[1:] or lines)]
    return {
        "seconds": seconds, "steps": steps, "posts": posts,
        "posts_per_second": posts / (steps * step_seconds) if posts and steps and step_seconds else None,
        "predicted_posts_per_second": results.get("predicted_posts_per_second"),
        "step_ms": None if steps is None else 1000 * step_seconds,
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "peak_mib": None if memory is None else memory / 2**20,
        **{f"parameters_{kind}": results["parameters"][kind] for kind in ("experts", "active", "total")},
    }  # fmt: skip


def _summed(costs: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    columns = {name: [cost[name] for cost in costs] for name in costs[0]}
    whole = {name: values for name, values in columns.items() if None not in values}
    found = {name: sum(whole[name]) if name in whole else None for name in columns}
    found[LARGEST] = max((value for value in columns[LARGEST] if value is not None), default=None)
    # Speeds are averages over the total time.
    speeds = {"tokens_per_second": "seconds", "step_ms": "steps"}
    for name, weights in speeds.items():
        if weights in whole:
            known = name in whole
            found[name] = float(np.average(whole[name], weights=whole[weights])) if known else None
    posts, steps, step_ms = (found[name] for name in ("posts", "steps", "step_ms"))
    found["posts_per_second"] = (
        1000 * posts / (steps * step_ms) if posts and steps and step_ms else None
    )
    if (name := "predicted_posts_per_second") in whole:
        # A post goes through all of the models, one after another.
        found[name] = 1 / sum(1 / speed for speed in whole[name])
    return found


def _merged(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: value for part in parts for name, value in part.items()}
