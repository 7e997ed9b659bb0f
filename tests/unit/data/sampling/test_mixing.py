"""Rates of the data sets: by progress, with a floor; draws that add up; labels drawn evenly."""

import math

import numpy as np
import pytest

from comoe.data.sampling.mixing import draws_in_stretch, label_shares, loss_gains, progress_rates
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
