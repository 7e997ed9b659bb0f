"""The rules of the watchdog, one rank's in one process, several ranks' on threads; real ranks are killed end to end."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from pathlib import Path

import psutil
import pytest

import comoe.train.fault.watchdog as module
from comoe.train.fault.channel import SideChannel, listen
from comoe.train.fault.watchdog import (
    LOST,
    Place,
    RankStatus,
    Watchdog,
    own_place,
    where_main_thread_is,
)


class Ended(list):
    """Takes exit codes instead of ending the tests."""

    def wait(self, seconds: float = 5.0) -> int | None:
        end = time.monotonic() + seconds
        while not self and time.monotonic() < end:
            time.sleep(0.01)
        return self[0] if self else None


@pytest.fixture
def ended() -> Ended:
    return Ended()


@pytest.fixture
def watch(ended: Ended):
    watchdog = Watchdog(end=ended.append, advice="What to do.")
    yield watchdog
    watchdog.leave(0)


def test_a_rank_that_stands_still_in_training_ends_and_says_where(
    watch: Watchdog, ended: Ended, capfd: pytest.CaptureFixture[str]
) -> None:
    watch.start(timeout_seconds=0.6)
    watch.reached(7)
    began = time.monotonic()
    assert ended.wait() == LOST
    assert 0.5 < time.monotonic() - began < 3
    said = capfd.readouterr().err.strip()
    assert said.startswith(
        "comoe: no rank made progress for 1 s (parallel.timeout_seconds) at step 7 (training): rank 0 on"
    )
    assert "is in test_watchdog.py:" in said
    assert said.endswith("What to do.") and len(ended) == 1


def test_steps_and_batches_that_come_in_time_keep_a_run_alive(
    watch: Watchdog, ended: Ended
) -> None:
    watch.start(timeout_seconds=0.6)
    for step in range(8):
        watch.reached(step)
        time.sleep(0.1)
    with watch.paused("evaluation"):
        for _ in range(8):
            watch.batch(True)
            time.sleep(0.1)
    assert not ended


def test_a_single_rank_opens_no_port(watch: Watchdog) -> None:
    before = {each.laddr for each in psutil.Process().net_connections() if each.status == "LISTEN"}
    watch.start(timeout_seconds=5.0)
    assert before == {
        each.laddr for each in psutil.Process().net_connections() if each.status == "LISTEN"
    }


@pytest.mark.parametrize("phase", ["preparing", "first step", "saving", "scoring", "finishing"])
def test_a_phase_that_may_take_long_does_not_count(
    watch: Watchdog, ended: Ended, phase: str
) -> None:
    watch.start(timeout_seconds=0.3)
    if phase == "first step":
        watch.enter(phase)
    elif phase == "saving":
        watch.reached(1)
        watch.enter(phase)
    elif phase == "scoring":
        watch.reached(1)
        watch.enter("evaluation")
        watch.batch(True)
        watch.batch(False)
    elif phase == "finishing":
        watch.reached(1)
        watch.enter(phase)
    time.sleep(1.0)
    assert not ended


def test_after_a_pause_training_counts_again_also_when_the_pause_was_cut_short(
    watch: Watchdog, ended: Ended
) -> None:
    watch.start(timeout_seconds=0.4)
    watch.reached(3)
    with pytest.raises(ValueError), watch.paused("evaluation"):
        time.sleep(0.7)
        assert not ended
        raise ValueError
    assert watch.phase == "training" and ended.wait() == LOST


def test_a_rank_that_has_left_is_not_watched_any_more(watch: Watchdog, ended: Ended) -> None:
    watch.start(timeout_seconds=0.3)
    watch.reached(1)
    watch.leave(0)
    time.sleep(0.8)
    assert not ended


def test_without_a_start_nothing_is_watched_and_nothing_fails(
    watch: Watchdog, ended: Ended
) -> None:
    watch.reached(1)
    watch.explain(RuntimeError("a collective"))
    watch.leave(2, "why")
    assert not ended


def test_where_names_our_line_and_the_innermost_and_is_empty_in_a_collective(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert where_main_thread_is().startswith("watchdog.py:")
    # A checkout in a folder called comoe, with an environment of its own.
    package, installed = "comoe/comoe/train", "comoe/.venv/site-packages"
    monkeypatch.setattr(module, "PACKAGE", f"{tmp_path / 'comoe/comoe'}{os.sep}")
    places = {}
    for folder in (package, installed, "torch/distributed"):
        file = tmp_path / folder / "inner.py"
        file.parent.mkdir(parents=True)
        file.write_text("def wait(look):\n    return look()\n")
        scope: dict = {}
        exec(compile(file.read_text(), str(file), "exec"), scope)
        found = []

        def look(found=found) -> None:
            thread = threading.Thread(target=lambda: found.append(where_main_thread_is()))
            thread.start()
            thread.join()

        scope["wait"](look)
        places[folder] = found[0]
    assert places[package].startswith("inner.py:2 wait > threading.py:")
    assert places[installed].startswith("threading.py:") and ">" not in places[installed]
    assert places["torch/distributed"] == ""


def threads() -> int:
    return sum(thread.name == "watchdog" and thread.is_alive() for thread in threading.enumerate())


def test_a_rank_that_cannot_reach_rank_0_tells_the_others_and_fails_in_time(
    watch: Watchdog, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    told: list = []
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(module, "rank", lambda: 1)
    monkeypatch.setattr(module, "broadcast_object", lambda _: (port, "word"))
    monkeypatch.setattr(module, "all_gather_objects", lambda value: [told.append(value), value][1:])
    before, began = threads(), time.monotonic()
    with pytest.raises(OSError, match=f"rank 1 cannot reach rank 0 at 127.0.0.1, port {port} "):
        watch.start(timeout_seconds=1.0)
    assert time.monotonic() - began < 5 and threads() == before
    assert told[1].startswith(f"rank 1 cannot reach rank 0 at 127.0.0.1, port {port} "), (
        "the others end by that"
    )


def test_the_others_end_with_the_reason_of_a_rank_that_cannot_reach_rank_0(
    watch: Watchdog, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(
        [
            [(own_place(), "")],
            ["", "rank 1 cannot reach rank 0 at a.", "rank 2 cannot reach rank 0 at a."],
        ]
    )
    monkeypatch.setattr(module, "all_gather_objects", lambda _: next(answers))
    before = threads()
    with pytest.raises(
        OSError, match="^rank 1 cannot reach rank 0 at a. 1 more ranks have this error.$"
    ):
        watch.start(timeout_seconds=1.0)
    assert threads() == before


class Ranks:
    """Three ranks as rank 0 sees them: the others are ends of a channel that speak when they are told to."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, ended: Ended, *, timeout_seconds: float
    ) -> None:
        self.watch = Watchdog(end=ended.append, timeout_seconds=timeout_seconds, beat=0.1)
        here = own_place()
        self.places = [here, Place("b", "1", here.pid, 0.0), Place("c", "2", here.pid, 0.0)]
        server = listen()
        now = time.monotonic()
        self.watch._places = self.places
        self.watch._ranks = {1: RankStatus(now, now), 2: RankStatus(now, now)}
        self.watch._own, self.watch._assessed = RankStatus(now, now), now
        self.watch._channel = SideChannel(0).serve(server)
        self.others = {
            r: SideChannel(r).connect("127.0.0.1", server.getsockname()[1], seconds=5)
            for r in (1, 2)
        }
        self.silent: set[int] = set()
        self.told: dict[int, list] = {1: [], 2: []}
        monkeypatch.setattr(module, "world_size", lambda: 3)
        threading.Thread(target=self.watch._watch, daemon=True).start()

    def live(
        self,
        seconds: float,
        ended: Ended,
        *,
        where: dict[int, str] | None = None,
        ticking: bool = False,
    ) -> None:
        """Let time pass; the ranks that are not silent send their beats."""
        end, ticks = time.monotonic() + seconds, 0
        while time.monotonic() < end and not ended:
            ticks += ticking
            beat = {"step": self.watch.step, "phase": "training", "counted": True, "ticks": ticks}
            for number, other in self.others.items():
                if number not in self.silent:
                    other.send(beat | {"where": (where or {}).get(number, "")})
                    self.told[number] += [message for _, message in other.receive(0.01)]
            if ticking:
                self.watch.reached(self.watch.step + 1)
            time.sleep(0.05)
        for number, other in self.others.items():
            if number not in self.silent:
                self.told[number] += [message for _, message in other.receive(0.3)]

    def verdicts(self, number: int) -> list[str]:
        return [message["say"] for message in self.told[number] if message and "say" in message]


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch, ended: Ended):
    made = Ranks(monkeypatch, ended, timeout_seconds=1.5)
    made.watch.reached(5)
    yield made
    made.watch.leave(0)


