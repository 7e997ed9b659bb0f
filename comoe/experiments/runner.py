"""Runs of an experiment, one after another, each its own ``deepspeed`` process with its own port."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch

from comoe.config.files import write_atomic
from comoe.config.load import load_recipe, recipe_from_dict, recipe_to_dict
from comoe.evaluation.tables import duration
from comoe.train.environment import free_port
from comoe.train.parallel.ds_config import load_settings

OWN_KEYS = ("run.name", "run.output_dir", "run.overwrite", "train.seed")
"""Keys that the experiment sets for each run."""

TAIL = 20
"""Lines of the log that are kept of a run that failed."""

PORTS_TRIED = 3
"""Starts of a run whose port another process takes each time."""

GRACE = 180.0
"""Seconds that ranks get to save and leave once their launcher is gone."""

say = partial(print, flush=True)


@dataclass(frozen=True, slots=True)
class Trial:
    """One run: a part of an arm with a seed."""

    part: str
    """Beginning of its name."""
    seed: int
    words: tuple[str, ...]
    """``key=value`` overrides that make the recipe this run, but for the seed."""
    experts: int
    """Experts per layer."""

    @property
    def name(self) -> str:
        """Name of its run folder."""
        return f"{self.part}-s{self.seed}"

    @property
    def overrides(self) -> list[str]:
        """The part's words and the seed."""
        return [*self.words, f"train.seed={self.seed}"]


@dataclass(frozen=True, slots=True)
class Experiment:
    """What all runs of one call of ``launch/scale.py`` or ``launch/compare.py`` share."""

    config: Path
    deepspeed: Path
    output: Path
    """Folder of everything that the experiment writes."""
    train_script: Path
    """launch/train.py."""
    ranks: int
    """Ranks of each run."""
    overrides: tuple[str, ...] = ()

    @staticmethod
    def from_command(given: argparse.Namespace, *, train_script: Path) -> Experiment:
        """As the command line asks for it; ranks are one per GPU, or one, where it names no number.

        Raises:
            ValueError: fewer than one rank.
        """
        if given.ranks is not None and given.ranks < 1:
            raise ValueError(f"--ranks is {given.ranks}; it must be at least 1.")
        ranks = given.ranks or max(1, torch.cuda.device_count())
        files = (given.config.resolve(), given.deepspeed.resolve(), given.output.resolve())
        return Experiment(*files, train_script, ranks, tuple(given.overrides))

    @property
    def runs(self) -> Path:
        """Folder of the run folders."""
        return self.output / "runs"

    def failure_file(self, trial: Trial) -> Path:
        """The last lines of a run that failed."""
        return self.output / "failed" / f"{trial.name}.txt"

    def problem(self, trial: Trial) -> str:
        """Why a run failed, in a line; empty where it did not."""
        file = self.failure_file(trial)
        return last_words(file.read_text(encoding="utf-8")) if file.is_file() else ""

    def refuse(self, keys: Sequence[str], flags: str) -> None:
        """Refuse overrides that the experiment sets itself.

        Raises:
            ValueError: there is one.
        """
        given = {word.partition("=")[0].strip().lstrip("-") for word in self.overrides}
        if taken := sorted(given & {*keys, *OWN_KEYS}):
            raise ValueError(f"{taken[0]} cannot be an override here: {flags} set it.")


def remember(experiment: Experiment, *, file_name: str) -> None:
    """Write down what all runs share, or make sure that it is what the earlier runs in this folder shared.

    Raises:
        ValueError: the folder holds an experiment with another recipe, DeepSpeed JSON or number of
            ranks.
    """
    recipe = recipe_to_dict(load_recipe(experiment.config, experiment.overrides))
    settings = load_settings(experiment.deepspeed)
    text = json.dumps(
        {"ranks": experiment.ranks, "deepspeed": settings, "recipe": recipe}, indent=1
    )
    file = experiment.output / file_name
    if not file.is_file():
        experiment.runs.mkdir(parents=True, exist_ok=True)
        write_atomic(file, text + "\n")
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    # A recipe of before an option was there has its default.
    before["recipe"] = json.loads(json.dumps(recipe_to_dict(recipe_from_dict(before["recipe"]))))
    if difference := difference_of(before, json.loads(text)):
        raise ValueError(
            f"{experiment.output} holds an experiment with {difference}; its runs cannot be compared. Choose another "
            f"--output, or make the two agree."
        )


