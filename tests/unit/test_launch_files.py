"""The files for clusters below ``launch/``: linted, and run dry where there is no cluster."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from comoe.train.launchers import place_of_rank

ROOT = Path(__file__).parents[2]
SBATCH = ROOT / "launch/slurm/comoe.sbatch"
JOBSET = ROOT / "launch/kubernetes/jobset.yaml"
DOCKERFILE = ROOT / "launch/docker/Dockerfile"
SCRIPTS = sorted(
    [SBATCH, *ROOT.glob("launch/*.sh"), *(p for p in ROOT.glob(".ci/*") if p.is_file())]
)


def linted(tool, *words):
    """Run a linter; the test is left out where it is not installed."""
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    done = subprocess.run([tool, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_pass_the_linter(script):
    linted("shellcheck", "--severity=warning", "--exclude=SC1091", "--shell=bash", script)


def test_the_dockerfile_passes_the_linter_and_copies_what_there_is():
    linted("hadolint", DOCKERFILE)


def test_the_dockerfile_has_its_targets_and_copies_what_the_context_has():
    text = DOCKERFILE.read_text()
    assert re.findall(r"^FROM .* AS (\w+)$", text, flags=re.MULTILINE) == ["wheel", "cpu", "cuda"]
    copied = re.findall(r"^COPY (?!--)(.*) \S+$", text, flags=re.MULTILINE)
    allowed = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"
    }
    for name in " ".join(copied).split():
        assert (ROOT / name).exists() and name.split("/")[0] in allowed, name
    setup = (ROOT / "launch/setup.sh").read_text()
    assert set(re.findall(r"torch==[\d.]+", text)) == set(re.findall(r"torch==[\d.]+", setup))


def run_sbatch(folder, *words):
    """The commands that the batch script runs, with tools of Slurm that only write them down."""
    (folder / "bin").mkdir(exist_ok=True)
    for tool in ("srun", "scontrol"):
        (folder / "bin" / tool).write_text(
            f'#!/bin/sh\necho {tool} "$@" >>"$CALLS"\nexit "${{CODE:-0}}"\n'
        )
        (folder / "bin" / tool).chmod(0o755)
    calls = folder / "calls"
    calls.unlink(missing_ok=True)
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "CALLS": str(calls), "SLURM_JOB_ID": "7", "NAME": "x",
        "OUTPUT": str(folder),
    }  # fmt: skip
    if "fails" in words:
        environment["CODE"] = "2"
    done = subprocess.run(["bash", SBATCH, "my.yaml", "train.epochs=5"], env=environment)
    return done.returncode, calls.read_text().splitlines()


def test_the_batch_script_begins_goes_on_ends_and_fails(tmp_path):
    fresh = f"srun --kill-on-bad-exit=1 comoe train my.yaml train.epochs=5 run.output_dir={tmp_path} run.name=x"
    again = f"srun --kill-on-bad-exit=1 comoe train --resume {tmp_path / 'x'}"
    assert run_sbatch(tmp_path) == (0, [fresh, "scontrol requeue 7"])
    assert run_sbatch(tmp_path, "fails") == (2, [fresh])
    (tmp_path / "x").mkdir()
    (tmp_path / "x/config.yaml").touch()
    assert run_sbatch(tmp_path) == (0, [again, "scontrol requeue 7"])
    (tmp_path / "x/export").mkdir()
    assert run_sbatch(tmp_path) == (0, [again])


def test_options_of_sbatch_come_before_the_first_command():
    lines = SBATCH.read_text().splitlines()
    options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH ")]
    first = next(number for number, line in enumerate(lines) if line and line[0] != "#")
    assert max(options) < first
    assert all(re.fullmatch(r"#SBATCH --[a-z-]+(=\S+)?", lines[number]) for number in options)


def test_the_jobset_passes_the_linter():
    linted("yamllint", "--strict", "-d", "{extends: default, rules: {line-length: {max: 120}, "
           "document-start: disable}}", JOBSET)  # fmt: skip


def test_the_pods_of_the_jobset_find_their_place_and_what_would_fail_again_is_not_restarted():
    jobset = yaml.safe_load(JOBSET.read_text())
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    given = {entry["name"]: entry["value"] for entry in container["env"]}
    ranks = job["completions"]
    places = [place_of_rank(given | {"JOB_COMPLETION_INDEX": str(n)}) for n in range(ranks)]
    assert [place.rank for place in places] == list(range(ranks)) == [0, 1]
    assert {place.world for place in places} == {ranks} == {job["parallelism"]}
    # The names that JobSet gives: <jobset>-<job>-<its number>-<pod>.<subdomain, the jobset's name>.
    name = jobset["metadata"]["name"]
    assert places[0].address == f"{name}-{replicated['name']}-0-0.{name}"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [2, 3] and job["backoffLimit"] == 0
    assert rule["onExitCodes"]["containerName"] == container["name"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in job["template"]["spec"]["volumes"]}
    done = subprocess.run(["sh", "-n", "-c", container["command"][2]], capture_output=True)
    assert done.returncode == 0 and container["command"][:2] == ["sh", "-c"]
