"""Sentiment of a post by a list of words with numbers: VADER's, with its rules, or the user's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from comoe.config.extras import need
from comoe.tasks.lexicon import Lexicon

SIDES = {"negative": -1, "neutral": 0, "positive": 1}
"""Labels that a lexicon can give -> side of its score; other labels are not its business."""

VADER_EDGE = 0.05
"""|compound| from which VADER's authors call a post positive or negative (Hutto & Gilbert 2014)."""

ALPHA = 15.0
"""s / sqrt(s^2 + ALPHA) keeps a sum of valences in (-1, 1), as VADER does."""


def applies(labels: Sequence[str]) -> bool:
    """Whether labels are those of sentiment: negative and positive, neutral or not, in any case."""
    names = {label.casefold() for label in labels}
    return names <= SIDES.keys() and {"negative", "positive"} <= names


def vader() -> Callable[[str], float]:
    """Text -> compound score in [-1, 1], with VADER's rules for negation, emphasis and emoji.

    Raises:
        ValueError: the package is not installed.

    Source: Hutto & Gilbert 2014 (ICWSM).
    """
    need("lexicon", what="the arm lexicon (without --lexicon FILE)")
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return lambda text: float(analyzer.polarity_scores(text)["compound"])


def by_words(numbers: Mapping[str, Sequence[float]]) -> Callable[[str], float]:
    """Text -> sum of its words' first numbers, brought into (-1, 1); of overlapping entries the longest counts."""
    lexicon = Lexicon(numbers)
    firsts = [row[0] for row in lexicon.numbers.values()]

    def score(text: str) -> float:
        total = sum(firsts[found.entry - 1] for found in lexicon.find(text))
        return total / math.sqrt(total * total + ALPHA)

    return score
