"""The column that names the pictures: which one a model was trained on, and which one of an input to read."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence

from comoe.schema import TaskConfig

USUAL = "image"
"""The column where nothing else is known."""


def choose_column(trained: str | None, *, asked: str | None, columns: Sequence[str] | None) -> str | None:
    """The picture column to read; says so on stderr where a model that reads pictures gets none.

    Args:
        trained: column of the training posts; None for a model that reads no pictures.
        asked: the user's ``--image-column``; whether there is such a column is not looked at.
        columns: of the input; None for a file of texts alone.

    Returns:
        ``asked``, else ``trained``, else ``image``, whichever the input has; None where it, or the model, has none.

    Raises:
        ValueError: a column was asked for, and the model reads no pictures, or the input has no columns.
    """
    if asked is not None and trained is None:
        raise ValueError(f"--image-column {asked}: this model reads no pictures; leave the option out.")
    if asked is not None and columns is None:
        raise ValueError(f"--image-column {asked}: a .txt file has no columns; give a .jsonl, .csv or .tsv file.")
    if asked is not None or trained is None:
        return asked
    found = next((column for column in (trained, USUAL) if column in (columns or ())), None)
    if found is None:
        there = "is a .txt" if columns is None else f"has {', '.join(columns)}"
        print(
            f"this model reads pictures; the input has no column {trained}; it {there}: answering by the text alone "
            "(--image-column names another column)",
            file=sys.stderr,
        )
    return found


def column_in_training(tasks: Iterable[TaskConfig]) -> str:
    """The commonest ``tasks.<name>.image`` of a recipe; ``image`` where no task has one."""
    named = Counter(task.image for task in tasks if task.image is not None)
    return named.most_common(1)[0][0] if named else USUAL
