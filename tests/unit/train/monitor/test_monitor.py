"""What the monitor writes can be read back: the log, TensorBoard's events, the pictures."""

import json

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from comoe.evaluation.embedding_stats import EmbeddingSummary, TaskEmbeddings
from comoe.evaluation.evaluate import Evaluation
from comoe.evaluation.routing_stats import RoutingStats
from comoe.tasks.task import Task
from comoe.train.monitor import plots
from comoe.train.monitor.metrics_file import read_metrics
from comoe.train.monitor.monitor import Monitor
from comoe.types import ModelOutput, Routing

TASKS = (
    Task("mood", "single_label", ("bad", "good"), "macro_f1", 1.0, None, 0.0, True),
    Task("heat", "regression", (), "pearson", 1.0, None, 0.0, False),
)


def start(folder, **options):
    return Monitor(folder, enabled=True, tasks=TASKS, recipe_text="run:\n  name: x", **options)


def train_line(monitor, step, *, loss=1.5):
    terms = {
        "task/mood": torch.tensor(0.5),
        "task/heat": 0.25,
        "contrastive": 0.1,
        "contrastive/mood": 0.1,
    }
    monitor.log_train(
        step, loss=loss, terms=terms, metrics={"mood": {"accuracy": 0.75}}, rates={"encoder": 5e-5, "experts": 5e-4},
        task_weights={"mood": 1.0, "heat": 1.0}, grad_norm=2.0, posts_per_second=100.0, seconds=3.0,
    )  # fmt: skip


def evaluation(**measures):
    metrics = {
        "mood": {"macro_f1": 0.6, "majority/macro_f1": 0.3, "f1/good": 0.7},
        "heat": {"pearson": 0.4},
    }
    return Evaluation(
        metrics=metrics, confusions={"mood": np.array([[3, 1], [2, 4]])}, predictions={}, **measures
    )


def summary(*, all_experts: bool = False):
    stats = RoutingStats(["mood", "heat"], num_layers=1, num_experts=2, layers=[3])
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.3], [0.2, 0.6]])
    picks, weights, counts = torch.tensor([[0], [0], [1]]), torch.ones(3, 1), torch.tensor([2, 1])
    if all_experts:
        picks, weights, counts = torch.tensor([[0, 1]] * 3), scores, torch.tensor([3, 3])
    routing = Routing(scores, scores, picks, weights, counts, torch.ones(3, 2))
    output = ModelOutput({}, {}, {}, (routing,), torch.tensor([0, 0, 1]))
    stats.update(output, torch.tensor([[True, False], [False, True]]))
    return stats.summary()


def events(folder):
    sizes = {"images": 0, "scalars": 0, "histograms": 0}
    return EventAccumulator(str(folder / "tensorboard"), size_guidance=sizes).Reload()


def test_a_training_line_carries_the_global_loss_then_tasks_rates_and_weights(tmp_path):
    monitor = start(tmp_path)
    train_line(monitor, 10, loss=1 / 3)
    # It is on disk before the next step.
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert list(line)[:4] == ["step", "split", "loss", "tasks"]
    assert (line["step"], line["split"], line["loss"]) == (10, "train", 1 / 3)
    assert line["tasks"] == {
        "mood": {"loss": 0.5, "contrastive": 0.1, "accuracy": 0.75}, "heat": {"loss": 0.25}
    }  # fmt: skip
    assert line["contrastive"] == 0.1 and line["rates"] == {"encoder": 5e-5, "experts": 5e-4}
    assert line["weights"] == {"mood": 1.0, "heat": 1.0} and line["grad_norm"] == 2.0
    event = {"step": 4, "what": "skipped step", "posts": [1, 2]}
    monitor.log_event(event)
    monitor.close()
    assert read_metrics(tmp_path / "metrics.jsonl")[1] == {"split": "event"} | event


def test_an_evaluation_reaches_the_log_tensorboard_and_the_plots(tmp_path):
    monitor = start(tmp_path)
    train_line(monitor, 10)
    found = evaluation(routing=summary())
    monitor.log_evaluation(10, split="validation", evaluation=found, mean=0.5)
    monitor.log_evaluation(10, split="test", evaluation=evaluation(), mean=0.45)
    monitor.close()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["split"] for line in lines] == ["train", "validation", "test"]
    assert lines[1]["tasks"]["mood"]["macro_f1"] == 0.6 and lines[1]["mean"] == 0.5
    assert lines[1]["routing"]["layers"] == [3] and lines[1]["routing"]["tokens"] == 3
    loaded = events(tmp_path)
    tags = loaded.Tags()
    measures = ("max_violation", "effective_experts", "entropy", "task_information", "cooperation",
                "share/expert_1")  # fmt: skip
    assert {f"routing/layer_3/{name}" for name in measures} | {
        "train/loss", "train/mood/loss", "rate/encoder", "weight/mood", "measured/grad_norm",
        "validation/mood/macro_f1", "test/heat/pearson", "validation/mean",
    } <= set(tags["scalars"])  # fmt: skip
    assert tags["histograms"] == ["routing/layer_3/scores"]
    assert loaded.Histograms("routing/layer_3/scores")[0].histogram_value.num == 6
    pictures = {
        "confusion/validation/mood",
        "confusion/test/mood",
        "routing/layer_expert",
        "routing/task_expert",
    }
    assert set(tags["images"]) == pictures
    assert "recipe/text_summary" in tags["tensors"]
    files = {f"{name.replace('/', '_')}.png" for name in (*pictures, "loss", "metrics", "experts")}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == files


