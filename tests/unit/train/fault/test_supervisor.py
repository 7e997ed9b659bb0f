"""Supervisors with small children in place of ranks: real processes, real signals, no torch."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from comoe.train.fault import supervisor
from comoe.train.fault.channel import SideChannel, listen
from comoe.train.fault.signals import StopSignal
from comoe.train.fault.supervisor import (
    _Child,
    _secret_of_the_parent,
    _word_of_the_launch,
    restart_record,
    supervise,
)

ROOT = Path(__file__).parents[4]

SUPERVISOR = """
import sys
from comoe.train.fault import supervisor
from comoe.train.fault.signals import StopSignal
supervisor.GRACE = 1.0
assert "torch" not in sys.modules
command = [sys.executable, "-c", *sys.argv[2:]]
sys.exit(supervisor.supervise(restarts=int(sys.argv[1]), stop=StopSignal(), command=command))
"""

CHILD = """
import os, signal, sys, time
rank, attempt = int(os.environ["RANK"]), int(os.environ["COMOE_ATTEMPT"])
log = lambda *words: print(rank, attempt, *words, file=open(sys.argv[1], "a"))
log("began", os.environ["MASTER_PORT"], os.environ["COMOE_RUN_WORD"], os.environ["COMOE_RESTARTED_BECAUSE"])
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
"""
"""What all children begin with; the rest is the test's."""


