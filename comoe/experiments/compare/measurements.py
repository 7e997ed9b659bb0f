"""What ``comoe compare`` measures of finished runs beside their results: gradients of tasks, worth of experts."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from comoe.config.files import read_json, write_json
from comoe.config.load import load_recipe
from comoe.experiments.ablate import measure_removal, read_removal
from comoe.experiments.affinity import measure_affinity, read_affinity
from comoe.experiments.classical import BASELINES
from comoe.experiments.compare.arms import ARMS, TASK_ARMS, measured_tasks
from comoe.experiments.compare.grouping import FEWEST, MOST, propose
from comoe.experiments.compare.plan import Arm, Plan, read_seeds
from comoe.experiments.compare.report import AFFINITY_FILE, Comparison
from comoe.experiments.compare.results import REMOVAL_FILE, split_of
from comoe.experiments.compare.transfer import left_out_task
from comoe.experiments.runner import Experiment, is_done, print_now

Measurement = Callable[[Experiment], None]
"""Measures finished runs after the training of all runs."""


def affinities(plan: Plan, given: argparse.Namespace) -> Measurement:
    """Cosines of the gradients of tasks, of the arms of ``--affinity``.

    Raises:
        ValueError: a bad option.
    """
    limit = given.affinity_posts
    if limit < 2 and limit != 0:
        raise ValueError(
            f"--affinity-posts is {limit}; it must be at least 2, or 0 for no gradients."
        )
    arms = _arms_of_one_run(plan, "--affinity", given.affinity)
    if plan.joint and not arms:
        arms = [plan.arm(plan.joint, flag="--arms")]
    if plan.joint is None and arms:
        raise ValueError(
            "--affinity compares the gradients of tasks; it needs an arm with several tasks."
        )
    measure = partial(measure_affinity, limit=limit, verify=not given.no_verify)
    return _measurement(arms if limit else [], AFFINITY_FILE, limit, read_affinity, measure)


def removals(plan: Plan, given: argparse.Namespace) -> Measurement:
    """What each expert is worth, in the arms of ``--remove-experts``.

    Raises:
        ValueError: a bad option.
    """
    limit = given.removal_posts
    arms = _arms_of_one_run(plan, "--remove-experts", given.remove_experts)
    for arm in arms:
        if not all(trial.experts for trial in arm.trials):
            raise ValueError(f"--remove-experts {arm.name}: this arm has no experts.")

    def measure(folder: Path) -> Any:
        split = split_of(read_json(folder / "results.json"))
        return measure_removal(folder, split=split, limit=limit, verify=not given.no_verify)

    return _measurement(arms, REMOVAL_FILE, limit, read_removal, measure)


def proposals(
    plan: Plan, given: argparse.Namespace, experiment: Experiment
) -> Callable[[Comparison], Comparison]:
    """What adds a grouping of the tasks (``--propose-groups``) to a comparison, with the command that tests it.

    Raises:
        ValueError: nothing is measured to propose it by, or too few or too many tasks.
    """
    if not given.propose_groups:
        return lambda comparison: comparison
    tasks = measured_tasks(load_recipe(experiment.config, experiment.overrides))
    if not FEWEST <= len(tasks) <= MOST:
        raise ValueError(
            f"--propose-groups is for {FEWEST} to {MOST} measured tasks; the recipe has {len(tasks)}."
        )
    left_out = any(left_out_task(arm.name) for arm in plan.arms)
    if plan.joint is None or not (given.affinity_posts or left_out):
        raise ValueError(
            "--propose-groups reads the gradients of the arm multi, or the arms of leave_one_out; "
            "add multi to --arms, and give --affinity-posts a number or add leave_one_out."
        )

    def with_proposal(comparison: Comparison) -> Comparison:
        cosines = comparison.cosines.get(plan.joint)
        found = propose(comparison.measured, cosines, comparison.changes)
        if found is None:
            return comparison
        words = ["comoe", "compare", str(given.config), "--arms", plan.joint]
        # Seeds that had no part in the choice, and a folder that leaves its evidence as it is.
        seeds = read_seeds(given.seeds, flag="--seeds")
        fresh = ",".join(str(seed + max(seeds) + 1 - min(seeds)) for seed in seeds)
        words += ["--against", plan.joint, *found.options, "--seeds", fresh]
        words += ["--output", f"{given.output}_groups", "--deepspeed", str(given.deepspeed)]
        words += ["--ranks", str(given.ranks)] if given.ranks else []
        command = shlex.join([*words, *given.overrides])
        return replace(comparison, proposal=found, proposal_command=command)

    return with_proposal


def _arms_of_one_run(plan: Plan, flag: str, text: str | None) -> list[Arm]:
    arms = [plan.arm(name, flag=flag) for name in (arm_names(flag, text) if text else [])]
    for arm in arms:
        if arm.classical:
            raise ValueError(f"{flag} {arm.name}: this arm is no trained model; name another one.")
        if len(arm.parts) > 1:
            raise ValueError(
                f"{flag} {arm.name}: this arm has a run for each task; give an arm of one run ({', '.join(arm.parts)})."
            )
    return arms


def _measurement(
    arms: Sequence[Arm],
    file_name: str,
    limit: int,
    read: Callable[[Path], Any],
    measure: Callable[[Path], Any],
) -> Measurement:
    """Measures the finished runs of some arms and writes a file to their folders, unless it is there."""

    def work(experiment: Experiment) -> None:
        trials = [trial for arm in arms for trial in arm.trials if is_done(experiment, trial)]
        for number, trial in enumerate(trials, start=1):
            folder = experiment.runs / trial.name
            file = folder / file_name
            if file.is_file() and read(file).limit == limit:
                continue
            print_now(f"[{number}/{len(trials)}] {trial.name}: {file.stem}")
            try:
                write_json(file, measure(folder).to_dict())
            except ValueError as error:
                # The runs took hours, and the rest of the report does not need this file.
                print_now(f"comoe: {error}")

    return work


def arm_names(flag: str, text: str) -> list[str]:
    """Names from a list with commas; ValueError, which names ``flag``, for an empty one."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        valid = ", ".join([*TASK_ARMS, *ARMS, *BASELINES])
        raise ValueError(f"{flag} is {text!r}; it must be names with commas between, of {valid}.")
    return names
