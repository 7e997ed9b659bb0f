"""Evaluation: the same numbers whatever the batches, the ranks and the fillers."""

import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from comoe.evaluation.evaluate import (
    TEACHER_KL,
    Evaluation,
    check_chosen_metric,
    chosen_metric,
    compute_metrics,
    evaluate,
    mean_metric,
    metric_names,
    reporting,
)
from comoe.tasks.kinds.base import PostOutput
from comoe.tasks.task import Task
from comoe.types import IGNORED, Batch, ModelOutput

MOOD = Task("mood", "single_label", ("sad", "happy"), "macro_f1")
HEAT = Task("heat", "regression", (), "mae")
NAMES = Task("names", "tags", ("O", "B-PER", "I-PER"), "span_f1")
TASKS = (MOOD, HEAT, NAMES)

WORDS = [2, 1, 3, 1, 2, 1]
"""Words per post; each word has two pieces, after one special token."""
CELLS = {
    "mood": [0, 1, 1, None, 0, None],
    "heat": [None, 2.0, -1.0, None, 0.5, None],
    "names": [[1, 2], None, [0, 1, 0], None, [0, 0], None],
}
ROWS = len(WORDS)


def split_logits() -> dict[str, list[Tensor]]:
    """What the fake model answers for each post; for tags per word."""
    generator = torch.Generator().manual_seed(3)
    return {
        "mood": [torch.randn(2, generator=generator) for _ in WORDS],
        "heat": [torch.randn(1, generator=generator) for _ in WORDS],
        "names": [torch.randn(words, 3, generator=generator) for words in WORDS],
    }


LOGITS = split_logits()


@dataclass(frozen=True)
class FakeCollator:
    """Batches of posts, or of (post, labelled task) pairs."""

    by_task: bool = False

    def __call__(self, split: Any, indices: np.ndarray) -> Batch:
        served = [(int(row), -1) for row in indices]
        if self.by_task:
            served = [
                (row, place)
                for row, _ in served
                for place, task in enumerate(TASKS)
                if CELLS[task.name][row] is not None
                or all(CELLS[other.name][row] is None for other in TASKS)
            ]
        served = served or [(-1, -1)]
        length = 1 + 2 * max(WORDS[row] if row >= 0 else 1 for row, _ in served)
        starts = torch.zeros(len(served), length, dtype=torch.bool)
        for place, (row, _) in enumerate(served):
            starts[place, 1 : 1 + 2 * WORDS[row] : 2] = row >= 0
        labels = {
            task.name: task.rules.collate(
                [
                    cell_of(task, row) if served_task in (-1, index) else None
                    for row, served_task in served
                ],
                labels=task.labels,
                length=length,
            )
            for index, task in enumerate(TASKS)
        }
        ids = torch.zeros(len(served), length, dtype=torch.int64)
        row_ids, task_ids = (torch.tensor(column) for column in zip(*served, strict=True))
        return Batch(ids, ids + 1, None, starts, task_ids, row_ids, labels)


def cell_of(task: Task, row: int) -> Any:
    """The parsed label; for tags one id per token, as the collator lays it out."""
    cell = None if row < 0 else CELLS[task.name][row]
    if cell is None or task.mode != "tokens":
        return cell
    return [IGNORED] + [value for tag in cell for value in (tag, IGNORED)]


def forward(batch: Batch) -> ModelOutput:
    """Looks the logits up; anything off the first pieces is far off, and must not be read."""
    length = batch.word_starts_BL.shape[1]
    logits = {
        name: torch.full((len(batch.row_ids_B), LOGITS[name][0].shape[-1]), 99.0)
        for name in ("mood", "heat")
    }
    logits["names"] = torch.full((len(batch.row_ids_B), length, 3), 99.0)
    for place, row in enumerate(batch.row_ids_B.tolist()):
        if row >= 0:
            logits["mood"][place], logits["heat"][place] = LOGITS["mood"][row], LOGITS["heat"][row]
            logits["names"][place, batch.word_starts_BL[place]] = LOGITS["names"][row]
    assert not torch.is_grad_enabled()
    return ModelOutput(logits, {}, {}, (), torch.zeros(0, dtype=torch.int64))


