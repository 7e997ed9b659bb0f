"""How far posts lie from those that a model was evaluated on: classifiers that tell one from the other.

A classifier two-sample test (Lopez-Paz and Oquab 2017, arXiv:1610.06545): what a classifier scores on
posts that it has not seen is 0.5 of area under the ROC curve where both sides are draws of one
distribution. By the model's embeddings it has a p-value; by words it says what changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import brentq
from scipy.stats import rankdata
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

from comoe.data.text.normalize import normalize_post, same_text

if TYPE_CHECKING:
    # Brings in torch, which a report without a model does not need.
    from comoe.inference.predictor import Predictor

MOST_COMPARED = 2000
"""Posts that are drawn from each side."""

LEAST_COMPARED = 20
"""Different posts that each side needs."""

FOLDS = 5
"""Parts that are scored in turn, by a classifier of the other four."""

PERMUTATIONS = 999
"""Of the sides, for a p-value; the smallest one is 1 over one more."""

CHUNK = 1024
"""Texts that are embedded at a time."""

WORDS_SHOWN = 10
"""Words, or pairs of words, that are shown of each side."""

TOKEN = r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]{2,}"
"""A Chinese sign, or a word of two characters or more."""

Z = 1.959963984540054
"""Of a two-sided 95 % interval."""


@dataclass(frozen=True, slots=True)
class Sample:
    """R rows to tell apart: each text of a side once, the same one of both sides in the same fold."""

    texts: Sequence[str]
    new_R: np.ndarray
    """Whether it is one of the new posts, bool."""
    shared_R: np.ndarray
    """Whether the other side has the text too, bool."""
    folds_R: np.ndarray
    """Fold, int."""

    def take(self, rows: np.ndarray) -> Sample:
        """Some of its rows."""
        texts = [self.texts[row] for row in rows]
        return Sample(texts, self.new_R[rows], self.shared_R[rows], self.folds_R[rows])

    @property
    def posts(self) -> tuple[int, int]:
        """Old and new ones."""
        return int((~self.new_R).sum()), int(self.new_R.sum())

    @property
    def whole(self) -> bool:
        """Whether both sides have enough posts, and some in each fold."""
        folds = [self.folds_R[self.new_R == side] for side in (False, True)]
        return all(len(some) >= LEAST_COMPARED and len(np.unique(some)) == FOLDS for some in folds)


def draw_sample(
    old: Sequence[str],
    new: Sequence[str],
    *,
    key: Callable[[str], str] = same_text,
    seed: int = 0,
) -> Sample | None:
    """As many posts of each side, drawn at random, then each text once per side.

    As many, because without repeats the larger of two samples has a smaller share of the texts that
    come often, so that sizes alone would tell the sides apart. Folds are stratified by side.

    Args:
        old, new: texts; blank ones do not count.
        key: what posts have in common that count as one text.
        seed: of draw and folds.

    Returns:
        None where fewer than ``LEAST_COMPARED`` different texts of a side are left.
    """
    sides = [[text for text in texts if text and not text.isspace()] for texts in (old, new)]
    count = min(MOST_COMPARED, *map(len, sides))
    drawn = []
    for number, texts in enumerate(sides):
        # Draws of other sizes have the same posts first, whose embeddings are computed once.
        places = np.random.default_rng((seed, number)).permutation(len(texts))[:count]
        drawn.append({key(texts[place]): texts[place] for place in places})
    if min(map(len, drawn)) < LEAST_COMPARED:
        return None
    generator = np.random.default_rng((seed, 2))
    texts, new_R, shared_R, folds_R = [], [], [], []
    both = drawn[0].keys() & drawn[1].keys()
    parts = (sorted(drawn[0].keys() - both), sorted(drawn[1].keys() - both), sorted(both))
    for keys, where in zip(parts, ((0,), (1,), (0, 1)), strict=True):
        folds = generator.permutation(len(keys)) % FOLDS
        for side in where:
            texts += [drawn[side][each] for each in keys]
            new_R += [bool(side)] * len(keys)
            shared_R += [len(where) > 1] * len(keys)
            folds_R += folds.tolist()
    return Sample(texts, np.array(new_R), np.array(shared_R), np.array(folds_R))


def told_by_embeddings(
    vectors_RM: np.ndarray, sample: Sample, *, permutations: int = PERMUTATIONS, seed: int = 0
) -> dict[str, Any]:
    """How well a linear discriminant on embeddings tells new posts from old ones.

    Each fold is scored by a discriminant of the others, whose features are standardized and whose
    covariance is shrunk (Ledoit and Wolf 2004) by these; ``auc`` is the mean of the folds' areas under
    the ROC curve. Sides are permuted within folds, a text of both sides keeps its two; so the p-value
    is exact where the posts of one side are draws as those of the other. The interval is that of a
    single area (Newcombe 2006, method 5) of fewer posts: as many fewer as the areas of permutations
    vary more than those of one fixed classifier, since the five learn from one another's folds.

    Args:
        vectors_RM: of the rows of ``sample``, finite.
        sample: the rows.
        permutations: of the sides.
        seed: of the permutations.

    Returns:
        ``auc``, ``low``, ``high``, ``p_value`` (one-sided), ``permutations``, and the number of
        ``old`` and ``new`` posts.
    """
    sides_RP = _permuted(sample, permutations, seed=seed)
    area_P = np.zeros(1 + permutations)
    vectors_RM = np.asarray(vectors_RM, dtype=np.float64)
    for fold in range(FOLDS):
        held_R = sample.folds_R == fold
        scores_HP = discriminate(vectors_RM[~held_R], sides_RP[~held_R], vectors_RM[held_R])
        area_P += areas(scores_HP, sides_RP[held_R]) / FOLDS
    old, new = sample.posts
    fixed = (old + new + 1) / (12 * old * new)
    fewer = max(1.0, float(area_P[1:].var()) / fixed)
    low, high = area_interval(area_P[0], old / fewer, new / fewer)
    # A permutation that gives the same scores in another order is not smaller by rounding.
    as_large = int((area_P[1:] >= area_P[0] - 1e-12).sum())
    return {
        "auc": float(area_P[0]), "low": low, "high": high,
        "p_value": (1 + as_large) / (1 + permutations), "permutations": permutations,
        "old": old, "new": new,
    }  # fmt: skip


def _permuted(sample: Sample, permutations: int, *, seed: int) -> np.ndarray:
    """(R, 1 + P) of 0 and 1: the sides as they are, then permuted within each fold."""
    generator = np.random.default_rng(seed)
    sides_RP = np.repeat(sample.new_R[:, None], 1 + permutations, axis=1).astype(np.float64)
    for fold in range(FOLDS):
        rows = np.flatnonzero((sample.folds_R == fold) & ~sample.shared_R)
        sides_RP[rows, 1:] = generator.permuted(sides_RP[rows, 1:], axis=0)
    return sides_RP


def discriminate(seen_RM: np.ndarray, sides_RP: np.ndarray, held_HM: np.ndarray) -> np.ndarray:
    """Scores of held-out rows, (H, P), by the linear discriminant of each column of sides.

    Args:
        seen_RM: vectors that it is fitted to.
        sides_RP: their sides, 0 and 1.
        held_HM: vectors to score.
    """
    mean_M, scale_M = seen_RM.mean(0), seen_RM.std(0)
    scale_M[scale_M < 1e-12] = np.inf
    seen_RM, held_HM = (seen_RM - mean_M) / scale_M, (held_HM - mean_M) / scale_M
    count, width = seen_RM.shape
    shrinkage = ledoit_wolf_shrinkage(seen_RM, assume_centered=True)
    covariance_MM = (1 - shrinkage) * seen_RM.T @ seen_RM / count
    level = max(shrinkage, 1e-6) * np.square(seen_RM).sum() / (count * width)
    covariance_MM[np.diag_indices(width)] += max(level, 1e-12)
    centered_RP = sides_RP - sides_RP.mean(0)
    return held_HM @ np.linalg.solve(covariance_MM, seen_RM.T @ centered_RP)


def areas(scores_HP: np.ndarray, sides_HP: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each column, (P,): the chance that a 1 scores above a 0, ties by half."""
    ranks_HP = rankdata(scores_HP, axis=0)
    ones_P = sides_HP.sum(0)
    return ((ranks_HP * sides_HP).sum(0) - ones_P * (ones_P + 1) / 2) / (
        ones_P * (len(sides_HP) - ones_P)
    )


