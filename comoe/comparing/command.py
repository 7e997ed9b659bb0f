"""The command line of ``launch/compare.py``."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from comoe.comparing.arms import ARMS, Trial, check_earlier, custom_arms, plan_trials
from comoe.comparing.plots import write_plots
from comoe.comparing.report import REMOVAL_FILE, Comparison, Result, compare, write_comparison
from comoe.comparing.tables import markdown_lines
from comoe.config import unknown_name
from comoe.removal import measure_removal
from comoe.scaling import Experiment, remember
from comoe.scaling_runs import chosen_ranks, failure_file, is_done, leave_after, run_points
from comoe.train.records import write_aside


def compare_and_exit(given: argparse.Namespace, *, train_script: Path) -> NoReturn:
    """Run the comparison and leave, with the exit codes of ``leave_after``."""
    leave_after(lambda: bool(run_comparison(given, train_script=train_script)))


def run_comparison(given: argparse.Namespace, *, train_script: Path) -> list[Trial]:
    """Run what is missing, remove experts where that was asked for, write the report; the runs that failed.

    Raises:
        ValueError: a wrong recipe, arm, or output folder; nothing has been run then.
    """
    experiment = Experiment(
        given.config.resolve(), given.deepspeed.resolve(), given.output.resolve(), train_script,
        chosen_ranks(given.ranks), tuple(given.overrides),
    )  # fmt: skip
    custom = custom_arms(given.arm)
    arms = list(dict.fromkeys([*_words("--arms", given.arms), *custom]))
    trials = plan_trials(experiment, arms=arms, custom=custom, seeds=_seeds(given.seeds))
    baseline = given.against or arms[0]
    if baseline not in arms:
        raise unknown_name("arm of this comparison (--against)", baseline, arms)
    without = _words("--remove-experts", given.remove_experts) if given.remove_experts else []
    _check_removal(without, trials, limit=given.removal_posts)
    remember(experiment, file_name="compare.json")
    for trial in trials:
        check_earlier(experiment, trial)
    say = partial(print, flush=True)
    report = partial(_report, experiment, baseline=baseline, keep=given.keep_checkpoints)
    failed = run_points(experiment, trials, report=partial(report, resamples=0), say=say)
    comparison = report(trials, resamples=given.resamples)
    if without:
        chosen = [result for arm in without for result in comparison.results[arm]]
        _remove(experiment, chosen, limit=given.removal_posts, say=say)
        comparison = report(trials, resamples=given.resamples)
    print("\n".join(markdown_lines(comparison)))
    print(f"\ntable   {given.output / 'table.md'}, table.csv, summary.json, comparison.json")
    print(f"plots   {given.output / 'plots'}")
    return failed


def _report(
    experiment: Experiment, trials: Sequence[Trial], *, baseline: str, keep: bool, resamples: int
) -> Comparison:
    for trial in trials:
        if not keep and is_done(experiment, trial):
            # The export has the best weights; the optimizer's state of dozens of runs would fill a disk.
            shutil.rmtree(experiment.runs / trial.name / "checkpoints", ignore_errors=True)
    problems = {trial.name: _problem(failure_file(experiment, trial)) for trial in trials}
    comparison = compare(
        trials, experiment.runs, baseline=baseline, resamples=resamples,
        problems={name: text for name, text in problems.items() if text},
    )  # fmt: skip
    write_comparison(comparison, experiment.output)
    write_aside(experiment.output / "table.md", "\n".join(markdown_lines(comparison)) + "\n")
    write_plots(comparison, experiment.output)
    return comparison


def _check_removal(arms: Sequence[str], trials: Sequence[Trial], *, limit: int) -> None:
    if limit < 1:
        raise ValueError(f"--removal-posts is {limit}; it must be at least 1.")
    known = {trial.arm: trial for trial in trials}
    for arm in arms:
        if arm not in known:
            raise unknown_name("arm of this comparison (--remove-experts)", arm, known)
        if not known[arm].experts:
            raise ValueError(f"--remove-experts {arm}: this arm has no experts.")


def _remove(experiment: Experiment, results: Sequence[Result], *, limit: int, say: Callable[[str], None]) -> None:
    for number, result in enumerate(results, start=1):
        folder = experiment.runs / result.trial.name
        if result.removal is not None and result.removal.limit == limit:
            continue
        say(f"[{number}/{len(results)}] {result.trial.name}: removing experts")
        try:
            removal = measure_removal(folder, split=result.split, limit=limit)
        except ValueError as error:
            # The runs took hours; the rest of the report does not need this one.
            say(f"comoe: {error}")
            continue
        write_aside(folder / REMOVAL_FILE, json.dumps(removal.to_dict()) + "\n")


def _problem(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return next((line for line in reversed(lines) if line.startswith("comoe:")), lines[-1] if lines else "")


def _words(flag: str, text: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise ValueError(f"{flag} is {text!r}; it must be names with commas between, of {', '.join(ARMS)}.")
    return words


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"--seeds is {text!r}; it must be whole numbers from 0 on with commas between.")
    return list(dict.fromkeys(map(int, parts)))