class Supervised:
    """Supervisors of several ranks, as a launcher starts them."""

    def __init__(
        self,
        folder: Path,
        child: str,
        *,
        restarts: int,
        ranks: int = 2,
        late: float = 0.0,
        last_words: str = "",
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = str(probe.getsockname()[1])
        self.log = folder / "log"
        self.processes = []
        for rank in reversed(range(ranks)):
            if rank == 0:
                time.sleep(late)
            places = {
                "RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": self.port,
            }
            command = [
                sys.executable,
                "-c",
                SUPERVISOR,
                str(restarts),
                CHILD + child,
                str(self.log),
            ]
            # The launcher's own word, and one of the user's that is another one for the last rank.
            command += [f"--local_rank={rank}", last_words if rank == ranks - 1 else ""]
            environment = os.environ | places | {"PYTHONPATH": str(ROOT)}
            self.processes.append(
                subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
            )
        self.processes.reverse()

    def wait_for(self, word: str, times: int = 1) -> None:
        end = time.monotonic() + 20
        while not self.log.exists() or self.log.read_text().count(word) < times:
            assert time.monotonic() < end, (
                self.log.read_text() if self.log.exists() else "nothing was logged"
            )
            time.sleep(0.02)

    def end(self) -> tuple[list[int], str]:
        """Exit codes of the supervisors, and all that they said."""
        try:
            said = [process.communicate(timeout=30)[1] for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [process.returncode for process in self.processes], "".join(said)

    def began(self) -> list[tuple[str, ...]]:
        lines = [line.split(maxsplit=5) for line in self.log.read_text().splitlines()]
        return sorted(
            (rank, attempt, *rest) for rank, attempt, word, *rest in lines if word == "began"
        )


def attempts(supervised: Supervised) -> list[tuple[int, int]]:
    return [(int(rank), int(attempt)) for rank, attempt, *_ in supervised.began()]


def test_a_killed_rank_is_started_again_with_all_others_until_the_run_ends(tmp_path: Path) -> None:
    child = "if rank == 1 and attempt < 2: time.sleep(0.3); die()\nif attempt < 2: time.sleep(60)"
    supervised = Supervised(tmp_path, child, restarts=3)
    codes, said = supervised.end()
    assert codes == [0, 0], said
    assert attempts(supervised) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert said.splitlines() == [
        "comoe: rank 1 was ended by SIGKILL. Starting again, restart 1 of 3.",
        "comoe: rank 1 was ended by SIGKILL. Starting again, restart 2 of 3.",
    ]


def test_the_ranks_of_an_attempt_share_a_port_and_all_attempts_a_word(tmp_path: Path) -> None:
    supervised = Supervised(
        tmp_path, "sys.exit(7 if attempt == 0 and rank == 0 else 0)", restarts=1
    )
    codes, said = supervised.end()
    assert codes == [0, 0], said
    began = supervised.began()
    by_attempt = {
        attempt: {port for _, number, port, *_ in began if number == attempt} for attempt in "01"
    }
    assert len(by_attempt["0"]) == len(by_attempt["1"]) == 1 and by_attempt["0"] != by_attempt["1"]
    assert supervised.port not in by_attempt["0"] | by_attempt["1"], (
        "the supervisors themselves have that one"
    )
    assert len({word for _, _, _, word, *_ in began}) == 1
    assert {
        why for _, attempt, _, _, *why in map(list, began) if attempt == "1" for why in why
    } == {"rank 0 ended with exit code 7"}


def test_when_no_restart_is_left_the_code_of_the_crash_is_the_runs(tmp_path: Path) -> None:
    supervised = Supervised(tmp_path, "die() if rank == 0 else time.sleep(60)", restarts=1)
    codes, said = supervised.end()
    assert codes == [137, 137] and attempts(supervised) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert said.endswith("comoe: rank 0 was ended by SIGKILL. No restart is left (--restarts 1).\n")


@pytest.mark.parametrize("code", [2, 3, 130])
def test_an_error_that_would_come_again_is_never_restarted(tmp_path: Path, code: int) -> None:
    supervised = Supervised(
        tmp_path, f"sys.exit({code}) if rank == 0 else time.sleep(60)", restarts=5
    )
    codes, said = supervised.end()
    assert codes == [code, code] and said == "" and len(attempts(supervised)) == 2


def test_one_rank_done_while_another_crashes_neither_hangs_nor_ends_the_run(tmp_path: Path) -> None:
    child = "time.sleep(0.3)\nif rank == 1 and attempt == 0: time.sleep(0.5); sys.exit(1)"
    supervised = Supervised(tmp_path, child, restarts=1, ranks=3)
    codes, said = supervised.end()
    assert codes == [0, 0, 0] and len(attempts(supervised)) == 6, said
    assert "rank 1 ended with exit code 1" in said


def test_a_child_that_hangs_after_another_crashed_is_ended_and_not_blamed(tmp_path: Path) -> None:
    child = "if attempt == 0: signal.signal(signal.SIGTERM, signal.SIG_IGN); sys.exit(4) if rank else time.sleep(60)"
    codes, said = Supervised(tmp_path, child, restarts=1).end()
    assert codes == [0, 0] and "comoe: rank 1 ended with exit code 4. Starting again" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_is_passed_on_and_what_follows_is_not_restarted(
    tmp_path: Path, number: signal.Signals
) -> None:
    child = """
def save(*_):
    log("saved")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
log("ready")
time.sleep(60)
"""
    supervised = Supervised(tmp_path, child, restarts=5)
    supervised.wait_for("ready", times=2)
    for process in supervised.processes:
        process.send_signal(number)
    codes, said = supervised.end()
    assert codes == [0, 0] and said == ""
    assert supervised.log.read_text().count("saved") == 2 and len(attempts(supervised)) == 2


def test_a_child_that_dies_of_the_signal_is_not_restarted_either(tmp_path: Path) -> None:
    supervised = Supervised(tmp_path, "log('ready'); time.sleep(60)", restarts=5)
    supervised.wait_for("ready", times=2)
    supervised.processes[1].terminate()
    codes, _ = supervised.end()
    assert codes == [143, 143] and len(attempts(supervised)) == 2


@pytest.mark.parametrize("lost", [0, 1])
def test_the_loss_of_a_supervisor_ends_the_run_and_the_other_says_why(
    tmp_path: Path, lost: int
) -> None:
    supervised = Supervised(tmp_path, "log('ready', os.getpid()); time.sleep(60)", restarts=5)
    supervised.wait_for("ready", times=2)
    lines = supervised.log.read_text().splitlines()
    (orphan,) = [int(line.split()[3]) for line in lines if line.startswith(f"{lost} 0 ready")]
    supervised.processes[lost].kill()
    supervised.processes[1 - lost].wait(30)
    os.kill(orphan, signal.SIGKILL)  # a real rank notices by itself that its supervisor is gone
    codes, said = supervised.end()
    who = f"comoe: rank {1 - lost}: " if lost == 0 else ""
    assert codes[1 - lost] == 1
    assert f"{who}rank {lost}'s supervisor is gone, so no restart is possible" in said


def test_a_supervisor_of_another_command_is_turned_away_and_says_what_must_be_the_same(
    tmp_path: Path,
) -> None:
    supervised = Supervised(tmp_path, "pass", restarts=1, last_words="run.name=other")
    try:
        assert supervised.processes[1].wait(30) == 1
        assert supervised.processes[0].poll() is None and not supervised.log.exists(), (
            "it waits for its own ranks"
        )
    finally:
        supervised.processes[0].terminate()
        codes, said = supervised.end()
    assert codes[0] == 130 and "must be identical on all machines" in said


def test_who_knows_the_command_alone_is_no_supervisor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervised = Supervised(tmp_path, "log('ready'); time.sleep(1)", restarts=0, late=2.0)
    words = ["--local_rank=1", ""]
    monkeypatch.setattr(
        sys, "argv", ["-c", "0", CHILD + "log('ready'); time.sleep(1)", str(supervised.log), *words]
    )
    monkeypatch.setattr(supervisor, "_secret_of_the_parent", lambda: "")
    # Rank 1 waits for rank 0; the stranger is there as early.
    strangers = [
        SideChannel(1, word=word) for word in ("", _word_of_the_launch(2, one_machine=True))
    ]
    for stranger in strangers:
        try:
            stranger.connect("127.0.0.1", int(supervised.port), seconds=5)
        except OSError:
            continue
        stranger.send({"attempt": 0, "code": 9, "killed": False})
    codes, said = supervised.end()
    for stranger in strangers:
        stranger.close()
    assert codes == [0, 0] and said == ""


def test_the_secret_of_a_launch_is_one_text_for_its_ranks_and_for_no_other_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first = _secret_of_the_parent()
    folder = tmp_path / f"comoe-{os.getuid()}"
    assert len(first) == 64 and _secret_of_the_parent() == first
    monkeypatch.setattr(os, "getppid", lambda: os.getpid())
    assert _secret_of_the_parent() != first
    assert {path.stat().st_mode & 0o777 for path in (folder, *folder.iterdir())} == {0o700, 0o600}
    folder.chmod(0o755)
    with pytest.raises(
        OSError, match="can be read by others; remove it, or set COMOE_LAUNCH_SECRET"
    ):
        _secret_of_the_parent()


def test_a_secret_of_the_environment_is_a_part_of_the_word(monkeypatch: pytest.MonkeyPatch) -> None:
    words = set()
    for secret in ("a", "b", ""):
        monkeypatch.setenv("COMOE_LAUNCH_SECRET", secret)
        words.add(_word_of_the_launch(2, one_machine=False))
    assert len(words) == 3


def test_a_stop_that_came_before_the_order_to_start_reaches_the_child() -> None:
    child = _Child([sys.executable, "-c", "import time; time.sleep(60)"], 1)
    assert child.look(asked_to_stop=True) == [{"stopped": True}]
    child.obey({"do": "start", "attempt": 0, "word": "w", "port": 1, "why": ""})
    assert child.process.wait(10) == -signal.SIGTERM


def test_a_port_that_is_taken_is_named_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with listen() as other:
        port = other.getsockname()[1]
        for key, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": str(port)}.items():
            monkeypatch.setenv(key, value)
        assert supervise(restarts=1, stop=StopSignal(), command=["false"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        f"comoe: rank 0: --restarts: port {port} of this machine cannot be used ([Errno "
    )
    assert f"such as --master_port {port + 1} " in said


def test_a_supervisor_that_comes_late_is_waited_for(tmp_path: Path) -> None:
    supervised = Supervised(tmp_path, "pass", restarts=1, late=1.5)
    codes, said = supervised.end()
    assert codes == [0, 0] and said == "" and attempts(supervised) == [(0, 0), (1, 0)]


def test_one_process_without_a_launcher_is_supervised_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks: Sequence[str] = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in marks} | {
        "PYTHONPATH": str(ROOT)
    }
    child = "import os, sys; sys.exit(0 if os.environ['COMOE_ATTEMPT'] == '1' else 9)"
    done = subprocess.run(
        [sys.executable, "-c", SUPERVISOR, "2", child],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stderr) == (
        0, "comoe: rank 0 ended with exit code 9. Starting again, restart 1 of 2.\n"
    )  # fmt: skip


def test_the_log_of_a_restarted_run_says_which_attempt_and_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("COMOE_ATTEMPT", raising=False)
    assert restart_record() == {}
    monkeypatch.setenv("COMOE_ATTEMPT", "0")
    assert restart_record() == {}
    monkeypatch.setenv("COMOE_ATTEMPT", "2")
    monkeypatch.setenv("COMOE_RESTARTED_BECAUSE", "rank 1 was ended by SIGKILL")
    assert restart_record() == {"attempt": 2, "why": "rank 1 was ended by SIGKILL"}
