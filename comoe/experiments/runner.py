"""Runs of an experiment, one after another, each its own ``deepspeed`` process with its own port."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

import psutil
import torch

from comoe.config.files import write_atomic
from comoe.config.load import load_recipe, recipe_from_dict, recipe_to_dict
from comoe.train.environment import free_port
from comoe.train.parallel.ds_config import load_settings

OWN = ("run.name", "run.output_dir", "run.overwrite")
"""Keys that the experiment sets for each run."""


@dataclass(frozen=True, slots=True)
class Experiment:
    """One call of ``launch/scale.py`` or ``launch/compare.py``."""

    config: Path
    """Recipe that all runs share."""
    deepspeed: Path
    """DeepSpeed JSON that all runs share."""
    output: Path
    """Folder for everything."""
    train_script: Path
    """launch/train.py."""
    ranks: int
    """Ranks of each run."""
    overrides: tuple[str, ...] = ()
    """``key=value`` words for all runs."""

    @property
    def runs(self) -> Path:
        """Folder of the run folders."""
        return self.output / "runs"


class Planned(Protocol):
    """What is needed of a run that has not been made yet."""

    @property
    def name(self) -> str:
        """Name of its run folder."""
        ...

    @property
    def overrides(self) -> list[str]:
        """``key=value`` words that make the recipe this run."""
        ...


def remember(experiment: Experiment, *, file_name: str = "scale.json") -> None:
    """Write down what all runs share, or make sure that it is what the earlier runs in this folder shared.

    Args:
        experiment: what they share.
        file_name: where, in the output folder.

    Raises:
        ValueError: the folder holds an experiment with another recipe, DeepSpeed JSON or number of
            ranks.
    """
    recipe = recipe_to_dict(load_recipe(experiment.config, experiment.overrides))
    shared = {
        "ranks": experiment.ranks,
        "deepspeed": load_settings(experiment.deepspeed),
        "recipe": recipe,
    }
    shared = json.loads(json.dumps(shared))
    file = experiment.output / file_name
    if not file.is_file():
        experiment.runs.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(shared, indent=1) + "\n")
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    # A recipe of before an option was there has its default.
    before["recipe"] = json.loads(json.dumps(recipe_to_dict(recipe_from_dict(before["recipe"]))))
    difference = difference_of(before, shared)
    if difference:
        raise ValueError(
            f"{experiment.output} holds an experiment with {difference}; its runs cannot be compared. Choose another "
            f"--output, or make the two agree."
        )


def difference_of(before: Any, now: Any, path: str = "") -> str:
    """The first place where two nested dicts differ, in words; empty where they are equal."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            if found := difference_of(
                before.get(key), now.get(key), f"{path}.{key}" if path else str(key)
            ):
                return found
        return ""
    return "" if before == now else f"{path} {before!r} instead of {now!r}"


TAIL = 20
"""Lines of the log that are kept of a run that failed."""


PORTS_TRIED = 3
"""Starts of a run whose port another process takes each time."""


GRACE = 180.0
"""Seconds that ranks get to save and leave once their launcher is gone."""


Run = TypeVar("Run", bound=Planned)


Report = Callable[[Sequence[Run]], None]
"""Writes tables and plots of the points so far."""


def run_points(
    experiment: Experiment,
    points: Sequence[Run],
    *,
    report: Report[Run],
    say: Callable[[str], None] = print,
) -> list[Run]:
    """Run what is not done yet; a run that was cut short goes on from its checkpoint.

    Args:
        experiment: what they share.
        points: the runs.
        report: called after each run.
        say: prints one line.

    Returns:
        The points that failed; their logs' last lines are in ``failed/``.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM, once the run under way has saved itself.
    """
    todo = [point for point in points if not is_done(experiment, point)]
    say(
        f"{len(points)} runs, {len(points) - len(todo)} of them done; {experiment.ranks} rank(s) each"
    )
    failed: list[Run] = []
    seconds: list[float] = []
    for number, point in enumerate(todo, start=len(points) - len(todo) + 1):
        began = time.monotonic()
        problem = run_point(experiment, point)
        seconds.append(time.monotonic() - began)
        if problem:
            failed.append(point)
        report(points)
        left = (len(points) - number) * sum(seconds) / len(seconds)
        outcome = f"FAILED ({problem})" if problem else _outcome(experiment.runs / point.name)
        say(
            f"[{number}/{len(points)}] {point.name}: {outcome}, {_in_words(seconds[-1])}; {_in_words(left)} left"
        )
    return failed


def chosen_ranks(asked: int | None) -> int:
    """Ranks of each run: as asked for, else one per GPU, else one.

    Raises:
        ValueError: fewer than one.
    """
    if asked is not None and asked < 1:
        raise ValueError(f"--ranks is {asked}; it must be at least 1.")
    return asked or max(1, torch.cuda.device_count())


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


def is_done(experiment: Experiment, point: Planned) -> bool:
    """True when the run left its results and its export, which comes last."""
    file = experiment.runs / point.name / "results.json"
    if not file.is_file() or not (file.parent / "export").is_dir():
        return False
    return bool(json.loads(file.read_text(encoding="utf-8")).get("finished"))


def run_point(experiment: Experiment, point: Planned) -> str:
    """Run one point to its end.

    Returns:
        Empty when it left its results; else what its log says at last, which ``failed/<point>.txt``
            tells at length.
    """
    log = experiment.output / "logs" / f"{point.name}.log"
    failure = failure_file(experiment, point)
    for folder in (log.parent, failure.parent):
        folder.mkdir(parents=True, exist_ok=True)
    for _ in range(PORTS_TRIED):
        command = command_of(experiment, point)
        with log.open("a", encoding="utf-8") as file:
            print(f"$ {' '.join(command)}", file=file, flush=True)
            begins = file.tell()
            code = _run(command, file)
        # Another process may have taken the port between its choice and the start.
        if b"EADDRINUSE" not in log.read_bytes()[begins:]:
            break
    # The launcher's exit code can be 0 when a rank was killed: only the results prove a run.
    if is_done(experiment, point):
        failure.unlink(missing_ok=True)
        return ""
    lines = [
        line.rstrip()
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    write_atomic(
        failure, "\n".join([f"exit code {code}; the last lines of {log}:", *lines[-TAIL:], ""])
    )
    return next((line for line in reversed(lines) if line.startswith("comoe:")), lines[-1])


def failure_file(experiment: Experiment, point: Planned) -> Path:
    """Where the last lines of a run that failed are."""
    return experiment.output / "failed" / f"{point.name}.txt"


def command_of(experiment: Experiment, point: Planned) -> list[str]:
    """The command of one run: a new one, or ``--resume`` where one was cut short."""
    launcher = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--quiet",
        "--master_port",
        str(free_port()),
    ]
    launcher += ["--num_accelerators", str(experiment.ranks)]
    train = [str(experiment.train_script), "--deepspeed", str(experiment.deepspeed)]
    folder = experiment.runs / point.name
    if (folder / "config.yaml").is_file():
        return [*launcher, *train, "--resume", str(folder)]
    names = [f"run.output_dir={experiment.runs}", f"run.name={point.name}"]
    return [
        *launcher,
        *train,
        "--config",
        str(experiment.config),
        *experiment.overrides,
        *point.overrides,
        *names,
    ]


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


def _outcome(folder: Path) -> str:
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    best = results.get("best_value")
    return f"validation {best:.4f}" if best is not None else "done"


def _in_words(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
