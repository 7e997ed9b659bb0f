"""Parts of a split: a held-out validation part, a limited number of posts, posts that two splits share."""

from __future__ import annotations

import zlib

import numpy as np
from sklearn.model_selection import train_test_split

from comoe.data.posts import PostSplit


def hold_out(posts: PostSplit, *, fraction: float, strata: np.ndarray, seed: int) -> tuple[np.ndarray, bool]:
    """Which posts become the validation part; equal texts stay on one side.

    Args:
        posts: training posts.
        fraction: share of the different texts to hold out, rounded, at least one text.
        strata: a number per post, int, shape (N,); each is held out by its share where there are enough posts.
        seed: any non-negative int.

    Returns:
        A mask of the held-out posts, bool, shape (N,), and whether strata were kept.

    Raises:
        ValueError: nothing would be held out, or nothing would be left.
    """
    first_row: dict[str, int] = {}
    text_ids = np.array([first_row.setdefault(text, len(first_row)) for text in posts.texts])
    count = max(1, round(fraction * len(first_row)))
    if fraction == 0 or count >= len(first_row):
        raise ValueError(f"{len(first_row):,} different posts cannot give up a share of {fraction} for validation")
    strata = strata[np.unique(text_ids, return_index=True)[1]]
    names, sizes = np.unique(strata, return_counts=True)
    # The split needs two posts per stratum: rare ones go with the largest.
    strata = np.where(np.isin(strata, names[sizes < 2]), names[sizes.argmax()], strata)
    kept = 1 < len(np.unique(strata)) <= min(count, len(strata) - count)
    everything = np.arange(len(strata))
    _, held = train_test_split(everything, test_size=count, stratify=strata if kept else None, random_state=seed)
    return np.isin(text_ids, held), kept


def limited(posts: PostSplit, *, count: int | None, seed: int) -> PostSplit:
    """At most ``count`` posts in their order, drawn by the seed; fewer are always a part of more."""
    if count is None or count >= len(posts):
        return posts
    return posts.take(np.sort(np.random.default_rng(seed).permutation(len(posts))[:count]))


def shared_posts(posts: PostSplit, *, known: PostSplit) -> int:
    """How many posts are in ``known`` too, by text, second text and picture; case and white space count as equal."""

    def keys(split: PostSplit) -> list[tuple[str, str | None, bytes | str | None]]:
        columns = zip(split.texts, split.pairs, split.images, strict=True)
        return [(" ".join(text.casefold().split()), pair, image) for text, pair, image in columns]

    there = set(keys(known))
    return sum(key in there for key in keys(posts))


def seed_of(seed: int, name: str) -> int:
    """A seed of its own for each name, so that adding a data set leaves the draws of the others alone."""
    return (seed + zlib.crc32(name.encode())) % 2**32