def area_interval(area: float, zeros: float, ones: float) -> tuple[float, float]:
    """95 % interval of an area under the ROC curve (Newcombe 2006, doi:10.1002/sim.2324, method 5).

    The areas from which this one lies 1.96 standard errors away, those that they would have (Hanley
    and McNeil 1982, with the mean of both numbers in the place of each).

    Args:
        area: found on these rows.
        zeros, ones: rows of each side.
    """
    more = (zeros + ones) / 2 - 1

    def distance(true: float) -> float:
        spread = 1 + more * ((1 - true) / (2 - true) + true / (1 + true))
        return (area - true) ** 2 - Z**2 * true * (1 - true) * spread / (zeros * ones)

    # The ends themselves have no error, and are roots.
    low = 0.0 if area <= 0 else brentq(distance, 0.0, min(area, 1 - 1e-9))
    high = 1.0 if area >= 1 else brentq(distance, max(area, 1e-9), 1.0)
    return float(low), float(high)


def told_by_words(sample: Sample) -> dict[str, Any] | None:
    """How well words tell new posts from old ones, and which words do.

    A logistic regression on TF-IDF of words and pairs of words (Chinese: signs), on folds that it has
    not seen.

    Returns:
        ``auc``, at least 0.5; and, where it lies 3 standard errors above 0.5, ``more`` and ``less``:
        the words that speak most for a new post, and for an old one. None where no word is in two
        posts.
    """
    try:
        return _told_by_words(sample)
    except ValueError as error:
        if "no terms remain" in str(error) or "empty vocabulary" in str(error):
            return None
        raise


