"""How posts are divided into passes of a model: by how tasks read them, by number, and by tokens."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import Any

import numpy as np

from comoe.data.sampling.sampler import eval_batches
from comoe.inference.columns import Posts
from comoe.tasks.labels import split_words
from comoe.tasks.task import Task

WINDOW = 1024
"""Posts of an input without end that are read and predicted together; they are sorted by length within it."""


READING = {
    "post": "single posts",
    "author": "all posts of an author",
    "context": "a post with its context behind it",
    "neighbors": "a post with its neighbors",
}
"""``Task.reads`` in words."""


NOT_TOGETHER = (
    ("author", "post"),
    ("author", "context"),
    ("author", "neighbors"),
    ("context", "neighbors"),
)
"""What no one pass can read."""


def refuse_mixed(tasks: list[Task]) -> list[Task]:
    """The tasks; ValueError for some that read the same input in ways that exclude one another."""
    found = {task.reads: task.name for task in tasks}
    for one, other in NOT_TOGETHER:
        if one in found and other in found:
            raise ValueError(
                f"task {found[one]} reads {READING[one]}, and task {found[other]} "
                f"{READING[other]}; ask for one of them at a time."
            )
    return tasks


def check_windows(tasks: Sequence[Task], *, explained: bool) -> None:
    """ValueError for what ``--long windows`` cannot do."""
    if explained:
        raise ValueError("a post in windows cannot be explained; leave --explain or --long out.")
    if any(task.reads != "post" for task in tasks):
        raise ValueError(
            "--long windows divides posts that are read alone; leave it out, or ask for other tasks."
        )


def task_passes(
    posts: Posts, tasks: Sequence[Task], *, as_words: Container[str]
) -> list[tuple[Sequence[Any], Sequence[Task]]]:
    """(words per post, tasks) of each pass over the posts.

    A tokenizer may cut a post given as words differently, so each head reads plain text whole or
    cut, as in training; only where both kinds of heads read plain text are there two
    passes.
    """
    cut = [task for task in tasks if task.name in as_words]
    whole = [task for task in tasks if task.name not in as_words]
    if not cut:
        return [(posts.words, whole)]
    made = list(posts.words)
    plain = [number for number in posts.usable if posts.words[number] is None]
    for number in plain:
        made[number] = split_words(posts.texts[number])
    if whole and plain:
        return [(posts.words, whole), (made, cut)]
    return [(made, tasks)]


def forward_passes(
    lengths: np.ndarray, batch_size: int, batch_tokens: int | None, *, rows: int
) -> Iterator[np.ndarray]:
    """Posts of each forward pass, longest first, of ``rows`` rows each; padding counts as tokens."""
    for indices in eval_batches(lengths, batch_size=batch_size):
        # Rows are padded to the longest, which comes first.
        while batch_tokens and len(indices) > 1:
            fitting = max(1, batch_tokens // (rows * int(lengths[indices[0]])))
            if fitting >= len(indices):
                break
            yield indices[:fitting]
            indices = indices[fitting:]
        yield indices
