"""A rank that dies or freezes ends the run in time, with one message; ``--restarts`` goes on by itself."""

import json
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from comoe.inference.checkpoint_folder import whats_wrong
from tests.end_to_end.commands import (
    EVENTFUL,
    SMOKE,
    STEPS,
    Done,
    Typed,
    deepspeed,
    losses,
    processes_of,
    rank_process,
    read_lines,
    train_lines,
    wait_for,
)

pytestmark = pytest.mark.end_to_end

SLACK = 15.0
"""Seconds beyond the time-out: the launchers look once a second, and other tests may run beside
this one."""


@dataclass(frozen=True, slots=True)
class Lost:
    """A run that lost a rank."""

    folder: Path
    done: Done
    seconds: float
    """From the loss to the end of the command."""

    @property
    def message(self) -> str:
        """What comoe said at its end; once."""
        (message,) = [line for line in self.done.said.splitlines() if line.startswith("comoe: ")]
        return message


def lose(typed: Typed, runs: Path, *, rank: int, number: signal.Signals, step: int) -> Lost:
    """Send a signal to one rank after a step, and wait for the end of the command."""
    folder = runs / "smoke"
    wait_for(lambda: max(train_lines(folder), default=0) >= step, what=f"step {step}")
    process = rank_process(runs, rank)
    began = time.monotonic()
    process.send_signal(number)
    try:
        done = typed.wait(90)
        seconds = time.monotonic() - began
        wait_for(
            lambda: not processes_of(runs), what="the end of all processes of the run", seconds=40
        )
    finally:
        if process.is_running():
            process.kill()
    return Lost(folder, done, seconds)


def test_a_killed_rank_ends_the_run_with_one_message_that_names_rank_machine_and_step(
    tmp_path, terminal
):
    words = deepspeed(2, settings="zero1")
    typed = terminal.start(*words, "--config", SMOKE, f"run.output_dir={tmp_path}", *EVENTFUL)
    killed = lose(typed, tmp_path, rank=1, number=signal.SIGKILL, step=5)
    assert killed.done.code not in (0, None) and killed.seconds < SLACK, (
        "long before the time-out of half an hour"
    )
    said = re.fullmatch(
        r"comoe: rank 0: rank 1 on machine \S+ died at step (\d+) \((?:training|saving|evaluation|drawing)\): its "
        r"process ended without a message, as after kill -9 or when memory runs out\. "
        r"The last whole checkpoint is good: "
        rf"go on with --resume {re.escape(str(killed.folder))}\.",
        killed.message,
    )
    assert said and 5 <= int(said[1]) < STEPS, killed.message
    assert "Traceback" not in killed.done.said and not (killed.folder / "results.json").exists()
    assert any(not whats_wrong(path) for path in (killed.folder / "checkpoints").glob("step-*"))


def test_a_frozen_rank_ends_the_run_after_the_timeout_also_when_it_is_rank_0(tmp_path, terminal):
    typed = terminal.start(
        *deepspeed(2), "--config", SMOKE, f"run.output_dir={tmp_path}", "train.max_steps=4000", "train.eval_every=2000",
        "train.save_every=2", "parallel.timeout_seconds=5",
    )  # fmt: skip
    lost = lose(typed, tmp_path, rank=0, number=signal.SIGSTOP, step=4)
    assert lost.done.code not in (0, None) and 4 < lost.seconds < 5 + SLACK
    assert re.match(
        r"comoe: rank 1: rank 0 on machine \S+ at step \d+ \(\w+\) is silent since \d+ s: its ",
        lost.message,
    )
    assert "Traceback" not in lost.done.said
    assert any(not whats_wrong(path) for path in (lost.folder / "checkpoints").glob("step-*"))


def test_a_run_with_restarts_survives_a_killed_rank_with_the_numbers_of_an_undisturbed_one(
    tmp_path, terminal, uninterrupted
):
    words = ("--restarts", "2", "--config", SMOKE, f"run.output_dir={tmp_path}", *EVENTFUL)
    lost = lose(
        terminal.start(*deepspeed(2), *words), tmp_path, rank=1, number=signal.SIGKILL, step=5
    )
    assert lost.done.code == 0, lost.done.said
    assert sorted(train_lines(lost.folder)) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(losses(lost.folder), losses(uninterrupted), rtol=1e-6)
    ours, theirs = (
        json.loads((run / "results.json").read_text()) for run in (lost.folder, uninterrupted)
    )
    assert ours["posts"] == theirs["posts"] and ours["best_step"] == theirs["best_step"]
    assert "comoe: rank 1 was ended by SIGKILL. Starting again, restart 1 of 2." in lost.done.said
    lines = read_lines(lost.folder / "metrics.jsonl")
    (resume,) = [line["step"] for line in lines if line["split"] == "resume"]
    assert resume >= 4
    assert [line for line in lines if line["split"] == "event"] == [
        {
            "split": "event",
            "event": "restart",
            "step": resume,
            "attempt": 1,
            "why": "rank 1 was ended by SIGKILL",
        }
    ]
