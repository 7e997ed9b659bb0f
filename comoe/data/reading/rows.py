"""From the rows of a file to posts: text, words, second text, parsed labels; or what is wrong with a row."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from comoe.config.recipe import TaskConfig
from comoe.data.posts import Post
from comoe.data.reading.files import RawSplit, Row
from comoe.data.report import BadRow, DataReport
from comoe.data.text.normalize import is_blank
from comoe.tasks.kinds.tagging import NotInPost, word_splitter
from comoe.tasks.labels import is_missing, label_name, whole_characters
from comoe.tasks.prompts import wants_pair
from comoe.tasks.task import kind_of


class BadCell(ValueError):
    """A cell that makes its row unusable."""

    def __init__(self, value: Any, rule: str) -> None:
        super().__init__(rule)
        self.value = value
        self.rule = rule


def read_rows(raw: RawSplit, read: Callable[[Mapping[str, Any]], Post]) -> Iterator[Post]:
    """The posts of a file in the order of its lines; see ``posts_of``."""
    found = [*zip(raw.lines, raw.rows, strict=True), *((bad.line, bad) for bad in raw.bad)]
    return posts_of(sorted(found, key=lambda item: item[0]), raw.file, read)


def posts_of(
    rows: Iterable[tuple[int, Row | BadRow]], file: str, read: Callable[[Mapping[str, Any]], Post]
) -> Iterator[Post]:
    """Posts one by one; a row that cannot be used becomes a post with an error.

    Args:
        rows: line and row, or what is wrong with it.
        file: for messages.
        read: makes a post of a row, as ``RowReader.read``; raises BadCell.
    """
    for line, row in rows:
        post, error = Post(), row
        if not isinstance(row, BadRow):
            try:
                post, error = read(row), None
            except BadCell as bad:
                error = BadRow(file, line, bad.value, bad.rule)
        yield replace(post, file=file, line=line, error=error)


FEW = 10
"""Bad rows of a file that may be the fault of the rows, however few good ones it has."""


def settle(
    posts: Iterable[Post], *, file: str, skip: bool, option: str, report: DataReport
) -> list[Post]:
    """The posts without an error; the others stop the command, or go into the report.

    Args:
        posts: of one file.
        file: for messages.
        skip: leave bad ones out.
        option: that would set ``skip``, for the message.
        report: gets the bad ones.

    Raises:
        ValueError: a bad post that is not skipped, or no usable one.
    """
    usable, bad = [], []
    for post in posts:
        (usable if post.error is None else bad).append(post)
    if bad and not skip and len(bad) > max(FEW, len(usable)):
        raise ValueError(
            f"{bad[0].error} {len(bad):,} of {len(bad) + len(usable):,} rows of this file are bad, so correct the "
            f"recipe (columns, labels, format) rather than the rows; {option} would leave all of them out."
        )
    if bad and not skip:
        more = f" ({len(bad) - 1:,} more bad rows in this file.)" if len(bad) > 1 else ""
        raise ValueError(
            f"{bad[0].error} Correct it, or set {option} to leave such rows out.{more}"
        )
    if not usable:
        rows = f": all {len(bad):,} rows are bad. The first: {bad[0].error}" if bad else "."
        raise ValueError(f"{file} has no usable post{rows}")
    report.set_aside.extend(post.error for post in bad)
    return usable


class RowReader:
    """Reads the rows of one data set for all of its tasks.

    Args:
        tasks: tasks of the data set; they have the same text columns.
        labels: task -> label names.
        max_characters: a longer text is a bad cell.
        columns: further columns to keep as text.
        strict: a label that does not fit its post's words (a phrase that is not among them) makes
            the row a bad one; else the post stays without that label and is counted in ``unfit``.
    """

    def __init__(
        self,
        tasks: Mapping[str, TaskConfig],
        labels: Mapping[str, tuple[str, ...]],
        *,
        max_characters: int,
        columns: Sequence[str] = (),
        strict: bool = True,
    ) -> None:
        self._tasks = tasks
        self._labels = labels
        self._kinds = {name: kind_of(task.kind) for name, task in tasks.items()}
        first = next(iter(tasks.values()))
        self._text, self._pair, self._image = first.text, first.pair, first.image
        self._author, self._context = first.author, first.context
        self._apart = first.context_as == "neighbors"
        self._max_characters = max_characters
        self._columns, self._strict = tuple(columns), strict
        self._split = word_splitter(self._kinds.values())
        self._asked_with_pair = [name for name, task in tasks.items() if wants_pair(task.prompt)]
        self.unfit: Counter[str] = Counter()

    def read(self, row: Mapping[str, Any]) -> Post:
        """One row.

        Raises:
            BadCell: no text, too long a text, an unknown label, another number of tags than of
                words, no second text where a prompt wants it, no author where tasks ask for one.
        """
        text, words = self._first_text(row.get(self._text))
        pair: Any = self._second_text(row.get(self._pair)) if self._pair is not None else None
        members: tuple[Post, ...] = ()
        if self._context is not None:
            pair = self._thread(row.get(self._context))
            if pair is not None and self._apart:
                members, pair = with_neighbors(text, words, pair), None
        author = None if self._author is None else cell_text(row.get(self._author))
        if self._author is not None and author is None:
            rule = f"column {self._author} is empty, and tasks ask for the author of each post (tasks.<name>.author)."
            raise BadCell(row.get(self._author), rule)
        labels = {
            name: self._label(name, row.get(task.label), words)
            for name, task in self._tasks.items()
        }
        for name in self._asked_with_pair if pair is None else ():
            # A post without any label is to be answered, and asked likewise.
            if labels[name] is not None or all(label is None for label in labels.values()):
                rule = (
                    f"column {self._pair} is empty, but tasks.{name}.prompt has {{pair}}; fill it."
                )
                raise BadCell(row.get(self._pair), rule)
        return Post(
            text=text,
            words=words,
            pair=pair,
            labels=labels,
            soft_labels={
                name: self._soft_label(name, row.get(task.soft_label))
                for name, task in self._tasks.items()
                if task.soft_label is not None
            },
            confidences={
                name: _confidence(name, row.get(task.confidence))
                for name, task in self._tasks.items()
                if task.confidence is not None
            },
            image=None if self._image is None else row.get(self._image),
            columns={name: cell_text(row.get(name)) for name in self._columns},
            author=author,
            members=members,
        )

    def _soft_label(self, name: str, value: Any) -> np.ndarray | None:
        try:
            return self._kinds[name].parse_soft(value, self._labels[name])
        except ValueError as error:
            where = f"task {name}, column {self._tasks[name].soft_label}"
            raise BadCell(value, f"{where}: {error}.") from error

    def _first_text(self, value: Any) -> tuple[str, list[str] | None]:
        if isinstance(value, (list, tuple)):
            words = [self._clean(word, self._text) for word in value]
            text = " ".join(words)
        else:
            text = self._clean(value, self._text)
            words = None if self._split is None else self._split(text)
        if len(text) > self._max_characters:
            raise self._too_long(text, self._text)
        if is_blank(text):
            raise BadCell(value, f"column {self._text} is empty; a post needs text.")
        return text, words

    def _second_text(self, value: Any) -> str | None:
        text = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        text = self._clean(text, self._pair)
        if len(text) > self._max_characters:
            raise self._too_long(text, self._pair)
        return None if is_blank(text) else text

    def _thread(self, value: Any) -> tuple[str, ...] | None:
        texts = [self._clean(text, self._context) for text in thread_of(value)]
        for text in texts:
            if len(text) > self._max_characters:
                raise self._too_long(text, self._context)
        return tuple(text for text in texts if not is_blank(text)) or None

    def _clean(self, value: Any, column: str | None) -> str:
        """A cell as text."""
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return ""
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise BadCell(
                value, f"column {column} holds no text; a text is a string, or a list of words."
            )
        text = str(value)
        if "\x00" in text:
            raise BadCell(value, f"column {column} holds a NUL character; remove it.")
        return whole_characters(text)

    def _too_long(self, text: str, column: str | None) -> BadCell:
        rule = (
            f"more than data.max_characters ({self._max_characters:,}); cut it, or raise the limit."
        )
        return BadCell(text, f"column {column} has {len(text):,} characters, {rule}")

    def _label(self, name: str, value: Any, words: list[str] | None) -> Any:
        labels, kind = self._labels[name], self._kinds[name]
        try:
            parsed = kind.parse(value, labels)
        except ValueError as error:
            hint = (
                f" Labels come from the training split, unless tasks.{name}.labels lists them."
                if labels
                else ""
            )
            raise BadCell(
                value, f"task {name}, column {self._tasks[name].label}: {error}.{hint}"
            ) from error
        if parsed is None:
            return None
        try:
            return kind.fitted(parsed, words or ())
        except ValueError as error:
            if self._strict or not isinstance(error, NotInPost):
                raise BadCell(
                    value, f"task {name}, column {self._tasks[name].label}: {error}"
                ) from error
        self.unfit[name] += 1
        return None


def thread_of(value: Any) -> list[Any]:
    """The posts of a context cell, the nearest first: of a list, which goes down to the parent, or one alone."""
    return list(reversed(value)) if isinstance(value, (list, tuple, np.ndarray)) else [value]


def with_neighbors(
    text: str, words: Sequence[str] | None, context: Sequence[str]
) -> tuple[Post, ...]:
    """``Post.members`` of a post with a context, the nearest first."""
    return (Post(text=text, words=words), *(Post(text=near) for near in context))


def cell_text(value: Any) -> str | None:
    """Any cell as text: true and "true", 3 and 3.0 are one text each; None where it is empty."""
    return None if is_missing(value) else label_name(value)


def _confidence(name: str, value: Any) -> float | None:
    """A number in [0, 1], None where missing."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.inf
    if math.isnan(number):
        return None
    if isinstance(value, (bool, np.bool_)) or not 0 <= number <= 1:
        raise BadCell(value, f"task {name}: the confidence must be a number from 0 to 1.")
    return number
