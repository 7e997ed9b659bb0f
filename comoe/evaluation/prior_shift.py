"""Probabilities for another mix of labels than that of the validation posts: a known one, or one found in the posts.

A calibrated probability p(y | x) is for posts mixed as the validation posts are. Where only the mix
is another one (prior shift: posts of a label look as they did), p(y | x) times rate(y) / prior(y),
scaled to sum to 1, is right for the new mix. Of labels that are independent each one is such a
pair of "has it" and "has it not".

Source: Saerens, Latinne & Decaestecker 2002, Neural Computation 14(1), equations 2.4 and 2.9.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

Chunks = Callable[[], Iterable[np.ndarray]]
"""Gives the probabilities of all posts anew, in parts of shape (n, Y)."""

ROUNDS, CLOSE = 1000, 1e-7
"""Most rounds of the estimate, and the change of a rate that ends them."""


def adapted(
    scores_NY: np.ndarray, prior_Y: np.ndarray, rates_Y: np.ndarray, *, exclusive: bool
) -> np.ndarray:
    """Probabilities under other rates of the labels, float64, (N, Y).

    Args:
        scores_NY: calibrated probabilities.
        prior_Y: shares of the labels among the posts that they were calibrated on, in (0, 1).
        rates_Y: shares among these posts.
        exclusive: one label per post, so that rows sum to 1.
    """
    scores_NY = np.asarray(scores_NY, dtype=np.float64)
    with_NY = scores_NY * (rates_Y / prior_Y)
    if exclusive:
        return with_NY / np.maximum(with_NY.sum(axis=1, keepdims=True), 1e-300)
    without_NY = (1 - scores_NY) * ((1 - rates_Y) / (1 - prior_Y))
    return with_NY / np.maximum(with_NY + without_NY, 1e-300)


def estimated(chunks: Chunks, prior_Y: np.ndarray, *, exclusive: bool) -> np.ndarray:
    """The likeliest rates of the labels among some posts, float64, (Y,), by expectation-maximization.

    Args:
        chunks: calibrated probabilities of the posts; called once per round.
        prior_Y: as of ``adapted``.
        exclusive: one label per post.
    """
    rates_Y = np.asarray(prior_Y, dtype=np.float64)
    for _ in range(ROUNDS):
        total_Y, count = np.zeros_like(rates_Y), 0
        for scores_nY in chunks():
            total_Y += adapted(scores_nY, prior_Y, rates_Y, exclusive=exclusive).sum(axis=0)
            count += len(scores_nY)
        if not count:
            return rates_Y
        moved = np.abs(total_Y / count - rates_Y).max()
        rates_Y = total_Y / count
        if moved < CLOSE:
            break
    return rates_Y


def completed(
    given: Mapping[str, float], labels: Sequence[str], prior_Y: Sequence[float], *, exclusive: bool
) -> np.ndarray:
    """Rates of all labels, (Y,): those given; of the others, where labels exclude one another, the
    rest in proportion to their prior, else their prior.

    Raises:
        ValueError: rates outside (0, 1), or that leave nothing, or something, for nobody.
    """
    for label, rate in given.items():
        if not 0 < rate < 1:
            raise ValueError(f"the rate of {label} is {rate}; it must be between 0 and 1")
    rates_Y = np.array([given.get(label, np.nan) for label in labels])
    prior_Y, open_Y = np.asarray(prior_Y, dtype=np.float64), np.isnan(rates_Y)
    if not exclusive:
        return np.where(open_Y, prior_Y, rates_Y)
    left = 1 - sum(given.values())
    if open_Y.any():
        if left <= 0:
            raise ValueError(f"the rates sum to {1 - left:g}; nothing is left for the other labels")
        return np.where(open_Y, left * prior_Y / prior_Y[open_Y].sum(), rates_Y)
    if abs(left) > 1e-6:
        raise ValueError(f"the rates of all labels sum to {1 - left:g}; they must sum to 1")
    return rates_Y