def run(
    shares: Sequence[Sequence[Sequence[int]]],
    *,
    collator: FakeCollator | None = None,
    **options: Any,
) -> list[Evaluation]:
    """Evaluate on as many ranks as there are shares, one after another; a gather travels through pickle."""
    sent: list[Any] = []
    collator = collator or FakeCollator()

    def one_rank(share: Sequence[Sequence[int]], gather: Callable[[Any], list[Any]]) -> Evaluation:
        batches = [np.array(rows, dtype=np.int64) for rows in share]
        return evaluate(
            forward, None, collator=collator, tasks=TASKS, batches=batches, gather=gather, **options
        )

    for share in shares:
        one_rank(share, lambda own: sent.append(pickle.loads(pickle.dumps(own))) or [own])
    return [one_rank(share, lambda own: sent) for share in shares]


def test_metrics_equal_those_of_all_rows_at_once():
    (found,) = run([[[0, 1, 2], [3, 4, 5]]])
    for task in TASKS:
        rows = [row for row in range(ROWS) if CELLS[task.name][row] is not None]
        if task.mode == "tokens":
            gold = [np.array(CELLS[task.name][row]) for row in rows]
            scores = [LOGITS[task.name][row].softmax(-1).numpy() for row in rows]
        else:
            targets = task.rules.collate(
                [CELLS[task.name][row] for row in rows], labels=task.labels, length=0
            )
            outputs = [
                PostOutput(row, LOGITS[task.name][row].numpy(), target)
                for row, target in zip(rows, targets.numpy(), strict=True)
            ]
            gold, scores = task.rules.gold_and_scores(outputs, task)
        values = dict(found.metrics[task.name])
        assert values.pop("n") == len(rows)
        assert values.pop("loss") > 0
        assert values == pytest.approx(task.rules.score(gold, scores, task))


def test_loss_is_the_mean_over_the_labelled_rows():
    (found,) = run([[[0, 1, 2, 3, 4, 5]]])
    losses = [
        -LOGITS["mood"][row].log_softmax(-1)[CELLS["mood"][row]].item() for row in (0, 1, 2, 4)
    ]
    assert found.metrics["mood"]["loss"] == pytest.approx(sum(losses) / 4, rel=1e-6)
    words = [
        (row, place, tag) for row in (0, 2, 4) for place, tag in enumerate(CELLS["names"][row])
    ]
    losses = [-LOGITS["names"][row][place].log_softmax(-1)[tag].item() for row, place, tag in words]
    assert found.metrics["names"]["loss"] == pytest.approx(sum(losses) / len(words), rel=1e-6)


@pytest.mark.parametrize(
    "shares",
    [
        [[[5, 0], [3, 1], [4, 2]]],
        [[[0, 2], [4]], [[1, 3], [5]]],
        [[[4, 2, 0]], [[]], [[5, 3, 1]]],
        [[[0, 1, 2], [3]], [[3, 4, 5], [0]]],  # rows served twice
    ],
)
@pytest.mark.parametrize("by_task", [False, True])
def test_ranks_batches_fillers_and_doubles_change_nothing(shares, by_task):
    (whole,) = run([[[0, 1, 2, 3, 4, 5]]])
    for found in run(shares, collator=FakeCollator(by_task=by_task)):
        assert found.metrics == whole.metrics
        assert found.predictions == whole.predictions
        assert all(
            np.array_equal(found.confusions[name], whole.confusions[name])
            for name in whole.confusions
        )
        assert found.confusions.keys() == {"mood", "names"}


