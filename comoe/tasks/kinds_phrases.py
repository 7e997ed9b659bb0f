"""The kind of task whose labels are words of the post itself: phrases to be found in it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from comoe.tasks.kinds_sequence import Tags
from comoe.tasks.labels import OUTSIDE, is_missing, split_words

PHRASE_TAGS = (OUTSIDE, "B-phrase", "I-phrase")
"""Labels of every such task, in the order of their ids."""
_EDGES = re.compile(r"^\W+|\W+$")


class Phrases(Tags):
    """Tags that are made of phrases: begin and inside of each phrase, outside elsewhere.

    A cell is a phrase that occurs in the post, or a list of them; upper and lower case count as equal, and so do signs
    around words. Every occurrence of a phrase is marked. Words that stand apart in the post ("slow crashes" in "slow to
    boot and often crashes") are marked in pieces, in their order, the longest pieces first. An empty text is a missing
    label, an empty list says that the post has no such phrase. Parsed: the phrases; fitted: one id per word.
    """

    free_words = True

    def split(self, text: str) -> list[str]:
        """Signs apart from words, as prediction splits a plain text."""
        return split_words(text)

    def discover(self, values: Iterable[object]) -> tuple[str, ...]:
        return PHRASE_TAGS if any(_phrases_of(value) is not None for value in values) else ()

    def parse(self, value: object, labels: Sequence[str]) -> list[str] | None:
        if labels and tuple(labels) != PHRASE_TAGS:
            raise ValueError(f"a task of kind phrases has the labels {', '.join(PHRASE_TAGS)}; leave its labels out")
        return _phrases_of(value)

    def fitted(self, parsed: list[str], words: Sequence[str]) -> list[int]:
        ids = [0] * len(words)
        # Words of signs alone are stepped over: a comma within a phrase must not hide it.
        places = [(place, folded) for place, word in enumerate(words) if (folded := _folded(word))]
        for phrase in parsed:
            # Phrases often come from a treebank, which writes "do n't".
            plain = phrase.replace(" n't", "n't")
            wanted = [folded for word in split_words(plain) if (folded := _folded(word))]
            spans = _found(wanted, [folded for _, folded in places])
            if not spans:
                raise ValueError(f"{phrase!r} is not in the post; give words of it as they are written there.")
            for first, last in spans:
                begin, end = places[first][0], places[last][0]
                ids[begin : end + 1] = [1] + [2] * (end - begin)
        return ids


def _found(wanted: Sequence[str], words: Sequence[str]) -> list[tuple[int, int]]:
    """(first, last) word of every occurrence, or of the pieces that stand apart; none where a word is missing."""
    if whole := list(_runs(wanted, words)):
        return whole
    spans: list[tuple[int, int]] = []
    done, after = 0, 0
    while done < len(wanted):
        for end in range(len(wanted), done, -1):
            runs = list(_runs(wanted[done:end], words))
            if runs:
                # The words of a phrase are usually given in the order of the post.
                spans.append(next((run for run in runs if run[0] >= after), runs[0]))
                after, done = spans[-1][1] + 1, end
                break
        else:
            return []
    return spans


def _runs(wanted: Sequence[str], words: Sequence[str]) -> Iterator[tuple[int, int]]:
    """(first, last) of each place where the wanted words stand side by side."""
    size = len(wanted)
    for first in range(len(words) - size + 1 if size else 0):
        if list(words[first : first + size]) == list(wanted):
            yield first, first + size - 1


def _folded(word: str) -> str:
    return _EDGES.sub("", word).casefold()


def _phrases_of(value: object) -> list[str] | None:
    """The phrases in one cell, None when it is missing."""
    if isinstance(value, (list, tuple, np.ndarray)):
        items = [item for item in value if not is_missing(item)]
    elif is_missing(value):
        return None
    else:
        items = [value]
    for item in items:
        if not isinstance(item, str):
            raise ValueError(f"{item!r} is no phrase; give words of the post, as one text or a list of texts")
    return [str(item) for item in items]
