"""The recipe tacl_comoe on generated posts: a gate by task, all experts, contrastive loss, pairs and tags together."""

import json
from pathlib import Path

import pytest

from comoe.inference.predictor import Predictor
from comoe.tasks.task import Task
from tests.end_to_end.commands import read_lines, train_in_ranks, train_lines

pytestmark = [pytest.mark.end_to_end, pytest.mark.one_core]

TASKS = ("hate", "entities", "stance", "topic")


@pytest.fixture(scope="module")
def run(tmp_path_factory, home) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    words = [
        "data.root=smoke:tacl_posts", "model.encoder=smoke:encoder", f"run.output_dir={runs}",
        "train.max_steps=3", "train.eval_every=3", "train.log_every=1", "data.limit_eval=60",
    ]  # fmt: skip
    config = "launch/configs/tacl_comoe.yaml"
    said = train_in_ranks(1, home, words, config=config, settings="zero1")
    assert "calibration (expected calibration error" in said
    return runs / "tacl_comoe"


def test_four_tasks_learn_together_and_the_contrastive_loss_sees_all_of_them(run):
    lines = train_lines(run).values()
    assert {name for line in lines for name in line["tasks"]} == set(TASKS)
    compared = {
        name for line in lines for name, values in line["tasks"].items() if "contrastive" in values
    }
    assert compared == set(TASKS)
    metrics = json.loads((run / "results.json").read_text(encoding="utf-8"))["metrics"]
    assert {split: set(found) for split, found in metrics.items()} == {
        "validation": set(TASKS),
        "test": set(TASKS),
    }


def test_the_export_answers_as_the_run_was_calibrated(run, home):
    fitted = json.loads((run / "results.json").read_text(encoding="utf-8"))["calibration"]
    assert tuple(fitted) == TASKS
    config = json.loads((run / "export" / "config.json").read_text(encoding="utf-8"))
    for task in map(Task.from_dict, config["tasks"]):
        entry = fitted[task.name]
        edges = None if task.thresholds is None else list(task.thresholds)
        assert (task.temperature, edges) == (entry["temperature"], entry["thresholds"])
        assert 0 <= entry["ece"]["test"]["before"] <= 1
        assert (run / "plots" / f"reliability_test_{task.name}.png").stat().st_size > 5000
    assert any(entry["temperature"] is not None for entry in fitted.values())
    predictor = Predictor.from_pretrained(run / "export", device="cpu")
    pairs = {
        post["text"]: post["target"]
        for post in read_lines(home / "smoke-1/tacl_posts/stance/test.jsonl")
    }
    told = [
        row
        for row in read_lines(run / "predictions" / "test" / "stance.jsonl")
        if row["gold"] is not None
    ][:8]
    texts = [row["text"] for row in told]
    answers = predictor(texts, pairs=[pairs[text] for text in texts], tasks=["stance"])
    for row, answer in zip(told, answers, strict=True):
        assert answer["stance"]["label"] == row["label"]
        assert answer["stance"]["scores"] == pytest.approx(row["scores"], abs=1e-5)
