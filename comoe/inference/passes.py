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
