"""Lexicons: words with numbers, read from a file or VADER's package, and found in texts."""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from comoe.config.extras import need
from comoe.config.failure import parsing
from comoe.config.files import read_json, write_json
from comoe.tasks.labels import WORD, split_words

VADER = "vader"
"""``model.lexicon.path`` for the lexicon of VADER's package."""

FILE = "lexicon.json"
"""A lexicon in a run folder or an export: word -> numbers."""


class Found(NamedTuple):
    """An entry of a lexicon in a text."""

    start: int
    """Its first character."""
    end: int
    """The last one + 1."""
    entry: int
    """Which entry, from 1."""


class Lexicon:
    """Words and phrases with the same count of numbers each, K; upper and lower case are one.

    Args:
        numbers: word or phrase -> its numbers; at least one.
    """

    def __init__(self, numbers: Mapping[str, Sequence[float]]) -> None:
        self.numbers = {_folded(word): tuple(map(float, row)) for word, row in numbers.items()}
        self.width = len(next(iter(self.numbers.values())))
        self._entries = {word: entry for entry, word in enumerate(self.numbers, start=1)}
        self._longest = max(len(split_words(word)) for word in self.numbers)

    @functools.cached_property
    def features(self) -> np.ndarray:
        """Per entry its numbers, each column brought to mean 0 and standard deviation 1 over the
        entries, and 1; row 0, of words that are no entry, is 0: float32, (entries + 1, K + 1)."""
        rows = np.array([*self.numbers.values()], dtype=np.float64)
        spread = rows.std(axis=0)
        rows = (rows - rows.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
        return np.pad(np.pad(rows, ((0, 0), (0, 1)), constant_values=1.0), ((1, 0), (0, 0))).astype(
            np.float32
        )

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of words and numbers."""
        return hashlib.sha256(json.dumps(self.numbers).encode()).hexdigest()

    def find(self, text: str) -> Iterator[Found]:
        """The entries in a text, from left to right; of those that overlap the longest of the first.

        Words are those of ``split_words``; a hashtag is also looked up without its sign. An entry
        that begins or ends with a sign, such as an emoticon, must stand between blanks.
        """
        spans = [match.span() for match in WORD.finditer(text)]
        place = 0
        while place < len(spans):
            start = spans[place][0]
            for last in range(min(place + self._longest, len(spans)) - 1, place - 1, -1):
                if entry := self._entry(text, start, spans[last][1]):
                    yield Found(start, spans[last][1], entry)
                    place = last
                    break
            place += 1

    def _entry(self, text: str, start: int, end: int) -> int:
        """Number of the entry that these characters are, 0 for none."""
        word = _folded(text[start:end])
        if word not in self._entries:
            return self._entries.get(word[1:], 0) if word.startswith("#") else 0
        apart = f"{text[start - 1 : start]}{text[end : end + 1]}".strip() == ""
        return self._entries[word] if apart or (word[0] + word[-1]).isalnum() else 0

    def save(self, folder: Path) -> None:
        """Write ``FILE``, from which ``load`` makes the same lexicon."""
        write_json(folder / FILE, self.numbers)

    @classmethod
    def load(cls, folder: Path) -> Lexicon | None:
        """The lexicon of a run folder or an export; None where it has none.

        Raises:
            ValueError: the file is damaged.
        """
        if not (folder / FILE).is_file():
            return None
        with parsing(folder / FILE, "copy it from a backup, or train the run again"):
            rows = read_json(folder / FILE)
            widths = {len(row) for row in rows.values()}
            each = (number for row in rows.values() for number in row)
            fine = all(isinstance(number, float) and math.isfinite(number) for number in each)
            assert fine and len(widths - {0}) == len(widths) == 1, (
                "not as many finite numbers of each word"
            )
            return cls(rows)


def load_lexicon(path: str) -> Lexicon:
    """The lexicon that ``model.lexicon.path`` names: ``vader``, or a file as of ``read_lexicon``.

    Raises:
        ValueError: VADER's package is not installed, or a file that cannot be read.

    Source: Hutto & Gilbert 2014 (ICWSM).
    """
    if path != VADER:
        return Lexicon(read_lexicon(Path(path).expanduser(), option="model.lexicon.path"))
    need("lexicon", what="model.lexicon.path (vader)")
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    numbers = SentimentIntensityAnalyzer().lexicon
    # VADER looks words up in lower case: of :P and :p the second one counts.
    return Lexicon({word: [numbers.get(_folded(word), numbers[word])] for word in numbers})


def read_lexicon(
    path: Path, *, option: str = "--lexicon", columns: int | None = None
) -> dict[str, tuple[float, ...]]:
    """Word or phrase -> numbers, of a file with these in each line, tabs or commas between.

    What stands behind the numbers that are read is not. A first line without a number is a head.

    Args:
        path: of the file.
        option: what named it.
        columns: numbers of each word that are read; None is as many as the first word has.

    Raises:
        ValueError: no such file, or a line of another form; names file, line and value.
    """
    if not path.is_file():
        raise ValueError(f"{option} {path}: there is no such file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{option} {path} is no UTF-8 text ({error}).") from error
    found: dict[str, tuple[float, ...]] = {}
    width, needed = columns or 0, "a number"
    marks = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if "\t" in text else {}
    for line, cells in _lines(path, csv.reader(io.StringIO(text), **marks)):
        if not any(cell.strip() for cell in cells):
            continue
        word, numbers = _folded(cells[0]), _numbers(cells[1:])
        if not numbers and line == 1 and len(cells) > 1:
            continue
        if not word or not numbers or len(numbers) < width:
            shown = ",".join(cells)
            raise ValueError(
                f"{path}:{line}: {shown!r} must be a word and {needed}, as in good,1.9; correct or remove the line."
            )
        if not width and len(numbers) > 1:
            needed = f"{len(numbers)} numbers, as the first word has"
        width = width or len(numbers)
        if found.setdefault(word, numbers[:width]) != numbers[:width]:
            raise ValueError(
                f"{path}:{line}: {word} has the number {found[word][0]:g} above; keep one."
                if width == 1
                else f"{path}:{line}: {word} has other numbers above; keep one of the lines."
            )
    if not found:
        raise ValueError(f"{option} {path} has no word; write a word and a number per line.")
    return found


def _folded(word: str) -> str:
    return " ".join(word.casefold().split())


def _lines(path: Path, rows: Any) -> Iterator[tuple[int, list[str]]]:
    """Number of the last line of each row, and its cells."""
    try:
        for cells in rows:
            yield rows.line_num, cells
    except csv.Error as error:
        raise ValueError(
            f"{path}:{rows.line_num}: {error}; look for a quote that is not closed."
        ) from error


def _numbers(cells: Sequence[str]) -> tuple[float, ...]:
    """The finite numbers that cells begin with."""
    found: list[float] = []
    for cell in cells:
        try:
            value = float(cell)
        except ValueError:
            break
        if not math.isfinite(value):
            break
        found.append(value)
    return tuple(found)