def _told_by_words(sample: Sample) -> dict[str, Any]:
    found = []
    for fold in range(FOLDS):
        held_R = sample.folds_R == fold
        words, model = _fitted(sample.take(np.flatnonzero(~held_R)))
        held = sample.take(np.flatnonzero(held_R))
        scores_H = model.decision_function(words.transform(held.texts))
        found.append(areas(scores_H[:, None], held.new_R[:, None].astype(float))[0])
    told: dict[str, Any] = {"auc": float(max(np.mean(found), 0.5)), "more": [], "less": []}
    old, new = sample.posts
    if told["auc"] > 0.5 + 3 * ((old + new + 1) / (12 * old * new)) ** 0.5:
        words, model = _fitted(sample)
        names, weights = words.get_feature_names_out(), model.coef_[0]
        order = np.argsort(weights, kind="stable")
        told["less"] = [str(names[place]) for place in order[:WORDS_SHOWN] if weights[place] < 0]
        last = order[::-1][:WORDS_SHOWN]
        told["more"] = [str(names[place]) for place in last if weights[place] > 0]
    return told


def _fitted(sample: Sample) -> tuple[TfidfVectorizer, LogisticRegression]:
    words = TfidfVectorizer(token_pattern=TOKEN, ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    model = LogisticRegression(class_weight="balanced", max_iter=1000)
    table = words.fit_transform(sample.texts)
    return words, model.fit(table, sample.new_R)


def drift_of(
    old: Sequence[str],
    new: Sequence[str],
    *,
    task: str,
    embed: Embedder | None = None,
    quoted: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """What tells new posts from old ones: ``words``, and ``embeddings`` where they are at hand.

    Args:
        old, new: texts.
        task: whose posts they are.
        embed: gives embeddings, and says which posts are one text to the model.
        quoted: name the words.
        seed: of the draw.

    Returns:
        Of ``told_by_words`` and ``told_by_embeddings``; None where too few posts are left.
    """
    key = same_text if embed is None else embed.key
    sample = draw_sample(old, new, key=key, seed=seed)
    found: dict[str, Any] = {"words": sample and told_by_words(sample)}
    if found["words"] and not quoted:
        found["words"] |= {"more": [], "less": []}
    if embed is None:
        return found
    found["embeddings"] = None
    if sample is not None:
        vectors = embed(sample.texts, task)
        there = np.array([row for row, vector in enumerate(vectors) if vector is not None], int)
        sample = sample.take(there)
        if sample.whole:
            vectors_RM = np.stack([vectors[row] for row in there])
            found["embeddings"] = told_by_embeddings(vectors_RM, sample, seed=seed)
    return found


@dataclass(frozen=True)
class Embedder:
    """Gives embeddings of texts as a task reads them, each once; a terminal shows a progress bar.

    A text is read alone, without the second text or the image that its post may have had; one that
    cannot be read so has no embedding.
    """

    predictor: Predictor
    known: dict[tuple, np.ndarray | None] = field(default_factory=dict)
    """What was embedded, by how it was read."""

    def key(self, text: str) -> str:
        """The text cleaned as the model reads it, case and white space aside: retweets with other links are one."""
        return same_text(normalize_post(text, self.predictor.exported.data_config.normalize))

    def __call__(self, texts: Sequence[str], task: str) -> list[np.ndarray | None]:
        """A vector of each text, as wide as the encoder; None where it has none."""
        predictor, known = self.predictor, self.known
        (chosen,) = predictor.choose_tasks([task])
        routed = task if predictor.exported.model_config.row_per_task else None
        reading = (chosen.prompt, task in predictor.as_words, routed)
        missing = [text for text in dict.fromkeys(texts) if (reading, text) not in known]
        with tqdm(total=len(missing), unit="post", desc=task, disable=None) as bar:
            for begin in range(0, len(missing), CHUNK):
                some = missing[begin : begin + CHUNK]
                for text, row in zip(some, predictor.embed(some, task=task), strict=True):
                    known[reading, text] = row.get("embedding")
                bar.update(len(some))
        return [known[reading, text] for text in texts]