def test_predictions_are_of_labelled_posts_and_of_posts_without_any_label():
    (found,) = run([[[0, 1, 2, 3, 4, 5]]], texts=[f"post {row}" for row in range(ROWS)])
    mood, heat, names = (found.predictions[task.name] for task in TASKS)
    assert [shown["row"] for shown in mood] == [0, 1, 2, 3, 4, 5]
    assert [shown["row"] for shown in heat] == [1, 2, 3, 4, 5]
    assert [shown["row"] for shown in names] == [0, 2, 3, 4, 5]
    assert mood[1]["text"] == "post 1" and mood[1]["gold"] == "happy" and mood[3]["gold"] is None
    assert mood[1]["label"] == MOOD.labels[int(LOGITS["mood"][1].argmax())]
    assert heat[0] == {"row": 1, "text": "post 1", "gold": 2.0, "value": LOGITS["heat"][1].item()}
    assert [len(shown["tags"]) for shown in names] == [WORDS[row] for row in (0, 2, 3, 4, 5)]
    assert names[0]["gold"] == ["B-PER", "I-PER"] and names[2]["gold"] is None


def test_an_unlabelled_post_whose_row_is_for_one_task_is_predicted_for_that_task_only():
    class HeatOnly(FakeCollator):
        def __call__(self, split: Any, indices: np.ndarray) -> Batch:
            return replace(
                super().__call__(split, indices),
                task_ids_B=torch.full((len(indices),), TASKS.index(HEAT)),
            )

    (found,) = run([[[3, 5]]], collator=HeatOnly())
    assert {name: [shown["row"] for shown in rows] for name, rows in found.predictions.items()} == {
        "mood": [],
        "heat": [3, 5],
        "names": [],
    }


def test_a_task_without_labelled_posts_is_left_out_and_never_nan():
    (found,) = run([[[1]]])
    assert found.metrics.keys() == {"mood", "heat"}
    assert all(
        math.isfinite(value) for values in found.metrics.values() for value in values.values()
    )
    (nothing,) = run([[[3, 5], []]])
    assert nothing.metrics == {} and nothing.confusions == {}
    assert [shown["gold"] for shown in nothing.predictions["mood"]] == [None, None]


def test_progress_counts_posts_and_predictions_can_be_left_out():
    seen: list[int] = []
    batches = reporting([np.array([0, 1, 2]), np.array([], dtype=np.int64)], seen.append)
    found = evaluate(
        forward, None, collator=FakeCollator(), tasks=TASKS, batches=batches, gather=lambda a: [a],
        predictions=False,
    )  # fmt: skip
    assert seen == [3, 0] and found.predictions == {} and "mood" in found.metrics


METRICS = {
    "mood": {"macro_f1": 0.8, "loss": 0.3},
    "heat": {"mae": 0.5},
    "names": {"span_f1": 0.6, "f1/O": 0.9},
}


def test_mean_is_over_the_tasks_that_have_labels():
    assert mean_metric({"mood": METRICS["mood"]}, TASKS) == 0.8
    with pytest.raises(ValueError, match=r"no labeled post of any task \(mood, heat, names\)"):
        mean_metric({}, TASKS)
    with pytest.raises(ValueError, match="no labeled post of heat; use mean"):
        chosen_metric({"mood": {"macro_f1": 1.0}}, TASKS, "heat/mae")


@pytest.mark.parametrize(
    ("name", "value"),
    [("mean", (0.8 - 0.5 + 0.6) / 3), ("mood/macro_f1", 0.8), ("mood/loss", -0.3), ("heat/mae", -0.5),
     ("names/f1/O", 0.9)],
)  # fmt: skip
def test_the_chosen_number_rises_as_the_model_gets_better(name, value):
    assert chosen_metric(METRICS, TASKS, name) == pytest.approx(value)


@pytest.mark.parametrize(
    ("name", "message"),
    [("mood/macro_f2", r"train\.early_stop_metric is 'mood/macro_f2'.*did you mean mood/macro_f1\?"),
     ("mod/macro_f1", r"did you mean mood/macro_f1\?"), ("heat/macro_f1", "which does not exist")],
)  # fmt: skip
def test_a_metric_that_no_evaluation_has_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        chosen_metric(METRICS, TASKS, name)


