"""Probabilities for another mix of labels than that of the validation posts: a known one, or one found in the posts.

Where only the mix is another one (prior shift: posts of a label look as they did), p(y | x) times
rate(y) / prior(y), scaled to sum to 1, is right for the new mix. Of labels that are independent
each one is such a pair of "has it" and "has it not". The prior is the mix that the probabilities
are for: that of the validation posts only where they are calibrated to it, and not where classes
were weighed. It is fitted on labeled posts, with a power of the probabilities: otherwise a
temperature that was fitted without it, or none, would be taken for a part of the ratio.

Sources: Saerens, Latinne & Decaestecker 2002, Neural Computation 14(1), equations 2.4 and 2.9;
Alexandari, Kundaje & Shrikumar 2020, arXiv:1901.06852 (calibration with a bias per label).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

Chunks = Callable[[], Iterable[np.ndarray]]
"""Gives the probabilities of all posts anew, in parts of shape (n, Y)."""

ROUNDS, CLOSE = 1000, 1e-7
"""Most rounds of the estimate, and the change of a rate that ends them."""

PULL = 0.1
"""Weight, in posts, of the square of what ``fit_prior`` fits: labels that are told apart without a
mistake leave it open."""


def adapted(
    scores_NY: np.ndarray,
    prior_Y: np.ndarray,
    rates_Y: np.ndarray,
    *,
    exclusive: bool,
    power: float = 1.0,
) -> np.ndarray:
    """Probabilities under other rates of the labels, float64, (N, Y).

    Args:
        scores_NY: probabilities.
        prior_Y: mix of the labels that they are for, each in (0, 1); see ``fit_prior``.
        rates_Y: shares among these posts.
        exclusive: one label per post, so that rows sum to 1.
        power: of the probabilities, from ``fit_prior``.
    """
    scores_NY = np.asarray(scores_NY, dtype=np.float64)
    with_NY = scores_NY**power * (rates_Y / prior_Y)
    if exclusive:
        return with_NY / np.maximum(with_NY.sum(axis=1, keepdims=True), 1e-300)
    without_NY = (1 - scores_NY) ** power * ((1 - rates_Y) / (1 - prior_Y))
    return with_NY / np.maximum(with_NY + without_NY, 1e-300)


def fit_prior(
    logits_NY: np.ndarray, gold: np.ndarray, probabilities: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, float]:
    """The mix of labels that probabilities are for, float64 (Y,), and the power that goes with it.

    A number per label added to power times the logits, by likelihood with a faint pull to none: the
    mean of the probabilities is then the share of the labels. The mix is the one with which
    ``estimated`` leaves these posts where they are.

    Args:
        logits_NY: float64, of labeled posts, tempered as the probabilities are.
        gold: label ids (N,), or 0/1 (N, Y).
        probabilities: logits -> softmax, or of each for itself.
    """
    count, width = logits_NY.shape
    true_NY = np.eye(width)[gold] if gold.ndim == 1 else gold.astype(np.float64)

    def loss(found: np.ndarray) -> tuple[float, np.ndarray]:
        power, scores_NY = (
            np.exp(found[-1]),
            probabilities(logits_NY * np.exp(found[-1]) + found[:-1]),
        )
        sure_NY = true_NY * np.log(np.maximum(scores_NY, 1e-300))
        if gold.ndim == 2:
            sure_NY += (1 - true_NY) * np.log(np.maximum(1 - scores_NY, 1e-300))
        off_NY = scores_NY - true_NY
        slope = np.append(off_NY.sum(axis=0), power * (off_NY * logits_NY).sum())
        value = -sure_NY.sum() + PULL / 2 * (found**2).sum()
        return value / count, (slope + PULL * found) / count

    bounds = [(None, None)] * width + [(-2.5, 2.5)]
    settings = {"maxiter": 1000, "ftol": 1e-14, "gtol": 1e-9}
    from scipy.optimize import minimize  # takes 0.3 s, which no prediction waits for

    found = minimize(
        loss, np.zeros(width + 1), jac=True, method="L-BFGS-B", bounds=bounds, options=settings
    ).x
    power, shifts_Y = float(np.exp(found[-1])), found[:-1]
    mean_Y = np.clip(probabilities(logits_NY * power + shifts_Y).mean(axis=0), 1e-9, 1 - 1e-9)
    if gold.ndim == 1:
        prior_Y = mean_Y * np.exp(-shifts_Y)
        return prior_Y / prior_Y.sum(), power
    odds_Y = mean_Y / (1 - mean_Y) * np.exp(-shifts_Y)
    return odds_Y / (1 + odds_Y), power


def estimated(
    chunks: Chunks, prior_Y: np.ndarray, *, exclusive: bool, power: float = 1.0
) -> np.ndarray:
    """The likeliest rates of labels among some posts, float64, (Y,), by expectation-maximization.

    Args:
        chunks: probabilities of the posts; called once per round.
        prior_Y: as of ``adapted``.
        exclusive: one label per post.
        power: as of ``adapted``.
    """
    rates_Y = np.asarray(prior_Y, dtype=np.float64)
    for _ in range(ROUNDS):
        total_Y, count = np.zeros_like(rates_Y), 0
        for scores_nY in chunks():
            some_nY = adapted(scores_nY, prior_Y, rates_Y, exclusive=exclusive, power=power)
            total_Y += some_nY.sum(axis=0)
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
