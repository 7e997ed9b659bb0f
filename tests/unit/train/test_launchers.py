"""The variables of each launcher lead to the same place of a rank, and to its share of the cores."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from comoe.train.launchers import (
    LAUNCHERS,
    RankPlace,
    check_ranks,
    first_host,
    place_of_rank,
    refuse_restarts_under_torchrun,
    settle_place,
    threads_of_rank,
)

ROOT = Path(__file__).parents[3]
MASTER = {"MASTER_ADDR": "gpu03", "MASTER_PORT": "1234"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1",
            "GROUP_WORLD_SIZE": "2", **MASTER}  # fmt: skip
DEEPSPEED = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "CROSS_RANK": "1",
             "CROSS_SIZE": "2", **MASTER}  # fmt: skip
SLURM = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
         "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_NODELIST": "gpu[03,07-09]",
         "SLURM_JOB_ID": "1000", "SLURM_STEP_ID": "2", "SLURM_NTASKS": "8"}  # fmt: skip
KUBERNETES = {"RANK": "1", "WORLD_SIZE": "2", **MASTER}
CASES = {
    "torchrun": (TORCHRUN, ("torchrun", 5, 8, 1, 4, 1, 2, "gpu03", 1234)),
    "deepspeed": (DEEPSPEED, ("deepspeed", 5, 8, 1, 4, 1, 2, "gpu03", 1234)),
    "slurm": (SLURM, ("slurm", 5, 8, 1, 4, 1, 2, "gpu03", 27002)),
    "kubernetes": (KUBERNETES, ("kubernetes", 1, 2, 0, 1, 1, 2, "gpu03", 1234)),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_is_read(launcher):
    environment, expected = CASES[launcher]
    place = place_of_rank(environment)
    assert place == RankPlace(*expected)
    # Written down, it is read again as it was, by whatever comes later.
    written = dict(environment)
    assert settle_place(written) == place
    again = place_of_rank(written)
    assert again is not None
    for name in ("rank", "world", "local_rank", "local_size", "node", "nodes", "address", "port"):
        assert getattr(again, name) == getattr(place, name), name
    assert (written["LOCAL_SIZE"], written["CROSS_SIZE"]) == (str(place.local_size), "2")


def test_other_shapes_of_the_same_launchers():
    uneven = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_NODEID": "2", "SLURM_STEP_NUM_TASKS": "5",
                      "SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "3"}  # fmt: skip
    found = place_of_rank(uneven)
    assert found is not None and (found.local_size, found.node, found.nodes) == (1, 2, 3)
    chosen = place_of_rank(SLURM | MASTER)
    assert chosen is not None and (chosen.address, chosen.port) == ("gpu03", 1234)
    inside = place_of_rank(SLURM | TORCHRUN)
    assert inside is not None and inside.launcher == "torchrun"
    job = place_of_rank({"JOB_COMPLETION_INDEX": "1", "WORLD_SIZE": "2", **MASTER})
    assert job is not None and (job.launcher, job.rank, job.nodes) == ("kubernetes", 1, 2)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7", "SLURM_LOCALID": "0"},
        SLURM | {"SLURM_STEP_NUM_TASKS": "1"},
        {"JOB_COMPLETION_INDEX": "0"},
    ],
    ids=["plain", "the shell of sbatch", "an interactive step", "a job of single pods"],
)
def test_what_is_no_rank(environment):
    before = dict(environment)
    assert settle_place(environment) is None and environment == before


def test_a_variable_that_is_no_number_or_missing_is_named():
    with pytest.raises(ValueError, match="has WORLD_SIZE='two', where a launcher sets a whole"):
        place_of_rank(TORCHRUN | {"WORLD_SIZE": "two"})
    with pytest.raises(ValueError, match="MASTER_ADDR is not; set it"):
        place_of_rank({"RANK": "1", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    "nodes, first",
    [("gpu[07-09,12],login", "gpu07"), ("login,gpu[1-2]", "login"), ("r[2-3]n[04,06]", "r2n04"), ("", "")],
)  # fmt: skip
def test_the_first_machine_of_slurms_short_form(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    "more, own, threads",
    [({}, False, 4), ({"OMP_NUM_THREADS": "3"}, False, None), ({"OMP_NUM_THREADS": "1"}, True, 4),
     ({"SLURM_CPUS_PER_TASK": "6"}, False, 6), ({"SLURM_CPUS_PER_TASK": "64"}, False, 16)],
)  # fmt: skip
def test_threads(more, own, threads):
    settled = dict(DEEPSPEED)
    settle_place(settled)
    assert threads_of_rank(settled | more, 16, torchruns_own=own) == threads


def test_restarts_are_refused_where_torchrun_holds_the_port(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    refuse_restarts_under_torchrun(0)
    with pytest.raises(ValueError, match="--restarts does not work under torchrun"):
        refuse_restarts_under_torchrun(3)


def test_ranks_that_a_machine_cannot_hold_are_refused_before_one_is_started():
    check_ranks(None)
    check_ranks(2)
    with pytest.raises(ValueError, match="--ranks is 1,000,000,000; each takes 256 MiB .*at most"):
        check_ranks(10**9)


RANKS = '''
import sys
from comoe.distributed import run_as_ranks
said = """
import os, sys, time
rank = int(os.environ["RANK"])
open(os.path.join(sys.argv[1], str(rank)), "w").close()
while len(os.listdir(sys.argv[1])) < int(os.environ["WORLD_SIZE"]):
    time.sleep(0.05)
sys.exit(rank * 3)
"""
sys.exit(run_as_ranks(int(sys.argv[1]), [sys.executable, "-c", said, sys.argv[2]]))
'''


@pytest.mark.parametrize("ranks, code", [(1, 0), (2, 3)])
def test_ranks_are_started_and_the_code_of_the_one_that_fails_is_passed_on(ranks, code, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", RANKS, str(ranks), tmp_path],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (code, "")
    assert {path.name for path in tmp_path.iterdir()} == {str(rank) for rank in range(ranks)}
