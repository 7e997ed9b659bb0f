"""The command line of ``launch/compare.py``."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from comoe.config.files import write_atomic
from comoe.config.load import load_recipe
from comoe.experiments.ablate import measure_removal, read_removal
from comoe.experiments.affinity import measure_affinity, read_affinity
from comoe.experiments.compare.arms import ARMS, TASK_ARMS, custom_arms
from comoe.experiments.compare.plan import Arm, Plan, Trial, check_earlier, plan_arms
from comoe.experiments.compare.plots import write_plots
from comoe.experiments.compare.report import AFFINITY_FILE, Comparison, compare, write_comparison
from comoe.experiments.compare.results import REMOVAL_FILE
from comoe.experiments.compare.tables import markdown_lines
from comoe.experiments.runner import (
    Experiment,
    chosen_ranks,
    failure_file,
    is_done,
    leave_after,
    remember,
    run_points,
)


def compare_and_exit(given: argparse.Namespace, *, train_script: Path) -> NoReturn:
    """Run the comparison and leave, with the exit codes of ``leave_after``."""
    leave_after(lambda: bool(run_comparison(given, train_script=train_script)))


def run_comparison(given: argparse.Namespace, *, train_script: Path) -> list[Trial]:
    """Run what is missing, measure gradients and experts where that is wanted, write the report; the runs that failed.

    Raises:
        ValueError: a wrong recipe, arm, or output folder; nothing has been run then.
    """
    experiment = Experiment(
        given.config.resolve(), given.deepspeed.resolve(), given.output.resolve(), train_script,
        chosen_ranks(given.ranks), tuple(given.overrides),
    )  # fmt: skip
    custom = custom_arms(given.arm)
    # Arms of one's own come behind, unless the list names them.
    arms = list(dict.fromkeys([*_words("--arms", given.arms), *custom]))
    plan = plan_arms(experiment, arms=arms, custom=custom, seeds=_seeds(given.seeds))
    baseline = (
        plan.arms[0].name
        if given.against is None
        else plan.arm(given.against, flag="--against").name
    )
    metrics = _metrics(experiment, given)
    later = [_affinities(plan, given), _removals(plan, given)]
    remember(experiment, file_name="compare.json")
    for trial in plan.trials:
        check_earlier(experiment, trial)
    say = partial(print, flush=True)
    for note in plan.notes:
        say(f"note: {note}")
    report = partial(
        _report, experiment, plan, baseline=baseline, keep=given.keep_checkpoints, metrics=metrics
    )
    failed = run_points(experiment, plan.trials, report=lambda trials: report(resamples=0), say=say)
    for measure in later:
        measure(experiment, say)
    comparison = report(resamples=given.resamples)
    print("\n".join(markdown_lines(comparison)))
    print(
        f"\ntable   {given.output / 'table.md'}, table.csv, gains.csv, affinity.csv, summary.json, comparison.json"
    )
    print(f"plots   {given.output / 'plots'}")
    return failed


def _report(
    experiment: Experiment,
    plan: Plan,
    *,
    baseline: str,
    keep: bool,
    metrics: Sequence[str],
    resamples: int,
) -> Comparison:
    for trial in plan.trials:
        if not keep and is_done(experiment, trial):
            # The export has the best weights; the optimizer's state of dozens of runs would fill a
            # disk.
            shutil.rmtree(experiment.runs / trial.name / "checkpoints", ignore_errors=True)
    problems = {trial.name: _problem(failure_file(experiment, trial)) for trial in plan.trials}
    comparison = compare(
        plan, experiment.runs, baseline=baseline, resamples=resamples,
        problems={name: text for name, text in problems.items() if text}, metrics=metrics,
    )  # fmt: skip
    write_comparison(comparison, experiment.output)
    write_atomic(experiment.output / "table.md", "\n".join(markdown_lines(comparison)) + "\n")
    write_plots(comparison, experiment.output)
    return comparison


Measuring = Callable[[Experiment, Callable[[str], None]], None]
"""Measures finished runs after all is trained, and says what it does."""


def _metrics(experiment: Experiment, given: argparse.Namespace) -> list[str]:
    """``task/metric`` words; which metrics there are is known when runs are finished."""
    names = [name.strip() for name in given.metrics.split(",")] if given.metrics else []
    tasks = load_recipe(experiment.config, experiment.overrides).tasks
    for name in names:
        task, slash, metric = name.partition("/")
        if task not in tasks or not slash or not metric:
            example = f"{next(iter(tasks))}/accuracy"
            raise ValueError(
                f"--metrics {name}: write task/metric ({example}, {example}@column=value for a slice); the tasks are "
                f"{', '.join(tasks)}."
            )
    return names


def _affinities(plan: Plan, given: argparse.Namespace) -> Measuring:
    limit = given.affinity_posts
    if limit < 2 and limit != 0:
        raise ValueError(
            f"--affinity-posts is {limit}; it must be at least 2, or 0 for no gradients."
        )
    asked = _words("--affinity", given.affinity) if given.affinity else []
    arms = [_of_one_run(plan, name, flag="--affinity") for name in asked]
    if plan.joint and not asked:
        arms = [plan.arm(plan.joint, flag="--arms")]
    if plan.joint is None and arms:
        raise ValueError(
            "--affinity holds the gradients of tasks against one another; it needs an arm with several."
        )
    return partial(_measure, arms if limit else [], AFFINITY_FILE, limit, read_affinity, "gradients of the tasks",
                   lambda folder: measure_affinity(folder, limit=limit))  # fmt: skip


def _removals(plan: Plan, given: argparse.Namespace) -> Measuring:
    limit = given.removal_posts
    if limit < 1:
        raise ValueError(f"--removal-posts is {limit}; it must be at least 1.")
    asked = _words("--remove-experts", given.remove_experts) if given.remove_experts else []
    arms = [_of_one_run(plan, name, flag="--remove-experts") for name in asked]
    for arm in arms:
        if not arm.trials[0].experts:
            raise ValueError(f"--remove-experts {arm.name}: this arm has no experts.")
    return partial(_measure, arms, REMOVAL_FILE, limit, read_removal, "removing experts",
                   lambda folder: measure_removal(folder, split=_split(folder), limit=limit))  # fmt: skip


def _of_one_run(plan: Plan, name: str, *, flag: str) -> Arm:
    arm = plan.arm(name, flag=flag)
    if len({trial.part for trial in arm.trials}) > 1:
        parts = ", ".join(dict.fromkeys(trial.part for trial in arm.trials))
        raise ValueError(
            f"{flag} {name}: this arm has a run for each task; give an arm of one run ({parts})."
        )
    return arm


def _measure(
    arms: Sequence[Arm],
    file_name: str,
    limit: int,
    read: Callable[[Path], Any],
    what: str,
    measure: Callable[[Path], Any],
    experiment: Experiment,
    say: Callable[[str], None],
) -> None:
    """Measure the finished runs of some arms and keep it in their folders; what is there already stays."""
    trials = [trial for arm in arms for trial in arm.trials if is_done(experiment, trial)]
    for number, trial in enumerate(trials, start=1):
        folder = experiment.runs / trial.name
        file = folder / file_name
        if file.is_file() and read(file).limit == limit:
            continue
        say(f"[{number}/{len(trials)}] {trial.name}: {what}")
        try:
            found = measure(folder)
        except ValueError as error:
            # The runs took hours; the rest of the report does not need this one.
            say(f"comoe: {error}")
            continue
        write_atomic(file, json.dumps(found.to_dict()) + "\n")


def _split(folder: Path) -> str:
    metrics = json.loads((folder / "results.json").read_text(encoding="utf-8"))["metrics"]
    return "test" if metrics.get("test") else "validation"


def _problem(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return next(
        (line for line in reversed(lines) if line.startswith("comoe:")), lines[-1] if lines else ""
    )


def _words(flag: str, text: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        valid = ", ".join([*TASK_ARMS, *ARMS])
        raise ValueError(f"{flag} is {text!r}; it must be names with commas between, of {valid}.")
    return words


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(
            f"--seeds is {text!r}; it must be whole numbers from 0 on with commas between."
        )
    return list(dict.fromkeys(map(int, parts)))
