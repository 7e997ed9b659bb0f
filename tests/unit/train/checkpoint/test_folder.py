"""The folder of checkpoints: a broken one is noticed, passed over and said; what is pruned and what stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from comoe.inference.checkpoint_folder import whats_wrong
from comoe.train.checkpoint.folder import (
    best_checkpoint,
    find_checkpoint,
    mark_best,
    prune,
)


def make_checkpoint(folder: Path, step: int) -> Path:
    """Two files and a manifest, as a real one has."""
    path = folder / f"step-{step:08d}"
    (path / "weights").mkdir(parents=True)
    contents = {"state.json": b"{}", "weights/model.safetensors": b"x" * 100}
    for name, content in contents.items():
        (path / name).write_bytes(content)
    manifest = {"step": step, "files": {name: len(text) for name, text in contents.items()}}
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return path


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def test_the_newest_checkpoint_is_found(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        make_checkpoint(tmp_path, step)
    found = find_checkpoint(tmp_path)
    assert found is not None
    assert (found.path.name, found.step, found.broken) == ("step-00000100", 100, ())


def test_a_folder_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "never made") is None


def truncate(path: Path) -> None:
    weights = path / "weights" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:40])


SPOILED = {
    "a file cut short": (truncate, "weights/model.safetensors has 40 bytes instead of 100"),
    "a file gone": (lambda path: (path / "state.json").unlink(), "state.json has no bytes instead of 2"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "it has no manifest, so its writing was cut short"),
    "half a manifest": (
        lambda path: (path / "manifest.json").write_text('{"files": {"sta'), "its manifest is damaged",
    ),
    "noise as manifest": (lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe"), "its manifest is damaged"),
    "another manifest": (lambda path: (path / "manifest.json").write_text("[1]"), "its manifest is damaged"),
    "a manifest of lists": (
        lambda path: (path / "manifest.json").write_text('{"files": ["a"]}'), "its manifest is damaged",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILED)
def test_a_broken_checkpoint_is_passed_over_and_said(tmp_path: Path, what: str) -> None:
    spoil, problem = SPOILED[what]
    make_checkpoint(tmp_path, 5)
    spoil(make_checkpoint(tmp_path, 10))
    found = find_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.broken) == (5, (f"step-00000010: {problem}",))


def test_when_all_are_broken_the_reasons_are_named(tmp_path: Path) -> None:
    truncate(make_checkpoint(tmp_path, 5))
    (make_checkpoint(tmp_path, 10) / "manifest.json").unlink()
    with pytest.raises(ValueError) as caught:
        find_checkpoint(tmp_path)
    said = str(caught.value)
    assert said.startswith(
        f"{tmp_path}: no whole checkpoint is left (step-00000010: it has no manifest"
    )
    assert "step-00000005: weights/model.safetensors has 40 bytes" in said
    assert said.endswith("start the run anew.")


def test_a_checkpoint_that_is_still_being_written_is_not_found(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 5).rename(tmp_path / ".writing-step-00000005")
    assert find_checkpoint(tmp_path) is None


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in range(1, 7):
        make_checkpoint(tmp_path, step)
    mark_best(tmp_path, 2)
    prune(tmp_path, keep=2)
    assert steps(tmp_path) == [2, 5, 6]


def test_pruning_never_keeps_a_broken_checkpoint_in_the_place_of_a_whole_one(
    tmp_path: Path,
) -> None:
    make_checkpoint(tmp_path, 5)
    truncate(make_checkpoint(tmp_path, 10))
    prune(tmp_path, keep=1)
    assert steps(tmp_path) == [5]


def test_pruning_removes_what_a_killed_run_left_half_written(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 3).rename(tmp_path / ".writing-step-00000003")
    make_checkpoint(tmp_path, 5)
    prune(tmp_path, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_the_best_checkpoint_is_given_only_when_it_is_whole(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 5)
    assert best_checkpoint(tmp_path) is None
    mark_best(tmp_path, 5)
    assert best_checkpoint(tmp_path) == path
    truncate(path)
    assert best_checkpoint(tmp_path) is None


def test_a_sound_checkpoint_has_nothing_wrong(tmp_path: Path) -> None:
    assert whats_wrong(make_checkpoint(tmp_path, 1)) == ""
