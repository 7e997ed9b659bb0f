"""``--restarts n``: a crashed run starts again from its last checkpoint, under the command that it was started by.

Each rank's process is then a small supervisor that runs the real rank as a child and never imports
torch. The supervisors agree over ``comoe.train.fault.channel``, on the port that the launcher
chose; the children of each attempt get another port to meet on. Rank 0's supervisor decides: when
one child crashed, all end theirs, and all start the next attempt together. An ordinary end, a
user's error and a stop signal are passed on and never restarted.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from comoe.train.fault.channel import Star, listen
from comoe.train.fault.signals import SUPERVISED, StopSignal

RUN_WORD, BECAUSE = "COMOE_RUN_WORD", "COMOE_RESTARTED_BECAUSE"
"""Variables of a child, beside the number of the attempt: a word of this start, and why the last
attempt ended."""


FINAL = (2, 3, 130)
"""Exit codes that would come again: the user's error, training that cannot go on, an
interruption."""


GRACE = 10.0
"""Seconds that the other children have to say why they end, after one crashed."""


MEETING = 1800.0
"""Seconds that supervisors of other machines have to come."""


LOOK_EVERY = 0.2
"""Seconds between two looks at the child."""


def is_child() -> bool:
    """True in the process that really trains."""
    return SUPERVISED in os.environ


def restart_in_words() -> Mapping[str, Any]:
    """For the log of a run: ``attempt`` and ``why``; empty in a first attempt and without ``--restarts``."""
    attempt = int(os.environ.get(SUPERVISED, "0"))
    return {"attempt": attempt, "why": os.environ.get(BECAUSE, "")} if attempt else {}


def supervise(*, restarts: int, stop: StopSignal, command: Sequence[str] | None = None) -> int:
    """Run this very command as a child until its run ends, and again at most ``restarts`` times when it crashed.

    Args:
        restarts: for the whole run, not for each rank.
        stop: notes signals to this process; they are passed on.
        command: other than this process's own.

    Returns:
        The exit code of the run.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    star = Star(rank, word=_word_of_the_launch(world))
    try:
        if rank == 0 and world > 1:
            star.serve(_listen_at(int(os.environ["MASTER_PORT"])))
        elif world > 1:
            place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            star.connect(*place, seconds=MEETING, give_up=stop.asked)
    except OSError as error:
        print(f"comoe: rank {rank}: --restarts: {error}", file=sys.stderr)
        return 2
    child = _Child(command or [sys.executable, "-u", *sys.argv], rank)
    judge = _Judge(world, restarts) if rank == 0 else None
    with stop:
        return _until_the_end(star, child, judge, stop)


def _word_of_the_launch(world: int) -> str:
    """A word that all supervisors of one launch have before they met: a digest of command line and number of ranks.

    It keeps apart two runs that chose one port, and turns away whoever talks to any open port. It
    is no secret: who sees the command line, as every user of these machines may, or guesses it, can
    speak as a supervisor, and so end the run or have it started again. Nobody can have another
    command run by it: each supervisor starts its own.
    """
    # The launcher numbers the ranks of a machine by an argument.
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    return hashlib.sha256(repr((world, words)).encode()).hexdigest()


def _listen_at(port: int) -> socket.socket:
    try:
        return listen(port)
    except OSError as error:
        raise OSError(
            f"port {port} of this machine cannot be used ({error}). If another run has it, give this one another port, "
            f"such as --master_port {port + 1} (a word of the launcher: before launch/train.py)."
        ) from error


def _until_the_end(star: Star, child: _Child, judge: _Judge | None, stop: StopSignal) -> int:
    """What every supervisor does: hear, look at the child, report, obey."""
    while True:
        came = star.receive(LOOK_EVERY)
        reports = child.look(asked_to_stop=stop.asked())
        if judge is None:
            for report in reports:
                star.send(report)
            orders = [
                message or {"do": "leave", "code": 1, "why": child.alone()} for _, message in came
            ]
        else:
            for rank, report in [*came, *((0, report) for report in reports)]:
                judge.hear(rank, report)
            judge.decide(star.connected())
            orders, judge.orders = judge.orders, []
            for order in orders:
                star.send(order)
        for order in orders:
            code = child.obey(order)
            if code is not None:
                hang_up_by = time.monotonic() + GRACE
                # Rank 0 hangs up last, so that its order arrives.
                while judge is not None and star.connected() and time.monotonic() < hang_up_by:
                    star.receive(LOOK_EVERY)
                star.close()
                return code


