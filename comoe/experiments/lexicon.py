"""Sentiment of a post by a list of words with numbers: VADER's, with its rules, or the user's own."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from comoe.config.extras import need
from comoe.tasks.labels import split_words

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


def by_words(numbers: Mapping[str, float]) -> Callable[[str], float]:
    """Text -> sum of its words' numbers, brought into (-1, 1); of overlapping entries the longest counts."""
    entries = {tuple(split_words(entry)): number for entry, number in numbers.items()}
    longest = max(map(len, entries))

    def score(text: str) -> float:
        words, place, total = split_words(text.casefold()), 0, 0.0
        while place < len(words):
            for length in range(longest, 0, -1):
                if (found := entries.get(tuple(words[place : place + length]))) is not None:
                    total += found
                    place += length - 1
                    break
            place += 1
        return total / math.sqrt(total * total + ALPHA)

    return score


def read_lexicon(path: Path) -> dict[str, float]:
    """Word or phrase -> number, of a file with a word and a number per line, tabs or commas between.

    A first line without a number is a head; further columns are not read.

    Raises:
        ValueError: no such file, or a line of another form; names file, line and value.
    """
    if not path.is_file():
        raise ValueError(f"--lexicon {path}: there is no such file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--lexicon {path} is no UTF-8 text ({error}).") from error
    found: dict[str, float] = {}
    marks = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if "\t" in text else {}
    for line, cells in _lines(path, csv.reader(io.StringIO(text), **marks)):
        if not any(cell.strip() for cell in cells):
            continue
        word, number = cells[0].strip().casefold(), _number(cells[1]) if len(cells) > 1 else None
        if number is None and line == 1 and len(cells) > 1:
            continue
        if number is None or not split_words(word):
            raise ValueError(
                f"{path}:{line}: {','.join(cells)!r} must be a word and a number, as in good,1.9."
            )
        if found.setdefault(word, number) != number:
            raise ValueError(
                f"{path}:{line}: {word} has the number {found[word]:g} above; keep one."
            )
    if not found:
        raise ValueError(f"--lexicon {path} has no word; write a word and a number per line.")
    return found


def _lines(path: Path, rows: Any) -> Iterator[tuple[int, list[str]]]:
    """Number of the last line of each row, and its cells."""
    try:
        for cells in rows:
            yield rows.line_num, cells
    except csv.Error as error:
        raise ValueError(
            f"{path}:{rows.line_num}: {error}; look for a quote that is not closed."
        ) from error


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
