"""Stopping in time: Ctrl-C, SIGTERM, the end of the terminal (SIGHUP) or the launcher, agreed on by all ranks."""

from __future__ import annotations

import os
import signal
from types import FrameType

import psutil

SUPERVISED = "COMOE_ATTEMPT"
"""Set in a process that a supervisor started (``comoe.train.fault.supervisor``): the number of the
attempt, from 0."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What asks a run to save and stop."""


class StopSignal:
    """Notes that this rank was asked to stop. The trainer asks each step and reduces what it finds over ranks.

    A context: at its end the signals do what they did before, so that what comes after a run can be
    ended by them.

    A SIGTERM to the ``deepspeed`` command ends that command alone and leaves its ranks running
    unseen. So a rank started by it also watches the launcher and the command above it, and treats
    the loss of either as SIGTERM; so does a rank of torchrun with its agent. Make one as early as
    possible: a command that is lost before looks like one that never was.
    """

    def __init__(self) -> None:
        self.reason = ""
        self._watched = _launchers()
        before = {number: signal.getsignal(number) for number in SIGNALS}
        # nohup ignores the end of a terminal, and so do its children.
        self._before = {
            number: handler
            for number, handler in before.items()
            if (number, handler) != (signal.SIGHUP, signal.SIG_IGN)
        }

    def __enter__(self) -> StopSignal:
        for number in self._before:
            signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """True once this rank should stop."""
        if not self.reason and any(_gone(process) for process in self._watched):
            self.reason = "the launcher is gone"
        return bool(self.reason)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name


def _launchers() -> list[psutil.Process]:
    """The supervisor of this process, and torchrun's agent or deepspeed.launcher.launch and the
    ``deepspeed`` command above, as far as they are there; empty under plain python."""
    found: list[psutil.Process] = []
    try:
        parent: psutil.Process | None = psutil.Process(os.getppid())
        if SUPERVISED in os.environ and parent is not None:
            found.append(parent)
            parent = parent.parent()
        if parent is not None and "TORCHELASTIC_RUN_ID" in os.environ:
            found.append(parent)
        elif parent is not None and "deepspeed.launcher.launch" in " ".join(_command(parent)):
            found.append(parent)
            found += [above for above in [parent.parent()] if above is not None]
    except psutil.NoSuchProcess:
        # The first process of a container has the number 0 above it, which is no process.
        pass
    return found


def _gone(process: psutil.Process) -> bool:
    # A dead command whose parent has not asked for its exit code yet is a zombie, and counts as
    # running.
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
