"""``--restarts n``: a crashed run restarts from its last checkpoint, with the same command.

Each rank's process is then a small supervisor that runs the real rank as a child and never imports
torch. The supervisors communicate over ``comoe.train.fault.channel``, on the launcher's port; the
children of each attempt use another port. Rank 0's supervisor decides: if one child crashes, all
end their children and start the next attempt together. A normal end, a user's error and a stop
signal are passed on and never restarted.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comoe.config.failure import doing
from comoe.train.fault.channel import SideChannel, listen
from comoe.train.fault.signals import SUPERVISED, StopSignal
from comoe.train.launchers import LOOPBACK

RUN_WORD, BECAUSE = "COMOE_RUN_WORD", "COMOE_RESTARTED_BECAUSE"
"""Environment variables of a child, besides the number of the attempt: an identifier of this start,
and why the last attempt ended."""

SECRET = "COMOE_LAUNCH_SECRET"
"""Environment variable with a text that only the ranks of this launch know."""

FINAL = (2, 3, 130)
"""Exit codes that are not restarted: the user's error, training that cannot continue, an
interruption."""

GRACE = 10.0
"""Seconds for the other children to report why they end, after one crashed."""

MEETING = 1800.0
"""Seconds for supervisors of other machines to connect."""

LOOK_EVERY = 0.2
"""Seconds between two checks of the child."""


def is_child() -> bool:
    """True in the process that trains."""
    return SUPERVISED in os.environ


def restart_record() -> Mapping[str, Any]:
    """For the log of a run: ``attempt`` and ``why``; empty in a first attempt and without ``--restarts``."""
    attempt = int(os.environ.get(SUPERVISED, "0"))
    return {"attempt": attempt, "why": os.environ.get(BECAUSE, "")} if attempt else {}


def supervise(*, restarts: int, stop: StopSignal, command: Sequence[str] | None = None) -> int:
    """Run this command as a child until its run ends, and again at most ``restarts`` times after a crash.

    Args:
        restarts: for the whole run, not for each rank.
        stop: records signals to this process; they are passed on.
        command: instead of this process's own.

    Returns:
        The exit code of the run.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    one_machine = os.environ.get("CROSS_SIZE", "1") == "1"
    try:
        word = "" if world == 1 else _word_of_the_launch(world, one_machine=one_machine)
        channel = SideChannel(rank, word=word)
        if rank == 0 and world > 1:
            server = _listen_at(int(os.environ["MASTER_PORT"]), one_machine=one_machine)
            channel.serve(server, others=world - 1)
        elif world > 1:
            address = LOOPBACK if one_machine else os.environ["MASTER_ADDR"]
            port = int(os.environ["MASTER_PORT"])
            channel.connect(address, port, seconds=MEETING, give_up=stop.asked)
    except OSError as error:
        print(f"comoe: rank {rank}: --restarts: {error}", file=sys.stderr)
        return 2
    child = _Child(command or [sys.executable, "-u", *sys.orig_argv[1:]], rank)
    coordinator = _Coordinator(world, restarts) if rank == 0 else None
    with stop:
        return _until_the_end(channel, child, coordinator, stop)


def _word_of_the_launch(world: int, *, one_machine: bool) -> str:
    """What all supervisors of one launch share: a digest of command line, number of ranks, and a secret.

    The command line, which every user of these machines may see, separates two runs on one port.
    The secret keeps others out: ``SECRET`` of the environment, else on one machine a file that this
    user alone can read. On several machines without ``SECRET`` there is none: who knows the command
    and reaches the port before all ranks have connected can end or restart the run. No one can make
    it run another command: each supervisor starts its own.

    Raises:
        OSError: the file cannot be kept from others.
    """
    # The launcher passes the rank within a machine as an argument.
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    secret = os.environ.get(SECRET) or (_secret_of_the_parent() if one_machine else "")
    return hashlib.sha256(repr((world, words, secret)).encode()).hexdigest()


