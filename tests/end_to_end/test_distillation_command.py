"""A student of the smoke run on two ranks: asked once, resumed exactly, exported and evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from comoe.inference.predictor import Predictor
from tests.end_to_end.commands import (
    SMOKE,
    TASKS,
    Terminal,
    deepspeed,
    read_lines,
    train_lines,
)
from tests.end_to_end.conftest import Finished

pytestmark = pytest.mark.end_to_end


def test_a_student_learns_all_tasks_from_every_post_and_resumes_exactly(
    terminal: Terminal, tmp_path: Path, smoke_run: Finished
) -> None:
    (tmp_path / "more.txt").write_text(
        "the band was loud\nwe ate at the station\n" * 20, encoding="utf-8"
    )
    words = [
        "--config", SMOKE, f"run.output_dir={tmp_path}", f"distill.teachers=[{smoke_run.folder / 'export'}]",
        f"distill.unlabelled=[{tmp_path / 'more.txt'}]", "model.moe.route_by=both", "train.batch_size=16",
        "train.micro_batch_size=4", "train.schedule=constant", "train.warmup_fraction=0", "model.dropout=0.2",
        "train.early_stop_metric=teacher_kl", "distill.temperature=2",
    ]  # fmt: skip
    whole = terminal.run(*deepspeed(2), *words, "run.name=whole", "train.max_steps=6")
    assert whole.code == 0, whole.out + whole.err
    assert "data set more: 40 train\n" in whole.said
    part = terminal.run(*deepspeed(2), *words, "run.name=part", "train.max_steps=3")
    assert part.code == 0 and ", 0 of them computed" in part.said, part.out + part.err
    done = terminal.run(*deepspeed(2), "--resume", tmp_path / "part", "train.max_steps=6")
    assert done.code == 0 and ", 0 of them computed" in done.said, done.out + done.err
    lines = [train_lines(tmp_path / name) for name in ("whole", "part")]
    for step in (4, 5, 6):
        assert lines[1][step]["loss"] == pytest.approx(lines[0][step]["loss"], rel=1e-6)
        assert all(values["soft"] > 0 for values in lines[0][step]["tasks"].values())
    checks = [
        line
        for line in read_lines(tmp_path / "whole" / "metrics.jsonl")
        if line["split"] == "validation"
    ]
    assert (
        checks[-1]["teacher_kl"] == pytest.approx(-checks[-1]["mean"])
        and checks[-1]["teacher_kl"] > 0
    )
    results = json.loads((tmp_path / "whole" / "results.json").read_text(encoding="utf-8"))
    kl = results["teacher_kl"]["validation"]
    assert set(kl) == {*TASKS, "mean"}
    assert results["experts_off"]["teacher_kl"]["as_trained"]["mean"] > 0
    predictor = Predictor.from_pretrained(tmp_path / "whole" / "export", device="cpu")
    assert set(predictor(["a fine day"])[0]) == {"text", *TASKS}
