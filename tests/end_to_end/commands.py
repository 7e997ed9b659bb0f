"""Type comoe's commands as a user does, each in its own process group, and look at what they leave behind.

The libraries take longer to import than a short run takes. So where the process is not what a test
is about, ``train_in_ranks`` trains in forked ranks, and ``Terminal.here`` runs a script in this one.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest

from comoe.train.environment import free_port
from tests.helpers_ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
SMOKE = "launch/configs/smoke.yaml"
TASKS = ("mood", "topic", "strength", "aspects", "mentions", "stance")
"""The tasks of the smoke recipe, in order."""
STEPS = 10
"""Steps of a run under ``EVENTFUL``."""
LEAN = ("run.plots=false", "run.histograms=false", "train.measure_experts=false")
"""For runs whose figures, and what their experts are worth, nobody looks at."""
EVENTFUL = (
    *LEAN,
    f"train.max_steps={STEPS}", "train.save_every=2", "train.eval_every=4", "train.keep_checkpoints=3",
    "data.limit_eval=40", "train.batch_size=48", "train.micro_batch_size=12", "train.schedule=linear",
    "train.warmup_fraction=0.2", "model.dropout=0.2", "model.moe.balance_rate=0.05", "data.mixing=progress",
    "tasks.topic=null", "tasks.strength=null", "tasks.aspects=null",
)  # fmt: skip
"""Everything that a resume must restore has an effect: dropout, two micro-steps, a rate that
changes, momenta, a balance bias that moves fast, an evaluation between, rates of the data sets that
follow it, a task that a restart must not drop a second time. One task per data set: each more would
only take time."""
TIMEOUT = 300.0
"""Seconds after which a command is ended and its test fails: many times what it takes alone on two
cores."""


@dataclass(frozen=True, slots=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """Both streams, without what the ``deepspeed`` command itself logs."""
        return "\n".join(
            line for line in (self.out + self.err).splitlines() if not is_launchers(line)
        )


def is_launchers(line: str) -> bool:
    """True for a log line of DeepSpeed's runner and launcher, which run outside of our processes."""
    return line.startswith("[20") and any(
        name in line for name in ("runner.py", "launch.py", "real_accelerator.py")
    )


@dataclass(slots=True)
class Typed:
    """A command that may still run."""

    process: subprocess.Popen[bytes]
    log: Path

    def wait(self, timeout: float = TIMEOUT) -> Done:
        """Wait for its end; a command that takes too long is ended with everything it started."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(
                f"it did not end in {timeout} s\n{self.output('out')}\n{self.output('err')}"
            ) from None
        return Done(code, self.output("out"), self.output("err"))

    def output(self, stream: str) -> str:
        """What it has written so far to ``out`` or ``err``."""
        return self.log.with_suffix(f".{stream}").read_text(encoding="utf-8", errors="replace")

    def kill(self) -> None:
        """SIGKILL to all processes of the command, while it runs: afterwards its number may be somebody else's."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Terminal:
    """Where commands are typed: the repository's folder, and no variable that a user need not set.

    Args:
        folder: takes the logs of the commands.
        home: ``COMOE_HOME``, so that tests leave the user's cache alone.
    """

    def __init__(self, folder: Path, *, home: Path) -> None:
        self.folder = folder
        self.typed: list[Typed] = []
        ours = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "DS_", "CROSS_", "SLURM_")
        self._environment = {
            key: value for key, value in os.environ.items() if not key.startswith(ours)
        }
        self._home = str(home)
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        self._environment |= {"PATH": path, "COMOE_HOME": str(home)}

    def start(self, *words: str | Path) -> Typed:
        """Type a command and do not wait."""
        log = self.folder / f"command-{len(self.typed)}"
        # Files, not pipes: a rank that outlives its command must not die of a closed pipe.
        with log.with_suffix(".out").open("wb") as out, log.with_suffix(".err").open("wb") as err:
            process = subprocess.Popen(
                [str(word) for word in words], cwd=ROOT, env=self._environment, stdout=out, stderr=err,
                start_new_session=True,
            )  # fmt: skip
        self.typed.append(Typed(process, log))
        return self.typed[-1]

    def run(self, *words: str | Path) -> Done:
        """Type a command and wait for its end."""
        return self.start(*words).wait()

    def python(self, *words: str | Path) -> Done:
        """Run a launch script in one process."""
        return self.run(sys.executable, *words)

    def here(self, script: str, *words: str | Path) -> Done:
        """Run a launch script that starts no ranks in this process."""
        out, err, code = StringIO(), StringIO(), 0
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setenv("COMOE_HOME", self._home)
            patch.setattr(sys, "argv", [script, *map(str, words)])
            patch.setattr(sys, "path", list(sys.path))
            try:
                runpy.run_path(str(ROOT / script), run_name="__main__")
            except SystemExit as ended:
                code = ended.code or 0
        return Done(code, out.getvalue(), err.getvalue())

    def close(self) -> None:
        """End what still runs."""
        for typed in self.typed:
            typed.kill()