def difference_of(before: Any, now: Any, path: str = "") -> str:
    """The first place where two nested dicts differ, in words; empty where they are equal."""
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
    """Run what is not done yet; a run that was cut short goes on from its checkpoint.

    Args:
        experiment: what they share.
        trials: the runs.
        report: writes tables and plots of the runs so far, after each run.

    Returns:
        The runs that failed; their logs' last lines are in ``failed/``.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM, once the run under way has saved itself.
    """
    todo = [trial for trial in trials if not is_done(experiment, trial)]
    done = len(trials) - len(todo)
    say(f"{len(trials)} runs, {done} of them done; {experiment.ranks} rank(s) each")
    failed: list[Trial] = []
    seconds: list[float] = []
    for number, trial in enumerate(todo, start=done + 1):
        began = time.monotonic()
        problem = run_trial(experiment, trial)
        seconds.append(time.monotonic() - began)
        if problem:
            failed.append(trial)
        report()
        left = duration((len(trials) - number) * sum(seconds) / len(seconds))
        outcome = f"FAILED ({problem})" if problem else "done"
        if not problem:
            best = _results(experiment, trial).get("best_value")
            outcome = "done" if best is None else f"validation {best:.4f}"
        head = f"[{number}/{len(trials)}] {trial.name}: {outcome}"
        say(f"{head}, {duration(seconds[-1])}; {left} left")
    return failed


def leave_after(work: Callable[[], bool]) -> NoReturn:
    """Do the work of a command that can be typed again, and end the process.

    Args:
        work: true when some run failed.

    Exit codes: 0 all is done, 1 a run failed, 2 the user can mend it, 130 after Ctrl-C.
    """
    try:
        sys.exit(1 if work() else 0)
    except (ValueError, OSError) as error:
        print(f"comoe: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("comoe: stopped; the same command goes on.", file=sys.stderr)
        sys.exit(130)


def is_done(experiment: Experiment, trial: Trial) -> bool:
    """True when the run left its results and its export, which comes last."""
    export = experiment.runs / trial.name / "export"
    return export.is_dir() and bool(_results(experiment, trial).get("finished"))


def _results(experiment: Experiment, trial: Trial) -> dict[str, Any]:
    file = experiment.runs / trial.name / "results.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def run_trial(experiment: Experiment, trial: Trial) -> str:
    """Run one trial to its end; empty when it left its results, else the last words of its log."""
    log = experiment.output / "logs" / f"{trial.name}.log"
    failure = experiment.failure_file(trial)
    for folder in (log.parent, failure.parent):
        folder.mkdir(parents=True, exist_ok=True)
    for _ in range(PORTS_TRIED):
        command = command_of(experiment, trial)
        with log.open("a", encoding="utf-8") as file:
            print(f"$ {' '.join(command)}", file=file, flush=True)
            begins = file.tell()
            code = _run(command, file)
        # Another process may have taken the port between its choice and the start.
        if b"EADDRINUSE" not in log.read_bytes()[begins:]:
            break
    # The launcher's exit code can be 0 when a rank was killed: only the results prove a run.
    if is_done(experiment, trial):
        failure.unlink(missing_ok=True)
        return ""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    said = [f"exit code {code}; the last lines of {log}:", *lines[-TAIL:], ""]
    write_atomic(failure, "\n".join(said))
    return last_words("\n".join(lines))


def last_words(log: str) -> str:
    """The last message of comoe in a log, else its last line."""
    lines = log.splitlines()
    ours = [line for line in lines if line.startswith("comoe:")]
    return (ours or lines or [""])[-1]


def command_of(experiment: Experiment, trial: Trial) -> list[str]:
    """The command of one run: a new one, or ``--resume`` where one was cut short."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet"]
    launcher += ["--master_port", str(free_port()), "--num_accelerators", str(experiment.ranks)]
    train = [str(experiment.train_script), "--deepspeed", str(experiment.deepspeed)]
    folder = experiment.runs / trial.name
    if (folder / "config.yaml").is_file():
        return [*launcher, *train, "--resume", str(folder)]
    names = [f"run.output_dir={experiment.runs}", f"run.name={trial.name}"]
    words = [*experiment.overrides, *trial.overrides, *names]
    return [*launcher, *train, "--config", str(experiment.config), *words]


def _run(command: Sequence[str], log: object) -> int:
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    # A session of its own: Ctrl-C must reach the ranks in the order that lets them save.
    child = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )
    try:
        with _terminations_interrupt():
            return child.wait()
    except KeyboardInterrupt:
        # The ranks see that their launcher's parent is gone, agree on it, save, and leave.
        child.terminate()
        child.wait()
        raise
    finally:
        _wait_for_group(child.pid)


def _wait_for_group(group: int) -> None:
    """Wait until no process of a run is left, so that the next one has the machine; end those that stay."""
    until = time.monotonic() + GRACE
    while _members(group):
        if time.monotonic() > until:
            os.killpg(group, signal.SIGKILL)
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


@contextmanager
def _terminations_interrupt() -> Iterator[None]:
    """Inside, SIGTERM does what Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
