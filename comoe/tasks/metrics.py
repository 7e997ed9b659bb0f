"""Metrics: (gold, predicted, labels) -> one number.

``gold`` and ``predicted`` are, by kind of task: label ids, int, shape (N,); 0/1 matrices, shape (N,
Y); numbers, shape (N,); one list of tag names per post; or texts, in words of any language.
``labels`` are the label names in the order of their ids. A metric is 0.0, never NaN, where it has
no value: no rows, a class that is never predicted, constant numbers.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from comoe.config.errors import nearest
from comoe.tasks.labels import OUTSIDE

ARTICLES = frozenset({"a", "an", "the"})
"""Words that do not count, as in SQuAD."""


_PREFIXES = ("B-", "I-", "E-", "S-")


CACHED = 2**16
"""Pairs of texts whose scores are kept."""


SIGNS = frozenset("$+<=>^`|~")
"""What SQuAD takes for punctuation beside that of Unicode."""


# Chinese signs and Japanese syllables: their words have no blanks between.
_UNSPACED = re.compile(
    "([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f])"
)


def text_words(text: str) -> list[str]:
    """The words of a text that count when two texts are compared.

    Without upper case, punctuation, articles and white space, as SQuAD's scorer has it (Rajpurkar
    et al. 2016, arXiv:1606.05250); for all languages punctuation is that of Unicode, compatibility
    forms are one (full-width letters), and each Chinese sign or Japanese syllable is a word, as in
    MLQA (Lewis et al. 2019, arXiv:1910.07475). Where nothing would be left ("the", "?!") that step
    is not taken.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    # Removed, not made a blank, as SQuAD does: "don't" is one word.
    plain = "".join(
        sign for sign in folded if unicodedata.category(sign)[0] != "P" and sign not in SIGNS
    )
    words = _UNSPACED.sub(r" \1 ", plain).split() or folded.split()
    return [word for word in words if word not in ARTICLES] or words


def exact_match(gold: Sequence[str], predicted: Sequence[str], labels: Sequence[str] = ()) -> float:
    """Share of texts whose words are those wanted, in their order, 0 to 1; words as in ``text_words``."""
    return _mean([_equal(a, b) for a, b in zip(gold, predicted, strict=True)])


def token_f1(gold: Sequence[str], predicted: Sequence[str], labels: Sequence[str] = ()) -> float:
    """Mean over posts of the F1 between the wanted and the written bag of words, 0 to 1; two empty ones agree: 1.

    Source: SQuAD's scorer, arXiv:1606.05250; words as in ``text_words``.
    """
    return _mean([_overlap(a, b) for a, b in zip(gold, predicted, strict=True)])


def rouge_l(gold: Sequence[str], predicted: Sequence[str], labels: Sequence[str] = ()) -> float:
    """Mean over posts of ROUGE-L, 0 to 1: the F1 by the longest common subsequence of words; two empty ones have 0.

    As the package rouge-score computes it, whose own tokenizer keeps ASCII letters alone; here
    words are those of ``text_words``, so that other languages count, and nothing is stemmed.

    Source: Lin 2004, ROUGE.
    """
    return _mean([_common_sequence(a, b) for a, b in zip(gold, predicted, strict=True)])


# Intervals of a comparison measure the same texts a thousand times over.
@functools.lru_cache(maxsize=CACHED)
def _equal(gold: str, predicted: str) -> float:
    return float(text_words(gold) == text_words(predicted))


@functools.lru_cache(maxsize=CACHED)
def _overlap(gold: str, predicted: str) -> float:
    wanted, written = text_words(gold), text_words(predicted)
    common = (Counter(wanted) & Counter(written)).total()
    return 2 * common / (len(wanted) + len(written)) if wanted or written else 1.0


