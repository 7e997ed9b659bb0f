"""Posts of evaluation that a data set gives up from its training posts where it has none: stratified, by a seed."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from comoe.config.recipe import Recipe
from comoe.data.authors import authors_held_out
from comoe.data.datasets import Group
from comoe.data.posts import PostSplit
from comoe.data.report import DataReport
from comoe.tasks.task import kind_of


def hold_out(
    posts: PostSplit, *, fraction: float, strata: np.ndarray, seed: int
) -> tuple[np.ndarray, bool]:
    """Which posts become a part for evaluation; equal texts stay on one side.

    Args:
        posts: training posts.
        fraction: share of the different texts to hold out, rounded, at least one text.
        strata: a number per post, int, shape (N,); each is held out by its share where there are
            enough posts.
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
        raise ValueError(
            f"{len(first_row):,} different posts cannot give up a share of {fraction:.4g}"
        )
    strata = strata[np.unique(text_ids, return_index=True)[1]]
    names, sizes = np.unique(strata, return_counts=True)
    # The split needs two posts per stratum: rare ones go with the largest.
    strata = np.where(np.isin(strata, names[sizes < 2]), names[sizes.argmax()], strata)
    kept = 1 < len(np.unique(strata)) <= min(count, len(strata) - count)
    # Loaded where it is needed: it takes half a second of every start.
    from sklearn.model_selection import train_test_split

    everything = np.arange(len(strata))
    _, held = train_test_split(
        everything, test_size=count, stratify=strata if kept else None, random_state=seed
    )
    return np.isin(text_ids, held), kept


def hold_out_by_text(texts: Sequence[str], *, fraction: float, seed: int) -> np.ndarray:
    """Which posts become a part for evaluation by seed and text alone, whatever other posts there are.

    Args:
        texts: of each post.
        fraction: expected share of the different texts to hold out.
        seed: any non-negative int.

    Returns:
        A mask of the held-out posts, bool, shape (N,).

    Raises:
        ValueError: nothing would be held out, or nothing would be left.
    """
    draws = (hashlib.sha256(f"{seed}/{text}".encode()).digest()[:8] for text in texts)
    held = np.array([int.from_bytes(draw) < fraction * 2**64 for draw in draws], dtype=bool)
    if held.all() or not held.any():
        raise ValueError(f"{len(held):,} posts cannot give up a share of {fraction:.4g} by text")
    return held


def seed_of(seed: int, name: str) -> int:
    """A seed of its own for each name, so that adding a data set leaves the draws of the others alone."""
    return (seed + zlib.crc32(name.encode())) % 2**32


def split_seed(recipe: Recipe) -> tuple[str, int]:
    """What chooses the posts of evaluation: the option that says so, and its value."""
    if recipe.data.split_seed == "train":
        return "train.seed", recipe.train.seed
    return "data.split_seed", recipe.data.split_seed


def with_held_out(
    group: Group, splits: dict[str, PostSplit], *, recipe: Recipe, report: DataReport
) -> dict[str, PostSplit]:
    """The splits of a data set, with parts of its training posts for test and validation where it has none.

    Both fractions are of all posts that can be held out, so the validation part is as large with
    and without a test part.

    Args:
        group: the data set.
        splits: of its files.
        recipe: its ``data``.
        report: gets a note for each part.

    Raises:
        ValueError: too few posts.
    """
    wanted, left = {}, 1.0
    if "test" not in splits and group.scored and recipe.data.test_fraction:
        wanted["test"] = recipe.data.test_fraction
    if "validation" not in splits and group.scored:
        wanted["validation"] = recipe.data.validation_fraction
    for split, fraction in wanted.items():
        try:
            parts = _parted(group, splits["train"], split, fraction / left, recipe, report)
        except ValueError as error:
            raise ValueError(
                f"{group.source.key}.path: {group.raw['train'].file} has no {split} split beside it, and its {error} "
                f"for {split}. Add a {split} file, or posts, or change data.{split}_fraction."
            ) from error
        splits, left = splits | parts, left - fraction
    return splits


def _parted(
    group: Group,
    train: PostSplit,
    split: str,
    fraction: float,
    recipe: Recipe,
    report: DataReport,
) -> dict[str, PostSplit]:
    """``train`` and ``split``."""
    option, seed = split_seed(recipe)
    # The seed of the validation part is the one that it had before there were others.
    seed_name = group.name if split == "validation" else f"{group.name}/{split} part"
    how = "at random"
    author = next(iter(group.tasks.values())).author
    if author is not None:
        how, authors = f"whole authors ({author})", train.columns[author]
        # One seed for all parts and data sets: an author is on the same side in each.
        held = authors_held_out(authors, fraction=fraction, seed=seed)
    elif recipe.data.stratify == NOTHING:
        how = "by their texts"
        held = hold_out_by_text(train.texts, fraction=fraction, seed=seed_of(seed, seed_name))
    for by, strata in _strata(group, train, recipe.data.stratify) if how == "at random" else ():
        held, kept = hold_out(
            train, fraction=fraction, strata=strata, seed=seed_of(seed, seed_name)
        )
        if kept:
            how = f"stratified by {by}"
            break
    report.notes.append(
        f"data set {group.name}: no {split} split; {held.sum():,} of {len(train):,} training posts "
        f"held out, {how}, by {option} {seed}"
    )
    return {
        "train": train.take(np.flatnonzero(~held)),
        split: train.take(np.flatnonzero(held)),
    }


def _strata(group: Group, posts: PostSplit, stratify: str) -> Iterator[tuple[str, np.ndarray]]:
    """What posts are stratified by, and a number per post: the finest first, down to the labels of the first task.

    Combinations that one post alone has are one stratum with others of its label of the first task.
    """
    tasks = [
        name
        for name, task in group.tasks.items()
        if group.labels[name] and kind_of(task.kind).mode != "tokens"
    ]
    if not tasks:
        yield "", np.zeros(len(posts), dtype=np.int64)
        return
    columns = [
        np.unique([str(value) for value in posts.labels[name]], return_inverse=True)[1]
        for name in tasks
    ]
    if stratify == EVERY and len(tasks) > 1:
        _, places, counts = np.unique(
            np.stack(columns, axis=1), axis=0, return_inverse=True, return_counts=True
        )
        places = places.reshape(-1)
        rare = counts[places] < 2
        yield (
            f"the labels of {', '.join(tasks)}",
            np.where(rare, len(counts) + columns[0], places),
        )
    yield "label", columns[0]


EVERY = "all"
"""``data.stratify``: the labels of all tasks on the posts."""

NOTHING = "none"
"""``data.stratify``: seed and text decide."""