def test_a_rank_that_dies_is_named_to_all_with_machine_and_step_at_once(
    ranks: Ranks, ended: Ended, capfd: pytest.CaptureFixture[str]
) -> None:
    ranks.live(0.3, ended, ticking=True)
    assert not ended
    ranks.others.pop(2).close()
    ranks.live(0.5, ended)
    assert ended == [LOST]
    (said,) = ranks.verdicts(1)
    assert said.startswith(
        f"rank 2 on machine c (node 2) died at step {ranks.watch.step} (training): its process"
    )
    assert capfd.readouterr().err.strip().startswith(f"comoe: rank 0: {said}")


def test_a_connection_that_the_network_broke_is_no_death(ranks: Ranks, ended: Ended) -> None:
    ranks.live(0.3, ended, ticking=True)
    ranks.watch._channel.broken[2] = "Connection timed out"
    ranks.others.pop(2).close()
    ranks.live(0.5, ended)
    (said,) = ranks.verdicts(1)
    assert said == (
        f"rank 2 on machine c (node 2) cannot be reached at step {ranks.watch.step} (training): Connection timed out; "
        "its machine or the network is gone, or its process is frozen."
    )


def test_a_silent_rank_is_named_after_the_timeout_and_not_before(
    ranks: Ranks, ended: Ended
) -> None:
    ranks.silent.add(1)
    began = time.monotonic()
    ranks.live(4, ended, ticking=True)
    assert ended == [LOST] and time.monotonic() - began > 1.4
    (said,) = ranks.verdicts(2)
    assert re.match(
        r"rank 1 on machine b \(node 1\) at step \d+ \(training\) is silent since \d s: its process",
        said,
    )


