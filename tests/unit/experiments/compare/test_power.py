"""Adjusted p-values, the smallest visible difference and the needed seeds, against scipy and published figures."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from comoe.experiments.compare.power import (
    adjust,
    holm,
    posts_needed,
    seeds_needed,
    smallest_difference,
)
from comoe.experiments.compare.statistics import Difference, paired_difference


def of_spread(seeds: int, spread: float = 1.0) -> Difference:
    """Differences over seeds with exactly this standard deviation."""
    values = np.arange(seeds) - (seeds - 1) / 2
    return paired_difference(list(spread * values / np.std(values, ddof=1)))


def test_differences_over_seeds_are_those_of_the_paired_t_test():
    first, second = np.random.default_rng(0).standard_normal((2, 6))
    found, expected = paired_difference(list(first - second)), stats.ttest_rel(first, second)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-12)
    assert (found.seeds, found.seed_spread) == (6, pytest.approx(np.std(first - second, ddof=1)))
    one = paired_difference([0.1])
    assert one.mean == 0.1 and math.isnan(one.p) and math.isnan(one.low) and one.verdict == ""


def test_holm_is_the_closed_test_of_bonferroni():
    p = np.random.default_rng(1).random(6) ** 3
    # The largest adjusted p-value of every set of hypotheses that one is part of.
    subsets = [
        set(chosen) for size in range(1, 7) for chosen in itertools.combinations(range(6), size)
    ]
    expected = [
        max(min(1, len(s) * min(p[i] for i in s)) for s in subsets if place in s)
        for place in range(6)
    ]
    assert holm(list(p)) == pytest.approx(expected, rel=1e-15)
    assert holm([0.01, math.nan, 0.04, 0.03])[0::2] == pytest.approx([0.03, 0.06])
    assert math.isnan(holm([0.01, math.nan])[1]) and holm([]) == []


def test_all_tables_are_one_family_without_the_claim():
    found = of_spread(4)
    groups = {"metric": {"a": {"x": found, "y": found}}, "loss": {"a": {"x": found}}}
    p = [
        [
            item.adjusted
            for group in adjust(groups, exempt=exempt).values()
            for item in group["a"].values()
        ]
        for exempt in (None, ("metric", "a", "y"))
    ]
    assert found.p == 1.0 and p[0] == [1.0] * 3
    assert p[1][0::2] == [1.0, 1.0] and math.isnan(p[1][1])


@pytest.mark.parametrize("seeds", [2, 3, 5, 12])
def test_the_smallest_difference_is_found_in_80_of_100_cases(seeds):
    size = smallest_difference([of_spread(seeds, 0.3)])
    shift, freedom = size / (0.3 / math.sqrt(seeds)), seeds - 1
    assert stats.nct.sf(stats.t.ppf(0.975, freedom), freedom, shift) == pytest.approx(0.8, abs=1e-9)
    drawn = size + 0.3 * np.random.default_rng(seeds).standard_normal((20_000, seeds))
    assert np.mean(stats.ttest_1samp(drawn, 0, axis=1).pvalue < 0.05) == pytest.approx(
        0.8, abs=0.01
    )


def test_needed_seeds_are_the_published_ones():
    # Two-sided paired t-test, level 5 %, power 80 %, by standardized difference (G*Power 3.1).
    for target, seeds in ((0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)):
        assert seeds_needed([of_spread(5)], target) == seeds
    assert seeds_needed([of_spread(3, 0.009)]) == 9


def test_spreads_are_pooled_over_arms_and_posts_do_not_become_more_with_seeds():
    pooled = smallest_difference([of_spread(3, 0.3), of_spread(3, 0.4)])
    assert pooled == pytest.approx(smallest_difference([of_spread(3, math.sqrt(0.125))]))
    drawn = np.random.default_rng(0).standard_normal((2, 4000))
    noisy = paired_difference([0.0, 0.0], np.stack([drawn[0], drawn[0]]))
    floor = (stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) * noisy.post_spread
    assert smallest_difference([noisy], seeds=50) == pytest.approx(floor)
    assert posts_needed([noisy], floor) == pytest.approx(1)
    assert seeds_needed([noisy]) is None and seeds_needed([noisy], 2.9) == 2
    assert math.isnan(smallest_difference([paired_difference([0.1])])) and seeds_needed([]) is None
