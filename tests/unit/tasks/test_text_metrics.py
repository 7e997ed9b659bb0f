"""Scores of free texts against independent computations."""

import random
import re
import string
from collections import Counter

import pytest
from rouge_score.rouge_scorer import RougeScorer

from comoe.tasks.metrics import exact_match, rouge_l, text_words, token_f1

WORDS = "the a Battery life is good good! don't screen, USB-C ... 50%".split()


def squad_normalized(text: str) -> str:
    """As SQuAD's own script has it."""
    text = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def squad_f1(gold: str, predicted: str) -> float:
    one, other = squad_normalized(gold).split(), squad_normalized(predicted).split()
    same = sum((Counter(one) & Counter(other)).values())
    if not same:
        return 0.0
    precision, recall = same / len(other), same / len(one)
    return 2 * precision * recall / (precision + recall)


class Words:
    """Our words as a tokenizer of rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        return text_words(text)


def pairs(seed: int) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    texts = [" ".join(["life", *draw.choices(WORDS, k=draw.randint(1, 6))]) for _ in range(200)]
    return list(zip(texts[::2], texts[1::2], strict=True))


def test_english_answers_are_scored_as_by_the_script_of_squad():
    for gold, predicted in pairs(0):
        f1, equal = squad_f1(gold, predicted), squad_normalized(gold) == squad_normalized(predicted)
        assert token_f1([gold], [predicted]) == pytest.approx(f1, abs=1e-12), (gold, predicted)
        assert exact_match([gold], [predicted]) == float(equal)


def test_rouge_l_is_to_the_last_digit_that_of_rouge_score():
    scorer = RougeScorer(["rougeL"], tokenizer=Words())
    for gold, predicted in [*pairs(1), ("", ""), ("life", ""), ("", "life")]:
        theirs = scorer.score(gold, predicted)["rougeL"].fmeasure
        assert rouge_l([gold], [predicted]) == theirs, (gold, predicted)


@pytest.mark.parametrize(
    ("gold", "predicted", "f1", "rouge", "equal"),
    [("电池很好", "电池不好", 3 / 4, 3 / 4, 0.0), ("电池。", "电池", 1.0, 1.0, 1.0),
     ("ＧＯＯＤ", "good", 1.0, 1.0, 1.0),
     ("Größe", "GRÖSSE", 1.0, 1.0, 1.0), ("хороший экран", "экран хороший", 1.0, 1 / 2, 0.0),
     ("«écran»", "écran", 1.0, 1.0, 1.0), ("iPhone的电池", "iPhone 电池", 2 * 3 / 7, 2 * 3 / 7, 0.0),
     ("\U0001f600", "\U0001f600", 1.0, 1.0, 1.0), ("the", "a", 0.0, 0.0, 0.0), ("?!", "!", 0.0, 0.0, 0.0),
     ("x", "", 0.0, 0.0, 0.0)],
)  # fmt: skip
def test_answers_of_other_languages_count(gold, predicted, f1, rouge, equal):
    assert token_f1([gold], [predicted]) == pytest.approx(f1)
    assert rouge_l([gold], [predicted]) == pytest.approx(rouge)
    assert exact_match([gold], [predicted]) == equal


def test_no_rows_have_no_score_and_two_empty_answers_agree():
    assert token_f1([], []) == exact_match([], []) == rouge_l([], []) == 0.0
    assert token_f1([""], [""]) == exact_match([""], [""]) == 1.0
