"""``comoe tune``: an Optuna study whose trials are runs, in a database that outlives a kill."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import optuna
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState

from comoe.config.failure import doing
from comoe.config.files import atomic_file, lock_beside, locked, write_atomic
from comoe.config.load import load_recipe, save_recipe
from comoe.config.space import Range, Space, load_space
from comoe.evaluation.evaluate import CHOSEN, MEAN
from comoe.evaluation.tables import markdown_table
from comoe.experiments.runner import (
    OWN_KEYS,
    Experiment,
    Trial,
    is_done,
    print_now,
    record_settings,
    result_of,
    run_trial,
)
from comoe.train.monitor.metrics_file import METRICS_FILE, read_metrics
from comoe.train.run_folder import LOCK

CHEAP = (
    "run.plots=false", "run.histograms=false", "run.trackers=[]", "train.measure_experts=false",
    "train.calibrate=false", "train.fit_thresholds=false", "train.keep_checkpoints=1",
)  # fmt: skip
"""What a trial leaves out: nothing of it changes the training."""
FIRST = 4
"""Finished trials before one is compared with the median of the others."""
RUN, INTERRUPTED, PROBLEM, SPACE = "run", "interrupted", "problem", "space"
"""Attributes that the study keeps: a trial's run folder, numbers of those whose process was killed,
why a run failed; and the space."""
STUDY = "study.db"
"""File of the study."""


def tune_and_exit(given: argparse.Namespace) -> NoReturn:
    """``comoe tune``: exit code 0 if a trial has a result, else 1."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sys.exit(1 if _tune(given) else 0)


def _tune(given: argparse.Namespace) -> bool:
    experiment = Experiment.from_command(given)
    space = load_space(given.space, taken=OWN_KEYS)
    experiment.refuse(tuple(space.options), "those of --space")
    for key, values in space.options.items():
        ends = (values.low, values.high) if isinstance(values, Range) else values
        for value in ends:
            _check_key(experiment, key, value)
    record_settings(experiment, file_name="tune.json")
    with (
        locked(lock_beside(experiment.runs), str(experiment.output)),
        doing("writing", experiment.output / STUDY),
    ):
        study = _open_study(experiment, space)
        _take_up(study)
        while len(counted(study)) < given.trials:
            _one_trial(study, experiment, space, seed=given.seed, of=given.trials)
            report(study, experiment)
        report(study, experiment)
    return not study.get_trials(states=[TrialState.COMPLETE])


def _check_key(experiment: Experiment, key: str, value: Any) -> None:
    """Refuse before the first run what the option does not take; rules between options are a trial's own."""
    try:
        load_recipe(experiment.config, [*experiment.overrides, _override(key, value)])
    except ValueError as error:
        # A message of the option itself begins with its key; one of a rule may be mended by other options.
        if f"{key} is " in str(error) and "must be" in str(error):
            raise ValueError(f"--space: {error}") from error


def _override(key: str, value: Any) -> str:
    return f"{key}={json.dumps(value)}"


def _open_study(experiment: Experiment, space: Space) -> optuna.Study:
    study = optuna.create_study(
        study_name="comoe",
        storage=f"sqlite:///{experiment.output / STUDY}",
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=FIRST),
        load_if_exists=True,
    )
    text = json.dumps(dataclasses.asdict(space), sort_keys=True)
    if study.user_attrs.setdefault(SPACE, text) != text:
        raise ValueError(
            f"{experiment.output} holds a study of another --space; choose another --output, or give the same space."
        )
    study.set_user_attr(SPACE, text)
    return study


def _take_up(study: optuna.Study) -> None:
    """Trials that a killed process left running are proposed again, and go on from their run's checkpoint."""
    waiting = {trial.user_attrs.get(RUN) for trial in study.get_trials(states=[TrialState.WAITING])}
    for trial in study.get_trials(states=[TrialState.RUNNING]):
        name = trial.user_attrs.get(RUN, _name(trial.number))
        if name not in waiting:
            study.enqueue_trial(trial.params, user_attrs={RUN: name})
        study.set_user_attr(INTERRUPTED, [*study.user_attrs.get(INTERRUPTED, []), trial.number])
        study.tell(trial.number, state=TrialState.FAIL)


