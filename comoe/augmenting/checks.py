"""Which answers of a generative model are kept out, and why."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from comoe.augmenting.generator import Answer
from comoe.augmenting.prompts import Prompts, words_of

_QUOTES = "\"'`*“”‘’«»「」"
_LOOP = re.compile(r"(\b\w+\b)(?:\W+\1\b){3}", flags=re.IGNORECASE)
"""One word four times in a row."""


@dataclass(frozen=True, slots=True)
class Malformed:
    """An answer that was kept out."""

    round: int
    """Round, from 1."""
    part: str
    """aspect or opinion."""
    reason: str
    """Key of ``REASONS``."""
    text: str
    """What the model wrote."""


def tidy(text: str) -> str:
    """An answer without the blanks, quotes and full stop around it."""
    return text.strip().strip(_QUOTES).strip().removesuffix(".").strip().strip(_QUOTES).strip()


def fault_of(answer: Answer, part: str, *, prompts: Prompts) -> str | None:
    """Key of the first reason that applies to an answer, None for a good one.

    Args:
        answer: as the model wrote it.
        part: aspect or opinion.
        prompts: what was asked.
    """
    return next((reason for reason, applies in REASONS.items() if applies(answer, part, prompts)), None)


def _is_empty(answer: Answer, part: str, prompts: Prompts) -> bool:
    return not words_of(answer.text)


def _has_several_lines(answer: Answer, part: str, prompts: Prompts) -> bool:
    return len(answer.text.strip().splitlines()) > 1


def _is_cut(answer: Answer, part: str, prompts: Prompts) -> bool:
    return not answer.ended


def _says_nothing(answer: Answer, part: str, prompts: Prompts) -> bool:
    return words_of(answer.text) in {words_of(phrase) for phrase in prompts.file.no_answer}


def _is_only_a_label(answer: Answer, part: str, prompts: Prompts) -> bool:
    # Told the gold label, a model that merely repeats it would always converge.
    known = {word for label in (*prompts.words, *prompts.labels) for word in words_of(label)}
    return set(words_of(answer.text)) <= known


def _echoes(answer: Answer, part: str, prompts: Prompts) -> bool:
    return prompts.echoes(answer.text)


def _repeats_itself(answer: Answer, part: str, prompts: Prompts) -> bool:
    return _LOOP.search(answer.text) is not None


def _is_too_long(answer: Answer, part: str, prompts: Prompts) -> bool:
    return len(tidy(answer.text).split()) > getattr(prompts.file.most_words, part)


REASONS: dict[str, Callable[[Answer, str, Prompts], bool]] = {
    "empty": _is_empty,
    "several lines": _has_several_lines,
    "echoes the prompt": _echoes,
    "repeats itself": _repeats_itself,
    "cut off": _is_cut,
    "too many words": _is_too_long,
    "says nothing": _says_nothing,
    "only a label": _is_only_a_label,
}
"""Reason, as it is counted and written -> whether it applies to (answer, part, prompts); the first one counts."""
