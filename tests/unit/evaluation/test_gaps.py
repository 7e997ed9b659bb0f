"""Gaps between groups: values of each group by scikit-learn, and intervals that know chance from difference."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from comoe.evaluation.evaluate import LEAST_POSTS, compute_metrics
from comoe.evaluation.gaps import gaps_of, measure_gaps
from comoe.evaluation.tables import gap_lines
from comoe.tasks.kinds.base import PostOutput
from tests.helpers_model import HEAT, MOOD


def answers(sizes, rates, *, seed=0):
    """Gold and predicted ids that agree at the rate of each group, and the group of each post."""
    generator = np.random.default_rng(seed)
    groups = np.repeat(list(sizes), list(sizes.values()))
    gold = generator.integers(0, 3, len(groups))
    right = generator.random(len(groups)) < np.array([rates[group] for group in groups])
    predicted = np.where(right, gold, (gold + 1) % 3)
    order = generator.permutation(len(groups))
    return gold[order], predicted[order], groups[order].tolist()


def test_a_gap_is_that_of_the_best_and_the_worst_group_that_are_large_enough():
    sizes = {"a": 200, "b": 60, "c": 300, "tiny": LEAST_POSTS - 1}
    gold, predicted, groups = answers(sizes, {"a": 0.9, "b": 0.4, "c": 0.7, "tiny": 0.0})
    found = measure_gaps(gold, predicted, MOOD, groups, list(sizes), resamples=200)
    assert list(found) == ["macro_f1", "accuracy"]
    for name, reference in {
        "accuracy": accuracy_score,
        "macro_f1": lambda a, b: f1_score(a, b, average="macro"),
    }.items():
        gap = found[name]
        assert set(gap["groups"]) == {"a", "b", "c"} and gap["groups"]["b"]["n"] == 60
        for value, of_group in gap["groups"].items():
            rows = [place for place, group in enumerate(groups) if group == value]
            expected = reference(gold[rows], predicted[rows])
            assert of_group["value"] == pytest.approx(expected)
            assert of_group["low"] < expected < of_group["high"]
        values = [of_group["value"] for of_group in gap["groups"].values()]
        assert gap["gap"] == pytest.approx(max(values) - min(values))
        assert (gap["largest"], gap["smallest"]) == ("a", "b")
        assert 0 < gap["by_chance"] < gap["low"] < gap["gap"] < gap["high"]
    # Accuracy has a normal approximation of its own: 1.96 standard errors of the two shares.
    share = {name: found["accuracy"]["groups"][name]["value"] for name in "ab"}
    error = sum(share[name] * (1 - share[name]) / sizes[name] for name in "ab") ** 0.5
    half = (found["accuracy"]["high"] - found["accuracy"]["low"]) / 2
    assert half == pytest.approx(1.96 * error, rel=0.2)


def test_groups_without_a_difference_have_a_gap_that_chance_explains():
    """Of many sets of equal groups about one in twenty has a gap above ``by_chance``."""
    sizes = dict.fromkeys("abcd", 40)
    above = 0
    for seed in range(20):
        gold, predicted, groups = answers(sizes, dict.fromkeys("abcd", 0.7), seed=seed)
        gap = measure_gaps(gold, predicted, MOOD, groups, list(sizes), resamples=40)["accuracy"]
        above += gap["gap"] > gap["by_chance"]
    assert above <= 4


def test_one_group_or_none_has_no_gap():
    gold, predicted, groups = answers({"a": 50, "b": 5}, {"a": 1.0, "b": 0.0})
    assert measure_gaps(gold, predicted, MOOD, groups, ["a", "b"]) == {}
    assert measure_gaps(gold, predicted, MOOD, [None] * 55, []) == {}


def test_gaps_of_a_split_are_those_of_its_labeled_posts_and_stand_in_metrics_and_table():
    gold, predicted, groups = answers({"a": 40, "b": 40}, {"a": 1.0, "b": 0.5})
    task = replace(MOOD, slices=("who", "age<30"))
    logits = 4 * np.eye(len(MOOD.labels), dtype=np.float32)[predicted]
    outputs = {
        "mood": [PostOutput(row, logits[row], label) for row, label in enumerate(gold)],
        "heat": [],
    }
    # Post 80 has no label: it counts in no group.
    outputs["mood"].append(PostOutput(80, logits[0], np.int64(-100)))
    ages = [str(20 + 20 * (group == "a")) for group in groups] + ["20"]
    columns = {"who": [*groups, "a"], "age": ages}
    found = gaps_of(outputs, (task, HEAT), columns)
    assert list(found) == ["mood"] and list(found["mood"]) == ["who", "age<30"]
    gap = found["mood"]["who"]["accuracy"]
    assert (gap["largest"], gap["smallest"], gap["groups"]["a"]["n"]) == ("a", "b", 40)
    assert found["mood"]["age<30"]["accuracy"]["largest"] == "false"
    metrics = compute_metrics(outputs, (task,), columns=columns, predictions=False).metrics["mood"]
    assert metrics["gap/accuracy@who"] == pytest.approx(gap["gap"])
    assert metrics["gap/macro_f1@age<30"] == pytest.approx(
        metrics["macro_f1@age<30=false"] - metrics["macro_f1@age<30=true"]
    )
    lines = gap_lines({"validation": found, "test": found}, [task])
    assert "a 1.000" in lines[3] or "a 1.000" in lines[4]
    assert len(lines) == 3 + 4 and all("test" in line for line in lines[3:])
    assert gap_lines({}, [task]) == gap_lines({"test": {}}, [task]) == []
