"""A dead or silent rank ends the run in time, with one message: which rank, on which machine, at which step.

A thread of each rank reports its training state to rank 0 about once a second, over a side channel
(``comoe.train.fault.channel``): collectives wait for the missing rank, and cannot name it.

* A rank that dies closes its connection: detected at once, in every phase of a run.
* A rank whose process is frozen, or whose machine is gone, is silent for ``timeout_seconds``: in
  every phase.
* All processes live, but no rank makes progress for ``timeout_seconds``: during training steps and
  the batches of an evaluation. Preparation, the first step (compilation), saving, scoring and the
  end have no time limit; one rank in such a phase is enough, because the others wait for it.
* Every other rank detects the loss of rank 0 on its own.
* A collective that fails on a rank waits for this thread to find the missing rank.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from comoe.distributed import all_gather_objects, broadcast_object, rank, world_size
from comoe.train.fault.channel import SideChannel, listen
from comoe.train.launchers import LOOPBACK

PACKAGE = f"{Path(__file__).resolve().parents[2]}{os.sep}"
"""Folder of the package; a checkout below a folder called comoe may contain site-packages."""


@dataclass(frozen=True, slots=True)
class Place:
    """Machine and process of one rank."""

    machine: str
    node: str
    """Number of the machine in the run, which distinguishes machines of the same name."""
    pid: int
    created: float
    """Creation time of the process, because process ids are reused."""


def own_place() -> Place:
    """This process."""
    node = os.environ.get("CROSS_RANK", "0")
    return Place(socket.gethostname(), node, os.getpid(), psutil.Process().create_time())


def loopback_of_process() -> str:
    """Equal in two processes if they reach one another by the loopback: containers of one machine do not."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return f"{socket.gethostname()} {os.environ.get('CROSS_RANK', '0')}"


def kill(place: Place) -> None:
    """Kill a frozen process of this machine: it cannot end by itself, and a launcher waits half a minute."""
    try:
        process = psutil.Process(place.pid)
        if process.create_time() == place.created:
            process.kill()
    except psutil.Error:
        return


def where_main_thread_is() -> str:
    """The main thread's frame in the package, and its innermost frame; empty in a collective."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    innermost, ours = "", ""
    while frame is not None and not ours:
        name = frame.f_code.co_filename
        if "/torch/distributed/" in name:
            return ""
        text = f"{name.rpartition('/')[2]}:{frame.f_lineno} {frame.f_code.co_name}"
        innermost = innermost or text
        ours = text if name.startswith(PACKAGE) else ""
        frame = frame.f_back
    return innermost if ours in ("", innermost) else f"{ours} > {innermost}"


PREPARING = "preparing"
"""The phase before training, in which most errors are those of the recipe."""

LOST = 4
"""Exit code of a rank that ends because another one is lost."""

BEATS_PER_SECOND = 500
"""Maximum of messages to rank 0 per second: with more ranks the beats are slower."""

GRACE = 6.0
"""Seconds for the other ranks to end after one ended with an error: usually all fail alike."""

MISSED = 4
"""Consecutive beats that a rank may miss after a failed collective; more identify the lost rank."""


@dataclass(slots=True)
class RankStatus:
    """The last known state of one rank."""

    at: float
    """Time of its last message, by this process's clock."""
    moved: float
    """Time of its last progress."""
    ticks: int = -1
    """Progress counter."""
    step: int = 0
    phase: str = PREPARING
    counted: bool = False
    """Whether ``timeout_seconds`` applies to this phase."""
    where: str = ""
    """Frame of its main thread if it makes no progress; empty in a collective."""


