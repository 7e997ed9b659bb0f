"""What ``comoe compare`` does."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import replace

from comoe.config.files import write_atomic, write_json
from comoe.config.load import load_recipe
from comoe.config.recipe import Recipe
from comoe.evaluation.evaluate import TEACHER_KL
from comoe.evaluation.tables import in_columns
from comoe.experiments.compare.claim import need_soft_labels, parse_claim, record_claim
from comoe.experiments.compare.measurements import affinities, arm_names, proposals, removals
from comoe.experiments.compare.own_arms import classical_arms, custom_arms, group_arms
from comoe.experiments.compare.plan import Plan, check_earlier, plan_arms, read_seeds
from comoe.experiments.compare.plots import write_plots
from comoe.experiments.compare.report import compare, with_metrics, write_comparison
from comoe.experiments.compare.splits import check_splits
from comoe.experiments.compare.tables import markdown_lines
from comoe.experiments.compare.tune import (
    Grid,
    Tuning,
    grid_trials,
    read_grid,
    read_tuning,
    tuned_plan,
)
from comoe.experiments.runner import (
    Experiment,
    Trial,
    is_done,
    print_now,
    record_settings,
    run_trials,
)

SETTINGS, TUNING = "compare.json", "tuning.json"
"""In the output folder: what all of its runs share, and the claim; the scores of ``--tune``."""


def run_comparison(given: argparse.Namespace) -> list[Trial]:
    """Run what is missing, measure gradients and experts on request, write the report; returns the failed runs.

    Raises:
        ValueError: a wrong recipe, arm, or output folder; nothing has run then.
    """
    experiment = Experiment.from_command(given)
    plan = _plan(experiment, given)
    grid = read_grid(given, plan, experiment)
    against = plan.arms[0] if given.against is None else plan.arm(given.against, flag="--against")
    recipe = load_recipe(experiment.config, experiment.overrides)
    metrics = _metrics(recipe, given)
    splits = check_splits(given.splits, recipe)
    for check in (affinities, removals):
        check(plan, given)
    _check_measures(plan, given, recipe)
    with_proposal = proposals(plan, given, experiment)
    if given.dry_run:
        print("\n".join(planned_lines(experiment, plan, grid)))
        return []
    record_settings(experiment, file_name=SETTINGS)
    claim = record_claim(experiment, plan, given.claim, file_name=SETTINGS)
    reference = claim.other if claim and given.against is None else against.name
    tuning, failed = None, []
    if grid is not None:
        tuning, failed = run_tuning(experiment, grid, plan, keep=given.keep_checkpoints)
        plan = tuned_plan(plan, tuning)
    measurements = [affinities(plan, given), removals(plan, given)]
    for trial in plan.trials:
        check_earlier(experiment, trial)
    for note in plan.notes:
        print_now(f"note: {note}")

    def report(resamples: int = 0) -> list[str]:
        drop_checkpoints(experiment, plan.trials, keep=given.keep_checkpoints)
        problems = {trial.name: experiment.problem(trial) for trial in plan.trials}
        comparison = compare(
            plan, experiment.runs, baseline=against.name, resamples=resamples, measure=given.measure,
            claim=claim, further=dict.fromkeys(splits, reference),
        )  # fmt: skip
        problems = {name: text for name, text in problems.items() if text}
        comparison = replace(with_metrics(comparison, metrics), problems=problems, tuning=tuning)
        comparison = with_proposal(comparison)
        write_comparison(comparison, experiment.output)
        lines = markdown_lines(comparison)
        write_atomic(experiment.output / "table.md", "\n".join(lines) + "\n")
        write_plots(comparison, experiment.output)
        return lines

    failed += run_trials(experiment, plan.trials, report=report)
    for measure in measurements:
        measure(experiment)
    print("\n".join(report(given.resamples)))
    names = ("table.csv", "gains.csv", "affinity.csv", "summary.json", "comparison.json", TUNING)
    written = [name for name in names if (experiment.output / name).is_file()]
    print(f"\ntable   {given.output / 'table.md'}, {', '.join(written)}")
    print(f"plots   {given.output / 'plots'}")
    return failed


def _plan(experiment: Experiment, given: argparse.Namespace) -> Plan:
    """All arms of the command line; those of the user's own come last, unless ``--arms`` names them."""
    custom = custom_arms(given.arm)
    groups = group_arms(given.groups, load_recipe(experiment.config, experiment.overrides))
    if both := [name for name in groups if name in custom]:
        raise ValueError(f"--groups {both[0]} and --arm {both[0]} have one name; rename one.")
    arms = list(dict.fromkeys([*arm_names("--arms", given.arms), *custom, *groups]))
    seeds = read_seeds(given.seeds, flag="--seeds")
    own = groups | classical_arms(arms, given.lexicon)
    return plan_arms(experiment, arms=arms, custom=custom, seeds=seeds, own=own)


