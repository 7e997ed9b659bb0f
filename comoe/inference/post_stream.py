"""The posts of an input that is predicted: which columns are read, and post after post."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from comoe.config.recipe import OWN_COLUMNS
from comoe.data.authors import NUM_POSTS, authors_in_order
from comoe.data.posts import Post
from comoe.data.reading.inputs import (
    USUAL_TEXT,
    check_columns,
    choose_author,
    choose_column,
    choose_pair,
    choose_text,
)
from comoe.data.reading.rows import BadCell, cell_text, posts_of
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
    max_posts: int = 0
    """Most posts of an author that are read."""

    def __iter__(self) -> Iterator[Post]:
        options = self.options
        read = (
            options.text_column,
            options.pair_column,
            options.image_column,
            options.author_column,
            *self.kept,
        )
        rows = self.rows.read(column for column in read if column not in (None, NUM_POSTS))
        posts = posts_of(rows, self.rows.file, self._post)
        if options.author_column is None:
            return posts
        return authors_in_order(posts, column=options.author_column, most=self.max_posts)

    @property
    def total(self) -> int | None:
        """Entries of the input, where that is known beforehand."""
        return self.rows.total if self.options.author_column is None else None

    def _post(self, row: Mapping[str, Any]) -> Post:
        author = self.options.author_column and cell_text(row.get(self.options.author_column))
        if self.options.author_column is not None and author is None:
            raise BadCell(
                None,
                f"column {self.options.author_column} is empty, and these tasks are of authors",
            )
        cell = row.get(self.options.text_column)
        words = cell if isinstance(cell, list) else None
        return Post(
            text=cell if words is None else " ".join(map(str, words)),
            words=words,
            pair=row.get(self.options.pair_column),
            image=row.get(self.options.image_column),
            author=author,
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
    if rows.plain and tasks and (text or pair):
        option, column = ("--text-column", text) if text else ("--pair-column", pair)
        raise ValueError(
            f"{option} {column}: a .txt file has no columns; leave the option out, or give a .jsonl, .csv or .tsv file."
        )
    if rows.plain:
        text, pair = USUAL_TEXT, None
    elif rows.rows:
        known = {} if model is None else model.exported.config
        text = choose_text(known, tasks, asked=text, columns=rows.columns)
        pair = choose_pair(known, tasks, asked=pair, columns=rows.columns)
    author = options.author_column
    if model is not None and tasks and (rows.plain or rows.rows):
        known = model.exported.config
        author = choose_author(
            known, tasks, asked=author, columns=() if rows.plain else rows.columns
        )
    kept = _kept_columns(options.keep, rows, tasks)
    wanted = {"--text-column": text, "--pair-column": pair}
    for some in (wanted | {"--image-column": image}, *({"--keep": name} for name in kept)):
        check_columns(rows, some)
    if author is not None:
        kept = list(dict.fromkeys([author, *kept, NUM_POSTS]))
    read = replace(
        options, text_column=text, pair_column=pair, image_column=image, author_column=author
    )
    most = 0 if model is None else model.exported.data_config.max_posts
    return PostStream(rows, read, tuple(kept), most)


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
