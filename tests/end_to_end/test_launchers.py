"""torchrun, Slurm's variables and ``comoe train --ranks`` give the losses of the deepspeed launcher."""

import shutil
import sys
from pathlib import Path

import pytest

from tests.end_to_end.commands import LEAN, SMOKE, free_port, losses

pytestmark = pytest.mark.end_to_end


@pytest.fixture
def words(tmp_path) -> list[str]:
    return [f"run.output_dir={tmp_path}", "train.max_steps=3", "data.limit_eval=20", *LEAN]


def test_torchrun(terminal, smoke_run, tmp_path, words):
    torchrun = shutil.which("torchrun", path=str(Path(sys.executable).parent)) or "torchrun"
    script = ["launch/train.py", "--deepspeed", "zero2", "--config", SMOKE, *words]
    done = terminal.run(torchrun, "--standalone", "--nproc_per_node", "2", *script)
    assert done.code == 0, done.out + done.err
    assert losses(tmp_path / "smoke") == pytest.approx(losses(smoke_run.folder)[:3], rel=1e-6)


def test_ranks_that_the_command_starts_itself(terminal, smoke_run, tmp_path, words):
    done = terminal.python("-m", "comoe", "train", "smoke", "--ranks", "2", *words)
    assert done.code == 0, done.out + done.err
    assert done.err.startswith("comoe: starting 2 ranks, on the CPU\n")
    assert losses(tmp_path / "smoke") == pytest.approx(losses(smoke_run.folder)[:3], rel=1e-6)
    words = (f"run.output_dir={tmp_path / 'none'}", "train.max_stpes=6")
    wrong = terminal.python("-m", "comoe", "train", "smoke", "--ranks", "2", *words)
    first, *more = wrong.err.splitlines()
    assert wrong.code == 2 and len(more) == 1
    assert "train.max_stpes is not an option; did you mean train.max_steps?" in more[0]
    assert not (tmp_path / "none").exists()


def test_two_tasks_of_slurm_on_machines_of_their_own(terminal, smoke_run, tmp_path, words):
    common = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
              "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost,other",
              "MASTER_PORT": str(free_port())}  # fmt: skip
    places = ({"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)} for rank in range(2))
    started = [
        terminal.start("env", *(f"{key}={value}" for key, value in (common | place).items()),
                       sys.executable, "-m", "comoe", "train", "smoke", *words)
        for place in places
    ]  # fmt: skip
    for typed in started:
        done = typed.wait()
        assert done.code == 0, done.out + done.err
    assert losses(tmp_path / "smoke") == pytest.approx(losses(smoke_run.folder)[:3], rel=1e-6)


def test_the_doctor_trains_a_step(terminal):
    done = terminal.python("-m", "comoe", "doctor")
    assert done.code == 0, done.out + done.err
    last = done.out.splitlines()[-1]
    assert last == "ok       training step: the smoke recipe trained a step, evaluated and exported"
