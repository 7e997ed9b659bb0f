"""Runs of an experiment, one after another, each a ``comoe train`` of its own."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from comoe.config.failure import doing
from comoe.config.files import lock_beside, locked, read_json, write_atomic
from comoe.config.legacy import keep_old_meanings
from comoe.config.load import load_recipe, recipe_from_dict, recipe_to_dict
from comoe.config.ready_made import recipe_path, settings_path
from comoe.evaluation.tables import duration
from comoe.train.environment import environment_of_a_child
from comoe.train.launchers import STARTING, check_ranks
from comoe.train.parallel.ds_config import load_settings

OWN_KEYS = ("run.name", "run.output_dir", "run.overwrite", "train.seed")
"""Keys that the experiment sets for each run."""

TAIL = 20
"""Lines of a failed run's log that are kept."""

TRAIN = "comoe.commands.train"
"""Module that a run executes."""

ASKED_EVERY = 0.5
"""Seconds between two questions whether a run is to be given up."""

GRACE = 180.0
"""Seconds that ranks have to save and exit after the command that started them ends."""

WRITTEN = ("runs", "logs", "failed", "plots", "table.md", "table.csv", "gains.csv", "summary.json", "comparison.json",
           "tuning.json", "study.db", "tune.md", "importance.png", "best.yaml")  # fmt: skip
"""What experiments write, or make folders of, in their output folder beside their settings."""

OTHERS = ("compare.json", "scale.json", "tune.json")
"""Settings of experiments, the marks of their folders."""

OF_RUNS = (".begun", "config.yaml", "results.json")
"""A folder with one of them is that of a run."""

print_now = partial(print, flush=True)


@dataclass(frozen=True, slots=True)
class Trial:
    """One run: a part of an arm with a seed."""

    part: str
    """Prefix of its name."""
    seed: int
    part_overrides: tuple[str, ...]
    """``key=value`` changes of the recipe, except the seed."""
    experts: int
    """Experts per layer."""
    baseline: tuple[str, ...] = ()
    """Classical model that is fitted instead of a training, and its arguments; empty: ranks train."""

    @property
    def name(self) -> str:
        """Name of its run folder."""
        return f"{self.part}-s{self.seed}"

    @property
    def overrides(self) -> list[str]:
        """The part's overrides and the seed."""
        return [*self.part_overrides, f"train.seed={self.seed}"]


@dataclass(frozen=True, slots=True)
class Experiment:
    """The settings that all runs of one call of ``comoe scale`` or ``comoe compare`` share."""

    config: Path
    deepspeed: Path
    output: Path
    ranks: int
    overrides: tuple[str, ...] = ()
    verify: bool = True
    """Compare the digests of the checkpoints that interrupted runs go on from."""

    @staticmethod
    def from_command(given: argparse.Namespace) -> Experiment:
        """From the command line; the default is one rank per GPU, or one on a CPU.

        Raises:
            ValueError: fewer than one rank, or a name that no ready file has.
        """
        if given.ranks is not None and given.ranks < 1:
            raise ValueError(f"--ranks is {given.ranks}; it must be at least 1.")
        check_ranks(given.ranks)
        ranks = given.ranks or max(1, torch.cuda.device_count())
        files = (recipe_path(given.config), settings_path(given.deepspeed), given.output)
        places = (file.resolve() for file in files)
        return Experiment(*places, ranks, tuple(given.overrides), verify=not given.no_verify)

    @property
    def runs(self) -> Path:
        """Folder of the run folders."""
        return self.output / "runs"

    def failure_file(self, trial: Trial) -> Path:
        """File with the last lines of a failed run."""
        return self.output / "failed" / f"{trial.name}.txt"

    def problem(self, trial: Trial) -> str:
        """Why a run failed, in a line; empty if it did not."""
        file = self.failure_file(trial)
        return last_message(file.read_text(encoding="utf-8")) if file.is_file() else ""

    def refuse(self, keys: Sequence[str], flags: str) -> None:
        """Raise a ``ValueError`` for an override that the experiment sets itself."""
        given = {text.partition("=")[0].strip().lstrip("-") for text in self.overrides}
        if taken := sorted(given & {*keys, *OWN_KEYS}):
            raise ValueError(f"{taken[0]} cannot be an override here: {flags} set it.")


