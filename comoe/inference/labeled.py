"""Labeled posts for a model to be scored on, read as training read its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from comoe.config.recipe import TaskConfig
from comoe.data.authors import by_author, one_label_each
from comoe.data.columns import check_slices
from comoe.data.images.check import ImageReader
from comoe.data.posts import PostSplit
from comoe.data.reading.files import RawSplit
from comoe.data.reading.inputs import (
    DataChoice,
    check_columns,
    choose_author,
    choose_column,
    choose_labels,
    choose_pair,
    choose_text,
)
from comoe.data.reading.rows import RowReader, read_rows, settle
from comoe.data.reading.sources import read_input
from comoe.data.report import DataReport
from comoe.inference.predictor import Predictor
from comoe.tasks.labels import split_words
from comoe.tasks.prompts import wants_pair
from comoe.tasks.slices import slice_columns, slice_of
from comoe.tasks.task import Task


def read_labeled(
    choice: DataChoice,
    tasks: Sequence[Task],
    *,
    predictor: Predictor,
    report: DataReport,
    needed: Sequence[str] = (),
) -> tuple[PostSplit, dict[str, int]]:
    """The posts, and per task how many labels do not fit their words.

    Slices of a column that is not there are left out, but for the ``needed`` ones.

    Raises:
        ValueError: as of ``comoe.score``.
    """
    known = predictor.exported.config.get("columns", {})
    texts = {known.get(task.name, {}).get("text") for task in tasks}
    kinds = {
        column: task.rules
        for task in tasks
        for column in (choice.label or known.get(task.name, {}).get("label"), "label", task.name)
        if column
    }
    raw = read_input(
        "--data",
        choice.path,
        format=choice.format,
        split=choice.split,
        text=choice.text or (texts.pop() if len(texts) == 1 else None),
        kinds=kinds,
    )
    configs = _columns(choice, tasks, raw=raw, predictor=predictor)
    for entry in needed:
        check_columns(raw, {"--by": slice_of(entry).column})
        check_slices("--by", entry, raw)
    slices = slice_columns([entry for task in tasks for entry in task.slices])
    slices = [column for column in slices if column in raw.columns]
    reader = RowReader(
        configs,
        {task.name: task.labels for task in tasks},
        max_characters=10**6,
        columns=slices,
        strict=not choice.skip_bad,
    )
    first = next(iter(configs.values()))
    per_author = first.per == "author"
    read = (one_label_each if per_author else iter)(read_rows(raw, reader.read))
    handled = {"skip": choice.skip_bad, "option": "--skip-bad", "report": report}
    posts = settle(read, file=raw.file, **handled)
    posts = (by_author if per_author else list)(posts)[: choice.limit]
    if first.image is not None:
        config = replace(predictor.exported.data_config, on_bad_image="text")
        posts = ImageReader(config, report, advice={}).read(posts, column=first.image)
    if any(task.name in predictor.as_words for task in tasks):
        # Plain texts are cut into words, as the posts were in training.
        posts = [replace(post, words=post.words or split_words(post.text)) for post in posts]
    names = [task.name for task in predictor.exported.tasks]
    return PostSplit.from_posts(posts, tasks=names, columns=slices), dict(reader.unfit)


def _columns(
    choice: DataChoice, tasks: Sequence[Task], *, raw: RawSplit, predictor: Predictor
) -> dict[str, TaskConfig]:
    """Task -> where its posts and labels stand: the columns that were given, else those of training."""
    config = predictor.exported.config
    image = choose_column(predictor.image_column, asked=choice.image, columns=raw.columns)
    labels = choose_labels(config, tasks, asked=choice.label, columns=raw.columns)
    pair = choose_pair(config, tasks, asked=choice.pair, columns=raw.columns)
    text = choose_text(config, tasks, asked=choice.text, columns=raw.columns)
    author = choose_author(config, tasks, asked=choice.author, columns=raw.columns)
    wanted = {"--text-column": text, "--pair-column": pair, "--image-column": image}
    check_columns(raw, wanted)
    for name, label in labels.items():
        if choice.label is None and len(tasks) > 1 and raw.rows and label not in raw.columns:
            raise ValueError(
                f"{raw.file} has no column {label} with the labels of task {name} (columns: {', '.join(raw.columns)}); "
                "name the tasks to score with --task, and the column of a single one with --label-column."
            )
        check_columns(raw, {"--label-column": label})
    with_pair = [task.name for task in tasks if wants_pair(task.prompt)]
    if with_pair and pair is None:
        raise ValueError(
            f"The prompt of {', '.join(with_pair)} has {{pair}}; name its column with --pair-column."
        )
    shared = TaskConfig(
        text=text, pair=pair, image=image, author=author, per="author" if author else "post"
    )
    near = {task.reads for task in tasks} & {"context", "neighbors"}
    if near and pair is not None:
        read_as = "neighbors" if "neighbors" in near else "segment"
        shared = replace(shared, pair=None, context=pair, context_as=read_as)
    return {
        task.name: replace(shared, kind=task.kind, label=labels[task.name], prompt=task.prompt)
        for task in tasks
    }
