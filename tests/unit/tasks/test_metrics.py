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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accuracy", 4 / 6),
        ("micro_f1", 4 / 6),
        ("macro_precision", (1 / 2 + 2 / 3 + 1) / 3),
        ("macro_recall", (1 / 2 + 1 + 1 / 2) / 3),
        ("macro_f1", (1 / 2 + 4 / 5 + 2 / 3) / 3),
        ("f1_class_1", 4 / 5),
        ("mean_f1_against_favor", (4 / 5 + 2 / 3) / 2),
    ],
)
def test_class_metrics_equal_the_values_worked_out_by_hand(name, value):
    assert METRICS[name](GOLD, PREDICTED, LABELS) == pytest.approx(value)


def test_against_and_favor_are_found_by_name_whatever_their_ids():
    order = ("Favor", "none", "Against")
    ids = np.array([1, 2, 0])
    moved = METRICS["mean_f1_against_favor"](ids[GOLD], ids[PREDICTED], order)
    assert moved == pytest.approx((4 / 5 + 2 / 3) / 2)


def test_stance_without_a_label_named_favor_says_which_is_nearest():
    with pytest.raises(
        ValueError, match=r"needs a label named 'favor'.*none, against, favour; is 'favour' meant"
    ):
        METRICS["mean_f1_against_favor"](GOLD, PREDICTED, ("none", "against", "favour"))


def test_f1_class_1_needs_a_second_label():
    with pytest.raises(ValueError, match="needs a label with id 1"):
        METRICS["f1_class_1"](np.array([0]), np.array([0]), ("only",))


def test_a_class_that_is_never_predicted_counts_as_zero():
    # against: P 2/4, R 1, F 2/3; none: P 1, R 1, F 1; favor: 0.
    predicted = np.array([0, 0, 1, 1, 1, 1])
    assert METRICS["macro_f1"](GOLD, predicted, LABELS) == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert METRICS["macro_precision"](GOLD, predicted, LABELS) == pytest.approx((1 + 1 / 2 + 0) / 3)


def test_a_class_that_occurs_on_neither_side_is_left_out_of_the_mean_as_in_tweeteval():
    assert METRICS["macro_f1"](np.array([0, 1]), np.array([0, 1]), LABELS) == 1.0


def test_one_class_only_is_scored_on_that_class():
    gold = np.zeros(4, dtype=int)
    assert METRICS["macro_f1"](gold, gold, LABELS) == 1.0
    assert METRICS["macro_recall"](gold, np.array([0, 0, 0, 1]), LABELS) == pytest.approx(
        (3 / 4 + 0) / 2
    )


@pytest.mark.parametrize("name", sorted(METRICS))
def test_no_rows_score_zero(name):
    assert METRICS[name]([], [], LABELS) == 0.0


GOLD_SETS = np.array([[1, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 0]])
PREDICTED_SETS = np.array([[1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 1, 0]])
# Columns: P 1, R 1/2, F 2/3; P 0, R 0, F 0; P 1, R 1, F 1.


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accuracy", 2 / 4),
        ("macro_f1", (2 / 3 + 0 + 1) / 3),
        ("macro_precision", (1 + 0 + 1) / 3),
        ("macro_recall", (1 / 2 + 0 + 1) / 3),
        ("micro_f1", 2 * 2 / (2 * 2 + 1 + 2)),
        ("sample_f1", (2 / 3 + 1 + 1 + 0) / 4),
        ("jaccard", (1 / 2 + 1 + 1 + 0) / 4),
    ],
)
def test_label_sets_equal_the_values_worked_out_by_hand(name, value):
    assert METRICS[name](GOLD_SETS, PREDICTED_SETS, ("a", "b", "c")) == pytest.approx(value)


@given(st.data(), st.integers(1, 12), st.integers(2, 5), st.booleans())
def test_class_metrics_are_to_the_last_digit_those_of_scikit_learn(data, rows, classes, sets):
    values = st.lists(st.integers(0, 1 if sets else classes - 1),
                      min_size=rows * (classes if sets else 1), max_size=rows * (classes if sets else 1))  # fmt: skip
    pair = [np.array(data.draw(values)).reshape(rows, -1) for _ in range(2)]
    gold, predicted = pair if sets else [ids[:, 0] for ids in pair]
    theirs = sklearn.metrics.precision_recall_fscore_support
    for average, undefined in (("macro", 0.0), ("micro", 0.0), *[("samples", 1.0)] * sets):
        expected = theirs(gold, predicted, average=average, zero_division=undefined)[:3]
        assert _averaged(gold, predicted, average=average, undefined=undefined) == expected
    expected = theirs(gold, predicted, labels=range(classes), average=None, zero_division=0.0)[:3]
    for ours, value in zip(class_scores(gold, predicted, "abcde"[:classes]), expected, strict=True):
        np.testing.assert_array_equal(ours, value)
    assert METRICS["accuracy"](gold, predicted, ()) == sklearn.metrics.accuracy_score(
        gold, predicted
    )


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
    [
        ([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]),
        ([2.0, 2.0], [1.0, 3.0]),
        ([1.0], [1.0]),
        ([1.0, 2.0], [np.nan, 1.0]),
    ],
)
def test_a_correlation_without_a_value_is_zero_and_not_nan(name, gold, predicted):
    assert METRICS[name](np.array(gold), np.array(predicted), ()) == 0.0


def test_spans_count_only_when_type_and_both_ends_are_right():
    gold = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC"]]
    predicted = [["B-PER", "I-PER", "O", "B-PER"], ["B-LOC", "I-LOC"]]
    assert METRICS["span_precision"](gold, predicted, ()) == pytest.approx(1 / 3)
    assert METRICS["span_recall"](gold, predicted, ()) == pytest.approx(1 / 3)
    assert METRICS["span_f1"](gold, predicted, ()) == pytest.approx(1 / 3)


def test_no_span_predicted_scores_zero():
    assert METRICS["span_f1"]([["B-PER", "O"]], [["O", "O"]], ()) == 0.0


@pytest.mark.filterwarnings("error")
def test_tags_without_prefix_are_types_and_runs_of_them_are_spans():
    assert entities(["NOUN", "NOUN", "O", "VERB", "NOUN"]) == [
        ("NOUN", 0, 2),
        ("VERB", 3, 4),
        ("NOUN", 4, 5),
    ]
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


def test_class_scores_cover_labels_that_do_not_occur():
    precision_Y, recall_Y, f1_Y = class_scores(np.array([0, 0]), np.array([0, 1]), LABELS)
    assert precision_Y.tolist() == [1, 0, 0]
    assert recall_Y.tolist() == [0.5, 0, 0]
    assert f1_Y == pytest.approx([2 / 3, 0, 0])


def test_only_errors_are_better_when_lower():
    assert LOWER_IS_BETTER & METRICS.keys() == {"mae"}