@dataclass(slots=True)
class _Child:
    """The real rank of one supervisor."""

    command: Sequence[str]
    rank: int
    process: subprocess.Popen[bytes] | None = None
    attempt: int = -1
    stopped: bool = False
    kill_at: float | None = None

    def look(self, *, asked_to_stop: bool) -> list[dict[str, Any]]:
        """Pass a signal on; reports for rank 0: that there was one, that the child has ended."""
        reports: list[dict[str, Any]] = []
        if asked_to_stop and not self.stopped:
            self.stopped = True
            reports.append({"stopped": True})
            if self.process is not None:
                self.process.send_signal(signal.SIGTERM)
        if self.process is None:
            return reports
        late = self.kill_at is not None and time.monotonic() > self.kill_at
        if late and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process.poll() is not None:
            reports.append(
                {"attempt": self.attempt, "code": self.process.returncode, "killed": late}
            )
            self.process = None
        return reports

    def obey(self, order: Mapping[str, Any]) -> int | None:
        """Start, end, or leave; the exit code in the last case."""
        if order["do"] == "start":
            self.attempt, self.kill_at = order["attempt"], None
            ours = {
                SUPERVISED: str(order["attempt"]),
                RUN_WORD: order["word"],
                BECAUSE: order["why"],
            }
            if "MASTER_PORT" in os.environ:
                ours["MASTER_PORT"] = str(order["port"])
            self.process = subprocess.Popen(self.command, env={**os.environ, **ours})
            if self.stopped:
                # The signal came while this order was under way.
                self.process.send_signal(signal.SIGTERM)
        elif order["do"] == "end" and self.process is not None:
            self.kill_at = time.monotonic() + order["grace"]
        elif order["do"] == "leave":
            if self.process is not None:
                self.process.kill()
                self.process.wait()
            if order.get("why"):
                print(f"comoe: rank {self.rank}: {order['why']}.", file=sys.stderr, flush=True)
            return int(order["code"])
        return None

    def alone(self) -> str:
        """Why this supervisor leaves when it lost rank 0's."""
        if self.attempt < 0:
            return (
                "rank 0's supervisor is gone, or belongs to another launch: the command after the launcher's own words "
                "must be the same on all machines, word by word"
            )
        return "rank 0's supervisor is gone, so nothing can be started again"


@dataclass(slots=True)
class _Judge:
    """Rank 0's part: what all supervisors do next."""

    world: int
    restarts: int
    orders: list[dict[str, Any]] = field(default_factory=list)
    lost: set[int] = field(default_factory=set)
    attempt: int = 0
    word: str = field(default_factory=lambda: uuid.uuid4().hex)
    ended: dict[int, int] = field(default_factory=dict)
    killed: set[int] = field(default_factory=set)
    first: int | None = None
    stopped: bool = False
    begun: bool = False
    meet_by: float = field(default_factory=lambda: time.monotonic() + MEETING)

    def hear(self, rank: int, report: Mapping[str, Any] | None) -> None:
        """Note what a supervisor said, or that it is gone."""
        if report is None:
            self.lost.add(rank)
        elif "stopped" in report:
            self.stopped = True
        elif report["attempt"] == self.attempt:
            self.ended[rank] = report["code"]
            if report["killed"]:
                self.killed.add(rank)
            if report["code"] and self.first is None:
                self.first = rank
                # Where all fail alike rank 0 has said why, and the others need not.
                alike = rank == 0 and report["code"] in FINAL
                self.orders.append({"do": "end", "grace": 0.0 if alike else GRACE})

    def decide(self, connected: set[int]) -> None:
        """Start once all are there; once all children of an attempt have ended leave, or start them again."""
        if self.lost:
            self._leave(
                1, f"rank {min(self.lost)}'s supervisor is gone, so nothing can be started again"
            )
        elif not self.begun:
            missing = set(range(1, self.world)) - connected
            if self.stopped:
                self._leave(130, "")
            elif not missing:
                self.begun = True
                self.orders.append(self._start(""))
            elif time.monotonic() > self.meet_by:
                self._leave(1, f"rank {min(missing)} did not come within {MEETING:.0f} s")
        elif len(self.ended) == self.world:
            self._next()

    def _next(self) -> None:
        codes = set(self.ended.values())
        final = next((code for code in FINAL if code in codes), None)
        why = self._why()
        if codes == {0}:
            self._leave(0, "")
        elif final is not None or self.stopped:
            self._leave(final or self._crash_code(), "")
        elif self.attempt >= self.restarts:
            self._leave(
                self._crash_code(), f"{why}. No restart is left (--restarts {self.restarts})"
            )
        else:
            self.attempt += 1
            self._say(f"{why}. Starting again, restart {self.attempt} of {self.restarts}")
            self.ended, self.killed, self.first = {}, set(), None
            self.orders.append(self._start(why))

    def _start(self, why: str) -> dict[str, Any]:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        return {"do": "start", "attempt": self.attempt, "word": self.word, "port": port, "why": why}

    def _why(self) -> str:
        """Who crashed; rather by a signal of its own than by noticing that another rank did."""
        if self.first is None:
            return ""
        signalled = [
            rank
            for rank, code in sorted(self.ended.items())
            if code < 0 and rank not in self.killed
        ]
        rank = self.first if self.ended[self.first] < 0 or not signalled else signalled[0]
        code = self.ended[rank]
        return f"rank {rank} " + (
            f"was ended by {signal.Signals(-code).name}"
            if code < 0
            else f"ended with exit code {code}"
        )

    def _crash_code(self) -> int:
        code = self.ended.get(self.first, 1)
        return code if code > 0 else 128 - code

    def _leave(self, code: int, why: str) -> None:
        if why:
            self._say(why)
        self.orders.append({"do": "leave", "code": code})

    def _say(self, text: str) -> None:
        print(f"comoe: {text}.", file=sys.stderr, flush=True)
