"""A dead or silent rank ends the whole run, in time and with one message: who, on which machine, at which step.

Each rank has a thread that tells rank 0 about once a second where its training is, over connections
of its own (``comoe.train.fault.channel``): collectives cannot tell, because they wait for the very
rank that is missing.

* A rank that died closes its connection: noticed at once, in every phase of a run.
* A rank whose process is frozen, or whose machine is gone, says nothing for ``timeout_seconds``: in
    every phase too.
* All processes live, but no rank gets any further for ``timeout_seconds``: counted while steps are
  trained, and over the batches of an evaluation. Not counted are preparation, the first step
  (compilation), saving, scoring and the end, which may take as long as they need; one rank in such
  a phase is enough, because the others wait for it.
* Rank 0 is the middle: when it is lost, all others notice by themselves.
* A collective that fails on some rank waits for this thread to find out who is missing.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from comoe.distributed import all_gather_objects, broadcast_object, rank, world_size
from comoe.train.fault.channel import Star, listen

PACKAGE = f"{Path(__file__).resolve().parents[2]}{os.sep}"
"""Folder of our own code; a checkout below a folder called comoe holds site-packages too."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one rank runs."""

    machine: str
    """Name of the machine."""
    node: str
    """Its number in the run; two of the same name differ in it."""
    pid: int
    """Number of the process there."""
    born: float
    """When the process began: the number may be somebody else's later."""


def own_place() -> Place:
    """This process."""
    node = os.environ.get("CROSS_RANK", "0")
    return Place(socket.gethostname(), node, os.getpid(), psutil.Process().create_time())


def kill(place: Place) -> None:
    """End a process of this machine that is frozen: it cannot end by itself, and a launcher waits half a minute."""
    try:
        process = psutil.Process(place.pid)
        if process.create_time() == place.born:
            process.kill()
    except psutil.Error:
        return


def where_main_thread_is() -> str:
    """File, line and function of ours that the main thread is in, and the innermost; empty in a collective."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    innermost, ours = "", ""
    while frame is not None and not ours:
        name = frame.f_code.co_filename
        if "/torch/distributed/" in name:
            return ""
        said = f"{name.rpartition('/')[2]}:{frame.f_lineno} {frame.f_code.co_name}"
        innermost = innermost or said
        ours = said if name.startswith(PACKAGE) else ""
        frame = frame.f_back
    return innermost if ours in ("", innermost) else f"{ours} > {innermost}"


PREPARING = "preparing"
"""The phase before training, in which an error is most likely one of the recipe."""


LOST = 4
"""Exit code of a rank that ends because another one is lost."""


BEATS_PER_SECOND = 500
"""Messages that rank 0 gets per second at most: with more ranks than these each one speaks less
often."""


GRACE = 6.0
"""Seconds that the other ranks have to end by themselves after one ended with an error: mostly all
fail alike."""


MISSED = 4
"""Beats in a row that a rank may miss once a collective has failed: whoever missed more is the one
to blame."""


@dataclass(slots=True)
class Heard:
    """What is known of one rank."""

    at: float
    """When it spoke last; seconds of this process's clock, as all here."""
    moved: float
    """When it was seen to get further last."""
    ticks: int = -1
    """Grows with its progress."""
    step: int = 0
    """Optimizer steps it has done."""
    phase: str = PREPARING
    """What it does."""
    counted: bool = False
    """Whether ``timeout_seconds`` counts in this phase."""
    where: str = ""
    """Where its main thread is, once it stands still; empty while it waits for other ranks in a
    collective."""