def test_the_rank_that_is_in_no_collective_is_blamed_for_a_standstill(
    ranks: Ranks, ended: Ended, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "where_main_thread_is", lambda: "")
    ranks.live(4, ended, where={1: "batching.py:9 encode", 2: ""})
    assert ended == [LOST]
    (said,) = ranks.verdicts(1)
    assert said.startswith("no rank made progress for 2 s")
    assert "rank 1 on machine b (node 1) is in batching.py" in said
    assert "the others wait for it" in said


def test_after_a_failed_collective_whoever_misses_some_beats_is_blamed_long_before_the_timeout(
    ranks: Ranks, ended: Ended
) -> None:
    ranks.watch.timeout_seconds = 1000.0
    ranks.silent.add(2)
    ranks.others[1].send({"trouble": "Connection closed by peer"})
    ranks.live(4, ended)
    assert ended == [LOST]
    assert ranks.verdicts(1)[0].startswith(
        "rank 2 on machine c (node 2) at step 5 (training) is silent"
    )


def test_a_rank_that_ended_with_an_error_of_its_own_ends_the_others_with_its_words_and_code(
    ranks: Ranks, ended: Ended, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "GRACE", 0.5)
    ranks.others[2].send({"gone": 2, "code": 3, "why": "out of memory with 5 posts", "step": 5})
    ranks.live(0.2, ended)
    ranks.others.pop(2).close()
    ranks.live(3, ended, ticking=True)
    assert ended == [3]
    assert "rank 2 on machine c (node 2) ended at step " in capfd.readouterr().err
    assert {"gone": 2, "code": 3, "why": "out of memory with 5 posts", "step": 5} in ranks.told[1]


def test_a_collective_that_fails_while_all_ranks_live_ends_the_run_as_a_broken_connection(
    ranks: Ranks, ended: Ended, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GRACE", 0.5)
    monkeypatch.setattr(module, "MISSED", 15)
    ranks.others[1].send({"trouble": "Connection reset by peer"})
    ranks.live(6, ended, ticking=True)
    assert ended == [LOST]
    said = ranks.verdicts(2)[0]
    assert said.startswith("a connection broke, noticed by rank 1 on machine b (node 1) at step ")
    assert said.endswith("Connection reset by peer.")
