"""Predictions of NumPy logits, as an ONNX file gives them: float64 rounded once, and the labels that PyTorch gives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit, softmax

from comoe.tasks.kinds.base import PostOutput
from comoe.tasks.task import Task
from comoe.types import Batch, ModelOutput

SINGLE = Task("mood", "single_label", ("a", "b", "c"), "macro_f1", temperature=1.7)
TWO = Task("irony", "single_label", ("no", "yes"), "macro_f1", thresholds=(0.3,))
MULTI = Task("signs", "multi_label", ("x", "y", "z"), "macro_f1", temperature=0.6)
CUTS = replace(MULTI, thresholds=(0.2, 0.9, 0.5))
NUMBER = Task("heat", "regression", (), "pearson", label_mean=1.5, label_std=0.3)
WORDS = Task("words", "tags", ("O", "B-PER", "I-PER"), "span_f1", temperature=2.3)


def logits_of(task: Task, rows: int = 40) -> np.ndarray:
    draw = np.random.default_rng(0)
    logits = draw.normal(0, 4, (rows, max(1, len(task.labels)))).astype(np.float32)
    logits[0], logits[1] = 3e38 * np.sign(logits[0]), 200 * np.sign(logits[1])
    return logits


def outputs_of(logits: np.ndarray, *, plain: bool) -> list[PostOutput]:
    return [PostOutput(row, values, np.zeros(3), plain) for row, values in enumerate(logits)]


def reference(task: Task, logits: np.ndarray) -> np.ndarray:
    """Scores, float32, as SciPy computes them in float64."""
    logits = logits.astype(np.float64) / (task.temperature or 1.0)
    return (expit(logits) if task.kind == "multi_label" else softmax(logits, axis=-1)).astype(
        np.float32
    )


@pytest.mark.parametrize("task", [SINGLE, TWO, MULTI, CUTS], ids=lambda task: task.name)
def test_scores_are_those_of_float64_and_labels_those_of_pytorch(task):
    logits = logits_of(task)
    found = task.rules.decode(outputs_of(logits, plain=True), task)
    scores = np.array([list(row["scores"].values()) for row in found])
    expected = reference(task, logits)
    np.testing.assert_allclose(scores, expected, rtol=1e-6, atol=0)  # SciPy rounds in another way
    assert (scores == expected).mean() > 0.99
    by_torch = task.rules.decode(outputs_of(logits, plain=False), task)
    for one, other in zip(found, by_torch, strict=True):
        assert one.keys() == other.keys()
        assert {key: one[key] for key in ("label", "labels") if key in one} == {
            key: other[key] for key in ("label", "labels") if key in other
        }
        assert one["scores"] == pytest.approx(other["scores"], rel=1e-5, abs=1e-30)


def test_numbers_have_the_same_bits():
    outputs = [outputs_of(logits_of(NUMBER)[2:], plain=plain) for plain in (True, False)]
    assert NUMBER.rules.decode(outputs[0], NUMBER) == NUMBER.rules.decode(outputs[1], NUMBER)


def test_tags_are_decoded_post_by_post():
    logits = [logits_of(WORDS)[2:9], logits_of(WORDS)[9:10], logits_of(WORDS)[:0]]
    outputs = [PostOutput(row, values, None, plain=True) for row, values in enumerate(logits)]
    found = WORDS.rules.decode(outputs, WORDS)
    for row, values in zip(found, logits, strict=True):
        expected = reference(WORDS, values) if len(values) else values
        assert row["tags"] == [WORDS.labels[number] for number in expected.argmax(axis=-1)]
        np.testing.assert_allclose(row["scores"], expected.max(axis=-1, initial=0), rtol=1e-6)


def test_what_is_not_finite_stays_so():
    logits = np.array([[np.nan, 1.0, 2.0], [np.inf, 1.0, 2.0]], dtype=np.float32)
    for plain in (True, False):
        rows = SINGLE.rules.decode(outputs_of(logits, plain=plain), SINGLE)
        assert all(np.isnan(list(row["scores"].values())).any() for row in rows)


@pytest.mark.parametrize("task", [SINGLE, WORDS], ids=lambda task: task.name)
def test_rows_of_an_output_of_arrays(task):
    logits = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    starts = np.array([[False, True, False, True], [False, True, True, False]])
    rows = np.arange(2)
    batch = Batch(None, None, None, starts, rows * 0 - 1, rows + 5)
    values = logits if task is WORDS else logits[:, 0]
    output = ModelOutput({task.name: values}, {}, {}, (), rows[:0])
    found = task.rules.outputs(output, batch, [1, 0], task=task)
    assert [one.row for one in found] == [6, 5] and all(one.plain for one in found)
    for one, row in zip(found, (1, 0), strict=True):
        expected = logits[row][starts[row]] if task is WORDS else logits[row, 0]
        assert (one.logits == expected).all()
    assert task.rules.outputs(output, batch, [], task=task) == []
