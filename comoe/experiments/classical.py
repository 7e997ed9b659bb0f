"""Classical models of text: the commonest label, a sentiment lexicon, naive Bayes, a linear SVM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from comoe.experiments.lexicon import SIDES, VADER_EDGE, applies, by_words, vader
from comoe.tasks.kinds.classification import MultiLabel
from comoe.tasks.labels import split_words
from comoe.tasks.lexicon import read_lexicon
from comoe.tasks.task import Task

Predict = Callable[[Sequence[str]], np.ndarray]
"""Texts -> logits, (N, Y)."""


@dataclass(frozen=True, slots=True)
class Examples:
    """Training posts of one task."""

    texts: Sequence[str]
    gold: np.ndarray
    """Label ids, (N,); of a task with several labels 0 and 1, (N, Y)."""
    labels: tuple[str, ...]
    seed: int

    @property
    def several(self) -> bool:
        """Whether a post may have several labels."""
        return self.gold.ndim == 2

    @property
    def counts(self) -> np.ndarray:
        """Posts of each label, (Y,)."""
        if self.several:
            return self.gold.sum(0)
        return np.bincount(self.gold, minlength=len(self.labels))


@dataclass(frozen=True, slots=True)
class Baseline:
    """One classical model."""

    fit: Callable[..., tuple[Predict, int]]
    """(examples, arguments of the arm) -> what predicts, and its fitted numbers."""
    fits: Callable[[Task], str]
    """Why it cannot predict a task; empty if it can."""
    probabilities: bool = True
    """Whether its logits are log-probabilities, so that its loss means something."""


def majority(examples: Examples) -> tuple[Predict, int]:
    """The share of each label among the training posts, for every post."""
    counts, posts = examples.counts + 0.5, len(examples.texts) + 1.0
    logits_Y = np.log(counts / (posts - counts)) if examples.several else np.log(counts / posts)
    return lambda texts: np.tile(logits_Y, (len(texts), 1)), len(logits_Y)


def naive_bayes(examples: Examples) -> tuple[Predict, int]:
    """Multinomial naive Bayes on counts of words and pairs of words, Laplace smoothing."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB

    words = CountVectorizer(tokenizer=split_words, token_pattern=None, ngram_range=(1, 2))
    counts = words.fit_transform(examples.texts)

    def fitted(gold: np.ndarray) -> Any:
        return MultinomialNB().fit(counts, gold)

    def scores(model: Any, texts: Sequence[str]) -> np.ndarray:
        return model.predict_log_proba(words.transform(texts))

    return _per_label(examples, fitted, scores, features=counts.shape[1])


def tfidf_svm(examples: Examples) -> tuple[Predict, int]:
    """Linear support vector machine on TF-IDF of words, pairs of words, and 2 to 5 letters within words.

    Labels weigh the same, whatever their number of posts; one label against the others.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_union
    from sklearn.svm import LinearSVC

    least = 2 if len(examples.texts) > SMALL else 1
    words = TfidfVectorizer(
        tokenizer=split_words, token_pattern=None, ngram_range=(1, 2), min_df=least,
        sublinear_tf=True,
    )  # fmt: skip
    letters = TfidfVectorizer(
        analyzer="char_wb", ngram_range=(2, 5), min_df=least, sublinear_tf=True
    )
    union = make_union(words, letters)
    table = union.fit_transform(examples.texts)

    def fitted(gold: np.ndarray) -> Any:
        model = LinearSVC(C=SVM_C, class_weight="balanced", random_state=examples.seed)
        return model.fit(table, gold)

    def scores(model: Any, texts: Sequence[str]) -> np.ndarray:
        found = model.decision_function(union.transform(texts))
        return found if found.ndim == 2 else np.stack([np.zeros_like(found), found], axis=1)

    return _per_label(examples, fitted, scores, features=table.shape[1])


SMALL = 1000
"""Training posts up to which the SVM keeps what occurs in one post only."""

SVM_C = 0.1
"""Inverse strength of its regularization."""


def _per_label(
    examples: Examples,
    fitted: Callable[[np.ndarray], Any],
    scores: Callable[[Any, Sequence[str]], np.ndarray],
    *,
    features: int,
) -> tuple[Predict, int]:
    """One model for exclusive labels, a model per label for others; what has no example is never predicted.

    Args:
        examples: of the task.
        fitted: class of each example -> a model with ``classes_``.
        scores: (model, texts) -> (N, classes).
        features: columns of its table.
    """
    constant, _ = majority(examples)
    if not examples.several:
        present = np.unique(examples.gold)
        if len(present) < 2:
            return constant, len(examples.labels)
        model = fitted(examples.gold)

        def of_one(texts: Sequence[str]) -> np.ndarray:
            found = scores(model, texts)
            logits_NY = np.full((len(texts), len(examples.labels)), found.min() - NEVER)
            logits_NY[:, model.classes_] = found
            return logits_NY

        return of_one, features * len(present)
    varied = [label for label, column in enumerate(examples.gold.T) if len(np.unique(column)) == 2]
    models = {label: fitted(examples.gold[:, label]) for label in varied}

    def of_each(texts: Sequence[str]) -> np.ndarray:
        logits_NY = constant(texts)
        for label, model in models.items():
            no, yes = scores(model, texts).T
            logits_NY[:, label] = yes - no
        return logits_NY

    return of_each, features * len(varied)


NEVER = 20.0
"""Distance of a label without training posts below all others, in logits."""


def lexicon(examples: Examples, path: str | None = None) -> tuple[Predict, int]:
    """The sign of a sentiment lexicon's score; nothing is learned but which label is commoner.

    Args:
        examples: of the task.
        path: a word and a number per line; None is VADER with its rules and its edge of 0.05.
    """
    numbers = None if path is None else read_lexicon(Path(path), columns=1)
    score = vader() if numbers is None else by_words(numbers)
    # VADER rounds to four digits: the edge itself is positive. Of words alone 0 is neutral.
    edge = VADER_EDGE - 5e-5 if numbers is None else 1e-6
    sides_Y = np.array([SIDES[label.casefold()] for label in examples.labels], dtype=np.float64)
    # Without a neutral label a post that has no such word gets the commoner one.
    tie_Y = 1e-7 * (np.arange(len(sides_Y)) == examples.counts.argmax())

    def predict(texts: Sequence[str]) -> np.ndarray:
        scores_N = np.array([score(text) for text in texts])
        return np.where(sides_Y == 0, edge, scores_N[:, None] * sides_Y) + tie_Y

    return predict, 0 if numbers is None else len(numbers)


def _classifies(task: Task) -> str:
    if task.rules.exclusive or isinstance(task.rules, MultiLabel):
        return ""
    return f"it is of kind {task.kind}, and this model labels whole posts"


def _is_sentiment(task: Task) -> str:
    if task.rules.exclusive and applies(task.labels):
        return ""
    shown = ", ".join(task.labels[:4]) + (", ..." if len(task.labels) > 4 else "")
    return f"its labels ({shown or task.kind}) are not negative, positive and perhaps neutral"


BASELINES: dict[str, Baseline] = {
    "majority": Baseline(majority, _classifies),
    "lexicon": Baseline(lexicon, _is_sentiment, probabilities=False),
    "naive_bayes": Baseline(naive_bayes, _classifies),
    "tfidf_svm": Baseline(tfidf_svm, _classifies, probabilities=False),
}
"""Arm -> model."""
