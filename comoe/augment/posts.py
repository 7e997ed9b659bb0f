"""The posts that auxiliary data is made for: text, target and gold label out of any file that a recipe could read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from comoe.config.recipe import TaskConfig
from comoe.data.posts import Post
from comoe.data.reading.files import RawSplit
from comoe.data.reading.inputs import USUAL_TEXT, DataChoice, check_columns
from comoe.data.reading.rows import BadCell, RowReader, read_rows, settle
from comoe.data.reading.sources import read_input
from comoe.data.report import BadRow, DataReport

PAIR, LABEL = "aspect", "polarity"
"""Columns that are read unasked where the posts have them."""


GOLD = "gold"
"""Key of ``Post.labels``: the label, None where the post has none."""


@dataclass(frozen=True, slots=True)
class InputPosts:
    """The posts of a file, and everything else that it holds about them."""

    file: str
    """What messages call it."""
    posts: tuple[Post, ...]
    """In the order of the file, each text on one line; ``pair`` is the target of the sentiment."""
    rows: tuple[Mapping[str, Any], ...]
    """Everything that the file holds about each."""
    bad: tuple[BadRow, ...]
    """Rows left out."""
    notes: tuple[str, ...]
    """What was decided on the user's behalf."""

    @property
    def digest(self) -> str:
        """Changes with any cell."""
        sha256 = hashlib.sha256()
        for post, row in zip(self.posts, self.rows, strict=True):
            cells = [post.line, post.text, post.pair, post.labels[GOLD], row]
            sha256.update(json.dumps(cells, default=str).encode())
        return sha256.hexdigest()


def read_input_posts(
    choice: DataChoice, *, labels: Sequence[str], added: Sequence[str]
) -> InputPosts:
    """Read the posts of a file, folder or hub data set.

    Args:
        choice: which.
        labels: gold labels that the prompts have a word for.
        added: columns that will be written beside those of the posts.

    Raises:
        ValueError: no such file, split or column; a column that would be overwritten; a row without
            text or with an unknown label, with file and line; no post at all.
    """
    raw = read_input("--input", choice.path, format=choice.format, split=choice.split)
    if taken := [name for name in added if name in raw.columns]:
        raise ValueError(
            f"{raw.file} has the column {taken[0]} already, which would be overwritten; rename or "
            f"drop it (in the way: {', '.join(taken)})."
        )
    choice = replace(choice, text=choice.text or USUAL_TEXT)
    options = ("--text-column", "--pair-column", "--label-column")
    check_columns(raw, dict(zip(options, (choice.text, choice.pair, choice.label), strict=True)))
    notes = []
    pair = choice.pair or (PAIR if PAIR in raw.columns else None)
    label = choice.label or (LABEL if LABEL in raw.columns else None)
    if pair is None:
        notes.append(
            f"no column {PAIR}: the sentiment is that of the whole post (--pair-column names another)"
        )
    if label is None:
        notes.append(
            f"no column {LABEL}: no gold labels, one round each (--label-column names another)"
        )
    report = DataReport()
    posts = settle(
        _posts(raw, replace(choice, pair=pair, label=label), labels),
        file=raw.file,
        skip=choice.skip_bad,
        option="--skip-bad",
        report=report,
    )
    rows = dict(zip(raw.lines, raw.rows, strict=True))
    return InputPosts(
        raw.file,
        posts=tuple(posts),
        rows=tuple(rows[post.line] for post in posts),
        bad=tuple(report.set_aside),
        notes=tuple(notes),
    )


def _posts(raw: RawSplit, choice: DataChoice, labels: Sequence[str]) -> Iterator[Post]:
    """The posts, bad ones included, up to ``choice.limit`` good ones."""
    config = TaskConfig(kind="unlabelled", text=choice.text, pair=choice.pair)
    columns = [] if choice.label is None else [choice.label]
    # What a model cannot read is cut when its prompt is made.
    reader = RowReader({"post": config}, {"post": ()}, max_characters=10**6, columns=columns)

    def read(row: Mapping[str, Any]) -> Post:
        post = reader.read(row)
        gold = post.columns.get(choice.label)
        if gold is not None and gold not in labels:
            rule = (
                f"column {choice.label} is a label without a word in the prompts "
                f"({', '.join(labels)}); add it to labels: there."
            )
            raise BadCell(row.get(choice.label), rule)
        pair = None if post.pair is None else " ".join(post.pair.split())
        return replace(post, text=" ".join(post.text.split()), pair=pair, labels={GOLD: gold})

    good = 0
    for post in read_rows(raw, read):
        if good == choice.limit:
            return
        good += post.error is None
        yield post
