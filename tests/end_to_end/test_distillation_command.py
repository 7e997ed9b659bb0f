"""A student of the smoke run on two ranks: asked once, resumed exactly, exported and evaluated."""

import json

import pytest

from comoe.inference.predictor import Predictor
from tests.end_to_end.commands import TASKS, end_behind, read_lines, train_in_ranks, train_lines

pytestmark = pytest.mark.end_to_end


def test_a_student_learns_all_tasks_from_every_post_and_resumes_exactly(tmp_path, home, smoke_run):
    (tmp_path / "more.txt").write_text(
        "the band was loud\nwe ate at the station\n" * 20, encoding="utf-8"
    )
    words = [
        f"run.output_dir={tmp_path}", "run.name=whole", f"distill.teachers=[{smoke_run.folder / 'export'}]",
        f"distill.unlabelled=[{tmp_path / 'more.txt'}]", "model.moe.route_by=both", "train.batch_size=16",
        "train.micro_batch_size=4", "train.schedule=constant", "train.warmup_fraction=0", "model.dropout=0.2",
        "train.early_stop_metric=teacher_kl", "distill.temperature=2", "train.max_steps=4", "train.save_every=2",
        "train.eval_every=4", "run.plots=false", "run.histograms=false",
    ]  # fmt: skip
    run = tmp_path / "whole"
    assert "data set more: 40 train\n" in train_in_ranks(2, home, words)
    before = train_lines(run)
    assert all(values["soft"] > 0 for values in before[4]["tasks"].values())
    end_behind(run, step=2)
    assert ", 0 of them computed" in train_in_ranks(2, home, resume=run)
    for step in (1, 2, 3, 4):
        assert train_lines(run)[step]["loss"] == pytest.approx(before[step]["loss"], rel=1e-6)
    checks = [line for line in read_lines(run / "metrics.jsonl") if line["split"] == "validation"]
    assert checks[-1]["teacher_kl"] == pytest.approx(-checks[-1]["chosen"])
    assert checks[-1]["teacher_kl"] > 0
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    kl = results["teacher_kl"]["validation"]
    assert set(kl) == {*TASKS, "mean"}
    assert results["experts_off"]["teacher_kl"]["as_trained"]["mean"] > 0
    predictor = Predictor.from_pretrained(run / "export", device="cpu")
    assert set(predictor(["a fine day"])[0]) == {"text", *TASKS}
