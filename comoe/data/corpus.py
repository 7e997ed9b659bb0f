"""The posts of a recipe: every data set read, checked, parsed, split, limited and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from comoe.config.recipe import Recipe, TaskConfig
from comoe.data.authors import authors_of_two_splits, by_author, one_label_each
from comoe.data.columns import check_extra_columns, extra_columns, part_off
from comoe.data.datasets import Group, cuts_all_posts, groups_of, read_group
from comoe.data.held_out import seed_of, split_seed, with_held_out
from comoe.data.images.check import ImageReader
from comoe.data.labels import resolved_task
from comoe.data.posts import PART_NAMES, PostSplit
from comoe.data.reading.rows import RowReader, read_rows, settle
from comoe.data.reading.sources import unread_files
from comoe.data.report import DataReport
from comoe.data.text.normalize import same_text
from comoe.tasks.labels import split_words
from comoe.tasks.task import Task, kind_of


def limited(posts: PostSplit, *, count: int | None, seed: int) -> PostSplit:
    """At most ``count`` posts in their order, drawn by the seed; fewer are a part of more."""
    if count is None or count >= len(posts):
        return posts
    return posts.take(np.sort(np.random.default_rng(seed).permutation(len(posts))[:count]))


def limited_labels(posts: PostSplit, *, tasks: Mapping[str, TaskConfig], seed: int) -> PostSplit:
    """The labels, gold or soft, that ``limit`` and ``limit_per_label`` keep; posts without any are dropped.

    The posts are drawn as by ``limited``: one limit for all tasks, where all label every post, is
    that many posts.

    Args:
        posts: training posts of one data set.
        tasks: all of its tasks.
        seed: any non-negative int.
    """
    if not any(task.limit or task.limit_per_label for task in tasks.values()):
        return posts
    order = np.random.default_rng(seed).permutation(len(posts))
    made = {name: dict(getattr(posts, name)) for name in ("labels", "soft_labels", "confidences")}
    useful = np.zeros(len(posts), dtype=bool)
    for task, config in tasks.items():
        columns = [made[name][task] for name in ("labels", "soft_labels") if task in made[name]]
        labelled = [row for row in order if any(column[row] is not None for column in columns)]
        if config.limit_per_label:
            labelled = _first_of_labels(labelled, posts.labels[task], config)
        kept = np.isin(np.arange(len(posts)), labelled[: config.limit])
        useful |= kept
        for of_tasks in made.values():
            if task in of_tasks:
                cells = zip(of_tasks[task], kept, strict=True)
                of_tasks[task] = [value if keep else None for value, keep in cells]
    return replace(posts, **made).take(np.flatnonzero(useful))


def _first_of_labels(rows: Sequence[int], values: Sequence[Any], config: TaskConfig) -> list[int]:
    """The rows, in their order, that bring a label which has fewer than ``limit_per_label`` posts so far."""
    kept: list[int] = []
    counts: Counter[int | None] = Counter()
    for row in rows:
        if values[row] is None:
            continue
        # Of multi_label the empty set is a label of its own.
        labels = kind_of(config.kind).label_ids(values[row]) or (None,)
        if any(counts[label] < config.limit_per_label for label in labels):
            kept.append(row)
            counts.update(labels)
    return kept


def shared_posts(posts: PostSplit, *, known: PostSplit) -> int:
    """How many posts are in ``known`` too, by text, second text or context, and image; case and white space count as
    equal."""

    def keys(split: PostSplit) -> list[tuple]:
        members = split.members or [()] * len(split)
        columns = zip(split.texts, split.pairs, split.images, members, strict=True)
        return [
            (same_text(text), pair, image, tuple(post.text for post in some))
            for text, pair, image, some in columns
        ]

    there = set(keys(known))
    return sum(key in there for key in keys(posts))


@dataclass(frozen=True, slots=True)
class Corpus:
    """All posts of a recipe."""

    tasks: tuple[Task, ...]
    """Tasks in the order of the recipe."""
    splits: dict[str, PostSplit]
    """train, validation, test where a data set has one, and unseen where posts are held out."""
    report: DataReport
    """What was found."""


_Splits = dict[str, PostSplit]


def load_corpus(
    recipe: Recipe,
    *,
    report: DataReport | None = None,
    with_images: bool = False,
    cache_dir: Path | None = None,
    progress: bool = False,
) -> Corpus:
    """Read every data set of a recipe; with images, every rank must call it.

    Tasks with equal path, format, subset, splits, text and image columns share their posts. A
    data set without a validation split gives up a part of its training posts, stratified by label,
    and one without a test split too, where ``data.test_fraction`` asks for it.
    Training posts without any label are left out, unless teachers give them soft ones. The same
    recipe gives the same corpus on every machine.

    Args:
        recipe: the recipe, with local paths (``comoe.starter.registry.resolve``).
        report: is filled and returned within the corpus; a new one by default.
        with_images: check all images and keep their sources; else no post has an image.
        cache_dir: folder of the results of image checks; None keeps none.
        progress: show a bar while images are checked.

    Raises:
        ValueError: a data set, file, column or label that is missing or wrong; a bad row under
            ``data.on_error: stop``.
    """
    report = DataReport() if report is None else report
    groups = groups_of(recipe)
    names = tuple(group.name for group in groups)
    parts: dict[str, list[PostSplit]] = {split: [] for split in PART_NAMES}
    reader = None
    if with_images:
        reader = ImageReader(recipe.data, report, cache_dir=cache_dir, progress=progress)
    for group in groups:
        read_group(group, with_images=with_images)
    check_extra_columns(groups, recipe)
    for number, group in enumerate(groups):
        splits = _parse(group, number, recipe=recipe, names=names, report=report, reader=reader)
        splits = part_off(group, splits, report)
        if group.tasks.keys() <= recipe.tasks.keys():
            kept = bool(recipe.distill.teachers)
            splits = splits if kept else _with_labels_only(group, splits, report)
        splits = with_held_out(group, splits, recipe=recipe, report=report)
        splits = _limited(group, splits, recipe=recipe, report=report)
        splits = {split: splits[split] for split in PART_NAMES if split in splits}
        _count_posts(group, splits, report, with_images=with_images)
        for split, posts in splits.items():
            parts[split].append(posts)
    joined = {split: PostSplit.join(found) for split, found in parts.items() if found}
    if recipe.distill.teachers:
        _warn_of_soft_labels(joined, report)
    labels = {task: found for group in groups for task, found in group.labels.items()}
    tasks = tuple(
        resolved_task(name, recipe.tasks[name], labels=labels[name], splits=joined, report=report)
        for name in recipe.tasks
    )
    return Corpus(tasks=tasks, splits=joined, report=report)


def _parse(
    group: Group,
    number: int,
    *,
    recipe: Recipe,
    names: tuple[str, ...],
    report: DataReport,
    reader: ImageReader | None,
) -> _Splits:
    """Rows to posts with parsed labels; bad rows stop the run or are set aside."""
    rows = RowReader(
        group.tasks,
        group.labels,
        max_characters=recipe.data.max_characters,
        columns=extra_columns(recipe),
        strict=recipe.data.on_error == "stop",
    )
    first = next(iter(group.tasks.values()))
    column, per_author = first.image, first.per == "author"
    if first.format == "auto":
        report.warnings += unread_files(group.source)
    splits = {}
    for split, raw in group.raw.items():
        report.warnings += [raw.joined] if raw.joined else []
        report.notes += raw.notes
        read = read_rows(raw, rows.read)
        posts = settle(
            one_label_each(read) if per_author else read,
            file=raw.file,
            skip=recipe.data.on_error == "skip",
            option="data.on_error=skip",
            report=report,
        )
        if reader is not None and column is not None:
            posts = reader.read(posts, column=column, folder=raw.image_folder)
        else:
            posts = [replace(post, image=None) for post in posts]
        if cuts_all_posts(recipe):
            posts = [replace(post, words=post.words or split_words(post.text)) for post in posts]
        splits[split] = PostSplit.from_posts(
            by_author(posts) if per_author else posts,
            tasks=recipe.tasks,
            confidences=[
                name for name, task in recipe.tasks.items() if task.confidence is not None
            ],
            soft_labels=[
                name for name, task in recipe.tasks.items() if task.soft_label is not None
            ],
            columns=extra_columns(recipe),
            group=number,
            group_names=names,
        )
    report.warnings += [
        f"task {task}: {count:,} posts of {group.name} have no such label, because it does not fit their words"
        for task, count in rows.unfit.items()
    ]
    if first.author is not None:
        _check_authors(group, first, splits, report)
    return splits


def _check_authors(group: Group, task: TaskConfig, splits: _Splits, report: DataReport) -> None:
    """Count the posts of authors; refuse authors in two splits whose label one of them would tell."""
    shared = authors_of_two_splits(splits, task)
    if shared and task.per == "author":
        raise ValueError(
            f"{group.source.key}.author: {shared}; the label of an author in training would be "
            "known in the evaluation. Keep the posts of an author in one file."
        )
    report.warnings += [f"data set {group.name}: {shared}"] if shared else []
    for split, posts in splits.items() if task.per == "author" else ():
        count = sum(map(len, posts.members))
        report.notes.append(
            f"data set {group.name}: {len(posts):,} {split} authors with {count:,} posts; authors are counted"
        )


def _with_labels_only(group: Group, splits: _Splits, report: DataReport) -> _Splits:
    """Training posts that no task has a label for are left out."""
    train = splits["train"]
    columns = [
        column[task]
        for column in (train.labels, train.soft_labels)
        for task in group.tasks
        if task in column
    ]
    useful = np.flatnonzero(
        [any(value is not None for value in values) for values in zip(*columns, strict=True)]
    )
    if not len(useful):
        file = group.raw["train"].file
        wanted = ", ".join(f"tasks.{name}.label={task.label}" for name, task in group.tasks.items())
        raise ValueError(
            f"No post in {file} has a label of any task; check the columns ({wanted})."
        )
    if left := len(train) - len(useful):
        report.notes.append(
            f"data set {group.name}: {left:,} training posts without any label left out"
        )
    return splits | {"train": train.take(useful)}


def _limited(group: Group, splits: _Splits, *, recipe: Recipe, report: DataReport) -> _Splits:
    """At most the wanted number of posts in each split, and of training labels of each task."""
    kept = {}
    for split, posts in splits.items():
        train = split == "train"
        count = recipe.data.limit_per_task if train else recipe.data.limit_eval
        seed = recipe.train.seed if train else split_seed(recipe)[1]
        seed = seed_of(seed, f"{group.name}/{split}")
        kept[split] = limited(posts, count=count, seed=seed)
    seed = seed_of(recipe.train.seed, f"{group.name}/train")
    train = limited_labels(kept["train"], tasks=group.tasks, seed=seed)
    if left := len(kept["train"]) - len(train):
        limits = ("limit", "limit_per_label")
        tasks = group.tasks.items()
        named = ", ".join(
            f"tasks.{name}.{key}" for name, task in tasks for key in limits if getattr(task, key)
        )
        report.notes.append(f"data set {group.name}: {left:,} training posts left out by {named}")
    return kept | {"train": train}


def _count_posts(group: Group, splits: _Splits, report: DataReport, *, with_images: bool) -> None:
    """Note posts and images of each split; warn of evaluation posts that are training posts too."""
    report.posts[group.name] = {split: len(posts) for split, posts in splits.items()}
    if with_images:
        report.images[group.name] = {
            split: sum(image is not None for image in posts.images)
            for split, posts in splits.items()
        }
    for split in PART_NAMES[1:]:
        repeated = shared_posts(splits[split], known=splits["train"]) if split in splits else 0
        if repeated:
            report.warnings.append(
                f"data set {group.name}: {repeated:,} of {len(splits[split]):,} {split} posts have "
                "the text of a training post; their scores are too high"
            )


def _warn_of_soft_labels(splits: _Splits, report: DataReport) -> None:
    """Evaluation posts among the training posts of another data set: teachers label these for every task."""
    train = splits["train"]
    for split in PART_NAMES[1:]:
        for group in np.unique(splits[split].groups) if split in splits else ():
            posts = splits[split].take(np.flatnonzero(splits[split].groups == group))
            others = train.take(np.flatnonzero(train.groups != group))
            if repeated := shared_posts(posts, known=others):
                report.warnings.append(
                    f"data set {train.group_names[group]}: {repeated:,} of {len(posts):,} {split} posts have the text "
                    "of a training post of another data set, which the teachers label for every task"
                )