@functools.lru_cache(maxsize=CACHED)
def _common_sequence(gold: str, predicted: str) -> float:
    wanted, written = text_words(gold), text_words(predicted)
    # One row of the table of dynamic programming: longest[j] is for the words so far and written[:j].
    longest = [0] * (len(written) + 1)
    for word in wanted:
        diagonal = 0
        for j, other in enumerate(written, start=1):
            longer = diagonal + 1 if word == other else max(longest[j], longest[j - 1])
            diagonal, longest[j] = longest[j], longer
    return _precision_recall_f1(longest[-1], len(written), len(wanted))[2]


def _precision_recall_f1(right: int, predicted: int, gold: int) -> tuple[float, float, float]:
    """From counts; 0 where there is nothing to divide by."""
    precision, recall = right / max(predicted, 1), right / max(gold, 1)
    # In this order the last digit is that of seqeval and rouge-score.
    return precision, recall, 2 * precision * recall / ((precision + recall) or 1.0)


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values)) if values else 0.0


def masked_accuracy(
    gold: Sequence[int], predicted: Sequence[float], labels: Sequence[str] = ()
) -> float:
    """Share of the hidden tokens that are found, 0 to 1, over the tokens of all posts.

    Args:
        gold: hidden tokens of each post.
        predicted: how many of them are found.
        labels: none.
    """
    return float(np.sum(predicted) / max(1, np.sum(gold)))


Metric = Callable[[Sequence, Sequence, Sequence[str]], float]


def accuracy(gold: np.ndarray, predicted: np.ndarray, labels: Sequence[str]) -> float:
    """Share of rows that are right, 0 to 1; for a matrix a row counts only when all of its labels are right."""
    if not len(gold):
        return 0.0
    right = np.asarray(gold) == predicted
    return float((right.all(axis=1) if right.ndim == 2 else right).mean())


def macro_f1(gold: np.ndarray, predicted: np.ndarray, labels: Sequence[str]) -> float:
    """Mean over classes of F1, 0 to 1. TweetEval's metric for emotion, hate, offensive and emoji.

    As in TweetEval and scikit-learn, the mean is over the classes that occur in ``gold`` or in
    ``predicted``; for a 0/1 matrix it is over all columns.
    """
    return _averaged(gold, predicted, average="macro")[2]


def macro_precision(gold: np.ndarray, predicted: np.ndarray, labels: Sequence[str]) -> float:
    """Mean over classes of precision, 0 to 1; classes as in ``macro_f1``."""
    return _averaged(gold, predicted, average="macro")[0]


def macro_recall(gold: np.ndarray, predicted: np.ndarray, labels: Sequence[str]) -> float:
    """Mean over classes of recall, 0 to 1; classes as in ``macro_f1``. TweetEval's metric for sentiment."""
    return _averaged(gold, predicted, average="macro")[1]


def micro_f1(gold: np.ndarray, predicted: np.ndarray, labels: Sequence[str]) -> float:
    """F1 of all decisions of all classes counted together, 0 to 1; for one label per row it equals the accuracy."""
    return _averaged(gold, predicted, average="micro")[2]


def sample_f1(gold: np.ndarray, predicted: np.ndarray, labels: Sequence[str]) -> float:
    """Mean over posts of the F1 between gold and predicted label sets, 0 to 1; two empty sets agree: 1."""
    return _averaged(gold, predicted, average="samples", undefined=1.0)[2]


def jaccard(gold: np.ndarray, predicted: np.ndarray, labels: Sequence[str]) -> float:
    """Mean over posts of |intersection| / |union| of gold and predicted label sets, 0 to 1; two empty sets agree: 1.

    Source: the accuracy of SemEval-2018 Task 1 E-c.
    """
    if not len(gold):
        return 0.0
    union = (gold | predicted).sum(axis=1)
    return float(
        np.where(union == 0, 1.0, (gold & predicted).sum(axis=1) / np.maximum(union, 1)).mean()
    )


def f1_class_1(gold: np.ndarray, predicted: np.ndarray, labels: Sequence[str]) -> float:
    """F1 of the label with id 1, 0 to 1. TweetEval's metric for irony.

    Raises:
        ValueError: the task has no label with id 1.
    """
    if len(labels) < 2:
        raise ValueError(
            f"f1_class_1 needs a label with id 1, but the labels are {', '.join(labels)}; use macro_f1."
        )
    return float(class_scores(gold, predicted, labels)[2][1])


