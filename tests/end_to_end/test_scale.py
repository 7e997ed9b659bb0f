"""``launch/scale.py``: survives a failing run, stops in time, goes on where it stopped, and leaves its report."""

import csv
import json
import re
import sys
from pathlib import Path

import pytest

from tests.end_to_end.commands import LEAN, SMOKE, processes_of, wait_for

pytestmark = [pytest.mark.end_to_end, pytest.mark.one_core]

ONE = "E2-k1-sigmoid-epauto-smoke-encoder-s0"


def words(output: Path, encoders: str) -> list[str]:
    lists = ["--experts", "2", "--top-k", "1,4", "--encoder", encoders, "--output", str(output)]
    # Long enough to be met half-way, also by a fast machine.
    return [sys.executable, "launch/scale.py", "--config", SMOKE, *lists, *LEAN, "train.max_steps=60",
            "train.save_every=10", "train.eval_every=60", "train.batch_size=32"]  # fmt: skip


def test_an_experiment_survives_a_failing_run_and_goes_on_after_an_interruption(terminal, tmp_path):
    output, missing = tmp_path / "scale", tmp_path / "missing"
    typed = terminal.start(*words(output, f"{missing},smoke:encoder"))
    run = output / "runs" / ONE
    wait_for(
        lambda: list(run.glob("checkpoints/step-*/manifest.json")), what="the first checkpoint"
    )
    typed.process.terminate()
    stopped = typed.wait()
    assert stopped.code == 130 and "the same command goes on" in stopped.err, stopped.said
    assert not (run / "results.json").exists() and processes_of(output) == []
    assert "top_k (4) must be at most model.moe.num_experts (2)" in stopped.out
    assert re.search(r"FAILED \(comoe: (rank 0: )?model.encoder", stopped.out)

    done = terminal.run(*words(output, f"{missing},smoke:encoder"))
    assert done.code == 1, done.said  # the missing encoder is tried again, and still missing
    assert f"{ONE}: validation" in done.out and "s left" in done.out
    assert "resuming" in (output / "logs" / f"{ONE}.log").read_text(encoding="utf-8")
    with (output / "table.csv").open(encoding="utf-8") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert [row["status"] for row in rows.values()] == ["failed", "done"]
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert float(rows[ONE]["stance/macro_f1"]) == results["metrics"]["test"]["stance"]["macro_f1"]
    assert float(rows[ONE]["parameters_experts"]) == results["parameters"]["experts"]
    assert float(rows[ONE]["max_violation"]) >= 0
    for name in ("quality.png", "cost.png", f"share_{ONE}.png"):
        assert (output / "plots" / name).stat().st_size > 5000
    assert list((output / "tensorboard" / ONE).glob("events*"))


def test_a_plan_is_printed_without_an_encoder_on_this_machine(terminal):
    done = terminal.here("launch/scale.py", "--plan", "--config", SMOKE, "--encoder-shape", "24,1024,4096,50265",
                         "--gpus", "1..4096", "--batch", "4096", "model.moe.num_experts=64")  # fmt: skip
    assert done.code == 0, done.said
    rows = [line.split() for line in done.out.splitlines()]
    assert [row[0] for row in rows if len(row) > 15 and row[0].isdigit()][:13] == [
        str(2**power) for power in range(13)
    ]
    assert "moments of adamw" in done.out and "alternatives" in done.out
