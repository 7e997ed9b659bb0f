"""Posts with their labels: what the readers hand over and batches are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np

from comoe.data.report import BadRow

UNSEEN = "unseen"
"""Split of the posts that ``tasks.<name>.hold_out`` keeps from training."""


PART_NAMES = ("train", "validation", "test", UNSEEN)
"""Splits of a corpus, in this order."""


@dataclass(frozen=True, slots=True)
class Post:
    """One post, out of a file or given by a program."""

    text: Any = ""
    """The post; of words, the words joined by blanks. Raw: cleaning belongs to tokenization."""
    words: Sequence[str] | None = None
    """The post as words, None where it is plain text."""
    pair: Any = None
    """Second text (stance target, aspect), None where there is none; of a context a tuple of texts,
    the nearest first."""
    labels: Mapping[str, Any] = field(default_factory=dict)
    """Task -> the label as its kind parsed it, None where missing."""
    confidences: Mapping[str, float | None] = field(default_factory=dict)
    """Task with a confidence column -> number in [0, 1], None where missing."""
    soft_labels: Mapping[str, Any] = field(default_factory=dict)
    """Task with a column of soft labels -> (1, Y), None where missing."""
    image: Any = None
    """What the image column holds; once located, the bytes of a file or its path."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Further column -> its cell (in training and scoring as text), None where empty."""
    file: str = ""
    """Where the post was read, for messages."""
    line: int = 0
    """Line in the file from 1; its number where a format has no lines."""
    author: str | None = None
    """Who wrote it, where a task asks for authors."""
    members: Sequence[Post] = ()
    """Of an author all posts; of a post with neighbors itself, then these, the nearest first; empty
    for a post that is read alone."""
    error: BadRow | None = None
    """Why the post cannot be used."""


@dataclass(frozen=True, slots=True)
class PostSplit:
    """One split of all data sets, one entry per post. Texts are raw: cleaning belongs to tokenization."""

    texts: Sequence[str]
    """The post; for a post given as words, the words joined by blanks."""
    pairs: Sequence[str | tuple[str, ...] | None]
    """Second text (stance target, aspect), None where a post has none; of a context a tuple of
    texts, the nearest first."""
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
    """The image: the bytes of its file, or the file's path; None where a post has none."""
    soft_labels: Mapping[str, Sequence[np.ndarray | None]] = field(default_factory=dict)
    """Task with a column of soft labels -> (1, Y), float32, None where a post has none."""
    columns: Mapping[str, Sequence[str | None]] = field(default_factory=dict)
    """Further columns that the recipe asks for, as text (true, 3, a name); None where a post has no
    such cell."""
    members: Sequence[Sequence[Post]] = ()
    """As of ``Post``; empty where all posts are read alone."""

    def __len__(self) -> int:
        return len(self.texts)

    @classmethod
    def from_posts(
        cls,
        posts: Sequence[Post],
        *,
        tasks: Iterable[str] = (),
        confidences: Iterable[str] = (),
        soft_labels: Iterable[str] = (),
        columns: Iterable[str] = (),
        group: int = 0,
        group_names: tuple[str, ...] = ("posts",),
    ) -> PostSplit:
        """The posts of one data set, with None for what one of them lacks.

        Args:
            posts: without errors.
            tasks: that get a column of labels.
            confidences: tasks that get a column of confidences.
            soft_labels: tasks that get one of soft labels.
            columns: further columns.
            group: index of the data set.
            group_names: of all data sets.
        """
        return cls(
            texts=[post.text for post in posts],
            pairs=[post.pair for post in posts],
            words=[post.words for post in posts],
            labels={task: [post.labels.get(task) for post in posts] for task in tasks},
            confidences={
                task: [post.confidences.get(task) for post in posts] for task in confidences
            },
            soft_labels={
                task: [post.soft_labels.get(task) for post in posts] for task in soft_labels
            },
            groups=np.full(len(posts), group, dtype=np.int64),
            group_names=group_names,
            origins=[f"{post.file}:{post.line}" for post in posts],
            images=[post.image for post in posts],
            columns={name: [post.columns.get(name) for post in posts] for name in columns},
            members=[post.members for post in posts],
        )

    def take(self, rows: np.ndarray) -> PostSplit:
        """The posts of the given indices, in that order."""
        taken = _columnwise([self], lambda columns: [columns[0][row] for row in rows])
        return replace(taken, groups=self.groups[rows])

    @classmethod
    def join(cls, parts: Sequence[PostSplit]) -> PostSplit:
        """All posts of several splits with the same tasks and group names, in the given order."""
        joined = _columnwise(parts, lambda columns: list(chain.from_iterable(columns)))
        return replace(joined, groups=np.concatenate([part.groups for part in parts]))


