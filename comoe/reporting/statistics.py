"""Small measures of a report: how far two collections of posts lie apart, weighted means."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline

from comoe.evaluation.prevalence import effective

MOST_COMPARED = 2000
"""Posts of each side that words are compared on."""


def told_apart(first: Sequence[str], second: Sequence[str], *, seed: int = 0) -> float | None:
    """How well words tell two collections of posts apart: area under the ROC curve, 0.5 to 1.

    A logistic regression on TF-IDF of words and pairs of words, on halves that it has not seen.
    Posts that are in both count for neither. None where fewer than 20 are left of one.
    """
    common = set(first) & set(second)
    generator = np.random.default_rng(seed)
    sides = []
    for texts in (first, second):
        own = sorted({text for text in texts if text} - common)
        sides.append([own[place] for place in generator.permutation(len(own))[:MOST_COMPARED]])
    if min(map(len, sides)) < 20:
        return None
    y = np.repeat([0, 1], [len(side) for side in sides])
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True),
        LogisticRegression(class_weight="balanced", max_iter=1000),
    )
    folds = StratifiedKFold(2, shuffle=True, random_state=seed)
    scores = cross_val_predict(model, sides[0] + sides[1], y, cv=folds, method="decision_function")
    return float(max(roc_auc_score(y, scores), 0.5))


def counts_2x2(gold_N: np.ndarray, found_N: np.ndarray) -> np.ndarray:
    """(gold, predicted) of a label: absence, presence."""
    known = ~np.isnan(gold_N) & ~np.isnan(found_N)
    gold, found = (np.stack([1 - some[known], some[known]]) for some in (gold_N, found_N))
    return gold @ found.T


def weighted_mean(values_N: np.ndarray, weights_N: np.ndarray) -> dict[str, float]:
    """Mean with its 95 % interval (normal, effective number of posts)."""
    mean = float(np.average(values_N, weights=weights_N))
    spread = float(np.average((values_N - mean) ** 2, weights=weights_N)) ** 0.5
    half = 1.959963984540054 * spread / max(effective(weights_N) - 1, 1) ** 0.5
    return {"mean": mean, "low": mean - half, "high": mean + half, "spread": spread}