def mean_f1_against_favor(gold: np.ndarray, predicted: np.ndarray, labels: Sequence[str]) -> float:
    """Mean of the F1 of the labels named ``against`` and ``favor``, 0 to 1. TweetEval's metric for stance.

    The labels are found by name (upper and lower case count as equal), whatever their ids.

    Raises:
        ValueError: a label of that name is absent.
    """
    lowered = [label.lower() for label in labels]
    for name in ("against", "favor"):
        if name not in lowered:
            guess = nearest(name, labels)
            hint = (
                f"; is {guess!r} meant? rename it"
                if guess
                else "; name the labels so, or use macro_f1"
            )
            listed = ", ".join(labels)
            raise ValueError(
                f"mean_f1_against_favor needs a label named {name!r}, but the labels are {listed}{hint}."
            )
    f1_Y = class_scores(gold, predicted, labels)[2]
    return float(np.mean([f1_Y[lowered.index(name)] for name in ("against", "favor")]))


def mae(gold: np.ndarray, predicted: np.ndarray, labels: Sequence[str] = ()) -> float:
    """Mean absolute error, in the unit of the labels; lower is better."""
    return float(np.mean(np.abs(np.asarray(gold, dtype=float) - predicted))) if len(gold) else 0.0


def pearson(gold: np.ndarray, predicted: np.ndarray, labels: Sequence[str] = ()) -> float:
    """Linear correlation, -1 to 1; 0.0 where one side is constant, not finite, or has fewer than two numbers."""
    if not (_varies(gold) and _varies(predicted)):
        return 0.0
    from scipy import stats  # takes a second, which a prediction would wait in vain

    return float(stats.pearsonr(gold, predicted)[0])


def spearman(gold: np.ndarray, predicted: np.ndarray, labels: Sequence[str] = ()) -> float:
    """Correlation of ranks, -1 to 1; 0.0 as for ``pearson``."""
    if not (_varies(gold) and _varies(predicted)):
        return 0.0
    from scipy import stats  # takes a second, which a prediction would wait in vain

    return float(stats.spearmanr(gold, predicted)[0])


def span_f1(
    gold: Sequence[list[str]], predicted: Sequence[list[str]], labels: Sequence[str] = ()
) -> float:
    """Micro F1 of whole spans, 0 to 1: a span is right when its type and both ends are. As in conlleval and seqeval.

    Tags without the prefix B-, I-, E- or S- count as types: a run of equal tags is one span.
    """
    return _spans(gold, predicted)[2]


def span_precision(
    gold: Sequence[list[str]], predicted: Sequence[list[str]], labels: Sequence[str] = ()
) -> float:
    """Share of the predicted spans that are right, 0 to 1."""
    return _spans(gold, predicted)[0]


def span_recall(
    gold: Sequence[list[str]], predicted: Sequence[list[str]], labels: Sequence[str] = ()
) -> float:
    """Share of the gold spans that were found, 0 to 1."""
    return _spans(gold, predicted)[1]


