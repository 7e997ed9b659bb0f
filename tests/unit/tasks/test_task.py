"""Tasks of a recipe resolved against their data."""

import json

import pytest

from comoe.config.recipe import TaskConfig
from comoe.tasks.kinds.registry import KINDS
from comoe.tasks.task import Task, build_task


def build(config: TaskConfig, *labels: str, **counts: int) -> Task:
    return build_task("mood", config, labels=labels, label_counts=counts)


@pytest.mark.parametrize(
    ("kind", "labels", "metric", "outputs"),
    [("single_label", ("a", "b"), "macro_f1", 2), ("multi_label", ("a", "b", "c"), "macro_f1", 3),
     ("regression", (), "pearson", 1), ("tags", ("O", "B-X"), "span_f1", 2)],
)  # fmt: skip
def test_auto_metric_and_head_width_follow_the_kind(kind, labels, metric, outputs):
    task = build(TaskConfig(kind=kind), *labels)
    assert (task.metric, task.rules.num_outputs(task.labels), task.rules) == (
        metric,
        outputs,
        KINDS[kind],
    )


@pytest.mark.parametrize(
    ("weights", "labels", "counts", "expected"),
    [("balanced", "ab", {"a": 30, "b": 10}, (40 / (2 * 30), 40 / (2 * 10))),  # posts over labels * count
     ("balanced", "abc", {"a": 6, "b": 3}, (0.5, 1.0, 1.0)),  # 1 without training posts
     ([1, 2.5], "ab", {}, (1.0, 2.5))],
)  # fmt: skip
def test_class_weights_are_balanced_or_as_given(weights, labels, counts, expected):
    task = build(TaskConfig(class_weights=weights), *labels, **counts)
    assert task.class_weights == expected


def test_auto_leaves_out_of_the_contrastive_loss_what_costs_a_second_pass_and_has_labels():
    assert build(TaskConfig(), "a", "b").contrastive
    assert not build(TaskConfig(contrastive=False), "a", "b").contrastive
    assert build(TaskConfig(kind="regression")).contrastive
    assert build(TaskConfig(kind="unlabelled")).contrastive
    assert not build(TaskConfig(kind="tags"), "O", "B-PER").contrastive
    assert not build(TaskConfig(kind="text", prompt="{text}")).contrastive
    assert not build(TaskConfig(kind="label_words", prompt="{text}"), "a", "b").contrastive
    assert build(TaskConfig(kind="tags", contrastive=True), "O", "B-PER").contrastive


def test_a_task_without_labels_has_neither_metric_nor_labels_nor_a_way_out_of_the_contrastive_loss():
    assert build(TaskConfig(kind="unlabelled")).metric == "none"
    for option, value in (
        ("metric", "accuracy"),
        ("contrastive", False),
        ("class_weights", "balanced"),
    ):
        with pytest.raises(ValueError, match=f"tasks.mood.{option}"):
            build(TaskConfig(kind="unlabelled", **{option: value}))
    with pytest.raises(
        ValueError, match="tasks.mood.labels .a. has no meaning for a task of kind unl"
    ):
        build(TaskConfig(kind="unlabelled"), "a")


@pytest.mark.parametrize(
    ("standardize", "moments", "expected"),
    [(True, (40.0, 1.5), (1.5, 40.0, 1.5)), (False, (40.0, 1.5), (1.5, 0.0, 1.0)), (True, None, (None, 0.0, 1.0))],
)  # fmt: skip
def test_width_and_scale_of_numbers_are_those_of_the_labels(standardize, moments, expected):
    config = TaskConfig(kind="regression", standardize=standardize)
    task = build_task("task", config, labels=(), label_counts={}, label_moments=moments)
    assert (task.contrastive_width, task.label_mean, task.label_std) == expected


def test_a_task_keeps_its_options_and_survives_json():
    options = {"contrastive_width": 3.0, "contrastive_temperature": 0.2, "contrastive_weight": 0.5}
    numbers = build(TaskConfig(kind="regression", **options))
    assert {name: getattr(numbers, name) for name in options} == options
    classes = TaskConfig(
        class_weights=[1.0, 3.0], label_smoothing=0.1, weight=2.0, metric="f1_class_1"
    )
    for task in (numbers, build(classes, "a", "b")):
        assert Task.from_dict(json.loads(json.dumps(task.to_dict()))) == task


def test_a_task_of_an_older_export_is_read():
    old = {"name": "mood", "kind": "single_label", "labels": ["a", "b"], "metric": "macro_f1", "weight": 1.0,
           "class_weights": None, "label_smoothing": 0.0, "contrastive": True}  # fmt: skip
    task = Task.from_dict(old)
    assert (task.contrastive_weight, task.contrastive_temperature, task.contrastive_width) == (
        1.0,
        None,
        None,
    )
    assert (task.label_mean, task.label_std, task.confidence_strategy) == (0.0, 1.0, "none")
    with pytest.raises(ValueError, match="confidence strategy"):
        Task.from_dict(old | {"confidence_strategy": "half"})
    with pytest.raises(ValueError, match="labls is not a field of a task; did you mean labels"):
        Task.from_dict(old | {"labls": ["a"]})


@pytest.mark.parametrize(
    ("options", "labels", "message"),
    [({"metric": "span_f1"}, "ab", r"tasks\.mood\.metric is 'span_f1', which does not exist"),
     ({"metric": "mean_f1_against_favor"}, "ab", r"tasks\.mood\.metric: .*needs a label named 'against'"),
     ({}, "a", r"single_label task with 1 label\(s\): a; it needs 2 or more"),
     ({"kind": "tags"}, "", r"tags task with 0 label\(s\): none"),
     ({"kind": "regression"}, "ab", "has no meaning for a task of kind regression"),
     ({"kind": "regression", "label_smoothing": 0.1}, "", "label_smoothing has no meaning for a regression task"),
     ({"kind": "regression", "class_weights": "balanced"}, "", r"class_weights \(balanced\) has no meaning"),
     ({"descriptions": {"a": "one", "bb": "two"}}, "ab", r"tasks\.mood\.descriptions is 'bb', which does not exist"),
     ({"descriptions": {"a": "one"}}, "abc", r"descriptions has no text for b, c; describe every label \(a, b, c\)"),
     ({"kind": "multi_label", "descriptions": {"a": "one"}}, "a", "descriptions needs two labels or more"),
     ({"class_weights": [1.0] * 3}, "ab", "3 numbers for 2 labels; give one each, in order: a, b")],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_what_to_do(options, labels, message):
    with pytest.raises(ValueError, match=message):
        build(TaskConfig(**options), *labels)


@pytest.mark.parametrize(
    "changes, place",
    [
        ({"prompt": ["a"]}, "prompt"), ({"labels": 3}, "labels"), ({"labels": [1, 2]}, "labels.0"),
        ({"labels": "ab"}, "labels"), ({"weight": "heavy"}, "weight"), ({"kind": None}, "kind"),
        ({"thresholds": "ab"}, "thresholds"), ({"class_weights": [None, 1.0]}, "class_weights.0"),
    ],
)  # fmt: skip
def test_a_task_of_an_export_with_a_value_of_another_type_is_refused(changes, place):
    plain = Task("mood", "single_label", ("a", "b"), "macro_f1").to_dict()
    assert Task.from_dict(plain).to_dict() == plain
    with pytest.raises(ValueError, match=f"task 'mood': {place} is "):
        Task.from_dict(plain | changes)
    for bad in ([], "mood", {"name": "mood"}):
        with pytest.raises(ValueError):
            Task.from_dict(bad)
