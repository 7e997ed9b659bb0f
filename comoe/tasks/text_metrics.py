"""How alike a written text and the wanted one are, in words of any language."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

ARTICLES = frozenset({"a", "an", "the"})
"""Words that do not count, as in SQuAD."""
CACHED = 2**16
"""Pairs of answers whose scores are remembered."""
SIGNS = frozenset("$+<=>^`|~")
"""What SQuAD takes for punctuation beside that of Unicode."""
# Chinese signs and Japanese syllables: their words have no blanks between.
_UNSPACED = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f])")


def answer_words(text: str) -> list[str]:
    """The words of an answer that count when two answers are compared.

    Without upper case, punctuation, articles and white space, as SQuAD's scorer has it (Rajpurkar et al. 2016,
    arXiv:1606.05250); for all languages punctuation is that of Unicode, compatibility forms are one (full-width
    letters), and each Chinese sign or Japanese syllable is a word, as in MLQA (Lewis et al. 2019, arXiv:1910.07475).
    Where nothing would be left ("the", "?!") that step is not taken.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    # Removed, not made a blank, as SQuAD does: "don't" is one word.
    plain = "".join(sign for sign in folded if unicodedata.category(sign)[0] != "P" and sign not in SIGNS)
    words = _UNSPACED.sub(r" \1 ", plain).split() or folded.split()
    return [word for word in words if word not in ARTICLES] or words


def exact_match(gold: Sequence[str], predicted: Sequence[str], labels: Sequence[str] = ()) -> float:
    """Share of answers whose words are those wanted, in their order, 0 to 1; words as in ``answer_words``."""
    return _mean([_equal(a, b) for a, b in zip(gold, predicted, strict=True)])


def token_f1(gold: Sequence[str], predicted: Sequence[str], labels: Sequence[str] = ()) -> float:
    """Mean over posts of the F1 between the wanted and the written bag of words, 0 to 1; two empty ones agree: 1.

    Source: SQuAD's scorer, arXiv:1606.05250; words as in ``answer_words``.
    """
    return _mean([_overlap(a, b) for a, b in zip(gold, predicted, strict=True)])


def rouge_l(gold: Sequence[str], predicted: Sequence[str], labels: Sequence[str] = ()) -> float:
    """Mean over posts of ROUGE-L, 0 to 1: the F1 by the longest common subsequence of words; two empty ones have 0.

    Computed by the package rouge-score, whose own tokenizer keeps ASCII letters alone; here words are those of
    ``answer_words``, so that other languages count, and nothing is stemmed.

    Source: Lin 2004, ROUGE.
    """
    return _mean([_common_sequence(a, b) for a, b in zip(gold, predicted, strict=True)])


class _Words:
    """A tokenizer as rouge-score calls it."""

    def tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        return answer_words(text)


# Intervals of a comparison measure the same answers a thousand times over.
@functools.lru_cache(maxsize=CACHED)
def _equal(gold: str, predicted: str) -> float:
    return float(answer_words(gold) == answer_words(predicted))


@functools.lru_cache(maxsize=CACHED)
def _overlap(gold: str, predicted: str) -> float:
    wanted, written = answer_words(gold), answer_words(predicted)
    common = (Counter(wanted) & Counter(written)).total()
    return 2 * common / (len(wanted) + len(written)) if wanted or written else 1.0


@functools.lru_cache(maxsize=CACHED)
def _common_sequence(gold: str, predicted: str) -> float:
    return _scorer().score(gold, predicted)["rougeL"].fmeasure


@functools.cache
def _scorer() -> Any:
    # Here and not above: it loads for a second or two, which every command would wait for.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values)) if values else 0.0