def class_scores(
    gold: np.ndarray, predicted: np.ndarray, labels: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 of every label, each of shape (Y,), 0 to 1; 0 where there is nothing to divide by."""
    if not len(gold):
        zeros = np.zeros(len(labels))
        return zeros, zeros, zeros
    return _ratios(_counts(gold, predicted, classes=len(labels)))


def confusion(gold: np.ndarray, predicted: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    """Counts of (gold label, predicted label), int64, shape (Y, Y): rows are gold."""
    width = len(labels)
    return np.bincount(np.asarray(gold) * width + predicted, minlength=width**2).reshape(
        width, width
    )


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Spans of one post's tags as (type, first word, last word + 1), malformed sequences as conlleval reads them.

    B- and S- begin a span, E- and S- end one. I- and E- of another type than the span before them,
    or without one, begin a span too. A tag without prefix counts as I-.

    Source: Tjong Kim Sang and Buchholz 2000, conlleval; seqeval's default mode.
    """
    spans: list[tuple[str, int, int]] = []
    open_type = None
    for position, tag in enumerate(tags):
        if tag == OUTSIDE:
            open_type = None
            continue
        prefix, kind = (tag[0], tag[2:]) if tag[:2] in _PREFIXES else ("I", tag)
        kind = kind or "_"
        first = spans.pop()[1] if prefix in "IE" and kind == open_type else position
        spans.append((kind, first, position + 1))
        open_type = kind if prefix in "BI" else None
    return spans


def _averaged(
    gold: np.ndarray, predicted: np.ndarray, *, average: str, undefined: float = 0.0
) -> tuple[float, float, float]:
    """Averaged precision, recall, F1: "macro" over classes, "micro" over decisions, "samples" over rows of a matrix."""
    if not len(gold):
        return 0.0, 0.0, 0.0
    if average == "samples":
        counts_3Y = _counts(gold.T, predicted.T)
    else:
        counts_3Y = _counts(gold, predicted)
    if average == "micro":
        counts_3Y = counts_3Y.sum(axis=1, keepdims=True)
    elif np.ndim(gold) == 1:
        counts_3Y = counts_3Y[:, counts_3Y[1:].any(axis=0)]
    precision, recall, f1 = (
        float(values.mean()) for values in _ratios(counts_3Y, undefined=undefined)
    )
    return precision, recall, f1


def _counts(gold: np.ndarray, predicted: np.ndarray, *, classes: int = 0) -> np.ndarray:
    """Per class, or per column of a 0/1 matrix, how many rows are right, predicted and gold: int64, (3, Y)."""
    gold, predicted = np.asarray(gold), np.asarray(predicted)
    if gold.ndim == 2:
        return np.stack([(gold & predicted).sum(axis=0), predicted.sum(axis=0), gold.sum(axis=0)])
    classes = max(classes, int(gold.max()) + 1, int(predicted.max()) + 1)
    ids = (gold[gold == predicted], predicted, gold)
    return np.stack([np.bincount(rows, minlength=classes) for rows in ids])


def _ratios(
    counts_3Y: np.ndarray, *, undefined: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1, each (Y,); ``undefined`` where there is nothing to divide by."""
    right_Y, predicted_Y, gold_Y = counts_3Y
    precision_Y, recall_Y, f1_Y = (
        np.where(below_Y == 0, undefined, above_Y / np.maximum(below_Y, 1))
        for above_Y, below_Y in (
            (right_Y, predicted_Y),
            (right_Y, gold_Y),
            (2 * right_Y, gold_Y + predicted_Y),
        )
    )
    return precision_Y, recall_Y, f1_Y


def _spans(gold: Sequence[list[str]], predicted: Sequence[list[str]]) -> tuple[float, float, float]:
    """Micro-averaged precision, recall, F1 of spans."""
    pairs = [(set(entities(a)), set(entities(b))) for a, b in zip(gold, predicted, strict=True)]
    return _precision_recall_f1(
        sum(len(a & b) for a, b in pairs),
        sum(len(b) for _, b in pairs),
        sum(len(a) for a, _ in pairs),
    )


def _varies(numbers: np.ndarray) -> bool:
    return len(numbers) > 1 and bool(np.isfinite(numbers).all()) and float(np.ptp(numbers)) > 0.0


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "macro_precision": macro_precision,
    "macro_recall": macro_recall,
    "micro_f1": micro_f1,
    "sample_f1": sample_f1,
    "jaccard": jaccard,
    "f1_class_1": f1_class_1,
    "mean_f1_against_favor": mean_f1_against_favor,
    "mae": mae,
    "pearson": pearson,
    "spearman": spearman,
    "span_f1": span_f1,
    "span_precision": span_precision,
    "span_recall": span_recall,
    "exact_match": exact_match,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
    "masked_accuracy": masked_accuracy,
}


LOWER_IS_BETTER = {"mae", "loss", "teacher_kl", "perplexity"}
"""Names of numbers that fall as a model gets better; every other one rises."""