@dataclass(slots=True)
class Watchdog:
    """Watches the other ranks from ``start`` to ``leave``.

    Args:
        end: called with the exit code if the run cannot continue; it must not return.
    """

    timeout_seconds: float = 1800.0
    advice: str = ""
    """Last sentence of the message: what the user can do."""
    end: Callable[[int], Any] = os._exit
    step: int = 0
    phase: str = PREPARING
    counted: bool = False
    ticks: int = 0
    beat: float = 1.0
    _channel: SideChannel | None = None
    _places: list[Place] = field(default_factory=list)
    _ranks: dict[int, RankStatus] = field(default_factory=dict)
    _gone: dict[int, tuple[int, str, float]] = field(default_factory=dict)
    _trouble: tuple[float, int, str] | None = None
    _assessed: float = 0.0
    _own: RankStatus = field(default_factory=lambda: RankStatus(0.0, 0.0))

    def start(self, *, timeout_seconds: float) -> None:
        """Start watching; every rank must call it, right after the process group exists.

        Raises:
            OSError: on every rank, if one of them cannot reach rank 0.
        """
        self.timeout_seconds = timeout_seconds
        self.beat = max(min(1.0, timeout_seconds / 10), world_size() / BEATS_PER_SECOND)
        found = all_gather_objects((own_place(), loopback_of_process()))
        self._places = [place for place, _ in found]
        one_machine = len({loopback for _, loopback in found}) == 1
        # A single rank opens no port.
        wanted = rank() == 0 and world_size() > 1
        server = listen(one_machine=one_machine) if wanted else None
        port, word = broadcast_object(
            (server.getsockname()[1] if server else 0, secrets.token_hex(32))
        )
        channel = SideChannel(rank(), word=word, patience=timeout_seconds)
        failed = ""
        try:
            if server:
                channel.serve(server, others=world_size() - 1)
            elif rank() > 0:
                address = LOOPBACK if one_machine else os.environ["MASTER_ADDR"]
                # Well before the collective below times out.
                channel.connect(address, port, seconds=min(60.0, timeout_seconds / 3))
        except OSError as error:
            failed = str(error)
        if errors := [text for text in all_gather_objects(failed) if text]:
            channel.close()
            more = f" {len(errors) - 1} more ranks have this error." if len(errors) > 1 else ""
            raise OSError(f"{errors[0]}{more}")
        now = time.monotonic()
        self._ranks = {
            other: RankStatus(now, now) for other in range(world_size()) if other != rank()
        }
        self._own = RankStatus(now, now)
        self._assessed = now
        self._channel = channel
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def reached(self, step: int) -> None:
        """Note a training step of this rank; the time to the next one counts."""
        self.step, self.phase, self.counted = step, "training", True
        self.ticks += 1

    def batch(self, more: bool) -> None:
        """Note a batch of an evaluation; the time to the next one counts if there are ``more``."""
        self.counted = more
        self.ticks += 1

    def enter(self, phase: str) -> None:
        """Enter a phase without a time limit."""
        self.phase, self.counted = phase, False
        self.ticks += 1

    @contextmanager
    def paused(self, phase: str) -> Iterator[None]:
        """A phase without a time limit, between two steps."""
        before = self.phase, self.counted
        self.enter(phase)
        try:
            yield
        finally:
            self.phase, self.counted = before
            self.ticks += 1

    def leave(self, code: int, why: str = "") -> None:
        """Tell the others that this rank ends with ``code``: it is not lost."""
        if self._channel is not None:
            self._gone[rank()] = (code, why, time.monotonic())
            self._channel.send({"gone": rank(), "code": code, "why": why, "step": self.step})

    def explain(self, error: BaseException) -> None:
        """Wait for the reason why a collective failed here, and end this process with it."""
        if self._channel is None:
            return
        text = str(error).splitlines()[0][:300]
        self._trouble = self._trouble or (time.monotonic(), rank(), text)
        self._channel.send({"trouble": text})
        time.sleep(MISSED * self.beat + 2 * GRACE)
        where = f"on {self._name(rank())} at step {self.step}"
        self._conclude(f"a collective failed {where}: {text}.", [])

    def _watch(self) -> None:
        due = 0.0
        while not self._left():
            if time.monotonic() >= due:
                due = time.monotonic() + self.beat
                self._channel.send(self._beat_message())
            for other, message in self._channel.receive(self.beat / 4):
                self._receive(other, message)
            self._assess(time.monotonic())

    def _beat_message(self) -> dict[str, Any]:
        now = time.monotonic()
        if self._own.ticks != self.ticks:
            self._own.ticks, self._own.moved = self.ticks, now
        self._own.step, self._own.phase, self._own.counted = self.step, self.phase, self.counted
        # Only a rank without progress inspects its frames, so this costs nothing.
        stuck = now - self._own.moved > self.timeout_seconds / 2
        self._own.where = where_main_thread_is() if stuck and self.counted else ""
        return {
            name: getattr(self._own, name)
            for name in ("step", "phase", "counted", "ticks", "where")
        }

    def _receive(self, other: int, message: dict[str, Any] | None) -> None:
        if message is None:
            if other not in self._gone:
                broken = self._channel.broken.get(other, "")
                at = self._at(self._ranks[other])
                died, unreached = f"died at {at}: {_DIED}", f"cannot be reached at {at}: {broken}; "
                text = unreached + _UNREACHED if broken else died
                self._conclude(f"{self._name(other)} {text}", [other])
            return
        now = time.monotonic()
        if "say" in message:
            self._finish(message["say"], message["blamed"])
        elif "gone" in message:
            self._gone[message["gone"]] = (message["code"], message["why"], now)
            self._ranks[other].step = message["step"]
            if rank() == 0:
                self._channel.send(message)
        elif "trouble" in message:
            self._trouble = self._trouble or (now, other, message["trouble"])
        else:
            status = self._ranks[other]
            status.at = now
            if message["ticks"] != status.ticks:
                status.ticks, status.moved = message["ticks"], now
            status.step, status.phase = message["step"], message["phase"]
            status.counted, status.where = message["counted"], message["where"]

    def _assess(self, now: float) -> None:
        if now - self._assessed > max(3 * self.beat, 3.0):
            # This process itself was frozen, and missed the messages of the others.
            for status in [*self._ranks.values(), self._own]:
                status.at = status.moved = now
        self._assessed = now
        for other, (code, why, at) in list(self._gone.items()):
            if code and now - at > GRACE and other != rank():
                self._finish(
                    f"{self._name(other)} ended at {self._at(self._ranks[other])}: {why}",
                    [],
                    code=code,
                )
        middle = rank() == 0
        seen = {
            r: status
            for r, status in self._ranks.items()
            if r not in self._gone and (middle or r == 0)
        }
        limit = MISSED * self.beat if self._trouble else self.timeout_seconds
        silent = [r for r, status in seen.items() if now - status.at > limit]
        if silent:
            names = " and ".join(f"{self._name(r)} at {self._at(seen[r])}" for r in silent[:8])
            plural = "are" if len(silent) > 1 else "is"
            seconds = now - min(seen[r].at for r in silent)
            self._conclude(f"{names} {plural} silent since {seconds:.0f} s: {_SILENT}", silent)
        elif middle and self._trouble and now - self._trouble[0] > MISSED * self.beat + GRACE:
            _, first, text = self._trouble
            where = f"noticed by {self._name(first)} at step {self.step}"
            self._conclude(f"a connection broke, {where}: {text}.", [])
        elif middle:
            self._assess_progress(now, seen)

    def _assess_progress(self, now: float, seen: dict[int, RankStatus]) -> None:
        ranks = {0: self._own, **seen}
        if not all(status.counted for status in ranks.values()):
            return
        if now - max(status.moved for status in ranks.values()) <= self.timeout_seconds:
            return
        # A rank outside a collective delays the others; on a GPU no rank may be seen in one.
        outside = [r for r, status in ranks.items() if status.where]
        names = ", ".join(f"{self._name(r)} is in {ranks[r].where}" for r in outside[:8])
        some = len(outside) < len(ranks)
        rest = "the others wait for it in a collective" if some else "none is in a collective"
        text = f"{names}; {rest}" if outside else "all of them wait in a collective"
        slowest = min(ranks.values(), key=lambda status: status.step)
        self._conclude(
            f"no rank made progress for {self.timeout_seconds:.0f} s (parallel.timeout_seconds) at "
            f"{self._at(slowest)}: {text}.",
            [],
        )

    def _conclude(self, text: str, blamed: list[int]) -> None:
        """End the run: rank 0 notifies all others first, another rank ends on its own."""
        if rank() == 0 and not self._left():
            self._channel.send({"say": text, "blamed": blamed})
        self._finish(text, blamed)

    def _finish(self, text: str, blamed: list[int], *, code: int = LOST) -> None:
        if self._left():
            return
        here = self._places[rank()].node
        left = [
            r
            for r, place in enumerate(self._places)
            if place.node == here and r not in {*blamed, *self._gone}
        ]
        if left[:1] == [rank()]:
            # Not through Python's buffers, whose locks the main thread may hold forever.
            who = f"rank {rank()}: " if len(self._places) > 1 else ""
            # Another rank may have said what to do.
            advice = "" if self.advice in text else f" {self.advice}"
            os.write(sys.stderr.fileno(), f"\ncomoe: {who}{text}{advice}\n".encode())
            for culprit in blamed:
                if self._places[culprit].node == here:
                    kill(self._places[culprit])
        self._gone[rank()] = (code, text, time.monotonic())
        self.end(code)

    def _left(self) -> bool:
        return rank() in self._gone

    def _name(self, other: int) -> str:
        place = self._places[other]
        several = len({place.node for place in self._places}) > 1
        return (
            f"rank {other} on machine {place.machine}{f' (node {place.node})' if several else ''}"
        )

    def _at(self, status: RankStatus) -> str:
        # Ranks are in the same step, and a status is up to one beat old.
        late = self.step >= status.step
        return (
            f"step {self.step} ({self.phase})" if late else f"step {status.step} ({status.phase})"
        )


_DIED = "its process ended without a message, as after kill -9 or when memory runs out."

_UNREACHED = "its machine or the network is gone, or its process is frozen."

_SILENT = "its process is frozen, or its machine cannot be reached."
