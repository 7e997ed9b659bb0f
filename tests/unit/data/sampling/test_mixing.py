"""Rates of the data sets: by progress, with a floor; draws that add up; labels drawn evenly."""

import math

import numpy as np
import pytest

from comoe.data.sampling.mixing import (
    FLOOR,
    draws_in_stretch,
    joint_label_shares,
    label_shares,
    loss_gains,
    progress_rates,
)
from comoe.tasks.task import Task

A, B, HELPER = (
    Task("a", "single_label", ("x", "y"), "macro_f1"),
    Task("b", "single_label", ("x", "y"), "macro_f1"),
    Task("helper", "single_label", ("x", "y"), "macro_f1", auxiliary=True),
)


def test_progress_rates_equal_the_hand_computed_ones():
    # Factors 1/4 + 3/4 * (0.2, 0.1, 0) / 0.2 = 1, 0.625, 0.25; times 0.5, 0.3, 0.2.
    rates = progress_rates(np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.1, -0.3]))
    assert rates == pytest.approx(np.array([0.5, 0.1875, 0.05]) / 0.7375)


@pytest.mark.parametrize(
    "gains", [[0.0, 0.0], [-1.0, -0.5], [math.nan, math.nan], [math.nan, -1.0]]
)
def test_where_nothing_improves_the_rates_are_those_by_size(gains):
    assert progress_rates(np.array([0.9, 0.1]), np.array(gains)) == pytest.approx([0.9, 0.1])


def test_no_data_set_falls_below_a_quarter_of_its_rate_by_size():
    rng = np.random.default_rng(0)
    for _ in range(50):
        base = rng.dirichlet(np.ones(4))
        rates = progress_rates(base, rng.normal(size=4))
        assert (rates >= base / 4 - 1e-12).all() and rates.sum() == pytest.approx(1)


def test_an_unknown_gain_counts_as_the_mean_of_the_others():
    base = np.full(3, 1 / 3)
    assert progress_rates(base, np.array([0.3, 0.1, math.nan])) == pytest.approx(
        progress_rates(base, np.array([0.3, 0.1, 0.2]))
    )


def test_a_gain_is_the_relative_fall_of_the_loss_and_the_mean_over_the_tasks_of_a_data_set():
    has = np.array([[True, True, True], [False, True, False], [False, False, True]])
    before, now = {"a": 2.0, "b": 1.0, "helper": 1.0}, {"a": 1.0, "b": 0.9, "helper": 0.1}
    gains = loss_gains(before, now, tasks=(A, B, HELPER), has_GT=has)
    # Auxiliary tasks have no say: the third data set has nothing to say at all.
    assert gains[:2] == pytest.approx([0.3, 0.1]) and math.isnan(gains[2])
    assert np.isnan(loss_gains({}, now, tasks=(A, B, HELPER), has_GT=has)).all()


def test_draws_of_stretches_add_up_and_rare_data_sets_get_their_share_over_many():
    rates = np.array([0.9, 0.097, 0.003])
    drawn = np.array(
        [draws_in_stretch(rates, total=16, seed=[1, number]) for number in range(4000)]
    )
    assert (drawn.sum(axis=1) == 16).all() and drawn.min() >= 0
    # 0.048 draws per stretch: largest remainders would never draw it.
    assert drawn.mean(axis=0) == pytest.approx(16 * rates, rel=0.15)


def test_labels_share_what_the_posts_without_label_leave():
    shares = label_shares(np.array([0, 0, 0, 0, 0, 1, 2, -1, -1, -1]))
    assert [(len(rows), share) for rows, share in shares] == [
        (3, 0.3),
        *((count, pytest.approx(0.7 / 3)) for count in (5, 1, 1)),
    ]


def marginal(shares, classes: np.ndarray, column: int) -> dict[int, float]:
    found: dict[int, float] = {}
    for rows, share in shares:
        (label,) = set(classes[rows, column].tolist())
        found[label] = found.get(label, 0) + share
    return found


def test_labels_of_two_tasks_come_equally_often_and_the_odds_of_the_data_stay():
    generator = np.random.default_rng(0)
    first = generator.choice(3, size=500, p=[0.7, 0.2, 0.1])
    second = np.where(generator.random(500) < 0.6, first % 2, generator.integers(0, 2, 500))
    classes = np.stack([first, second], axis=1)
    shares = joint_label_shares(classes)
    assert sorted(np.concatenate([rows for rows, _ in shares])) == list(range(500))
    assert marginal(shares, classes, 0) == pytest.approx(dict.fromkeys(range(3), 1 / 3))
    assert marginal(shares, classes, 1) == pytest.approx(dict.fromkeys(range(2), 1 / 2))
    # Scaling rows and columns leaves every odds ratio as it was in the data.
    of_kind = {tuple(classes[rows[0]]): (len(rows), share) for rows, share in shares}
    before, after = (of_kind[0, 0][number] * of_kind[2, 1][number]
                     / (of_kind[0, 1][number] * of_kind[2, 0][number]) for number in range(2))  # fmt: skip
    assert after == pytest.approx(before)


def test_labels_that_only_some_posts_have_are_even_among_these():
    # Reasons stand with negative posts alone: 6 and 2 of them; 2 neutral posts have none.
    classes = np.array([[0, 0]] * 6 + [[0, 1]] * 2 + [[1, -1]] * 2)
    shares = joint_label_shares(classes)
    assert marginal(shares, classes, 0) == pytest.approx({0: 0.5, 1: 0.5})
    assert marginal(shares, classes, 1) == pytest.approx({0: 0.25, 1: 0.25, -1: 0.5})
    # Each label of one task with one of the other alone: even is possible, for both at once.
    tied = np.array([[0, 0]] * 6 + [[1, 1]] * 2)
    assert [share for _, share in joint_label_shares(tied)] == pytest.approx([0.5, 0.5])
    # A label of three that stands with both: no shares are even for both; the last task is.
    stuck = np.array([[0, 0]] * 5 + [[1, 0]] * 3 + [[2, 1]] * 2)
    found = joint_label_shares(stuck)
    assert marginal(found, stuck, 1) == pytest.approx({0: 0.5, 1: 0.5})
    assert sum(share for _, share in found) == pytest.approx(1)


def test_no_combination_of_labels_disappears_for_the_sake_of_even_labels():
    # Without a post that has both second labels, even ones would leave none with both first labels.
    classes = np.repeat([[0, 0], [0, 1], [1, 0]], [300, 400, 300], axis=0)
    shares = {tuple(classes[rows[0]]): share for rows, share in joint_label_shares(classes)}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares[0, 0] > 0.3 * FLOOR / 1.03 and shares[0, 1] == pytest.approx(
        shares[1, 0], rel=1e-3
    )
