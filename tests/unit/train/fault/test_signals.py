"""Signals to real processes: noted, not deadly; and the loss of a launcher is noticed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from comoe.train.fault.signals import StopSignal

ROOT = Path(__file__).parents[4]
RANK = """
    import sys, time
    from comoe.train.fault.signals import StopSignal
    stop = StopSignal()
    print("loading", flush=True)
    time.sleep(float(sys.argv[1]) if sys.argv[1:] else 0)
    with stop:
        print("ready", flush=True)
        end = time.time() + 30
        while not stop.asked() and time.time() < end:
            time.sleep(0.02)
        print(stop.reason, flush=True)
    print("went on", flush=True)
"""


def start(code: str, *arguments: str, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_the_process_goes_on(number: signal.Signals) -> None:
    with start(RANK) as rank:
        assert rank.stdout is not None
        assert [rank.stdout.readline() for _ in range(2)] == ["loading\n", "ready\n"]
        rank.send_signal(number)
        assert rank.communicate(timeout=40)[0] == f"{number.name}\nwent on\n"
    assert rank.returncode == 0


def test_after_the_run_signals_do_what_they_did_before() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        assert signal.getsignal(signal.SIGTERM) != before[0]
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked() and stop.reason == "SIGTERM"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_plain_python_has_no_launcher_to_lose() -> None:
    with StopSignal() as stop:
        time.sleep(0.05)
        assert not stop.asked()


def test_the_first_process_of_a_container_has_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getppid", lambda: 0)
    assert not StopSignal().asked()


# A command that starts a launcher that starts a rank, as ``deepspeed`` does; the rank writes to a
# file.
LAUNCHER = """
    import subprocess, sys, time
    rank = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[3]], stdout=open(sys.argv[2], "w"))
    time.sleep(60)
"""
COMMAND = """
    import subprocess, sys, time
    launcher = subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:], "deepspeed.launcher.launch"])
    print(launcher.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("when", ["loading", "ready"])
@pytest.mark.parametrize("lost", ["command", "launcher"])
def test_the_loss_of_the_launcher_or_of_the_command_above_it_is_a_signal(
    lost: str, when: str, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    seconds = "1.5" if when == "loading" else "0"
    arguments = [textwrap.dedent(LAUNCHER), textwrap.dedent(RANK), str(log), seconds]
    with start(COMMAND, *arguments) as command:
        assert command.stdout is not None
        launcher = psutil.Process(int(command.stdout.readline()))
        try:
            wait_for(lambda: log.exists() and when in log.read_text())
            # Killed, not asked: nobody passes anything on. The command stays a zombie until it is
            # waited for.
            (launcher if lost == "launcher" else command).kill()
            wait_for(lambda: "went on" in log.read_text())
        finally:
            command.kill()
            if launcher.is_running():
                launcher.kill()
    assert log.read_text() == "loading\nready\nthe launcher is gone\nwent on\n"


def wait_for(condition, seconds: float = 30.0) -> None:
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "it did not happen"
        time.sleep(0.02)
