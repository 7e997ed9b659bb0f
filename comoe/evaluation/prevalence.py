"""How often each label occurs in a corpus, by a model that errs: counted, and corrected for its confusion.

Counting predictions is biased: where a model takes a tenth of the neutral posts for negative, a
corpus that is nearly all neutral seems a tenth negative. Both estimates assume that the model
errs on a label as often as on the validation posts, and that only the mix of labels is another
(prior shift).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
"""Of all intervals here."""


@dataclass(frozen=True, slots=True)
class Shares:
    """Shares of K labels with 95 % intervals; each sums to 1."""

    share_K: np.ndarray
    low_K: np.ndarray
    high_K: np.ndarray
    unexplained: float = 0.0
    """Part of the predictions, 0 to 1, that no mix of labels explains under this confusion (total
    variation distance); 0 where so few posts can be so far off by chance (95 %). Above 0 the
    assumption is wrong."""


def counted_shares(counts_K: np.ndarray) -> Shares:
    """Shares of predictions as they are; Wilson's intervals, of the sampling of posts alone.

    Args:
        counts_K: predictions of each label; of weighted posts their sum, scaled to the effective
            number (``effective``).

    Source: Wilson 1927, equation 4 of Brown, Cai & DasGupta 2001.
    """
    n, z = max(float(counts_K.sum()), 1e-12), 1.959963984540054
    share_K = counts_K / n
    middle_K = (share_K + z**2 / (2 * n)) / (1 + z**2 / n)
    half_K = z / (1 + z**2 / n) * np.sqrt(share_K * (1 - share_K) / n + z**2 / (4 * n**2))
    return Shares(share_K, np.maximum(middle_K - half_K, 0.0), np.minimum(middle_K + half_K, 1.0))


def corrected_shares(
    counts_K: np.ndarray, confusion_KK: np.ndarray, *, draws: int = 1000, seed: int = 0
) -> Shares:
    """The mix of labels under which a model with this confusion would have predicted these counts.

    The likeliest mix on the simplex for p(predicted j) = sum over i of share_i p(j | i). The
    interval holds the middle 95 % of mixes for confusions and predicted shares drawn from their
    Dirichlet posteriors (one pseudo-count per row), so few labeled posts make it wide.

    Args:
        counts_K: predictions of each label in the corpus.
        confusion_KK: labeled posts, (gold, predicted).
        draws: number of them.
        seed: of the draws.

    Source: adjusted count, Gart & Buck 1966, Forman 2008; solved on the simplex by
    expectation-maximization, Saerens et al. 2002 with the confusion in the place of scores.
    """
    K = len(counts_K)
    generator = np.random.default_rng(seed)
    rows_KK = confusion_KK + 1 / K
    confusion_DKK = np.stack([generator.dirichlet(row_K, size=draws) for row_K in rows_KK], axis=1)
    predicted_DK = generator.dirichlet(counts_K + 1 / K, size=draws)
    mixes_DK = likeliest_mix(predicted_DK, confusion_DKK)
    low_K, high_K = np.quantile(mixes_DK, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    predicted_K = counts_K / max(counts_K.sum(), 1e-12)
    known_KK = rows_KK / rows_KK.sum(1, keepdims=True)
    share_K = likeliest_mix(predicted_K[None], known_KK[None])[0]
    expected_K = share_K @ known_KK
    unexplained = float(np.abs(expected_K - predicted_K).sum() / 2)
    size = max(round(float(counts_K.sum())), 1)
    chance_DK = generator.multinomial(size, expected_K / expected_K.sum(), size=200) / size
    if unexplained <= np.quantile(np.abs(chance_DK - expected_K).sum(1) / 2, LEVEL):
        unexplained = 0.0
    return Shares(share_K, np.minimum(low_K, share_K), np.maximum(high_K, share_K), unexplained)


def sampled_shares(
    mean_K: np.ndarray,
    size: float,
    values_nK: np.ndarray,
    gold_nK: np.ndarray,
    weights_n: np.ndarray,
    *,
    exclusive: bool = True,
) -> Shares:
    """Shares from predictions of all posts and gold labels of a random sample of them.

    mean(gold) + q (mean of all predictions - mean of the sample's predictions): right on average
    however the model errs, and never wider than the sample alone for the q of least variance.
    Normal intervals, so n should be 100 or more.

    Args:
        mean_K: shares of the predictions of all posts.
        size: effective number of posts.
        values_nK: predictions of the sample, 0 or 1.
        gold_nK: gold labels of the sample, 0 or 1.
        weights_n: of the sample.
        exclusive: one label per post: one q for all labels, so that shares sum to 1.

    Source: PPI++, arXiv:2311.01453, equation 5 and section 6; difference estimator, Cochran 1977.
    """
    n, w_n = effective(weights_n), weights_n / weights_n.sum()
    gold_K, sample_K = w_n @ gold_nK, w_n @ values_nK
    off_gold_nK, off_value_nK = gold_nK - gold_K, values_nK - sample_K
    shared_K, own_K = w_n @ (off_gold_nK * off_value_nK), w_n @ off_value_nK**2
    if exclusive:
        shared_K, own_K = np.full_like(shared_K, shared_K.sum()), np.full_like(own_K, own_K.sum())
    q_K = np.clip(shared_K / np.maximum(own_K * (1 + n / size), 1e-12), 0.0, 1.0)
    share_K = np.clip(gold_K + q_K * (mean_K - sample_K), 0.0, 1.0)
    rest_K = w_n @ (off_gold_nK - q_K * off_value_nK) ** 2
    half_K = 1.959963984540054 * np.sqrt(
        rest_K / max(n - 1, 1) + q_K**2 * mean_K * (1 - mean_K) / size
    )
    return Shares(share_K, np.maximum(share_K - half_K, 0.0), np.minimum(share_K + half_K, 1.0))


def likeliest_mix(
    predicted_DK: np.ndarray, confusion_DKK: np.ndarray, *, rounds: int = 4000, close: float = 1e-7
) -> np.ndarray:
    """Expectation-maximization from an even mix: (D, K), every row on the simplex.

    Args:
        predicted_DK: shares of the predictions.
        confusion_DKK: p(predicted | gold), rows of gold labels.
        rounds: at most.
        close: change of a share that ends it.
    """
    mix_DK = np.full_like(predicted_DK, 1 / predicted_DK.shape[1])
    for _ in range(rounds):
        expected_DK = np.einsum("di,dij->dj", mix_DK, confusion_DKK)
        ratio_DK = predicted_DK / np.maximum(expected_DK, 1e-300)
        new_DK = mix_DK * np.einsum("dij,dj->di", confusion_DKK, ratio_DK)
        moved = np.abs(new_DK - mix_DK).max()
        mix_DK = new_DK
        if moved < close:
            break
    return mix_DK / mix_DK.sum(1, keepdims=True)


def effective(weights_N: np.ndarray) -> float:
    """Number of equally weighted posts that tell as much: (sum w)^2 / sum w^2, Kish 1965."""
    return float(weights_N.sum() ** 2 / max((weights_N**2).sum(), 1e-300))


def population_stability(expected_K: np.ndarray, found_K: np.ndarray) -> float:
    """Sum of (f - e) ln(f / e) over shares, from half a post in each label on.

    Below 0.1 is commonly read as stable, above 0.25 as another population.

    Args:
        expected_K: counts of the reference.
        found_K: counts of the corpus.
    """
    e_K, f_K = ((counts_K + 0.5) / (counts_K + 0.5).sum() for counts_K in (expected_K, found_K))
    return float(((f_K - e_K) * np.log(f_K / e_K)).sum())


def counts_2x2(gold_N: np.ndarray, found_N: np.ndarray) -> np.ndarray:
    """(gold, predicted) of a label: absence, presence."""
    known = ~np.isnan(gold_N) & ~np.isnan(found_N)
    gold, found = (np.stack([1 - some[known], some[known]]) for some in (gold_N, found_N))
    return gold @ found.T


def weighted_mean(values_N: np.ndarray, weights_N: np.ndarray) -> dict[str, float | None]:
    """Mean with its 95 % interval (normal, effective number of posts); of one post that counts the ends are None."""
    mean = float(np.average(values_N, weights=weights_N))
    spread = float(np.average((values_N - mean) ** 2, weights=weights_N)) ** 0.5
    if np.count_nonzero(weights_N) < 2:
        return {"mean": mean, "low": None, "high": None, "spread": spread}
    half = 1.959963984540054 * spread / max(effective(weights_N) - 1, 1) ** 0.5
    return {"mean": mean, "low": mean - half, "high": mean + half, "spread": spread}