def deepspeed(ranks: int, *, settings: str | Path = "zero2") -> list[str | Path]:
    """The beginning of the README's training command, on a port that no other run has."""
    path = settings if isinstance(settings, Path) else f"ds_configs/{settings}.json"
    command = shutil.which("deepspeed", path=str(Path(sys.executable).parent)) or "deepspeed"
    words = f"--master_port {free_port()} --num_accelerators {ranks} launch/train.py --deepspeed"
    return [command, *words.split(), path]


def train_in_ranks(
    ranks: int,
    home: Path,
    overrides: Sequence[str] = (),
    *,
    config: str | Path = SMOKE,
    settings: str | Path | None = None,
    resume: Path | None = None,
    killed_at: int | None = None,
) -> str:
    """Train a recipe, or resume a run, in forked ranks; what rank 0 said on both streams.

    Args:
        ranks: number of them.
        home: ``COMOE_HOME``.
        overrides: ``key=value`` options.
        config: recipe; a relative path begins at the repository's folder.
        settings: name in ``ds_configs/``, or a file; None is the run's own with ``resume``, else ZeRO 2.
        resume: run folder.
        killed_at: SIGKILL to every rank once this step is in the log; fails as a dead rank does.
    """
    request = {
        "config": None if resume else ROOT / config,
        "deepspeed": ROOT / f"ds_configs/{settings}.json"
        if isinstance(settings, str)
        else settings,
        "overrides": [str(word) for word in overrides],
        "resume": resume,
    }
    work = "tests.end_to_end.commands:train_here"
    options = {"request": request, "home": str(home), "killed_at": killed_at}
    return run_ranks(work, ranks, timeout=TIMEOUT, **options)[0]


def train_here(request: dict[str, Any], home: str, killed_at: int | None = None) -> str:
    """What one forked rank runs."""
    from comoe.train.request import Request
    from comoe.train.run import run_request

    os.environ["COMOE_HOME"] = home
    if killed_at is not None:
        Thread(target=die, args=(request, killed_at), daemon=True).start()
    said = StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        run_request(Request(**request))
    return said.getvalue()


def die(request: dict[str, Any], step: int) -> None:
    """End this process, a rank of the smoke recipe, after a step, without a word."""
    output = next(word for word in request["overrides"] if word.startswith("run.output_dir="))
    run = Path(output.partition("=")[2]) / "smoke"
    wait_for(lambda: max(train_lines(run), default=0) >= step, what=f"step {step}")
    os.kill(os.getpid(), signal.SIGKILL)


def end_behind(run: Path, *, step: int) -> None:
    """Leave a finished run as if it had been ended behind one of its checkpoints."""
    for path in (run / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    for left in ("results.json", "checkpoints/best.json"):
        (run / left).unlink(missing_ok=True)
    shutil.rmtree(run / "export")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a last line that is still being written is left out."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def train_lines(run: Path) -> dict[int, dict[str, Any]]:
    """Step -> its training line; a step that is there twice fails."""
    lines = [line for line in read_lines(run / "metrics.jsonl") if line["split"] == "train"]
    by_step = {line["step"]: line for line in lines}
    assert len(by_step) == len(lines), "a step was logged twice"
    return by_step


def losses(run: Path) -> list[float]:
    """The global loss of each step."""
    return [line["loss"] for _, line in sorted(train_lines(run).items())]


def wait_for(condition: Callable[[], object], *, what: str, seconds: float = TIMEOUT) -> None:
    """Look until it is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen in {seconds} s"
        time.sleep(0.005)


def processes_of(folder: Path) -> list[str]:
    """Command lines of the living processes that name a folder of this test, our own commands and ranks alone."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if process.status() != psutil.STATUS_ZOMBIE and any(
                str(folder) in word for word in words
            ):
                found.append(" ".join(words))
        except psutil.Error:
            continue
    return found


def rank_process(folder: Path, rank: int) -> psutil.Process:
    """The process that trains as one rank of a run below a folder, not its supervisor."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(folder) in word for word in process.cmdline()):
                variables = process.environ()
                supervisor = "--restarts" in process.cmdline() and "COMOE_ATTEMPT" not in variables
                if variables.get("RANK") == str(rank) and not supervisor:
                    found.append(process)
        except psutil.Error:
            continue
    assert len(found) == 1, f"{len(found)} processes of rank {rank}"
    return found[0]