def _secret_of_the_parent() -> str:
    """A random text, the same for all processes that one launcher started on this machine."""
    folder = Path(tempfile.gettempdir()) / f"comoe-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise OSError(
            f"{folder} can be read by others; remove it, or set {SECRET} to a secret of your own"
        )
    parent = os.getppid()
    try:
        # Numbers of processes are used again; when a process began is in the 22nd field.
        began = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        began = "0"
    path = folder / f"launch-{parent}-{began}"
    # The first one's stays, and is whole when it is there.
    aside = folder / f".{secrets.token_hex(8)}"
    aside.touch(mode=0o600, exist_ok=False)
    try:
        with doing("writing", aside):
            aside.write_text(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    finally:
        aside.unlink()
    return path.read_text()


def _listen_at(port: int, *, one_machine: bool) -> socket.socket:
    try:
        return listen(port, one_machine=one_machine)
    except OSError as error:
        raise OSError(
            f"port {port} of this machine cannot be used ({error}). If another run has it, give this one another port, "
            f"such as --master_port {port + 1} (a word of the launcher: before the script)."
        ) from error


def _until_the_end(
    channel: SideChannel, child: _Child, coordinator: _Coordinator | None, stop: StopSignal
) -> int:
    """The loop of every supervisor: receive, check the child, report, obey."""
    while True:
        came = channel.receive(LOOK_EVERY)
        reports = child.look(asked_to_stop=stop.asked())
        if coordinator is None:
            for report in reports:
                channel.send(report)
            orders = [
                message or {"do": "leave", "code": 1, "why": child.alone()} for _, message in came
            ]
        else:
            for rank, report in [*came, *((0, report) for report in reports)]:
                coordinator.receive(rank, report)
            coordinator.decide(channel.connected())
            orders, coordinator.orders = coordinator.orders, []
            for order in orders:
                channel.send(order)
        for order in orders:
            code = child.obey(order)
            if code is not None:
                deadline = time.monotonic() + GRACE
                # Rank 0 closes last, so that its order arrives.
                while (
                    coordinator is not None and channel.connected() and time.monotonic() < deadline
                ):
                    channel.receive(LOOK_EVERY)
                channel.close()
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
        """Pass a signal on; returns reports for rank 0: a signal, the end of the child."""
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
            code = self.process.returncode
            reports.append({"attempt": self.attempt, "code": code, "killed": late})
            self.process = None
        return reports

    def obey(self, order: Mapping[str, Any]) -> int | None:
        """Start the child, end it, or leave; returns the exit code in the last case."""
        if order["do"] == "start":
            self.attempt, self.kill_at = order["attempt"], None
            own = {
                SUPERVISED: str(order["attempt"]),
                RUN_WORD: order["word"],
                BECAUSE: order["why"],
            }
            if "MASTER_PORT" in os.environ:
                own["MASTER_PORT"] = str(order["port"])
            self.process = subprocess.Popen(self.command, env={**os.environ, **own})
            if self.stopped:
                # The signal came before this order.
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
        """Why this supervisor leaves after losing rank 0's."""
        if self.attempt < 0:
            return (
                "rank 0's supervisor is gone, or belongs to another launch: the command after the "
                "launcher's arguments must be identical on all machines"
            )
        return "rank 0's supervisor is gone, so no restart is possible"


@dataclass(slots=True)
class _Coordinator:
    """Rank 0's decisions for all supervisors."""

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

    def receive(self, rank: int, report: Mapping[str, Any] | None) -> None:
        """Record a supervisor's report, or its loss (None)."""
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
                # If all fail alike, rank 0's message is enough.
                alike = rank == 0 and report["code"] in FINAL
                self.orders.append({"do": "end", "grace": 0.0 if alike else GRACE})

    def decide(self, connected: set[int]) -> None:
        """Start when all are connected; when all children of an attempt have ended, leave or restart."""
        if self.lost:
            lost = f"rank {min(self.lost)}'s supervisor is gone"
            self._leave(1, f"{lost}, so no restart is possible")
        elif not self.begun:
            missing = set(range(1, self.world)) - connected
            if self.stopped:
                self._leave(130, "")
            elif not missing:
                self.begun = True
                self.orders.append(self._start(""))
            elif time.monotonic() > self.meet_by:
                self._leave(1, f"rank {min(missing)} did not connect within {MEETING:.0f} s")
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
            no_more = f"No restart is left (--restarts {self.restarts})"
            self._leave(self._crash_code(), f"{why}. {no_more}")
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
        """Which rank crashed: first one that a signal ended, because the others only notice its loss."""
        if self.first is None:
            return ""
        ended = sorted(self.ended.items())
        signaled = [rank for rank, code in ended if code < 0 and rank not in self.killed]
        rank = self.first if self.ended[self.first] < 0 or not signaled else signaled[0]
        code = self.ended[rank]
        if code < 0:
            return f"rank {rank} was ended by {signal.Signals(-code).name}"
        return f"rank {rank} ended with exit code {code}"

    def _crash_code(self) -> int:
        code = self.ended.get(self.first, 1)
        return code if code > 0 else 128 - code

    def _leave(self, code: int, why: str) -> None:
        if why:
            self._say(why)
        self.orders.append({"do": "leave", "code": code})

    def _say(self, text: str) -> None:
        print(f"comoe: {text}.", file=sys.stderr, flush=True)