def counted(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that came to an end, in whatever way."""
    ended = study.get_trials(states=[TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL])
    interrupted = study.user_attrs.get(INTERRUPTED, [])
    return [trial for trial in ended if trial.number not in interrupted]


def _name(number: int) -> str:
    return f"t{number:04d}"


def _one_trial(
    study: optuna.Study, experiment: Experiment, space: Space, *, seed: int, of: int
) -> None:
    done = len(counted(study))
    # Proposals depend on what is known and on this number, not on how often the study was stopped.
    study.sampler = optuna.samplers.TPESampler(seed=seed + done, n_startup_trials=FIRST)
    trial = study.ask()
    overrides = [
        _override(key, _suggest(trial, key, values)) for key, values in space.options.items()
    ]
    name = trial.user_attrs.get(RUN, _name(trial.number))
    trial.set_user_attr(RUN, name)
    state, problem = _run(trial, experiment, name, overrides)
    result = result_of(experiment, name).get("best_value") if state == TrialState.COMPLETE else None
    if problem:
        trial.set_user_attr(PROBLEM, problem)
    study.tell(trial, result, state=state)
    shown = f"validation {result:.4f}" if result is not None else f"{state.name.lower()} {problem}"
    print_now(f"[{done + 1}/{of}] {name} ({', '.join(overrides)}): {shown.strip()}")


def _suggest(trial: optuna.Trial, key: str, values: Any) -> Any:
    if not isinstance(values, Range):
        # Optuna keeps plain values alone; a list of numbers is one choice.
        return json.loads(trial.suggest_categorical(key, [json.dumps(value) for value in values]))
    draw = trial.suggest_int if values.whole else trial.suggest_float
    step = (
        {} if values.step is None else {"step": int(values.step) if values.whole else values.step}
    )
    return draw(key, values.low, values.high, log=values.log, **step)


def _run(
    trial: optuna.Trial, experiment: Experiment, name: str, overrides: list[str]
) -> tuple[TrialState, str]:
    """Run, or go on with, the run of a trial; its state and what went wrong."""
    try:
        recipe = load_recipe(experiment.config, [*experiment.overrides, *overrides])
    except ValueError as error:
        return TrialState.FAIL, str(error)
    given = {text.partition("=")[0].strip().lstrip("-") for text in experiment.overrides}
    settings = [text for text in CHEAP if text.partition("=")[0] not in given]
    run = Run(name, recipe.train.seed, (*overrides, *settings), recipe.model.moe.num_experts)
    pruned = Pruned(trial, experiment.runs / name)
    problem = _finish(experiment, run, pruned)
    if pruned.asked():
        experiment.failure_file(run).unlink(missing_ok=True)
        return TrialState.PRUNED, f"at step {pruned.step}"
    if problem or result_of(experiment, name).get("best_value") is None:
        return TrialState.FAIL, problem or "no evaluation of the run has a number"
    return TrialState.COMPLETE, ""


def _finish(experiment: Experiment, run: Trial, pruned: Pruned) -> str:
    """Run a trial to its end; what went wrong. A run that outlived its killed study is waited for."""
    folder = experiment.runs / run.name
    while True:
        if folder.is_dir():
            with locked(folder / LOCK, f"the run {run.name}", wait=print_now):
                pass
        problem = (
            "" if is_done(experiment, run) else run_trial(experiment, run, give_up=pruned.asked)
        )
        if "is in use by" not in problem:
            return problem


class Run(Trial):
    """A run of the study, in a folder of the trial's name."""

    @property
    def name(self) -> str:
        """Name of its run folder."""
        return self.part


class Pruned:
    """Whether a trial is worse than the median of the others, by the validation lines of its run, in their order.

    Compared is what ``train.early_stop_metric`` asks for, as trials are ranked.
    """

    def __init__(self, trial: optuna.Trial, folder: Path) -> None:
        self._trial, self._folder = trial, folder
        self._seen: set[int] = set()
        self._answer = False
        self.step = 0
        """Of the last line that was compared."""

    def asked(self) -> bool:
        """Compare what is new."""
        lines = read_metrics(self._folder / METRICS_FILE)
        for line in lines:
            # Older versions called what early_stop_metric asks for the mean.
            step, value = line.get("step"), line.get(CHOSEN, line.get(MEAN))
            if self._answer or line.get("split") != "validation" or step in self._seen:
                continue
            self._seen.add(step)
            if value is not None and math.isfinite(value):
                self.step = step
                self._trial.report(value, step)
                self._answer = self._trial.should_prune()
        return self._answer


def report(study: optuna.Study, experiment: Experiment) -> None:
    """Write ``tune.md``, ``importance.png`` and ``best.yaml``."""
    rows = [("trial", "state", "validation", "overrides")]
    for trial in counted(study):
        value = "-" if trial.value is None else f"{trial.value:.4f}"
        pairs = ", ".join(f"{key}={value}" for key, value in trial.params.items())
        rows.append((trial.user_attrs.get(RUN, ""), trial.state.name.lower(), value, pairs))
    lines = ["# Trials", "", *markdown_table(rows[0], rows[1:])]
    if complete := study.get_trials(states=[TrialState.COMPLETE]):
        best = max(complete, key=lambda trial: trial.value)
        kept = best.params.items()
        values = {key: json.loads(v) if isinstance(v, str) else v for key, v in kept}
        overrides = [_override(key, value) for key, value in values.items()]
        recipe = load_recipe(experiment.config, [*experiment.overrides, *overrides])
        save_recipe(recipe, experiment.output / "best.yaml")
        lines += [
            "",
            f"Best: {best.user_attrs[RUN]}, validation {best.value:.4f}; its recipe is best.yaml.",
        ]
    if weights := _importances(study):
        lines += ["", "Share of the variance between trials (fANOVA):", ""]
        lines += [f"- {key}: {share:.2f}" for key, share in weights.items()]
        with atomic_file(experiment.output / "importance.png") as file:
            _importance_figure(weights).savefig(file, format="png", dpi=120)
    write_atomic(experiment.output / "tune.md", "\n".join([*lines, ""]))


def _importances(study: optuna.Study) -> Mapping[str, float]:
    """Option -> its share; empty where trials are too few or all alike."""
    try:
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        return optuna.importance.get_param_importances(study, evaluator=evaluator)
    except (RuntimeError, ValueError, ZeroDivisionError):
        return {}


def _importance_figure(weights: Mapping[str, float]) -> Figure:
    figure = Figure(figsize=(7, 1 + 0.4 * len(weights)), layout="constrained")
    axes = figure.subplots()
    names = list(weights)[::-1]
    axes.barh(names, [weights[name] for name in names], color="#5b3f8c")
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the variance between trials")
    axes.set_title("What the options are worth")
    return figure