def planned_lines(experiment: Experiment, plan: Plan, grid: Grid | None) -> list[str]:
    """What ``--dry-run`` prints: every run with the options that it changes, and those that are finished."""
    tuning = [] if grid is None else grid_trials(grid, plan)
    lines = [f"note: {note}" for note in plan.notes]
    for title, trials in (("tuning", tuning), ("comparison", plan.trials)):
        # Arms may share the run of a task.
        runs = {trial.name: trial for trial in trials}
        rows = [
            (name, "finished" if is_done(experiment, trial) else "", " ".join(trial.part_overrides))
            for name, trial in runs.items()
        ]
        if runs:
            head = (f"{title}: {len(runs)} runs", "", "options")
            lines += [*in_columns(head, rows, left=3), ""]
    return lines


def run_tuning(
    experiment: Experiment, grid: Grid, plan: Plan, *, keep: bool
) -> tuple[Tuning, list[Trial]]:
    """Run the grid of every arm, write ``tuning.json``; returns the scores and the failed runs."""
    trials = grid_trials(grid, plan)
    for trial in trials:
        check_earlier(experiment, trial)
    print_now(f"tuning {', '.join(grid.options)} by the validation {grid.by}")

    def report() -> None:
        drop_checkpoints(experiment, trials, keep=keep)
        found = read_tuning(grid, plan, experiment).to_dict()
        write_json(experiment.output / TUNING, found)

    failed = run_trials(experiment, trials, report=report)
    report()
    return read_tuning(grid, plan, experiment), failed


def drop_checkpoints(experiment: Experiment, trials: Sequence[Trial], *, keep: bool) -> None:
    """Remove the checkpoints of finished runs: their exports have the best weights."""
    for trial in trials:
        if not keep and is_done(experiment, trial):
            # The optimizer states of many runs would fill a disk.
            shutil.rmtree(experiment.runs / trial.name / "checkpoints", ignore_errors=True)


def _metrics(recipe: Recipe, given: argparse.Namespace) -> list[str]:
    """``task/metric`` names; whether a metric exists is known when runs are finished."""
    names = [name.strip() for name in given.metrics.split(",")] if given.metrics else []
    tasks = recipe.tasks
    for name in names:
        task, slash, metric = name.partition("/")
        if task not in tasks or not slash or not metric:
            example = f"{next(iter(tasks))}/accuracy"
            raise ValueError(
                f"--metrics {name}: write task/metric ({example}, {example}@column=value for a "
                f"slice); the tasks are {', '.join(tasks)}."
            )
    return names


def _check_measures(plan: Plan, given: argparse.Namespace, recipe: Recipe) -> None:
    """Refuse a claim, or a number to compare or tune by, that the runs will not have."""
    if given.claim is not None:
        parse_claim(given.claim, plan, recipe)
    for flag, measure in (("--measure", given.measure), ("--tune-by", given.tune_by)):
        if measure == TEACHER_KL:
            need_soft_labels(f"{flag} {measure}", recipe)