def test_a_choice_that_no_validation_post_can_measure_is_refused_before_training():
    check_chosen_metric("mean", TASKS, measured={"heat"})
    check_chosen_metric("heat/mae", TASKS, measured={"heat"})
    check_chosen_metric("mood/teacher_kl", TASKS, measured={"mood"}, distilled={"mood"})
    no_post = "is '{}', but no validation post has a label of mood"
    for name, measured, taught, message in (
        ("mean", set(), (), no_post.format("mean")),
        ("mood/macro_f1", {"heat"}, (), no_post.format("mood/macro_f1")),
        # What no teacher knows, and what no validation post of a teacher's task measures.
        ("heat/teacher_kl", {"heat"}, {"mood"}, "which does not exist"),
        ("teacher_kl", {"heat"}, {"mood"}, "no validation post has a label of mood;"),
    ):
        with pytest.raises(ValueError, match=message):
            check_chosen_metric(name, TASKS, measured=measured, distilled=taught)


def test_names_of_metrics_are_known_before_any_evaluation():
    (found,) = run([[[0, 1, 2, 3, 4, 5]]])
    for task in TASKS:
        assert ("n", *metric_names(task)) == tuple(found.metrics[task.name])


def test_auxiliary_tasks_are_in_no_mean_and_choose_no_checkpoint():
    tasks = (MOOD, replace(HEAT, auxiliary=True), NAMES)
    assert (
        mean_metric(METRICS, tasks)
        == chosen_metric(METRICS, tasks, "mean")
        == pytest.approx((0.8 + 0.6) / 2)
    )
    divergent = {name: {TEACHER_KL: value} for name, value in (("mood", 0.25), ("heat", 8.0))}
    assert chosen_metric(divergent, tasks, TEACHER_KL) == -0.25
    with pytest.raises(ValueError, match="no validation post has a label of mood, names"):
        check_chosen_metric("mean", tasks, measured={"heat"})
    with pytest.raises(ValueError, match=r"no labeled post of any task \(mood, names\)"):
        mean_metric({"heat": METRICS["heat"]}, tasks)


SLICES = {"kind": ["a", "b", None, "a", "b", "b"], "true": ["true"] * 6}


def test_slices_have_the_metrics_of_their_rows_alone():
    tasks = (replace(MOOD, slices=("kind",)), HEAT, replace(NAMES, slices=("kind", "true")))

    def values_of(shares: Sequence[Sequence[Sequence[int]]]) -> dict[str, dict[str, float]]:
        outputs = run(shares)[0].outputs
        return compute_metrics(outputs, tasks, columns=SLICES, predictions=False).metrics

    found = values_of([[[0, 1, 2], [3, 4, 5]]])
    # Labelled for mood are posts 0, 1, 2, 4; of kind a: 0; of kind b: 1, 4; post 2 is of no kind.
    for value, rows in (("a", [0]), ("b", [1, 4])):
        (alone,) = run([[rows]])
        assert found["mood"][f"n@kind={value}"] == len(rows)
        for metric in ("macro_f1", "accuracy"):
            assert found["mood"][f"{metric}@kind={value}"] == alone.metrics["mood"][metric]
    assert found["names"]["span_f1@true=true"] == found["names"]["span_f1"]
    assert found["names"]["n@true=true"] == 3
    assert not any("@" in name for name in found["heat"])
    assert values_of([[[4, 2], [0]], [[5, 3], [1]]]) == found


@pytest.mark.parametrize(
    ("entry", "column", "cells"),
    [("sure<0.7", "sure", ["0.5", "0.7", None, "1", "0.69", "x"]), ("a<b", "a<b", ["true"] * 6)],
)
def test_a_bound_cuts_the_numbers_of_a_column_in_two(entry, column, cells):
    (task,) = tasks = (replace(MOOD, slices=(entry,)),)
    outputs = run([[[0, 1, 2, 3, 4, 5]]])[0].outputs
    found = compute_metrics(outputs, tasks, columns={column: cells}, predictions=False).metrics
    # Labelled for mood are posts 0, 1, 2, 4; post 2 has no number.
    wanted = {"true": [0, 4], "false": [1]} if column == "sure" else {"true": [0, 1, 2, 4]}
    for value, rows in wanted.items():
        (alone,) = run([[rows]])
        assert found["mood"][f"n@{entry}={value}"] == len(rows)
        assert found["mood"][f"accuracy@{entry}={value}"] == alone.metrics["mood"]["accuracy"]
    assert sum(name.startswith("n@") for name in found[task.name]) == len(wanted)


