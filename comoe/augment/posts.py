"""The posts that auxiliary data is made for: text, target and gold label out of any file that a recipe could read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comoe.config.errors import nearest, unknown_name
from comoe.config.recipe import TaskConfig
from comoe.data.reading.files import RawSplit
from comoe.data.reading.rows import BadCell, RowReader, cell_text
from comoe.data.reading.sources import NAMES, open_source, read_split
from comoe.data.report import BadRow

PAIR, LABEL = "aspect", "polarity"
"""Columns that are read unasked where the posts have them."""


@dataclass(frozen=True, slots=True)
class PostChoice:
    """Which posts."""

    path: str
    """File, folder or hub name."""
    format: str = "auto"
    """Key of ``comoe.data.reading.sources.READERS``."""
    split: str = "train"
    """Split of a folder or hub data set; a file is read whole."""
    text: str = "text"
    """Column with the post."""
    pair: str | None = None
    """Column with the target; None is ``PAIR`` where there is one."""
    label: str | None = None
    """Column with the gold label; None is ``LABEL`` where there is one."""
    limit: int | None = None
    """The first so many posts only."""
    skip_bad: bool = False
    """Leave bad rows out, and count them, instead of stopping at the first."""


@dataclass(frozen=True, slots=True)
class Post:
    """One post."""

    index: int
    """Number from 0, in the order of the file."""
    line: int
    """Line in the file."""
    text: str
    """The post, on one line."""
    target: str | None
    """What its sentiment is about."""
    gold: str | None
    """The label, None where it has none."""
    row: Mapping[str, Any]
    """Everything that the file holds about it."""


@dataclass(frozen=True, slots=True)
class Posts:
    """What was read."""

    file: str
    """What messages call it."""
    posts: tuple[Post, ...]
    """In the order of the file."""
    bad: tuple[BadRow, ...]
    """Rows left out."""
    notes: tuple[str, ...]
    """What was decided on the user's behalf."""

    @property
    def digest(self) -> str:
        """Changes with any cell."""
        sha256 = hashlib.sha256()
        for post in self.posts:
            cells = [post.line, post.text, post.target, post.gold, post.row]
            sha256.update(json.dumps(cells, default=str).encode())
        return sha256.hexdigest()


def read_posts(choice: PostChoice, *, labels: Sequence[str], added: Sequence[str]) -> Posts:
    """Read the posts.

    Args:
        choice: which.
        labels: gold labels that the prompts have a word for.
        added: columns that will be written beside those of the posts.

    Raises:
        ValueError: no such file, split or column; a column that would be overwritten; a row without
            text or with an unknown label, with file and line; no post at all.
    """
    source = open_source(
        "--input", root=None, path=choice.path, format=choice.format, subset=None, splits={}
    )
    if choice.split not in NAMES:
        raise unknown_name("--split", choice.split, NAMES)
    # A path that is a file is its data set's training split to the reader.
    raw = read_split(source, "train" if Path(source.path).is_file() else choice.split)
    if raw is None:
        raise ValueError(
            f"--input {choice.path}: it has no {choice.split} split; choose another --split."
        )
    if taken := [name for name in added if name in raw.columns]:
        raise ValueError(
            f"{raw.file} has the column {taken[0]} already, which would be overwritten; rename or drop it "
            f"(in the way: {', '.join(taken)})."
        )
    pair, label, notes = _columns(choice, raw)
    posts, bad = _rows(raw, choice, pair=pair, label=label, labels=labels)
    if bad and not choice.skip_bad:
        raise ValueError(
            f"{bad[0]} Correct the row, or leave out bad rows with --skip-bad ({len(bad)} in all)."
        )
    if not posts:
        raise ValueError(f"{raw.file} holds no post that can be read.")
    return Posts(raw.file, tuple(posts), tuple(bad), tuple(notes))


def _columns(choice: PostChoice, raw: RawSplit) -> tuple[str | None, str | None, list[str]]:
    """Columns of target and gold label, and what to tell the user about them."""
    for option, name in {
        "--text-column": choice.text, "--pair-column": choice.pair, "--label-column": choice.label
    }.items():  # fmt: skip
        if name is not None and raw.rows and name not in raw.columns:
            guess = nearest(name, raw.columns)
            hint = f"; did you mean {guess}?" if guess else ""
            raise ValueError(
                f"{raw.file} has no column {name!r}{hint} (columns: {', '.join(raw.columns)}) Set {option}."
            )
    pair = choice.pair or (PAIR if PAIR in raw.columns else None)
    label = choice.label or (LABEL if LABEL in raw.columns else None)
    notes = []
    if pair is None:
        notes.append(
            f"no column {PAIR}: the sentiment is that of the whole post (--pair-column names another)"
        )
    if label is None:
        notes.append(
            f"no column {LABEL}: no gold labels, one round each (--label-column names another)"
        )
    return pair, label, notes


def _rows(
    raw: RawSplit, choice: PostChoice, *, pair: str | None, label: str | None, labels: Sequence[str]
) -> tuple[list[Post], list[BadRow]]:
    config = TaskConfig(kind="unlabelled", text=choice.text, pair=pair)
    # Of any length: what a model cannot read is cut when it is asked.
    reader = RowReader({"post": config}, {"post": ()}, max_characters=10**9)
    bad, posts = list(raw.bad), []
    for line, row in zip(raw.lines, raw.rows, strict=True):
        if choice.limit is not None and len(posts) == choice.limit:
            break
        try:
            read = reader.read(row)
            gold = None if label is None else cell_text(row.get(label))
            if gold is not None and gold not in labels:
                known = ", ".join(labels)
                rule = f"column {label} is a label without a word in the prompts ({known}); add it to labels: there."
                raise BadCell(row.get(label), rule)
            text = " ".join(read.text.split())
            target = None if read.pair is None else " ".join(read.pair.split())
            posts.append(Post(len(posts), line, text, target, gold, row))
        except BadCell as error:
            bad.append(BadRow(raw.file, line, error.value, error.rule))
    return posts, sorted(bad, key=lambda item: item.line)
