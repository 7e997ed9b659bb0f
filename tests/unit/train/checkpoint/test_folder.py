"""The folder of checkpoints: a broken one is noticed, passed over and said; what is pruned and what stays."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from comoe.inference.checkpoint_folder import named_best, whats_wrong, write_manifest
from comoe.train.checkpoint.folder import best_checkpoint, find_checkpoint, mark_best, prune


def make_checkpoint(folder: Path, step: int) -> Path:
    """Two files and a manifest, as a real one has."""
    path = folder / f"step-{step:08d}"
    (path / "weights").mkdir(parents=True)
    contents = {"state.json": b"{}", "weights/model.safetensors": b"x" * 100}
    for name, content in contents.items():
        (path / name).write_bytes(content)
    write_manifest(path, step=step, run="ours")
    return path


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def test_the_newest_whole_checkpoint_is_found(tmp_path):
    assert find_checkpoint(tmp_path / "never made") is None
    # One that is still being written is none.
    make_checkpoint(tmp_path, 200).rename(tmp_path / ".writing-step-00000200")
    assert find_checkpoint(tmp_path) is None
    paths = [make_checkpoint(tmp_path, step) for step in (5, 10, 100)]
    assert [whats_wrong(path) for path in paths] == [""] * 3
    found = find_checkpoint(tmp_path)
    assert found is not None
    assert (found.path.name, found.step, found.broken) == ("step-00000100", 100, ())


def rewrite_manifest(**changes: object) -> Callable[[Path], object]:
    def spoil(path: Path) -> None:
        file = path / "manifest.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return spoil


def flip(name: str) -> Callable[[Path], object]:
    def spoil(path: Path) -> None:
        content = bytearray((path / name).read_bytes())
        content[0] ^= 1
        (path / name).write_bytes(content)

    return spoil


def truncate(path: Path) -> None:
    weights = path / "weights" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:40])


SPOILED = {
    "a file cut short": (truncate, "weights/model.safetensors has 40 bytes instead of 100"),
    "a file gone": (lambda path: (path / "state.json").unlink(), "state.json is missing"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "it has no manifest, so its writing was cut short"),
    "half a manifest": (
        lambda path: (path / "manifest.json").write_text('{"files": {"sta'), "its manifest is damaged",
    ),
    "noise as manifest": (lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe"), "its manifest is damaged"),
    "an empty manifest": (rewrite_manifest(files={}), "its manifest is damaged, as it lists no state.json"),
    "no file": (lambda path: (path / "manifest.json").write_text(""), "its manifest is damaged"),
    "a changed weight": (
        flip("weights/model.safetensors"),
        "weights/model.safetensors was changed after it was written (its SHA-256 is another)",
    ),
    "a changed step": (flip("state.json"), "state.json was changed after it was written (its SHA-256 is another)"),
    "another step under its name": (rewrite_manifest(step=7), "it is that of step 7"),
    "another run's": (rewrite_manifest(run="theirs"), "it is that of another run"),
    "another manifest": (lambda path: (path / "manifest.json").write_text("[1]"), "its manifest is damaged"),
    "a manifest of lists": (
        lambda path: (path / "manifest.json").write_text('{"files": ["a"]}'), "its manifest is damaged",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILED)
def test_a_broken_checkpoint_is_passed_over_and_said(tmp_path, what):
    spoil, problem = SPOILED[what]
    (tmp_path / ".run").write_text("ours")
    make_checkpoint(tmp_path, 5)
    spoil(make_checkpoint(tmp_path, 10))
    found = find_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.broken) == (5, (f"step-00000010: {problem}",))


@pytest.mark.parametrize("what", ["a changed weight", "a changed step"])
def test_bytes_are_compared_unless_that_is_not_wanted(tmp_path, what):
    SPOILED[what][0](make_checkpoint(tmp_path, 10))
    found = find_checkpoint(tmp_path, verify=False)
    assert found is not None and found.step == 10
    with pytest.raises(ValueError, match="no whole checkpoint is left"):
        find_checkpoint(tmp_path)


def test_a_checkpoint_of_an_older_version_has_sizes_alone(tmp_path):
    path = make_checkpoint(tmp_path, 5)
    manifest = json.loads((path / "manifest.json").read_text())
    older = {"step": 5, "files": manifest["files"]}
    (path / "manifest.json").write_text(json.dumps(older))
    (tmp_path / ".run").write_text("a newer start")
    assert whats_wrong(path, verify=True) == ""


@pytest.mark.parametrize("spoil", ["", "{", "[]", '{"step": null}', '{"step": "x"}', None])
def test_the_best_step_is_known_although_its_note_is_lost(tmp_path, spoil):
    for step in (2, 5):
        path = make_checkpoint(tmp_path, step)
        (path / "state.json").write_text('{"best_step": 2, "best_value": 0.5}')
        write_manifest(path, step=step)
    mark_best(tmp_path, 2)
    note = tmp_path / "best.json"
    note.unlink() if spoil is None else note.write_text(spoil)
    assert named_best(tmp_path) == tmp_path / "step-00000002"
    (path / "state.json").write_text('{"best_step": 0, "best_value": null}')
    write_manifest(path, step=5)
    assert named_best(tmp_path) is None


def test_when_all_are_broken_the_reasons_are_named(tmp_path):
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


def test_pruning_keeps_the_newest_whole_ones_and_the_best(tmp_path):
    for step in range(1, 8):
        make_checkpoint(tmp_path, step)
    truncate(tmp_path / "step-00000007")
    make_checkpoint(tmp_path, 8).rename(tmp_path / ".writing-step-00000008")
    mark_best(tmp_path, 2)
    (tmp_path / "step-00000001.bak").mkdir()
    (tmp_path / "step-notes.txt").write_text("a user's own")
    prune(tmp_path, keep=2)
    assert (tmp_path / "step-00000001.bak").is_dir() and (tmp_path / "step-notes.txt").is_file()
    (tmp_path / "step-00000001.bak").rmdir()
    (tmp_path / "step-notes.txt").unlink()
    assert steps(tmp_path) == [2, 5, 6]
    assert not (tmp_path / ".writing-step-00000008").exists()


def test_the_best_checkpoint_is_given_only_when_it_is_whole(tmp_path, capsys):
    path = make_checkpoint(tmp_path, 5)
    assert best_checkpoint(tmp_path) is None
    mark_best(tmp_path, 5)
    assert best_checkpoint(tmp_path) == path
    truncate(path)
    assert best_checkpoint(tmp_path) is None
    assert "step-00000005, the best one: weights" in capsys.readouterr().err
