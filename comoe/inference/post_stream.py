"""The posts of an input that is predicted: which columns are read, and post after post."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from comoe.config.recipe import OWN_COLUMNS
from comoe.data.posts import Post
from comoe.data.reading.inputs import (
    USUAL_TEXT,
    check_columns,
    choose_column,
    choose_pair,
    choose_text,
)
from comoe.data.reading.rows import cell_text, posts_of
from comoe.data.reading.stream import RowStream, open_stream
from comoe.inference.options import DEFAULT, PredictOptions
from comoe.inference.predictor import Predictor
from comoe.tasks.task import Task


@dataclass(frozen=True, slots=True)
class PostStream:
    """Posts that are read as they are asked for; a line that cannot be read is a post with an error, in its place."""

    rows: RowStream
    """The input."""
    options: PredictOptions
    """With the columns that are read."""
    kept: tuple[str, ...]
    """Columns that are copied to the predictions."""

    def __iter__(self) -> Iterator[Post]:
        options = self.options
        read = (options.text_column, options.pair_column, options.image_column, *self.kept)
        rows = self.rows.read(column for column in read if column is not None)
        return posts_of(rows, self.rows.file, self._post)

    def _post(self, row: Mapping[str, Any]) -> Post:
        cell = row.get(self.options.text_column)
        words = cell if isinstance(cell, list) else None
        return Post(
            text=cell if words is None else " ".join(map(str, words)),
            words=words,
            pair=row.get(self.options.pair_column),
            image=row.get(self.options.image_column),
            # Text and whole numbers stay, anything else becomes text.
            columns={
                column: cell if isinstance(cell := row.get(column), (str, int)) else cell_text(cell)
                for column in self.kept
            },
        )


def open_posts(
    source: str,
    options: PredictOptions = DEFAULT,
    *,
    model: Predictor | None = None,
    tasks: Sequence[Task] = (),
) -> PostStream:
    """Find an input, and the columns to read.

    Columns that are not given are those that ``tasks`` of ``model`` had in training, if the input
    has them. In a .txt file every line is a post. Cells stay as they are: the predictor reports a
    wrong one.

    Args:
        source: as of ``open_stream``.
        options: the columns to read and to keep, and the format of the input.
        model: that predicts.
        tasks: to predict.

    Raises:
        ValueError: no such input or column, a format that cannot be read, an image column for a
            model of texts, or a column to keep that the predictions have themselves.
    """
    rows = open_stream(source, format=options.input_format)
    text, pair, image = options.text_column, options.pair_column, options.image_column
    if rows.plain or rows.rows:
        trained, names = model and model.image_column, None if rows.plain else rows.columns
        image = choose_column(trained, asked=image, columns=names)
    if rows.plain:
        text, pair = USUAL_TEXT, None
    elif rows.rows:
        known = {} if model is None else model.exported.config
        text = choose_text(known, tasks, asked=text, columns=rows.columns)
        pair = choose_pair(known, tasks, asked=pair, columns=rows.columns)
    kept = _kept_columns(options.keep, rows, tasks)
    wanted = {"--text-column": text, "--pair-column": pair}
    for some in (wanted | {"--image-column": image}, *({"--keep": name} for name in kept)):
        check_columns(rows, some)
    read = replace(options, text_column=text, pair_column=pair, image_column=image)
    return PostStream(rows, read, tuple(kept))


def _kept_columns(
    keep: Sequence[str] | None, rows: RowStream, tasks: Sequence[Task]
) -> Sequence[str]:
    own = {*OWN_COLUMNS, *(task.name for task in tasks)}
    if keep is None:
        usual = ("id",) if rows.rows else ()
        return [column for column in usual if column in rows.columns and column not in own]
    for column in keep:
        if column.partition("/")[0] in own:
            raise ValueError(
                f"--keep {column}: the predictions have this name themselves; rename the column."
            )
    return list(dict.fromkeys(keep))
