"""Posts with their labels: what the readers hand over and batches are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from comoe.config.errors import unknown_name

UNSEEN = "unseen"
"""Split of the posts that ``tasks.<name>.hold_out`` keeps from training."""


PART_NAMES = ("train", "validation", "test", UNSEEN)
"""Splits of a corpus, in this order."""


@dataclass(frozen=True, slots=True)
class PostSplit:
    """One split of all data sets, one entry per post. Texts are raw: cleaning belongs to tokenisation."""

    texts: Sequence[str]
    """The post; for a post given as words, the words joined by blanks."""
    pairs: Sequence[str | None]
    """Second text (stance target, aspect), None where a post has none."""
    words: Sequence[Sequence[str] | None]
    """The post as words, None where it is plain text."""
    labels: Mapping[str, Sequence[Any]]
    """Task -> the label as its kind parsed it, None where a post lacks it."""
    confidences: Mapping[str, Sequence[float | None]]
    """Task -> number in [0, 1], None where there is none."""
    groups: np.ndarray
    """Data set of each post, int64, shape (N,), an index of ``group_names``."""
    group_names: tuple[str, ...]
    """Names of the data sets."""
    origins: Sequence[str]
    """"file:line" of each post, for messages."""
    images: Sequence[bytes | str | None]
    """The picture: the bytes of its file, or the file's path; None where a post has none."""
    columns: Mapping[str, Sequence[str | None]] = field(default_factory=dict)
    """Further columns that the recipe asks for, as text (true, 3, a name); None where a post has no
    such cell."""

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: np.ndarray) -> PostSplit:
        """The posts of the given indices, in that order."""

        def pick(column: Sequence[Any]) -> list[Any]:
            return [column[row] for row in rows]

        return PostSplit(
            texts=pick(self.texts),
            pairs=pick(self.pairs),
            words=pick(self.words),
            labels={task: pick(column) for task, column in self.labels.items()},
            confidences={task: pick(column) for task, column in self.confidences.items()},
            groups=self.groups[rows],
            group_names=self.group_names,
            origins=pick(self.origins),
            images=pick(self.images),
            columns={name: pick(column) for name, column in self.columns.items()},
        )


def unlabelled_posts(
    texts: Sequence[str],
    *,
    tasks: Sequence[str],
    pairs: Sequence[str | None] | None = None,
    words: Sequence[Sequence[str] | None] | None = None,
    images: Sequence[bytes | str | None] | None = None,
) -> PostSplit:
    """Posts to be answered: no labels, one data set.

    Raises:
        ValueError: texts, pairs, words and images of different number.
    """
    count = len(texts)
    for what, column in (("pairs", pairs), ("words", words), ("images", images)):
        if column is not None and len(column) != count:
            raise ValueError(
                f"There are {count} texts and {len(column)} {what}; give one for each text, None where there is none."
            )
    return PostSplit(
        texts=list(texts),
        pairs=[None] * count if pairs is None else list(pairs),
        words=[None] * count if words is None else list(words),
        labels={task: [None] * count for task in tasks},
        confidences={},
        groups=np.zeros(count, dtype=np.int64),
        group_names=("posts",),
        origins=[f"post {number}" for number in range(1, count + 1)],
        images=[None] * count if images is None else list(images),
    )


def hidden(posts: PostSplit, what: str) -> PostSplit:
    """The posts as the model is to see them: ``data.hide`` takes all texts, or all pictures, away.

    Raises:
        ValueError: no such ``data.hide``; or hidden texts of posts given as words, whose tags would
            have no words.
    """
    if what not in HIDINGS:
        raise unknown_name("data.hide", what, HIDINGS)
    return HIDINGS[what](posts)


def _without_texts(posts: PostSplit) -> PostSplit:
    if any(words for words in posts.words):
        raise ValueError(
            "data.hide is text, but there are posts given as words, whose tags need them; set it to none."
        )
    return replace(posts, texts=[""] * len(posts), pairs=[None] * len(posts))


def _without_images(posts: PostSplit) -> PostSplit:
    return replace(posts, images=[None] * len(posts))


def join_splits(parts: Sequence[PostSplit]) -> PostSplit:
    """All posts of several splits in one, in the given order. They must have the same tasks and group names."""

    def joined(columns: Sequence[Sequence[Any]]) -> list[Any]:
        return [value for column in columns for value in column]

    return PostSplit(
        texts=joined([part.texts for part in parts]),
        pairs=joined([part.pairs for part in parts]),
        words=joined([part.words for part in parts]),
        labels={task: joined([part.labels[task] for part in parts]) for task in parts[0].labels},
        confidences={
            task: joined([part.confidences[task] for part in parts])
            for task in parts[0].confidences
        },
        groups=np.concatenate([part.groups for part in parts]),
        group_names=parts[0].group_names,
        origins=joined([part.origins for part in parts]),
        images=joined([part.images for part in parts]),
        columns={name: joined([part.columns[name] for part in parts]) for name in parts[0].columns},
    )


HIDINGS: dict[str, Callable[[PostSplit], PostSplit]] = {
    "none": lambda posts: posts,
    "text": _without_texts,
    "image": _without_images,
}
"""``data.hide`` -> posts as the model sees them."""
