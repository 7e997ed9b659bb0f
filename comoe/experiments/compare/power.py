"""What a comparison can see: the smallest difference, the seeds that it needs, p-values of many comparisons."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from scipy import optimize, stats

from comoe.experiments.compare.statistics import CONFIDENCE, Difference

POWER = 0.8
"""Share of comparisons that find the smallest visible difference."""

TARGET = 0.01
"""Difference for which the report says how many seeds it needs."""

MOST_SEEDS = 1000
"""More seeds than anybody runs."""


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: the chance of one or more false findings among all is below 5 % where only
    those below 0.05 count, whatever the dependence of the comparisons.

    Args:
        p_values: NaN stays NaN and does not count.

    Source: Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[place] = largest
    return adjusted


def adjust(
    groups: Mapping[str, Mapping[str, Mapping[str, Difference]]],
    *,
    exempt: tuple[str, str, str] | None = None,
) -> dict[str, dict[str, dict[str, Difference]]]:
    """The same differences with p-values adjusted for all of them together.

    Args:
        groups: table -> arm -> name -> difference.
        exempt: place of the comparison named beforehand: it is not adjusted and does not count.
    """
    places = [
        (table, arm, name)
        for table, group in groups.items()
        for arm, of_arm in group.items()
        for name in of_arm
        if (table, arm, name) != exempt
    ]
    p_values = holm([groups[table][arm][name].p for table, arm, name in places])
    found = {
        table: {arm: dict(of_arm) for arm, of_arm in group.items()}
        for table, group in groups.items()
    }
    for (table, arm, name), p in zip(places, p_values, strict=True):
        found[table][arm][name] = replace(found[table][arm][name], adjusted=p)
    return found


def smallest_difference(differences: Sequence[Difference], *, seeds: int | None = None) -> float:
    """The true difference that 80 % of comparisons like these tell from 0 at the 95 % level.

    Two spreads count, pooled over the given comparisons: s over seeds, which shrinks with their
    number n, and that over posts, which does not (see ``paired_difference``). Without the latter
    this is the difference at which the paired t-test has a power of 80 %.

    Args:
        differences: of several arms, in one measure.
        seeds: n; None is the fewest of the given comparisons.

    Returns:
        In the unit of the measure; NaN for fewer than two seeds.
    """
    known = [found for found in differences if found.seeds > 1]
    if not known or (seeds is not None and seeds < 2):
        return math.nan
    seeds = min(found.seeds for found in known) if seeds is None else seeds
    freedom = [found.seeds - 1 for found in known]
    of_seeds = np.average([found.seed_spread**2 for found in known], weights=freedom) / seeds
    of_posts = np.mean([found.post_spread**2 for found in known])
    variance = float(of_seeds + of_posts)
    if not variance:
        return 0.0
    shift = of_seeds * _noncentrality(seeds - 1) + of_posts * _noncentrality(None)
    return float(shift) / math.sqrt(variance)


def seeds_needed(differences: Sequence[Difference], target: float = TARGET) -> int | None:
    """The fewest seeds with which a difference of ``target`` can be seen.

    Returns:
        None where no number of seeds is enough, because the posts are too few, or where there is no
        spread over seeds to judge by.
    """

    def sees(seeds: int) -> bool:
        return smallest_difference(differences, seeds=seeds) <= target

    if not sees(MOST_SEEDS):
        return None
    low, high = 1, MOST_SEEDS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if sees(middle) else (middle, high)
    return high


def posts_needed(differences: Sequence[Difference], target: float = TARGET) -> float:
    """How many times as many posts a difference of ``target`` needs at least, with any number of seeds."""
    of_posts = float(np.mean([found.post_spread**2 for found in differences]))
    return (_noncentrality(None) / target) ** 2 * of_posts


@functools.cache
def _noncentrality(freedom: int | None) -> float:
    """True difference in standard errors that a two-sided test finds with ``POWER``; None: normal.

    Findings with the wrong sign do not count.
    """
    if freedom is None:
        return float(stats.norm.ppf(0.5 + CONFIDENCE / 2) + stats.norm.ppf(POWER))
    edge = float(stats.t.ppf(0.5 + CONFIDENCE / 2, freedom))

    def missing(shift: float) -> float:
        return float(stats.nct.sf(edge, freedom, shift)) - POWER

    return float(optimize.brentq(missing, 0.0, 10 * edge, xtol=1e-12))
