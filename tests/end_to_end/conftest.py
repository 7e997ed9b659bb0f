"""One cache folder and two finished runs, shared by all tests of this folder and by all workers of pytest-xdist."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from filelock import FileLock

from tests.end_to_end.commands import EVENTFUL, SMOKE, Done, Terminal, deepspeed, train_in_ranks


@dataclass(frozen=True, slots=True)
class Finished:
    """A run that has ended well."""

    folder: Path
    done: Done


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers have."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def home(shared: Path) -> Path:
    """``COMOE_HOME`` of all commands."""
    return shared / "home"


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


def run_once(runs: Path, train: Callable[[Path], Done]) -> Finished:
    """A finished run of the smoke recipe; whoever asks first makes it, the others wait."""
    said = runs.with_suffix(".json")
    with FileLock(runs.with_suffix(".lock")):
        if not said.exists():
            done = train(runs)
            assert done.code == 0, done.out + done.err
            said.write_text(json.dumps(asdict(done)), encoding="utf-8")
    return Finished(runs / "smoke", Done(**json.loads(said.read_text(encoding="utf-8"))))


@pytest.fixture(scope="session")
def smoke_run(shared: Path, shared_terminal: Terminal) -> Finished:
    """The smoke recipe as it is, six steps on two ranks."""
    words = (*deepspeed(2), "--config", SMOKE, "train.max_steps=6")
    return run_once(
        shared / "runs", lambda runs: shared_terminal.run(*words, f"run.output_dir={runs}")
    )


@pytest.fixture(scope="session")
def uninterrupted(shared: Path, home: Path) -> Path:
    """Folder of a finished run under ``EVENTFUL`` on two ranks, which nothing disturbed."""

    def train(runs: Path) -> Done:
        return Done(0, train_in_ranks(2, home, [f"run.output_dir={runs}", *EVENTFUL]), "")

    return run_once(shared / "uninterrupted", train).folder