def _columnwise(
    splits: Sequence[PostSplit], make: Callable[[list[Sequence[Any]]], list[Any]]
) -> PostSplit:
    """A split whose columns are made of those of some splits; ``groups`` is the caller's."""
    plain = ("texts", "pairs", "words", "origins", "images", "members")
    made = {name: make([getattr(split, name) for split in splits]) for name in plain}
    for name in ("labels", "confidences", "soft_labels", "columns"):
        keys = getattr(splits[0], name)
        made[name] = {key: make([getattr(split, name)[key] for split in splits]) for key in keys}
    return replace(splits[0], **made)


def bounds_of(posts: PostSplit) -> np.ndarray | None:
    """First text of each post among those of ``flattened``, int64, (N + 1,); None where each is read alone."""
    if not any(posts.members):
        return None
    return np.concatenate(([0], np.cumsum([len(members) or 1 for members in posts.members])))


def flattened(posts: PostSplit) -> PostSplit:
    """Every text that is read as a post of its own, without labels; the posts themselves where each is read alone."""
    if not any(posts.members):
        return posts
    alone = zip(posts.texts, posts.words, posts.pairs, posts.members, strict=True)
    rows = [members or (Post(*texts),) for *texts, members in alone]
    return PostSplit.from_posts(list(chain.from_iterable(rows)))


def shown_text(text: Any) -> Any:
    """A text as it is shown: of several posts (their texts, or themselves) all of them, a line each."""
    if not isinstance(text, (list, tuple)):
        return text
    return "\n".join(post.text if isinstance(post, Post) else str(post) for post in text)


def unlabelled_posts(
    texts: Sequence[str],
    *,
    tasks: Sequence[str],
    pairs: Sequence[str | None] | None = None,
    words: Sequence[Sequence[str] | None] | None = None,
    images: Sequence[bytes | str | None] | None = None,
) -> PostSplit:
    """Posts to predict: no labels, one data set. A text that is a tuple of posts is an author with these.

    Raises:
        ValueError: texts, pairs, words and images of different number.
    """
    count = len(texts)
    for what, column in (("pairs", pairs), ("words", words), ("images", images)):
        if column is not None and len(column) != count:
            raise ValueError(
                f"There are {count} texts and {len(column)} {what}; give one for each text, None where there is none."
            )
    none = [None] * count
    rows = zip(texts, words or none, pairs or none, images or none, strict=True)
    posts = [
        Post(
            shown_text(text), words=some, pair=pair, image=image, file="post", line=number,
            members=text if isinstance(text, tuple) else (),
        )
        for number, (text, some, pair, image) in enumerate(rows, start=1)
    ]  # fmt: skip
    return PostSplit.from_posts(posts, tasks=tasks)


def hidden(posts: PostSplit, what: str) -> PostSplit:
    """The posts as the model is to see them: ``data.hide`` takes all texts, or all images, away.

    Raises:
        ValueError: hidden texts of posts given as words, whose tags would
            have no words.
    """
    return HIDINGS[what](posts)


def _without_texts(posts: PostSplit) -> PostSplit:
    if any(words for words in posts.words):
        raise ValueError(
            "data.hide is text, but there are posts given as words, whose tags need them; set it to none."
        )
    return replace(posts, texts=[""] * len(posts), pairs=[None] * len(posts))


HIDINGS: dict[str, Callable[[PostSplit], PostSplit]] = {
    "none": lambda posts: posts,
    "text": _without_texts,
    "image": lambda posts: replace(posts, images=[None] * len(posts)),
}
"""``data.hide`` -> posts as the model sees them."""
