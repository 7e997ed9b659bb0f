"""Columns of second texts, labels and images: which ones a model was trained on, and which of an input to read."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from comoe.config.errors import nearest
from comoe.config.recipe import TaskConfig
from comoe.data.reading.files import RawSplit
from comoe.data.reading.stream import RowStream
from comoe.tasks.prompts import wants_pair
from comoe.tasks.task import Task

USUAL, USUAL_TEXT = "image", "text"
"""The columns of images and posts where nothing else is known."""


@dataclass(frozen=True, slots=True)
class DataChoice:
    """Which posts a command reads, and out of which columns."""

    path: str
    """File, folder or hub name."""
    format: str = "auto"
    """Key of ``comoe.data.reading.sources.READERS``."""
    split: str = "test"
    """Split of a folder or hub data set; a file is read whole."""
    text: str | None = None
    """Column with the post; None leaves the choice to the command, as below."""
    pair: str | None = None
    """Column with the second text."""
    label: str | None = None
    """Column with the label."""
    image: str | None = None
    """Column with the image."""
    author: str | None = None
    """Column with the author."""
    limit: int | None = None
    """The first so many posts only."""
    skip_bad: bool = False
    """Leave bad rows out, and count them, instead of stopping at the first."""


def check_columns(
    raw: RawSplit | RowStream, wanted: Mapping[str, str | None], *, hint: str = ""
) -> None:
    """Every column that was asked for is there.

    Args:
        raw: the rows.
        wanted: option or key of the recipe -> column, None where none is asked for.
        hint: what to say besides, at the end.

    Raises:
        ValueError: option, column, nearest column.
    """
    for option, name in wanted.items():
        if name is not None and raw.rows and name not in raw.columns:
            guess = nearest(name, raw.columns)
            meant = f"; did you mean {guess}?" if guess else ""
            raise ValueError(
                f"{option} is {name!r}, but {raw.file} has no such column{meant} "
                f"(columns: {', '.join(raw.columns)}). Set {option} to the right one.{hint}"
            )


def choose_column(
    trained: str | None, *, asked: str | None, columns: Sequence[str] | None
) -> str | None:
    """The image column to read; says so on stderr where a model that reads images gets none.

    Args:
        trained: column of the training posts; None for a model that reads no images.
        asked: the user's ``--image-column``; whether there is such a column is not looked at.
        columns: of the input; None for a file of texts alone.

    Returns:
        ``asked``, else ``trained``, else ``image``, whichever the input has; None where it, or the
            model, has none.

    Raises:
        ValueError: a column was asked for, and the model reads no images, or the input has no
            columns.
    """
    if asked is not None and trained is None:
        raise ValueError(
            f"--image-column {asked}: this model reads no images; leave the option out."
        )
    if asked is not None and columns is None:
        raise ValueError(
            f"--image-column {asked}: a .txt file has no columns; give a .jsonl, .csv or .tsv file."
        )
    if asked is not None or trained is None:
        return asked
    found = next((column for column in (trained, USUAL) if column in (columns or ())), None)
    if found is None:
        there = "is a .txt" if columns is None else f"has {', '.join(columns)}"
        print(
            f"this model reads images; the input has no column {trained}; it {there}: answering by "
            "the text alone (--image-column names another column)",
            file=sys.stderr,
        )
    return found


def column_in_training(tasks: Iterable[TaskConfig]) -> str:
    """The commonest ``tasks.<name>.image`` of a recipe; ``image`` where no task has one."""
    named = Counter(task.image for task in tasks if task.image is not None)
    return named.most_common(1)[0][0] if named else USUAL


def columns_in_training(tasks: Mapping[str, TaskConfig]) -> dict[str, dict[str, str | None]]:
    """Task -> columns of its training posts: text, second text or context (``pair``), label, and author where it is
    asked for, as an export keeps them."""
    return {
        name: {"text": task.text, "pair": task.pair or task.context, "label": task.label}
        | ({"author": task.author} if task.per == "author" else {})
        for name, task in tasks.items()
    }


def choose_text(
    config: Mapping[str, Any], tasks: Iterable[Task], *, asked: str | None, columns: Sequence[str]
) -> str:
    """The column of posts to read.

    Args:
        config: ``config.json`` of the export.
        tasks: that are predicted or scored.
        asked: the user's ``--text-column``.
        columns: of the input.

    Returns:
        ``asked``; else the one column of training that the tasks share, if the input has it (printed
            on stderr); else ``text``.
    """
    if asked is not None:
        return asked
    known = config.get("columns", {})
    named = {known.get(task.name, {}).get("text") for task in tasks if task.rules.predicts}
    trained = named.pop() if len(named) == 1 else None
    if trained in (None, USUAL_TEXT) or trained not in columns:
        return USUAL_TEXT
    print(
        f"posts are read from column {trained}, as in training (--text-column names another)",
        file=sys.stderr,
    )
    return trained


def pair_in_training(config: Mapping[str, Any], tasks: Iterable[Task]) -> str | None:
    """The one column of second texts that all of some tasks had in training.

    A task whose prompt leaves {pair} out has no say, as it never reads a second text.

    Args:
        config: ``config.json`` of the export.
        tasks: of the model.

    Returns:
        None where they had different ones, one of them had none, or an older export did not keep
            them.
    """
    named = set(_pairs_in_training(config, tasks).values())
    return named.pop() if len(named) == 1 else None


def _pairs_in_training(config: Mapping[str, Any], tasks: Iterable[Task]) -> dict[str, str | None]:
    """Task -> column of its second texts; of tasks that may read any."""
    known = config.get("columns", {})
    return {
        task.name: known.get(task.name, {}).get("pair")
        for task in tasks
        if task.rules.predicts and (task.prompt is None or wants_pair(task.prompt))
    }


def choose_pair(
    config: Mapping[str, Any], tasks: Sequence[Task], *, asked: str | None, columns: Sequence[str]
) -> str | None:
    """The column of second texts to read: ``asked``, else that of training where the input has it.

    Standard error says so, and also where tasks with different columns leave one out that the input has.
    """
    trained = None if asked is not None else pair_in_training(config, tasks)
    if trained not in columns:
        if asked is None:
            _say_unread(_pairs_in_training(config, tasks), columns)
        return asked
    print(
        f"second texts are read from column {trained}, as in training (--pair-column names another)",
        file=sys.stderr,
    )
    return trained


def _say_unread(pairs: Mapping[str, str | None], columns: Sequence[str]) -> None:
    if len(set(pairs.values())) < 2:
        return
    for column in dict.fromkeys(pair for pair in pairs.values() if pair in columns):
        names = [name for name, pair in pairs.items() if pair == column]
        asked = " ".join(f"--task {name}" for name in names)
        print(
            f"warning: {', '.join(names)} had second texts from column {column} in training and is answered without "
            f"them, as other tasks had none or others; {asked} alone reads the column",
            file=sys.stderr,
        )


def choose_author(
    config: Mapping[str, Any], tasks: Iterable[Task], *, asked: str | None, columns: Sequence[str]
) -> str | None:
    """The column of authors to read: ``asked``, else that of training; None for tasks that are not of authors.

    Raises:
        ValueError: asked for without such a task, or not there.
    """
    of_authors = [task.name for task in tasks if task.reads == "author"]
    if not of_authors:
        if asked is not None:
            raise ValueError(
                f"--author-column {asked}: these tasks are answered for each post; leave the option out."
            )
        return None
    known = config.get("columns", {})
    column = asked or known.get(of_authors[0], {}).get("author")
    if column not in columns:
        there = ", ".join(columns) or "none"
        raise ValueError(
            f"{', '.join(of_authors)} is answered for each author, and the input has no column {column} (columns: "
            f"{there}). Name the column that says who wrote a post: --author-column."
        )
    return column


def choose_labels(
    config: Mapping[str, Any], tasks: Sequence[Task], *, asked: str | None, columns: Sequence[str]
) -> dict[str, str]:
    """Task -> column with its label.

    Returns:
        ``asked``; else per task the column of training, where the input has it and no other task of
            these had the same;
        else ``label`` for one task, and the name of each for several.
    """
    known = config.get("columns", {})
    trained = {task.name: known.get(task.name, {}).get("label") for task in tasks}
    shared = Counter(trained.values())
    own = {
        name: column
        for name, column in trained.items()
        if column in columns and shared[column] == 1
    }
    usual = {task.name: "label" if len(tasks) == 1 else task.name for task in tasks}
    return usual | own if asked is None else dict.fromkeys(usual, asked)
