"""When a run folder is cleared; several real ranks take one in ``tests/multiprocess/test_beginning.py``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import comoe.beginning as module
from comoe.beginning import MARK, take


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The folder of an earlier run."""
    folder = tmp_path / "run"
    (folder / "checkpoints" / "step-00000002").mkdir(parents=True)
    for name in ("config.yaml", MARK, "checkpoints/step-00000002/state.json", "metrics.jsonl"):
        (folder / name).write_text("old")
    return folder


def files(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_an_earlier_run_stays_whole_where_a_machine_does_not_see_the_folder(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(old)
    monkeypatch.setenv("CROSS_SIZE", "2")
    monkeypatch.setattr(module, "all_gather_objects", lambda own: [own, "b (node 1)"])
    with pytest.raises(ValueError, match="is not the same folder on all machines: b .node 1. cannot see"):
        take(old, fresh=True)
    assert files(old) == before


@pytest.mark.parametrize("machines", ["1", "2"])
def test_an_earlier_run_goes_once_all_machines_have_seen_the_folder(
    old: Path, monkeypatch: pytest.MonkeyPatch, machines: str
) -> None:
    monkeypatch.setenv("CROSS_SIZE", machines)
    monkeypatch.setenv(module.RUN_WORD, "ours")
    seen = os.open(old, os.O_RDONLY)
    take(old, fresh=True)
    assert files(old) == {MARK: "ours"} and os.path.samestat(os.fstat(seen), old.stat()), "what they saw is that folder"
    os.close(seen)


def test_a_resumed_run_keeps_all_that_is_there(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(old)
    monkeypatch.setenv("CROSS_SIZE", "2")
    monkeypatch.setenv(module.RUN_WORD, "ours")
    take(old, fresh=False)
    assert files(old) == before | {MARK: "ours"}


def test_a_run_that_is_cleared_halfway_is_still_a_run_that_must_be_cleared(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone: list[str] = []
    monkeypatch.setattr(module.shutil, "rmtree", lambda path: gone.append(path.name))
    monkeypatch.setattr(module.Path, "unlink", lambda path: gone.append(path.name))
    take(old, fresh=True)
    assert gone[-1] == "config.yaml" and len(gone) == len(set(gone)) == 4