@dataclass(slots=True)
class Watchdog:
    """Watches the other ranks from ``start`` to ``leave``, and until then just notes where this one is.

    Args:
        end: called with the exit code when the run cannot go on; it must not return.
    """

    timeout_seconds: float = 1800.0
    advice: str = ""
    """What to do after the end; the last sentence of the message."""
    end: Callable[[int], Any] = os._exit
    step: int = 0
    phase: str = PREPARING
    counted: bool = False
    ticks: int = 0
    beat: float = 1.0
    _star: Star | None = None
    _places: list[Place] = field(default_factory=list)
    _heard: dict[int, Heard] = field(default_factory=dict)
    _gone: dict[int, tuple[int, str, float]] = field(default_factory=dict)
    _trouble: tuple[float, int, str] | None = None
    _judged: float = 0.0
    _own: Heard = field(default_factory=lambda: Heard(0.0, 0.0))

    def start(self, *, timeout_seconds: float) -> None:
        """Begin to watch; every rank must call it, right after the process group exists.

        Raises:
            OSError: on every rank, when one of them cannot reach rank 0; naming it and the address.
        """
        self.timeout_seconds = timeout_seconds
        self.beat = max(min(1.0, timeout_seconds / 10), world_size() / BEATS_PER_SECOND)
        self._places = all_gather_objects(own_place())
        server = listen() if rank() == 0 else None
        port, word = broadcast_object(
            (server.getsockname()[1], uuid.uuid4().hex) if server else None
        )
        star = Star(rank(), word=word, patience=timeout_seconds)
        failed = ""
        try:
            if server:
                star.serve(server)
            else:
                # Well before the collective below gives up waiting for this rank.
                star.connect(
                    os.environ["MASTER_ADDR"], port, seconds=min(60.0, timeout_seconds / 3)
                )
        except OSError as error:
            failed = str(error)
        if lonely := [said for said in all_gather_objects(failed) if said]:
            star.close()
            more = f" So it is with {len(lonely) - 1} more." if len(lonely) > 1 else ""
            raise OSError(f"{lonely[0]}{more}")
        now = time.monotonic()
        self._heard = {other: Heard(now, now) for other in range(world_size()) if other != rank()}
        self._own = Heard(now, now)
        self._judged = now
        self._star = star
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def reached(self, step: int) -> None:
        """This rank did a training step: from now on the time to the next one counts."""
        self.step, self.phase, self.counted = step, "training", True
        self.ticks += 1

    def batch(self, more: bool) -> None:
        """This rank did a batch of an evaluation; the time to the next one counts if there are ``more``."""
        self.counted = more
        self.ticks += 1

    def enter(self, phase: str) -> None:
        """What comes next may take as long as it needs."""
        self.phase, self.counted = phase, False
        self.ticks += 1

    @contextmanager
    def paused(self, phase: str) -> Iterator[None]:
        """A phase that may take as long as it needs, between two steps."""
        before = self.phase, self.counted
        self.enter(phase)
        try:
            yield
        finally:
            self.phase, self.counted = before
            self.ticks += 1

    def leave(self, code: int, why: str = "") -> None:
        """This rank ends with ``code``, and says so to the others: what follows is no loss."""
        if self._star is not None:
            self._gone[rank()] = (code, why, time.monotonic())
            self._star.send({"gone": rank(), "code": code, "why": why, "step": self.step})

    def explain(self, error: BaseException) -> None:
        """Wait until it is known why a collective failed here, and end this process with that message."""
        if self._star is None:
            return
        said = str(error).splitlines()[0][:300]
        self._trouble = self._trouble or (time.monotonic(), rank(), said)
        self._star.send({"trouble": said})
        time.sleep(MISSED * self.beat + 2 * GRACE)
        self._conclude(
            f"a collective failed on {self._name(rank())} at step {self.step}: {said}.", []
        )

    def _watch(self) -> None:
        due = 0.0
        while not self._left():
            if time.monotonic() >= due:
                due = time.monotonic() + self.beat
                self._star.send(self._beat_message())
            for other, message in self._star.receive(self.beat / 4):
                self._hear(other, message)
            self._judge(time.monotonic())

    def _beat_message(self) -> dict[str, Any]:
        now = time.monotonic()
        if self._own.ticks != self.ticks:
            self._own.ticks, self._own.moved = self.ticks, now
        self._own.step, self._own.phase, self._own.counted = self.step, self.phase, self.counted
        # Looking costs nothing then: this rank stands still.
        standing = now - self._own.moved > self.timeout_seconds / 2
        self._own.where = where_main_thread_is() if standing and self.counted else ""
        own = self._own
        return {
            "step": own.step,
            "phase": own.phase,
            "counted": own.counted,
            "ticks": own.ticks,
            "where": own.where,
        }

    def _hear(self, other: int, message: dict[str, Any] | None) -> None:
        if message is None:
            if other not in self._gone:
                broken = self._star.broken.get(other, "")
                what = (
                    f"cannot be reached at {{}}: {broken}; {_UNREACHED}"
                    if broken
                    else f"died at {{}}: {_DIED}"
                )
                self._conclude(
                    f"{self._name(other)} {what.format(self._at(self._heard[other]))}", [other]
                )
            return
        now = time.monotonic()
        if "say" in message:
            self._finish(message["say"], message["blamed"])
        elif "gone" in message:
            self._gone[message["gone"]] = (message["code"], message["why"], now)
            self._heard[other].step = message["step"]
            if rank() == 0:
                self._star.send(message)
        elif "trouble" in message:
            self._trouble = self._trouble or (now, other, message["trouble"])
        else:
            heard = self._heard[other]
            heard.at = now
            if message["ticks"] != heard.ticks:
                heard.ticks, heard.moved = message["ticks"], now
            heard.step, heard.phase = message["step"], message["phase"]
            heard.counted, heard.where = message["counted"], message["where"]

    def _judge(self, now: float) -> None:
        if now - self._judged > max(3 * self.beat, 3.0):
            # This process itself was frozen: what it missed meanwhile is nobody's fault.
            for heard in [*self._heard.values(), self._own]:
                heard.at = heard.moved = now
        self._judged = now
        for other, (code, why, at) in list(self._gone.items()):
            if code and now - at > GRACE and other != rank():
                self._finish(
                    f"{self._name(other)} ended at {self._at(self._heard[other])}: {why}",
                    [],
                    code=code,
                )
        middle = rank() == 0
        seen = {
            r: heard
            for r, heard in self._heard.items()
            if r not in self._gone and (middle or r == 0)
        }
        limit = MISSED * self.beat if self._trouble else self.timeout_seconds
        silent = [r for r, heard in seen.items() if now - heard.at > limit]
        if silent:
            names = " and ".join(f"{self._name(r)} at {self._at(seen[r])}" for r in silent[:8])
            plural = "are" if len(silent) > 1 else "is"
            seconds = now - min(seen[r].at for r in silent)
            self._conclude(f"{names} {plural} silent since {seconds:.0f} s: {_SILENT}", silent)
        elif middle and self._trouble and now - self._trouble[0] > MISSED * self.beat + GRACE:
            _, first, said = self._trouble
            self._conclude(
                f"a connection broke, noticed by {self._name(first)} at step {self.step}: {said}.",
                [],
            )
        elif middle:
            self._judge_progress(now, seen)

    def _judge_progress(self, now: float, seen: dict[int, Heard]) -> None:
        ranks = {0: self._own, **seen}
        if not all(heard.counted for heard in ranks.values()):
            return
        if now - max(heard.moved for heard in ranks.values()) <= self.timeout_seconds:
            return
        # Whoever is in no collective keeps the others waiting; on a GPU nobody may be seen in one.
        outside = [r for r, heard in ranks.items() if heard.where]
        names = ", ".join(f"{self._name(r)} is in {ranks[r].where}" for r in outside[:8])
        rest = (
            "the others wait for it in a collective"
            if len(outside) < len(ranks)
            else "none is in a collective"
        )
        said = f"{names}; {rest}" if outside else "all of them wait in a collective"
        slowest = min(ranks.values(), key=lambda heard: heard.step)
        self._conclude(
            f"no rank got any further for {self.timeout_seconds:.0f} s (parallel.timeout_seconds) at "
            f"{self._at(slowest)}: {said}.",
            [],
        )

    def _conclude(self, text: str, blamed: list[int]) -> None:
        """End the run: on rank 0 tell all others first, elsewhere for this rank alone."""
        if rank() == 0 and not self._left():
            self._star.send({"say": text, "blamed": blamed})
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
            # Past Python's buffers: the main thread may hold their locks for ever.
            os.write(
                sys.stderr.fileno(), f"\ncomoe: rank {rank()}: {text} {self.advice}\n".encode()
            )
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

    def _at(self, heard: Heard) -> str:
        # Ranks go in step, and what was heard last is up to a beat old.
        late = self.step >= heard.step
        return f"step {self.step} ({self.phase})" if late else f"step {heard.step} ({heard.phase})"


_DIED = "its process ended without a word, as after kill -9 or when memory runs out."


_UNREACHED = "its machine or the network is gone, or its process is frozen."


_SILENT = "its process is frozen, or its machine cannot be reached."
