"""Metrics against values worked out by hand, and where they have no value."""

import random

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics.sequence_labeling import get_entities, precision_recall_fscore_support

from comoe.tasks.metrics import (
    LOWER_IS_BETTER,
    METRICS,
    _averaged,
    class_scores,
    confusion,
    entities,
)

LABELS = ("none", "against", "favor")
GOLD = np.array([0, 0, 1, 1, 2, 2])
PREDICTED = np.array([0, 1, 1, 1, 2, 0])
# none: 1 of 2 predicted, 1 of 2 found: P 1/2, R 1/2, F 1/2. against: 2 of 3, 2 of 2: P 2/3, R 1, F
# 4/5. favor: 1 of 1, 1 of 2: P 1, R 1/2, F 2/3.


@pytest.mark.parametrize("order", [LABELS, ("Favor", "none", "Against")])
def test_scores_of_stance_and_of_class_1_equal_the_values_worked_out_by_hand(order):
    ids = np.array([[name.lower() for name in order].index(name) for name in LABELS])
    found = METRICS["mean_f1_against_favor"](ids[GOLD], ids[PREDICTED], order)
    assert found == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert METRICS["f1_class_1"](GOLD, PREDICTED, LABELS) == pytest.approx(4 / 5)


def test_a_metric_of_one_class_needs_that_class():
    missing = r"needs a label named 'favor'.*none, against, favour; is 'favour' meant"
    with pytest.raises(ValueError, match=missing):
        METRICS["mean_f1_against_favor"](GOLD, PREDICTED, ("none", "against", "favour"))
    with pytest.raises(ValueError, match="needs a label with id 1"):
        METRICS["f1_class_1"](np.array([0]), np.array([0]), ("only",))


@pytest.mark.parametrize("name", sorted(METRICS))
def test_no_rows_score_zero(name):
    assert METRICS[name]([], [], LABELS) == 0.0


GOLD_SETS = np.array([[1, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 0]])
PREDICTED_SETS = np.array([[1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 1, 0]])
# Columns: P 1, R 1/2, F 2/3; P 0, R 0, F 0; P 1, R 1, F 1.


def test_label_sets_equal_the_values_worked_out_by_hand():
    jaccard = METRICS["jaccard"](GOLD_SETS, PREDICTED_SETS, ("a", "b", "c"))
    assert jaccard == pytest.approx((1 / 2 + 1 + 1 + 0) / 4)


@given(st.data(), st.integers(1, 12), st.integers(2, 5), st.booleans())
def test_class_metrics_are_to_the_last_digit_those_of_scikit_learn(data, rows, classes, sets):
    size = rows * (classes if sets else 1)
    values = st.lists(st.integers(0, 1 if sets else classes - 1), min_size=size, max_size=size)
    pair = [np.array(data.draw(values)).reshape(rows, -1) for _ in range(2)]
    gold, predicted = pair if sets else [ids[:, 0] for ids in pair]
    labels = tuple("abcde"[:classes])
    theirs = sklearn.metrics.precision_recall_fscore_support
    averages = {
        "macro": ("macro_precision", "macro_recall", "macro_f1"), "micro": (None, None, "micro_f1")
    } | ({"samples": (None, None, "sample_f1")} if sets else {})  # fmt: skip
    for average, names in averages.items():
        undefined = float(average == "samples")
        expected = theirs(gold, predicted, average=average, zero_division=undefined)[:3]
        assert _averaged(gold, predicted, average=average, undefined=undefined) == expected
        for name, value in zip(names, expected, strict=True):
            assert name is None or METRICS[name](gold, predicted, labels) == value
    expected = theirs(gold, predicted, labels=range(classes), average=None, zero_division=0.0)[:3]
    for ours, value in zip(class_scores(gold, predicted, labels), expected, strict=True):
        np.testing.assert_array_equal(ours, value)
    accuracy = sklearn.metrics.accuracy_score(gold, predicted)
    assert METRICS["accuracy"](gold, predicted, ()) == accuracy


def test_a_single_label_that_may_apply_is_scored_as_a_label():
    # scikit-learn takes a matrix of one column for ids of two classes.
    gold, predicted = np.array([[1], [0], [1], [1]]), np.array([[1], [0], [0], [1]])
    assert METRICS["macro_f1"](gold, predicted, ("spam",)) == pytest.approx(2 * 2 / (2 * 2 + 1))
    assert class_scores(gold, predicted, ("spam",))[1].tolist() == pytest.approx([2 / 3])


def test_numbers_equal_the_values_worked_out_by_hand():
    gold, predicted = np.array([1.0, 2.0, 3.0]), np.array([1.0, 4.0, 3.0])
    assert METRICS["mae"](gold, predicted, ()) == pytest.approx(2 / 3)
    assert METRICS["pearson"](gold, predicted, ()) == pytest.approx(2 / np.sqrt(2 * 14 / 3))
    assert METRICS["spearman"](gold, predicted, ()) == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
@pytest.mark.parametrize(
    ("gold", "predicted"),
    [([1.0, 2.0, 3.0], [2.0] * 3), ([2.0, 2.0], [1.0, 3.0]), ([1.0], [1.0]), ([1.0, 2.0], [np.nan, 1.0])],
)  # fmt: skip
def test_a_correlation_without_a_value_is_zero_and_not_nan(name, gold, predicted):
    assert METRICS[name](np.array(gold), np.array(predicted), ()) == 0.0


@pytest.mark.filterwarnings("error")
def test_tags_without_prefix_are_types_and_runs_of_them_are_spans():
    found = entities(["NOUN", "NOUN", "O", "VERB", "NOUN"])
    assert found == [("NOUN", 0, 2), ("VERB", 3, 4), ("NOUN", 4, 5)]
    assert METRICS["span_f1"]([["SOUND", "IDLE"]], [["SOUND", "IDLE"]], ()) == 1.0


def test_spans_and_their_scores_are_to_the_last_digit_those_of_seqeval():
    draw = random.Random(0)
    # Malformed sequences too: types that change inside of a span, spans that begin with I- or E-.
    tags = ["O", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in ("A", "B", "A-B", ""))]
    for _ in range(300):
        gold = [draw.choices(tags[:9], k=draw.randint(0, 9)) for _ in range(draw.randint(1, 4))]
        predicted = [
            draw.choices(tags, k=len(post)) if draw.random() < 0.5 else list(post) for post in gold
        ]
        for post in gold + predicted:
            theirs = [(kind, first, last + 1) for kind, first, last in get_entities(post)]
            assert entities(post) == theirs, post
        theirs = precision_recall_fscore_support(gold, predicted, average="micro", zero_division=0)
        names = ("span_precision", "span_recall", "span_f1")
        assert [METRICS[name](gold, predicted, ()) for name in names] == list(theirs[:3])


def test_confusion_has_gold_in_its_rows():
    assert confusion(GOLD, PREDICTED, LABELS).tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 1]]
    assert LOWER_IS_BETTER & METRICS.keys() == {"mae"}
