"""Files of posts to be answered: .txt, .csv, .tsv and .jsonl."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comoe.config import nearest, unknown_name
from comoe.data.files import RawSplit, read_csv, read_jsonl, read_tsv, text_lines
from comoe.input_columns import choose_column, choose_pair
from comoe.predict import Predictor
from comoe.tasks.catalog import Task


@dataclass(frozen=True, slots=True)
class Post:
    """One line of the input."""

    text: Any
    """The post; a list of words is a post given as words."""
    pair: str | None = None
    """Second text."""
    image: Any = None
    """What the picture column holds."""
    error: str = ""
    """Why the line could not be read."""


def read_posts(
    path: Path,
    *,
    text_column: str = "text",
    pair_column: str | None = None,
    image_column: str | None = None,
    model: Predictor | None = None,
    tasks: Sequence[Task] = (),
) -> list[Post]:
    """The posts of a file; a line that cannot be read becomes a post with an error, and keeps its place.

    The picture column of ``model`` is read unless ``image_column`` names another, and the column of second texts that
    ``tasks`` had in training unless ``pair_column`` names another. Lines end at a line feed only. In a
    .txt file every line is a post; bytes that are not UTF-8 become U+FFFD there.

    Raises:
        ValueError: no such file or column, an ending that is not .txt, .csv, .tsv or .jsonl, or a picture column for a
            model of texts.
    """
    if not path.is_file():
        raise ValueError(f"--input {path}: there is no such file.")
    ending = path.suffix.lower()
    trained = None if model is None else model.image_column
    if ending == ".txt":
        choose_column(trained, asked=image_column, columns=None)
        return [Post(line) for line in text_lines(path)[0]]
    if ending not in TABLES:
        raise ValueError(f"--input {path}: {unknown_name('ending that can be read', ending, ('.txt', *TABLES))}")
    raw = TABLES[ending](path)
    if raw.rows:
        image_column = choose_column(trained, asked=image_column, columns=raw.columns)
        known = {} if model is None else model.exported.config
        pair_column = choose_pair(known, tasks, asked=pair_column, columns=raw.columns)
    columns = {"--text-column": text_column, "--pair-column": pair_column, "--image-column": image_column}
    for option, column in columns.items():
        if column is not None and raw.rows and column not in raw.columns:
            guess = nearest(column, raw.columns)
            hint = f" Did you mean {guess}?" if guess else ""
            raise ValueError(
                f"{option} {column}: {path} has no such column; it has {', '.join(raw.columns)}.{hint} Set {option}."
            )
    found = [
        (line, Post(row.get(text_column), _cell_of(row, pair_column), _cell_of(row, image_column)))
        for line, row in zip(raw.lines, raw.rows, strict=True)
    ]
    broken = [(row.line, Post("", error=f"line {row.line} {row.rule}")) for row in raw.bad]
    return [post for _, post in sorted(found + broken, key=lambda item: item[0])]


def _cell_of(row: dict[str, Any], column: str | None) -> Any:
    return None if column is None else row.get(column)


TABLES: dict[str, Callable[[Path], RawSplit]] = {
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_jsonl,
}
"""Ending of the input -> reader."""