def test_where_all_experts_run_the_pictures_show_the_weights_of_the_gate(tmp_path, monkeypatch):
    drawn = []
    figure = plots.task_share_figure
    monkeypatch.setattr(
        plots, "task_share_figure",
        lambda share, **given: drawn.append((share, given["what"])) or figure(share, **given),
    )  # fmt: skip
    monitor = start(tmp_path)
    for all_experts in (False, True):
        found = evaluation(routing=summary(all_experts=all_experts))
        monitor.log_evaluation(10 + all_experts, split="validation", evaluation=found, mean=0.5)
    monitor.close()
    (tokens, what), (weights, of_weights) = drawn
    assert (what, of_weights) == ("tokens", "gate weight")
    # Mood has the first two tokens, heat the third.
    np.testing.assert_allclose(tokens[0], [[1, 0], [0, 1]])
    np.testing.assert_allclose(
        weights[0], [[1.7 / 2.1, 0.4 / 2.1], [0.2 / 0.8, 0.6 / 0.8]], rtol=1e-5
    )


def test_a_number_that_is_not_finite_is_null_in_the_log_and_absent_in_tensorboard(tmp_path):
    monitor = start(tmp_path)
    train_line(monitor, 1, loss=float("nan"))
    monitor.close()
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] is None
    assert "train/loss" not in events(tmp_path).Tags()["scalars"]


def test_a_resumed_run_shows_one_curve_and_a_new_one_of_the_same_name_forgets_the_old(tmp_path):
    def run(*steps, **options):
        monitor = start(tmp_path, **options)
        for step, loss in steps:
            train_line(monitor, step, loss=loss)
        monitor.close()
        lines = [(line["split"], line["step"]) for line in read_metrics(tmp_path / "metrics.jsonl")]
        return lines, [(e.step, e.value) for e in events(tmp_path).Scalars("train/loss")]

    run((1, 1.0), (2, 2.0), (3, 3.0))
    lines, curve = run((3, 30.0), resumed_at=2)
    assert lines == [("train", 1), ("train", 2), ("resume", 2), ("train", 3)]
    assert curve == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert run((1, 5.0)) == ([("train", 1)], [(1, 5.0)])


def test_only_the_enabled_monitor_writes(tmp_path):
    monitor = Monitor(tmp_path / "run", enabled=False, tasks=TASKS, recipe_text="")
    train_line(monitor, 1)
    monitor.log_evaluation(1, split="validation", evaluation=evaluation(routing=summary()))
    monitor.log_event({"what": "nothing"})
    monitor.close()
    assert not (tmp_path / "run").exists()


def test_embeddings_reach_the_log_tensorboard_its_projector_and_the_plots(tmp_path):
    points = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    measures = {
        "alignment": 1.5,
        "uniformity": -2.0,
        "retrieval_at_1": 0.5,
        "retrieval_at_1/chance": 0.4,
    }
    views = {
        "mood": TaskEmbeddings(measures, points, ["bad", "good\nor so", "bad"] * 2),
        "heat": TaskEmbeddings(measures, points, [0.1, 0.2, 0.3] * 2),
    }
    retrieval = {"image_to_text_at_1": 0.7, "text_to_image_at_1": 0.6, "chance": 0.01}
    found, monitor = EmbeddingSummary(views, retrieval), start(tmp_path)
    monitor.log_evaluation(10, split="validation", evaluation=evaluation(embeddings=found))
    monitor.log_projector(10, split="validation", embeddings=found)
    monitor.close()
    line = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert line["embeddings"]["mood"] == measures and line["retrieval"]["image_to_text_at_1"] == 0.7
    tags = events(tmp_path).Tags()
    scalars = {"mood/alignment", "heat/retrieval_at_1", "image_to_text_at_1"}
    assert {f"embedding/{name}" for name in scalars} <= set(tags["scalars"])
    assert {"embedding/mood", "embedding/heat"} <= set(tags["images"])
    assert "map/validation" in tags["images"]
    for name in ("embedding_mood", "embedding_map_validation"):
        assert (tmp_path / "plots" / f"{name}.png").is_file()
    projected = tmp_path / "tensorboard" / "00010" / "validation_mood"
    assert (projected / "metadata.tsv").read_text().splitlines() == ["bad", "good or so", "bad"] * 2
    np.testing.assert_allclose(np.loadtxt(projected / "tensors.tsv"), points, rtol=1e-5)


@pytest.mark.parametrize("part", ["_figure", "_draw_curves", "_scalars"])
def test_what_cannot_be_drawn_costs_one_warning_and_no_number(tmp_path, monkeypatch, capsys, part):
    def fail(*_, **__):
        raise RuntimeError("no formula")

    monkeypatch.setattr(Monitor, part, fail)
    monitor = start(tmp_path)
    for step in (1, 2):
        train_line(monitor, step)
        monitor.log_evaluation(step, split="validation", evaluation=evaluation(), mean=0.5)
    bins = (np.ones(2), np.ones(2), np.ones(2))
    monitor.log_reliability(2, split="test", task="mood", curves={"before": bins}, errors={"a": 1})
    monitor.close()
    told = capsys.readouterr().err
    assert told.count("warning") == 1 and "RuntimeError: no formula" in told
    steps = [(line["step"], line["split"]) for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == [(1, "train"), (1, "validation"), (2, "train"), (2, "validation")]


def test_a_plot_with_a_long_name_gets_one_that_fits(tmp_path):
    monitor = start(tmp_path)
    for end in "ab":
        bins = (np.ones(2), np.ones(2), np.ones(2))
        task = "x" * 240 + end
        monitor.log_reliability(1, split="test", task=task, curves={"before": bins}, errors={})
    monitor.close()
    assert len(list((tmp_path / "plots").glob("reliability_test_x*.png"))) == 2
