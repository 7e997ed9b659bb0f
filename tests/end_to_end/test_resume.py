"""Killed, stopped, finished: ``--resume`` goes on as if nothing had happened."""

import json
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from comoe.inference.checkpoint_folder import whats_wrong
from comoe.train.checkpoint.folder import find_checkpoint
from tests.end_to_end.commands import (
    EVENTFUL,
    ROOT,
    SMOKE,
    STEPS,
    Terminal,
    deepspeed,
    losses,
    processes_of,
    read_lines,
    train_in_ranks,
    train_lines,
    wait_for,
)

pytestmark = pytest.mark.end_to_end

KILLED_AT = 6
STOPPED_AT = 5
BUCKET = 12_345_678
"""Value in a DeepSpeed file that no other has."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """A run in two sittings."""

    folder: Path
    restored: int
    """Step that the second sitting began at."""
    out: str
    """What the second sitting said."""


def start(terminal: Terminal, runs: Path, settings: str | Path = "zero2"):
    words = deepspeed(2, settings=settings)
    return terminal.start(*words, "--config", SMOKE, f"run.output_dir={runs}", *EVENTFUL)


def resume(home: Path, folder: Path) -> str:
    # An override beside the run, one that changes nothing: it is allowed.
    return train_in_ranks(2, home, ["run.verbose=false"], resume=folder)


def validations(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(run / "metrics.jsonl") if line["split"] == "validation"]


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("step-*"))


@pytest.fixture(scope="module")
def killed(tmp_path_factory, home) -> Resumed:
    """kill -9 of everything; then the newest checkpoint is cut short too, as if the disk had been full."""
    runs = tmp_path_factory.mktemp("killed")
    folder = runs / "smoke"
    with pytest.raises(AssertionError, match=r"exit codes \[(-9|4), (-9|4)\]"):
        train_in_ranks(2, home, [f"run.output_dir={runs}", *EVENTFUL], killed_at=KILLED_AT)
    assert max(train_lines(folder)) < STEPS and not (folder / "results.json").exists(), (
        "the kill came too late"
    )
    *_, before, newest = checkpoints(folder)
    weights = newest / "weights" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    return Resumed(folder, int(before.name.removeprefix("step-")), resume(home, folder))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, shared_terminal, home) -> Resumed:
    """SIGTERM to the ``deepspeed`` command alone, as a scheduler sends it; the run has settings of its own."""
    runs = tmp_path_factory.mktemp("stopped")
    folder = runs / "smoke"
    own = json.loads((ROOT / "ds_configs/zero2.json").read_text(encoding="utf-8"))
    own["zero_optimization"]["allgather_bucket_size"] = BUCKET
    (runs / "own.json").write_text(json.dumps(own), encoding="utf-8")
    typed = start(shared_terminal, runs, runs / "own.json")
    wait_for(lambda: max(train_lines(folder), default=0) >= STOPPED_AT, what=f"step {STOPPED_AT}")
    typed.process.send_signal(signal.SIGTERM)
    typed.process.wait(60)
    wait_for(lambda: not processes_of(runs), what="the end of all processes of the run", seconds=60)
    assert not (folder / "results.json").exists(), "the signal came too late"
    last = max(train_lines(folder))
    newest = checkpoints(folder)[-1]
    assert newest.name == f"step-{last:08d}" and not whats_wrong(newest), (
        "the last step was not saved"
    )
    assert f"stopping at step {last}" in typed.output("out")
    assert f"--resume {folder}" in typed.output("out")
    assert "Traceback" not in typed.output("err")
    return Resumed(folder, last, resume(home, folder))


def test_control_c_saves_and_leaves_no_process_behind(tmp_path, terminal):
    typed = start(terminal, tmp_path)
    wait_for(lambda: max(train_lines(tmp_path / "smoke"), default=0) >= 3, what="step 3")
    os.killpg(
        typed.process.pid, signal.SIGINT
    )  # a terminal sends it to all processes of the command
    done = typed.wait(90)
    wait_for(
        lambda: not processes_of(tmp_path), what="the end of all processes of the run", seconds=60
    )
    last = max(train_lines(tmp_path / "smoke"))
    newest = checkpoints(tmp_path / "smoke")[-1]
    assert last < STEPS and newest.name == f"step-{last:08d}" and not whats_wrong(newest), (
        done.out + done.err
    )
    # Why it stops depends on who was faster: the signal, its echo by the launcher, or the end of
    # the command.
    assert f"stopping at step {last} (" in done.said
    assert f"--resume {tmp_path / 'smoke'}" in done.said
    # DeepSpeed's runner shows where it was interrupted; our ranks do not.
    assert "launch/train.py" not in done.said and f"{ROOT / 'comoe'}/" not in done.err


@pytest.fixture(params=["killed", "stopped"])
def resumed(request) -> Resumed:
    return request.getfixturevalue(request.param)


def test_the_losses_after_a_resume_equal_those_of_the_uninterrupted_run(resumed, uninterrupted):
    assert sorted(train_lines(resumed.folder)) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(losses(resumed.folder), losses(uninterrupted), rtol=1e-6)


def test_rates_norms_and_evaluations_are_the_same_too(resumed, uninterrupted):
    ours, theirs = train_lines(resumed.folder), train_lines(uninterrupted)
    for step in ours:
        assert ours[step]["rates"] == theirs[step]["rates"], step
        assert ours[step]["grad_norm"] == pytest.approx(theirs[step]["grad_norm"], rel=1e-5), step
    checks = [
        {line["step"]: line["mean"] for line in validations(run)}
        for run in (resumed.folder, uninterrupted)
    ]
    assert list(checks[0]) == [4, 8, 10] and checks[0] == pytest.approx(checks[1], rel=1e-6)


def test_the_data_sets_are_drawn_from_at_the_same_changing_rates(resumed, uninterrupted):
    draws = [
        [
            [line[f"draws/{name}"] for name in ("reviews", "mentions", "stance")]
            for line in validations(run)
        ]
        for run in (resumed.folder, uninterrupted)
    ]
    assert len(draws[0]) == 3 and draws[0][0] == [1 / 3] * 3 and draws[0][1] != draws[0][0]
    np.testing.assert_allclose(draws[0], draws[1], rtol=1e-4)


def test_the_log_says_where_the_run_was_resumed(resumed):
    lines = read_lines(resumed.folder / "metrics.jsonl")
    where = [number for number, line in enumerate(lines) if line["split"] == "resume"]
    assert [lines[number] for number in where] == [{"split": "resume", "step": resumed.restored}]
    assert all(line["step"] <= resumed.restored for line in lines[: where[0]])
    assert all(
        line["step"] > resumed.restored
        for line in lines[where[0] + 1 :]
        if line["split"] == "train"
    )
    assert f"resuming {resumed.folder} at step {resumed.restored}" in resumed.out


def test_tensorboard_draws_one_curve(resumed):
    events = EventAccumulator(str(resumed.folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    drawn = events.Scalars("train/loss")
    assert [event.step for event in drawn] == list(range(1, STEPS + 1))
    assert [event.value for event in drawn] == pytest.approx(losses(resumed.folder), rel=1e-6)


def test_a_resumed_run_ends_with_results_over_all_its_posts(resumed, uninterrupted):
    ours, theirs = (
        json.loads((run / "results.json").read_text()) for run in (resumed.folder, uninterrupted)
    )
    assert ours["posts"] == theirs["posts"] == STEPS * 48
    assert (ours["finished"], ours["best_step"]) == (theirs["finished"], theirs["best_step"])
    for task, metrics in theirs["metrics"]["test"].items():
        assert ours["metrics"]["test"][task] == pytest.approx(metrics, rel=1e-5, abs=1e-6), task


def test_a_checkpoint_that_was_cut_short_is_passed_over_and_said(killed):
    (warning,) = [
        line for line in killed.out.splitlines() if "weights/model.safetensors has" in line
    ]
    assert warning.startswith("warning: ") and "bytes instead of" in warning
    assert warning.endswith(f"; using step-{killed.restored:08d} instead.")
    assert all(not whats_wrong(path) for path in checkpoints(killed.folder)), (
        "a broken checkpoint was kept"
    )


def test_a_resume_takes_the_deepspeed_file_of_the_run(stopped):
    settings = json.loads((stopped.folder / "ds_config.json").read_text(encoding="utf-8"))
    assert settings["zero_optimization"]["allgather_bucket_size"] == BUCKET


def test_resuming_a_finished_run_succeeds_and_does_nothing(uninterrupted, home):
    def kept() -> list[tuple[int, bytes]]:
        names = ("results.json", "export/model.safetensors", "predictions/test/mood.jsonl")
        paths = [uninterrupted / name for name in names]
        return [(path.stat().st_mtime_ns, path.read_bytes()) for path in paths]

    before = kept()
    lines = train_lines(uninterrupted)
    said = resume(home, uninterrupted)
    finished = f"{uninterrupted} is finished (all steps done, step {STEPS}); nothing to do."
    assert finished in said and "task      metric" in said, "the table is shown again"
    assert train_lines(uninterrupted) == lines
    assert kept() == before


DAMAGES = {
    "deleted": lambda file: file.unlink(),
    "emptied": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "one bit changed": lambda file: file.write_bytes(flipped(file.read_bytes())),
}


def flipped(content: bytes) -> bytes:
    """The content with one bit of its first byte changed."""
    return bytes([content[0] ^ 1]) + content[1:]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_checkpoint_with_any_damaged_file_gives_way_to_the_one_before(
    how, uninterrupted, tmp_path
):
    folder = shutil.copytree(uninterrupted / "checkpoints", tmp_path / "checkpoints")
    *_, before, newest = sorted(folder.glob("step-*"))
    files = [path for path in newest.rglob("*") if path.is_file()]
    assert len(files) > 10, "the layout of a checkpoint is another one: look at this test"
    for file in files:
        content = file.read_bytes()
        DAMAGES[how](file)
        found = find_checkpoint(folder)
        assert found is not None and found.path == before, file
        (problem,) = found.broken
        assert problem.startswith(f"{newest.name}: ") and file.name.split(".")[0] in problem
        file.write_bytes(content)
    assert find_checkpoint(folder).path == newest