def record_settings(experiment: Experiment, *, file_name: str) -> None:
    """Write the shared settings, or check that they equal those of the earlier runs in this folder.

    Raises:
        ValueError: the folder holds an experiment with another recipe, DeepSpeed JSON or number of
            ranks, or files of others that the runs and the report would replace.
    """
    recipe = recipe_to_dict(load_recipe(experiment.config, experiment.overrides))
    settings = load_settings(experiment.deepspeed)
    text = json.dumps(
        {"ranks": experiment.ranks, "deepspeed": settings, "recipe": recipe}, indent=1
    )
    file = experiment.output / file_name
    if not file.is_file():
        _refuse_foreign(experiment, file_name)
        experiment.runs.mkdir(parents=True, exist_ok=True)
        write_atomic(file, text + "\n")
        return
    before = read_json(file)
    before = {key: before.get(key) for key in ("ranks", "deepspeed", "recipe")}
    # An option may be newer than the recorded recipe.
    keep_old_meanings(before["recipe"])
    before["recipe"] = json.loads(
        json.dumps(recipe_to_dict(recipe_from_dict(before["recipe"], saved=True)))
    )
    if difference := difference_of(before, json.loads(text)):
        raise ValueError(
            f"{experiment.output} holds an experiment with {difference}; its runs cannot be "
            f"compared. Choose another --output, or make the two agree."
        )


def _refuse_foreign(experiment: Experiment, file_name: str) -> None:
    """ValueError for an output folder without settings that holds something else than finished or begun runs."""
    output, runs = experiment.output, experiment.runs
    found = [path for path in runs.iterdir() if path.is_dir()] if runs.is_dir() else []
    ours = found and all(any((path / name).is_file() for name in OF_RUNS) for path in found)
    names = OTHERS if ours else (*OTHERS, *WRITTEN)
    if taken := [name for name in names if os.path.lexists(output / name)]:
        raise ValueError(
            f"{output} holds files of something else ({', '.join(taken)}, and no {file_name}), "
            "which would be replaced: choose another --output, or move them away."
        )


