"""Posts of the same author: one label, one entry of a split, one side of every division."""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from comoe.config.recipe import TaskConfig
from comoe.data.posts import Post, PostSplit
from comoe.data.report import BadRow
from comoe.data.text.normalize import is_blank

NUM_POSTS = "num_posts"
"""Column of a prediction of an author: posts in the input."""

REMEMBERED = 100_000
"""Authors that are known again while an input is read."""

SHOWN = 3
"""Authors that a message names."""


def one_label_each(posts: Iterable[Post]) -> Iterator[Post]:
    """The posts; one whose label differs from an earlier one of its author has an error."""
    known: dict[tuple[str | None, str], tuple[Any, int]] = {}
    for post in posts:
        labels = {} if post.error else post.labels
        for task, label in labels.items():
            if label is None:
                continue
            first, line = known.setdefault((post.author, task), (label, post.line))
            if label != first:
                rule = (
                    f"task {task}: the label of this author differs from that in line {line}, and "
                    f"tasks.{task}.per is author, who has one; make them agree, or set it to post."
                )
                yield replace(post, error=BadRow(post.file, post.line, post.author, rule))
                break
        else:
            yield post


def by_author(posts: Sequence[Post]) -> list[Post]:
    """One entry for each author, in the order of their first posts.

    Its labels, confidences and columns are those of the first post that has them, its text is all
    texts, a line each.
    """
    members: dict[str | None, list[Post]] = {}
    for post in posts:
        members.setdefault(post.author, []).append(post)
    return [joined_posts(some) for some in members.values()]


def joined_posts(posts: Sequence[Post]) -> Post:
    """The entry of an author with these posts."""

    def first(name: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for post in posts:
            for key, value in getattr(post, name).items():
                if found.get(key) is None:
                    found[key] = value
        return found

    made = {name: first(name) for name in ("labels", "confidences", "columns")}
    text = "\n".join(post.text for post in posts)
    return replace(
        posts[0], text=text, words=None, pair=None, soft_labels={}, members=tuple(posts), **made
    )


def authors_in_order(posts: Iterable[Post], *, column: str, most: int) -> Iterator[Post]:
    """One entry for each run of posts of one author, as they come, in the memory of ``most`` posts.

    An author who comes back behind another is a further entry, of those posts alone; how many did
    is said at the end on stderr, as far as the last ``REMEMBERED`` authors tell. A row that cannot be read is an entry
    with its error; a post without text is left out, unless the author has no other.

    Args:
        posts: with their authors, raw.
        column: of the authors.
        most: posts of an author that are read, the first ones.
    """
    seen: dict[str, None] = {}
    back = 0
    author, some, count = None, [], 0
    for post in itertools.chain(posts, [None]):
        if post is not None and post.error:
            yield post
            continue
        if post is None or post.author != author:
            if author is not None:
                yield _entry(some, count, column)
                back += author in seen
                seen[author] = None
                if len(seen) > REMEMBERED:
                    del seen[next(iter(seen))]
            author, some, count = post and post.author, [], 0
        if post is not None:
            count += 1
            blank = not isinstance(post.text, str) or is_blank(post.text)
            if some and is_blank(some[0].text) and not blank:
                some.pop()
            if len(some) < most and not (blank and some):
                some.append(replace(post, text="") if blank else post)
    if back:
        print(
            f"{back:,} times an author of column {column} came back behind another, and is answered again, by the "
            "later posts alone; sort the input by author to have one answer each",
            file=sys.stderr,
        )


def _entry(posts: Sequence[Post], count: int, column: str) -> Post:
    first = posts[0]
    columns = {**first.columns, column: first.author, NUM_POSTS: count}
    return replace(
        first, text=[post.text for post in posts], words=None, pair=None, columns=columns
    )


def authors_held_out(authors: Sequence[str | None], *, fraction: float, seed: int) -> np.ndarray:
    """Posts of the authors that become a part for evaluation, bool, (N,).

    The side of an author depends on seed and name alone, so that data sets of the same authors
    divide them alike.

    Args:
        authors: of each post.
        fraction: share of the authors, rounded, at least one.
        seed: any int.

    Raises:
        ValueError: nothing would be held out, or nothing would be left.
    """
    names = {str(author) for author in authors}
    count = max(1, round(fraction * len(names)))
    if fraction == 0 or count >= len(names):
        raise ValueError(f"{len(names):,} authors cannot give up a share of {fraction:.4g}")
    order = sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    held = set(order[:count])
    return np.array([str(author) in held for author in authors], dtype=bool)


def authors_of_two_splits(splits: Mapping[str, PostSplit], task: TaskConfig) -> str:
    """What to say of authors that have posts in two splits; empty where there are none."""
    home: dict[str | None, str] = {}
    found: dict[str, str] = {}
    for split, posts in splits.items():
        for author in dict.fromkeys(posts.columns[task.author]):
            if author is not None and home.setdefault(author, split) != split:
                found[author] = f"{author} ({home[author]} and {split})"
    if not found:
        return ""
    shown = ", ".join(list(found.values())[:SHOWN]) + (", ..." if len(found) > SHOWN else "")
    return f"{len(found):,} authors have posts in two splits: {shown}"
