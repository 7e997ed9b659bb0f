"""The columns of a call of the predictor: one entry per post, checked post by post."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comoe.config.errors import unknown_name
from comoe.data.images.decode import BadImage, locate_image
from comoe.data.posts import shown_text
from comoe.data.reading.rows import thread_of
from comoe.data.text.normalize import is_blank
from comoe.tasks.labels import whole_characters
from comoe.tasks.prompts import wants_pair
from comoe.tasks.task import Task


@dataclass(frozen=True, slots=True)
class Posts:
    """The columns of a call, one entry per post, and what becomes of them."""

    texts: list[Any]
    pairs: list[Any]
    words: list[Any]
    images: list[Any]
    usable: list[int]
    """Numbers of the posts that can be predicted."""
    predictions: list[dict[str, Any]]
    """Per post its text, or its error."""


def read_columns(
    texts: Sequence[Any],
    pairs: Sequence[Any] | None = None,
    words: Sequence[Any] | None = None,
    images: Sequence[Any] | None = None,
    *,
    tasks: Sequence[Task],
) -> Posts:
    """The columns as lists, with what is wrong with a post in its prediction.

    Raises:
        ValueError: columns of different number, or that are no lists.
    """
    texts, reads = _listed("texts", texts), {task.reads for task in tasks}
    second = context_of if reads & {"context", "neighbors"} else second_text
    pairs = list(map(second, _column("pairs", pairs, count=len(texts))))
    words = _column("words", words, count=len(texts))
    images = _column("images", images, count=len(texts))
    predictions: list[dict[str, Any]] = [{"text": shown_text(text)} for text in texts]
    usable = []
    for number, prediction in enumerate(predictions):
        problem = text_problem(texts[number], words[number], authors="author" in reads)
        if problem := problem or pair_problem(pairs[number], tasks):
            prediction["error"] = problem
        else:
            usable.append(number)
    return Posts(texts, pairs, words, images, usable, predictions)


COLUMNS = {"text": "texts", "pair": "pairs", "words": "words", "image": "images"}
"""Key of a post with more than its text -> column of a call."""


def columns_of(posts: Sequence[Any]) -> dict[str, list[Any]]:
    """Posts as the columns of a call: texts, or mappings with keys of ``COLUMNS``, where words stand for a text.

    Raises:
        ValueError: another key.
    """
    rows = [post if isinstance(post, Mapping) else {"text": post} for post in posts]
    for key in dict.fromkeys(key for row in rows for key in row):
        if key not in COLUMNS:
            raise unknown_name("key of a post", str(key), COLUMNS)
    columns = {name: [row.get(key) for row in rows] for key, name in COLUMNS.items()}
    columns["texts"] = [
        " ".join(map(str, words)) if text is None and words else text
        for text, words in zip(columns["texts"], columns["words"], strict=True)
    ]
    return columns


def locate_images(posts: Posts, root: Path | None, *, reads_images: bool) -> None:
    """Put in place of each image where it is; what is wrong with one goes into its prediction.

    Args:
        posts: changed in place.
        root: folder that paths start from and must not leave; None: any path.
        reads_images: whether the model does.

    Raises:
        ValueError: an image for a model that reads none.
    """
    for number in posts.usable:
        cell, posts.images[number] = posts.images[number], None
        try:
            found = locate_image(cell, root=None if root is None else root.resolve())
        except BadImage as error:
            posts.predictions[number]["image_error"] = f"the image {error.rule}"
            continue
        if found is not None and not reads_images:
            raise ValueError("this model reads no images; leave images out.")
        posts.images[number] = found


def _column(what: str, values: Sequence[Any] | None, *, count: int) -> list[Any]:
    values = [None] * count if values is None else _listed(what, values)
    if len(values) != count:
        raise ValueError(
            f"there are {count} texts and {len(values)} {what}; give one for each text, or None."
        )
    return values


def _listed(what: str, values: Any) -> list[Any]:
    if isinstance(values, (str, bytes, os.PathLike)) or not isinstance(values, Iterable):
        raise ValueError(
            f"{what} must be a list with one for each text, not a {type(values).__name__}: {what}=[...]"
        )
    return list(values)


def context_of(cell: Any) -> Any:
    """A context as training reads its cell: a tuple of texts, the nearest first, None for an empty one."""
    texts = [second_text(text) for text in thread_of(cell)]
    return tuple(text for text in texts if text is not None) or None


def text_problem(text: Any, words: Any, *, authors: bool = False) -> str:
    """Why a post, or an author (a list of posts), cannot be predicted; empty when it can."""
    if authors and isinstance(text, (list, tuple)):
        found = [text_problem(one, None) for one in text] or ["the author has no post"]
        return next(filter(None, found), "")
    if words is not None:
        good = (
            len(words) > 0
            and all(isinstance(word, str) for word in words)
            and not all(map(is_blank, words))
        )
        return (
            "" if good else "the words must be text, and one of them must have a visible character"
        )
    if not isinstance(text, str):
        return f"the text must be text, not {type(text).__name__}"
    return "the text is empty" if is_blank(text) else ""


def second_text(cell: Any) -> Any:
    """A second text as training reads its cell: words with blanks between, a number as text, None for a blank one.

    What is no text at all (true, an object) stays as it is.
    """
    text = " ".join(map(str, cell)) if isinstance(cell, (list, tuple)) else cell
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        text = "" if math.isnan(text) else str(text)
    return None if isinstance(text, str) and is_blank(text) else text


def pair_problem(pair: Any, tasks: Sequence[Task]) -> str:
    """Why a post with this second text, as ``second_text`` gives it, cannot be predicted; empty where it can."""
    for text in pair if isinstance(pair, tuple) else (pair,):
        if text is not None and not isinstance(text, str):
            return f"the second text must be text, not {type(text).__name__}"
    asking = [task.name for task in tasks if wants_pair(task.prompt)]
    if pair is not None or not asking:
        return ""
    wanted = f"the second text is missing, which the prompt of {', '.join(asking)} wants"
    return f"{wanted}; give it (--pair-column), or ask for other tasks"


def whole_cell(cell: str | list[str] | tuple[str, ...] | None) -> Any:
    """A cell without halves of surrogate pairs, as training reads it."""
    if isinstance(cell, str):
        return whole_characters(cell)
    if isinstance(cell, tuple):
        return tuple(map(whole_characters, cell))
    return None if cell is None else [whole_characters(word) for word in cell]