def difference_of(before: Any, now: Any, path: str = "") -> str:
    """The first difference of two nested dicts, as text; empty if they are equal."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return "" if before == now else f"{path} {before!r} instead of {now!r}"
    for key in dict.fromkeys([*before, *now]):
        place = f"{path}.{key}" if path else str(key)
        if found := difference_of(before.get(key), now.get(key), place):
            return found
    return ""


def run_trials(
    experiment: Experiment, trials: Sequence[Trial], *, report: Callable[[], object]
) -> list[Trial]:
    """Run what is not finished; an interrupted run resumes from its checkpoint.

    Args:
        experiment: the shared settings.
        trials: the runs.
        report: writes tables and plots, after each run.

    Returns:
        The failed runs; the last lines of their logs are in ``failed/``.

    Raises:
        ValueError: another process runs them.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP, after the current run has saved a checkpoint.
    """
    experiment.output.mkdir(parents=True, exist_ok=True)
    with locked(lock_beside(experiment.runs), str(experiment.output)):
        return _run_trials(experiment, trials, report=report)


def _run_trials(
    experiment: Experiment, trials: Sequence[Trial], *, report: Callable[[], object]
) -> list[Trial]:
    todo = [trial for trial in trials if not is_done(experiment, trial)]
    done = len(trials) - len(todo)
    print_now(f"{len(trials)} runs, {done} of them done; {experiment.ranks} rank(s) each")
    failed: list[Trial] = []
    seconds: list[float] = []
    for number, trial in enumerate(todo, start=done + 1):
        start = time.monotonic()
        problem = run_trial(experiment, trial)
        seconds.append(time.monotonic() - start)
        if problem:
            failed.append(trial)
        report()
        left = duration((len(trials) - number) * sum(seconds) / len(seconds))
        best = result_of(experiment, trial.name).get("best_value")
        outcome = "done" if best is None else f"validation {best:.4f}"
        outcome = f"FAILED ({problem})" if problem else outcome
        head = f"[{number}/{len(trials)}] {trial.name}: {outcome}"
        print_now(f"{head}, {duration(seconds[-1])}; {left} left")
    return failed


def is_done(experiment: Experiment, trial: Trial) -> bool:
    """True if the run has its results and, if it was trained, its export, which is written last."""
    whole = bool(trial.baseline) or (experiment.runs / trial.name / "export").is_dir()
    return whole and bool(result_of(experiment, trial.name).get("finished"))


def result_of(experiment: Experiment, name: str) -> dict[str, Any]:
    """``results.json`` of a run by its name; empty where it has none."""
    file = experiment.runs / name / "results.json"
    return read_json(file) if file.is_file() else {}


def run_trial(
    experiment: Experiment, trial: Trial, *, give_up: Callable[[], bool] | None = None
) -> str:
    """Run one trial to its end; empty if it has results, else the last message of its log.

    ``give_up`` is asked while it runs, and ends it by returning true.
    """
    failure = experiment.failure_file(trial)
    if trial.baseline:
        return _fit(experiment, trial)
    log = experiment.output / "logs" / f"{trial.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = command_of(experiment, trial)
    with doing("writing", log), log.open("a", encoding="utf-8") as file:
        print(f"$ {' '.join(command)}", file=file, flush=True)
        code = _run(command, file, give_up)
    # A run that was stopped ends with exit code 0 too: only the results count.
    if is_done(experiment, trial):
        _no_failure(failure)
        return ""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    head = f"exit code {code}; the last lines of {log}:"
    failure.parent.mkdir(exist_ok=True)
    write_atomic(failure, "\n".join([head, *lines[-TAIL:], ""]))
    return last_message("\n".join(lines))


def _fit(experiment: Experiment, trial: Trial) -> str:
    """Fit a classical model in this process: no rank is started for it."""
    from comoe.experiments.baselines import run_baseline

    failure, (name, *arguments) = experiment.failure_file(trial), trial.baseline
    names = [f"run.output_dir={experiment.runs}", f"run.name={trial.name}"]
    recipe = load_recipe(experiment.config, [*experiment.overrides, *trial.overrides, *names])
    try:
        run_baseline(recipe, experiment.runs / trial.name, name=name, arguments=arguments)
    except ValueError as error:
        failure.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(failure, f"comoe: {error}\n")
        return str(error)
    _no_failure(failure)
    return ""


def _no_failure(file: Path) -> None:
    file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        # Empty after the last failed run.
        file.parent.rmdir()


def last_message(log: str) -> str:
    """The last message of comoe in a log, else its last line."""
    lines = log.splitlines()
    ours = [line for line in lines if line.startswith("comoe:") and not line.startswith(STARTING)]
    return (ours or lines or [""])[-1]


def command_of(experiment: Experiment, trial: Trial) -> list[str]:
    """The command of one run: a new run, or ``--resume`` for an interrupted one."""
    # Not by the deepspeed command, which imports DeepSpeed twice before a rank does.
    train = [sys.executable, "-u", "-m", TRAIN, "--ranks", str(experiment.ranks)]
    train += ["--deepspeed", str(experiment.deepspeed)]
    folder = experiment.runs / trial.name
    if (folder / "config.yaml").is_file():
        unverified = [] if experiment.verify else ["--no-verify"]
        return [*train, "--resume", str(folder), *unverified]
    names = [f"run.output_dir={experiment.runs}", f"run.name={trial.name}"]
    overrides = [*experiment.overrides, *trial.overrides, *names]
    return [*train, "--config", str(experiment.config), *overrides]


def _run(command: Sequence[str], log: object, give_up: Callable[[], bool] | None = None) -> int:
    environment = environment_of_a_child()
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    # A session of its own: Ctrl-C must reach the ranks in the order that lets them save.
    child = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, interrupt)
    try:
        while give_up is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return child.wait(timeout=ASKED_EVERY)
            if give_up():
                child.terminate()
                break
        return child.wait()
    except KeyboardInterrupt:
        # The ranks get the signal or notice the end of what started them, save, and exit.
        child.terminate()
        child.wait()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        # The next run needs the whole machine; processes that stay too long are killed.
        deadline = time.monotonic() + GRACE
        while _members(child.pid):
            if time.monotonic() > deadline:
                os.killpg(child.pid, signal.SIGKILL)
            time.sleep(0.5)


def _members(group: int) -> list[int]:
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except ProcessLookupError:
            continue
    return found
