"""A task of plain posts: read for training alone, in the contrastive loss, and in no answer, score or card."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_data import labelled_rows, recipe_of, write_jsonl
from helpers_export import tiny_predictor
from helpers_model import MOOD, TOPIC, random_batch, scaled, tiny_model, tiny_objective

from comoe.config.recipe import TaskConfig
from comoe.data.corpus import Corpus, load_corpus
from comoe.evaluation.evaluate import check_chosen_metric, evaluate, mean_metric
from comoe.evaluation.tables import format_results_table
from comoe.inference.options import PredictOptions
from comoe.inference.predict_file import predict_file
from comoe.inference.score import DataChoice, score
from comoe.tasks.task import Task, build_task
from comoe.types import IGNORED, Batch

PLAIN = build_task("plain", TaskConfig(kind="unlabelled"), labels=(), label_counts={})
TASKS = (MOOD, PLAIN, TOPIC)


def batch_of(rows: int = 6, *, plain: int = 4) -> Batch:
    batch = random_batch(rows=rows, tasks=(MOOD, TOPIC))
    marks = torch.where(torch.arange(rows) < plain, 0, IGNORED)
    return scaled(replace(batch, labels={**batch.labels, "plain": marks}), TASKS)


def corpus_of(root: Path, **tasks: TaskConfig) -> Corpus:
    write_jsonl(root / "moods" / "train.jsonl", labelled_rows(20))
    write_jsonl(root / "plain" / "train.jsonl", [{"post": f"plain post {i}"} for i in range(7)])
    write_jsonl(root / "plain" / "test.jsonl", [{"post": "not read"}])
    return load_corpus(recipe_of(root, **tasks))


def test_plain_posts_are_read_for_training_alone_and_need_no_label_column(tmp_path):
    mood, plain = TaskConfig(path="moods"), TaskConfig(path="plain", text="post", kind="unlabelled")
    corpus = corpus_of(tmp_path, mood=mood, plain=plain)
    train = corpus.splits["train"]
    assert corpus.report.posts["plain"] == {"train": 7} and "test" not in corpus.splits
    assert train.labels["plain"].count(0) == 7
    assert train.labels["plain"].count(None) == len(train) - 7
    assert corpus.tasks[1] == replace(PLAIN, name="plain")
    assert not corpus.splits["validation"].labels["plain"].count(0)


def test_plain_posts_may_be_a_text_file(tmp_path):
    lines = "\ufefffirst post\r\n\n  \nwith\u2028a separator\nlast"
    (tmp_path / "plain.txt").write_bytes(lines.encode())
    plain = TaskConfig(path="plain.txt", kind="unlabelled")
    corpus = corpus_of(tmp_path, mood=TaskConfig(path="moods"), plain=plain)
    train = corpus.splits["train"]
    posts = [row for row, label in enumerate(train.labels["plain"]) if label == 0]
    assert [train.texts[row] for row in posts] == ["first post", "with\u2028a separator", "last"]
    assert [train.origins[row].rpartition(":")[2] for row in posts] == ["1", "4", "5"]
    assert corpus.report.posts["plain"] == {"train": 3}
    with pytest.raises(
        ValueError, match="mood.label is 'label'.*Plain text has no labels: use it for"
    ):
        corpus_of(tmp_path, mood=TaskConfig(path="plain.txt"))


def test_a_labelled_data_set_may_be_the_plain_posts_too(tmp_path):
    plain = TaskConfig(path="moods", kind="unlabelled")
    splits = corpus_of(tmp_path, mood=TaskConfig(path="moods"), plain=plain).splits
    assert [set(splits[name].labels["plain"]) for name in ("train", "validation")] == [{0}, {0}]


@pytest.mark.parametrize("plain", [4, 0])
def test_a_head_without_outputs_learns_its_pooling_from_the_contrastive_loss_alone(plain):
    objective = tiny_objective(tasks=TASKS, dropout=0.1).train()
    step = objective(batch_of(plain=plain))
    step.loss.backward()
    head = objective.model.heads[1]
    assert [name for name, _ in head.named_parameters()] == ["pooling.query"]
    assert bool(head.pooling.query.grad.any()) == bool(plain)
    assert step.output.logits["plain"].shape == (6, 0)
    assert step.terms["task/plain"] == 0
    assert bool(step.terms["contrastive/plain"] > 0) == bool(plain)


@pytest.mark.parametrize("contrastive", [True, False])
def test_a_head_on_words_pools_only_where_it_takes_part(contrastive):
    words = Task("words", "tags", ("O", "B-PER"), "span_f1", contrastive=contrastive)
    output = tiny_model(tasks=(MOOD, words))(random_batch(tasks=(MOOD, words)))
    assert ("words" in output.embeddings) == contrastive and "words" not in output.attentions
    assert output.logits["words"].shape[2] == 2


def test_no_answer_no_score_and_no_metric_to_choose_by():
    model, batch = tiny_model(tasks=TASKS).eval(), batch_of()
    found = evaluate(
        model, None, collator=lambda split, rows: batch, tasks=TASKS, batches=[np.arange(6)],
        gather=lambda answers: [answers],
    )  # fmt: skip
    assert set(found.metrics) == set(found.predictions) == {"mood", "topic"}
    assert np.isfinite(mean_metric(found.metrics, TASKS))
    assert "plain" not in format_results_table({"test": found.metrics}, TASKS)
    check_chosen_metric("mean", TASKS, measured={"mood"})
    with pytest.raises(ValueError, match="plain/none"):
        check_chosen_metric("plain/none", TASKS)


@pytest.mark.parametrize("route_by", ["token", "task"])
def test_an_export_answers_the_other_tasks(tmp_path, route_by):
    predictor = tiny_predictor(tmp_path, tasks=TASKS, route_by=route_by)
    assert [task.name for task in predictor.tasks] == ["mood", "topic"]
    (answer,) = predictor(["a sunny day"], explain=True)
    assert list(answer) == ["text", "mood", "topic"] and "attention" in answer["topic"]
    with pytest.raises(ValueError, match="plain"):
        predictor(["a sunny day"], tasks=["plain"])
    (tmp_path / "posts.txt").write_text("good day\n", encoding="utf-8")
    predict_file(
        predictor, tmp_path / "posts.txt", tmp_path / "answers.csv", PredictOptions(format="csv")
    )
    assert "plain" not in (tmp_path / "answers.csv").read_text(encoding="utf-8")
    rows = [{"text": "good day", "label": "bad"}, {"text": "bad rain", "label": "good"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    scores = score(
        predictor, DataChoice(path=str(tmp_path / "rows.jsonl")), tasks=["mood"], progress=False
    )
    assert scores.evaluation.metrics["mood"]["n"] == 2
    assert list(scores.evaluation.metrics) == ["mood"]
    card = (tmp_path / "export" / "README.md").read_text(encoding="utf-8")
    assert "| mood | single_label |" in card and "2 tasks: mood, topic" in card
    assert "unlabelled" not in card