@dataclass(frozen=True)
class SoftCollator:
    """``FakeCollator`` with soft labels of three tasks: each post's own, uniform or 1; post 4 has none."""

    by_task: bool = False

    def __call__(self, split: Any, indices: np.ndarray) -> Batch:
        batch = FakeCollator(self.by_task)(split, indices)
        soft = {}
        for task in TASKS:
            shape = batch.word_starts_BL.shape if task.mode == "tokens" else batch.row_ids_B.shape
            soft[task.name] = torch.full(
                (*shape, max(1, len(task.labels))), 1 / max(1, len(task.labels))
            )
            soft[task.name][(batch.row_ids_B < 0) | (batch.row_ids_B == 4)] = math.nan
        soft["names"][~batch.word_starts_BL] = math.nan
        return replace(batch, soft_labels=soft)


@pytest.mark.parametrize("shares", [[[[0, 1, 2, 3, 4, 5]]], [[[4, 2, 0]], [[]], [[5, 3, 1]]]])
def test_the_divergence_from_the_teacher_is_over_all_posts_with_a_soft_label(shares):
    rows = [0, 1, 2, 3, 5]
    z = [LOGITS["mood"][row].double() for row in rows]
    mood = np.mean([-float(one.log_softmax(-1).mean()) - math.log(2) for one in z])
    heat = np.mean([0.5 * (LOGITS["heat"][row].item() - 1) ** 2 for row in rows])
    words = torch.cat([LOGITS["names"][row] for row in rows]).double()
    names = float((-words.log_softmax(-1).mean(dim=-1) - math.log(3)).mean())
    for found in run(shares, collator=SoftCollator()):
        kl = found.teacher_kl()
        assert kl == pytest.approx(
            {"mood": mood, "heat": heat, "names": names, "mean": np.mean([mood, heat, names])},
            rel=1e-4,
        )
        assert found.metrics["mood"]["teacher_kl"] == kl["mood"]
        assert found.teacher_kl({0})["heat"] == pytest.approx(
            0.5 * (LOGITS["heat"][0].item() - 1) ** 2
        )
        chosen = chosen_metric(found.metrics, TASKS, "teacher_kl")
        assert chosen == pytest.approx(-kl["mean"])
        assert chosen_metric(found.metrics, TASKS, "mood/teacher_kl") == -kl["mood"]
        helped = replace(found, auxiliary=["heat"]).teacher_kl()
        assert helped == kl | {"mean": pytest.approx((kl["mood"] + kl["names"]) / 2)}
    (plain,) = run([[[0, 1, 2, 3, 4, 5]]])
    assert plain.teacher_kl() == {} and "teacher_kl" not in plain.metrics["mood"]


def test_rows_that_are_there_for_a_soft_label_change_no_metric_and_no_prediction():
    """Where a row serves one task, a post has rows for tasks that it has no label of."""

    def everything(split: Any, indices: np.ndarray) -> Batch:
        served = [(int(row), place) for row in indices for place in range(3)] or [(-1, -1)]
        parts = [FakeCollator()(split, np.array([row] if row >= 0 else [])) for row, _ in served]
        length = max(part.input_ids_BL.shape[1] for part in parts)
        labels = {
            task.name: task.rules.collate(
                [cell_of(task, row) if place == number else None for row, place in served],
                labels=task.labels,
                length=length,
            )
            for number, task in enumerate(TASKS)
        }
        starts = torch.zeros(len(served), length, dtype=torch.bool)
        for place, part in enumerate(parts):
            starts[place, : part.word_starts_BL.shape[1]] = part.word_starts_BL[0]
        ids = torch.zeros(len(served), length, dtype=torch.int64)
        row_ids, task_ids = (torch.tensor(column) for column in zip(*served, strict=True))
        return Batch(ids, ids + 1, None, starts, task_ids, row_ids, labels)

    (whole,) = run([[[0, 1, 2, 3, 4, 5]]])
    (found,) = run([[[0, 1, 2], [3, 4, 5]]], collator=everything)
    assert found.metrics == whole.metrics and found.predictions == whole.predictions
