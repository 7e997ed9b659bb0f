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
    sampled_shares,
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


def test_a_labeled_sample_is_right_whatever_the_model_does_and_narrower_than_alone():
    """A model that errs by the post, which no confusion of other posts could tell; 300 corpora."""
    generator = np.random.default_rng(2)
    held, narrower, errors = [], [], []
    for _ in range(300):
        gold_N = generator.choice(3, size=4000, p=[0.6, 0.3, 0.1])
        wrong_N = generator.random(4000) < np.where(gold_N == 0, 0.35, 0.1)
        found_N = np.where(wrong_N, 1, gold_N)
        gold, found = np.eye(3)[gold_N], np.eye(3)[found_N]
        sample = generator.choice(4000, size=200, replace=False)
        one = np.ones(200)
        got = sampled_shares(found.mean(0), 4000, found[sample], gold[sample], one)
        truth_K = np.array([0.6, 0.3, 0.1])
        held.append((got.low_K <= truth_K) & (truth_K <= got.high_K))
        errors.append(got.share_K - truth_K)
        alone = 2 * 1.96 * gold[sample].std(0) / 199**0.5
        narrower.append((got.high_K - got.low_K) < alone)
        assert got.share_K.sum() == pytest.approx(1, abs=1e-9)
    assert np.mean(held) >= 0.93 and np.abs(np.mean(errors, axis=0)).max() < 0.006
    assert np.mean(narrower) > 0.9


def test_a_perfect_model_needs_no_labels_and_a_useless_one_adds_nothing():
    gold = np.eye(2)[np.repeat([0, 1], [30, 70])]
    perfect = sampled_shares(np.array([0.4, 0.6]), 1e6, gold, gold, np.ones(100))
    np.testing.assert_allclose(perfect.share_K, [0.4, 0.6], atol=1e-3)
    useless = sampled_shares(
        np.array([0.5, 0.5]),
        1e6,
        np.tile(np.eye(2), (50, 1)),
        gold[np.argsort(np.arange(100) % 2)],
        np.ones(100),
    )
    assert useless.share_K[0] == pytest.approx(0.3, abs=0.02)
