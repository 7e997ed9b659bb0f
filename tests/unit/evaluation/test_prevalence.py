"""Shares corrected for a model's confusion: exact where the confusion is known, intervals that hold the truth."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from comoe.evaluation.prevalence import (
    corrected_shares,
    counted_shares,
    effective,
    likeliest_mix,
    population_stability,
)

CONFUSION = np.array([[0.80, 0.15, 0.05], [0.25, 0.60, 0.15], [0.05, 0.10, 0.85]])


@given(st.lists(st.floats(0.02, 1), min_size=3, max_size=3))
def test_a_known_confusion_gives_back_every_mix(mix):
    mix_K = np.array(mix) / sum(mix)
    found_K = likeliest_mix((mix_K @ CONFUSION)[None], CONFUSION[None], close=1e-12)[0]
    # The reference: the linear equations themselves.
    exact_K = np.linalg.solve(CONFUSION.T, mix_K @ CONFUSION)
    np.testing.assert_allclose(found_K, exact_K, atol=2e-4)


def test_a_mix_outside_is_the_likeliest_inside_and_what_is_left_is_told():
    # Fewer positives than the errors of the others alone give: the best mix has none.
    predicted = np.array([0.70, 0.30, 0.00])
    found = corrected_shares(1e6 * predicted, 1e6 * CONFUSION, draws=20)
    grid = np.linspace(0, 1, 2001)
    mixes = np.stack([grid, 1 - grid, np.zeros_like(grid)], axis=1)
    best = mixes[np.argmax(np.log(mixes @ CONFUSION) @ predicted)]
    np.testing.assert_allclose(found.share_K, best, atol=2e-3)
    assert found.unexplained == pytest.approx(
        np.abs(best @ CONFUSION - predicted).sum() / 2, abs=2e-3
    )
    assert found.unexplained > 0.05


def test_intervals_hold_the_truth_where_counting_misses_it():
    """200 corpora whose mix is not that of the labeled posts: 95 % intervals, at least 90 % hold."""
    generator = np.random.default_rng(5)
    held, counted_held = [], []
    for seed in range(200):
        truth_K = generator.dirichlet(np.ones(3))
        gold_K = generator.multinomial(900, [0.5, 0.2, 0.3])
        confusion = np.stack(
            [generator.multinomial(n, row) for n, row in zip(gold_K, CONFUSION, strict=True)]
        )
        counts_K = generator.multinomial(4000, truth_K @ CONFUSION)
        found = corrected_shares(counts_K, confusion, draws=200, seed=seed)
        held.append((found.low_K <= truth_K) & (truth_K <= found.high_K))
        plain = counted_shares(counts_K)
        counted_held.append((plain.low_K <= truth_K) & (truth_K <= plain.high_K))
    assert np.mean(held) >= 0.90
    assert np.mean(counted_held) < 0.40


def test_counted_shares_have_wilsons_interval():
    # By hand: 10 of 100, z = 1.96: center 0.1148, half width 0.0596.
    found = counted_shares(np.array([10.0, 90.0]))
    np.testing.assert_allclose(
        [found.low_K[0], found.share_K[0], found.high_K[0]], [0.0552, 0.1, 0.1744], atol=1e-4
    )


def test_few_labeled_posts_make_the_interval_wide():
    counts = np.array([500.0, 300.0, 200.0])
    few, many = (corrected_shares(counts, n * CONFUSION, draws=400) for n in (20, 2000))
    assert np.all(few.high_K - few.low_K > 2 * (many.high_K - many.low_K))


def test_weights_count_as_kish_says_and_stability_is_zero_for_the_same_mix():
    assert effective(np.ones(7)) == pytest.approx(7)
    assert effective(np.array([1.0, 1.0, 2.0])) == pytest.approx(16 / 6)
    assert population_stability(np.array([50, 50]), np.array([500, 500])) == pytest.approx(0)
    # (0.9 - 0.5) ln 1.8 + (0.1 - 0.5) ln 0.2, of counts so large that half a post is nothing.
    by_hand = 0.4 * np.log(1.8) - 0.4 * np.log(0.2)
    found = population_stability(np.array([5e7, 5e7]), np.array([9e7, 1e7]))
    assert found == pytest.approx(by_hand, rel=1e-5)
