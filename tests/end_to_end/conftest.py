"""One cache folder and two finished runs, shared by all tests of this folder: a run takes longer than most tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.end_to_end.commands import EVENTFUL, SMOKE, Done, Terminal, deepspeed


@dataclass(frozen=True, slots=True)
class Finished:
    """A run that has ended well."""

    folder: Path
    done: Done


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``COMOE_HOME`` of all commands."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def shared_terminal(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Iterator[Terminal]:
    opened = Terminal(tmp_path_factory.mktemp("terminal"), home=home)
    yield opened
    opened.close()


@pytest.fixture
def terminal(tmp_path: Path, home: Path) -> Iterator[Terminal]:
    opened = Terminal(tmp_path, home=home)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory, shared_terminal: Terminal) -> Finished:
    """The smoke recipe as it is, six steps on two ranks."""
    runs = tmp_path_factory.mktemp("runs")
    done = shared_terminal.run(
        *deepspeed(2), "--config", SMOKE, f"run.output_dir={runs}", "train.max_steps=6"
    )
    assert done.code == 0, done.out + done.err
    return Finished(runs / "smoke", done)


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, shared_terminal: Terminal) -> Path:
    """Folder of a finished run under ``EVENTFUL`` on two ranks, which nothing disturbed."""
    runs = tmp_path_factory.mktemp("uninterrupted")
    done = shared_terminal.run(
        *deepspeed(2), "--config", SMOKE, f"run.output_dir={runs}", *EVENTFUL
    )
    assert done.code == 0, done.out + done.err
    return runs / "smoke"
