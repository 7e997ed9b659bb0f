"""Scores an export on a labelled data set, in one process: what ``launch/eval.py`` calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from comoe.config.errors import nearest, unknown_name
from comoe.config.recipe import TaskConfig
from comoe.data.images.check import ImageReader
from comoe.data.posts import PostSplit
from comoe.data.reading.files import RawSplit
from comoe.data.reading.inputs import choose_column, choose_labels, choose_pair
from comoe.data.reading.rows import BadCell, RowReader
from comoe.data.reading.rows import Post as LabelledPost
from comoe.data.reading.sources import NAMES, open_source, read_split
from comoe.data.report import BadRow, DataReport
from comoe.data.sampling.sampler import eval_batches
from comoe.data.tokens.split import TokenizedSplit, tokenize_split
from comoe.evaluation.calibration import ece_of
from comoe.evaluation.evaluate import Evaluation, evaluate
from comoe.inference.predictor import Predictor
from comoe.tasks.labels import split_words
from comoe.tasks.prompts import wants_pair
from comoe.tasks.task import Task


@dataclass(frozen=True, slots=True)
class DataChoice:
    """Which posts to score on."""

    path: str
    """File, folder or hub name."""
    format: str = "auto"
    """Key of ``comoe.data.reading.sources.READERS``."""
    split: str = "test"
    """Split of a folder or hub data set; a file is read whole."""
    text: str = "text"
    """Column with the post."""
    pair: str | None = None
    """Column with the second text; None is the one of the training posts, where the data set has
    it."""
    label: str | None = None
    """Column with the label; None is the one of the training posts, where the data set has it and
    no two tasks share it, else ``label`` for one task, and the name of each task for several."""
    skip_bad: bool = False
    """Leave bad rows out, and count them, instead of stopping at the first."""
    image: str | None = None
    """Column with the picture; None is the one of the training posts, or ``image``, if the model
    reads pictures."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What the data set says about the model."""

    evaluation: Evaluation
    """Metrics and confusion matrices."""
    tasks: tuple[Task, ...]
    """The scored tasks."""
    posts: int
    """Posts read."""
    bad: tuple[BadRow, ...]
    """Rows left out."""
    without_picture: tuple[BadRow, ...] = ()
    """Rows scored by their text alone, because their picture is bad."""
    unfit: Mapping[str, int] = field(default_factory=dict)
    """Task -> posts without its label, because it does not fit their words (``skip_bad``)."""


def score_data(
    predictor: Predictor,
    choice: DataChoice,
    *,
    tasks: Sequence[str] | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> Scores:
    """Score the model on labelled posts, by the path of training: same reader, tokenizer, collator and metrics.

    Args:
        predictor: the model.
        choice: the posts.
        tasks: names of the tasks to score; None is all of the model's.
        batch_size: posts per forward pass.
        progress: show a progress bar.

    Raises:
        ValueError: no such task, file or column; a row that cannot be read, with file and line; no
            labelled post.
    """
    known = {task.name: task for task in predictor.tasks}
    for name in tasks or ():
        if name not in known:
            raise unknown_name("task of this model", name, known)
    chosen = tuple(known.values()) if tasks is None else tuple(known[name] for name in tasks)
    report = DataReport()
    posts, unfit = _read(choice, chosen, predictor=predictor, report=report)
    exported = predictor.exported
    split = tokenize_split(
        posts, exported.tokenizer, tasks=exported.tasks, config=exported.data_config
    )
    with tqdm(total=len(split), unit="post", disable=not progress, dynamic_ncols=True) as bar:
        evaluation = score_split(predictor, split, batch_size=batch_size, progress=bar.update)
    for name, error in ece_of(evaluation.answers, chosen).items():
        evaluation.metrics[name]["ece"] = error
    if not evaluation.metrics:
        raise ValueError(
            f"{choice.path}: no post has a label of {', '.join(task.name for task in chosen)}."
        )
    return Scores(
        evaluation,
        chosen,
        len(split),
        tuple(report.set_aside),
        tuple(report.without_picture),
        unfit,
    )


def score_split(
    predictor: Predictor,
    split: TokenizedSplit,
    *,
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Score the model, as it is now, on tokenised posts.

    Args:
        predictor: the model.
        split: posts with labels.
        batch_size: posts per forward pass.
        progress: called after each batch with its number of posts.
    """
    return evaluate(
        predictor.exported.model,
        split,
        collator=predictor.collator,
        tasks=predictor.exported.tasks,
        batches=eval_batches(split.lengths, batch_size=batch_size),
        gather=lambda answers: [answers],
        device=predictor.device,
        progress=progress,
        columns=split.posts.columns,
        predictions=False,
        spell=predictor.collator.spell,
    )


def format_scores(scores: Scores) -> str:
    """The scores as lines of text: per task its main metric beside the majority baseline, then every other number."""
    lines = [
        f"{scores.posts} posts" + (f", {len(scores.bad)} bad rows left out" if scores.bad else "")
    ]
    if scores.without_picture:
        lines.append(
            f"{len(scores.without_picture)} posts scored without their bad picture; the first:"
        )
        lines.append(f"  {scores.without_picture[0]}")
    lines += [
        f"{task}: {n} labels left out that do not fit their posts' words"
        for task, n in scores.unfit.items()
    ]
    for task in scores.tasks:
        values = scores.evaluation.metrics.get(task.name)
        if values is None:
            lines.append(f"{task.name}: no labels")
            continue
        main = f"{task.metric} {values[task.metric]:.4f}, majority {values[f'majority/{task.metric}']:.4f}"
        rest = [
            f"{name} {value:.4f}"
            for name, value in values.items()
            if not name.endswith(task.metric)
        ]
        lines += [
            f"{task.name}: {main}",
            *(f"  {'  '.join(rest[i : i + 4])}" for i in range(0, len(rest), 4)),
        ]
    return "\n".join(lines)


def _read(
    choice: DataChoice, tasks: Sequence[Task], *, predictor: Predictor, report: DataReport
) -> tuple[PostSplit, dict[str, int]]:
    """The posts, and per task how many labels do not fit their words."""
    source = open_source(
        "--data", root=None, path=choice.path, format=choice.format, subset=None, splits={}
    )
    if choice.split not in NAMES:
        raise unknown_name("--split", choice.split, NAMES)
    # A path that is a file is its data set's training split to the reader.
    raw = read_split(source, "train" if Path(source.path).is_file() else choice.split)
    if raw is None:
        raise ValueError(
            f"{choice.path}: it has no {choice.split} split; choose another --split or give a file."
        )
    image = choose_column(predictor.image_column, asked=choice.image, columns=raw.columns)
    config = predictor.exported.config
    columns = choose_labels(config, tasks, asked=choice.label, columns=raw.columns)
    pair = choose_pair(config, tasks, asked=choice.pair, columns=raw.columns)
    wanted = {
        "--text-column": [choice.text],
        "--pair-column": [pair],
        "--label-column": [*columns.values()],
    }
    _check_columns(raw, wanted | {"--image-column": [image]})
    asking = [task.name for task in tasks if wants_pair(task.prompt)]
    if asking and pair is None:
        raise ValueError(
            f"The prompt of {', '.join(asking)} has {{pair}}; name its column with --pair-column."
        )
    shared = TaskConfig(text=choice.text, pair=pair, image=image)
    configs = {
        task.name: replace(shared, kind=task.kind, label=columns[task.name], prompt=task.prompt)
        for task in tasks
    }
    slices = tuple(
        dict.fromkeys(column for task in tasks for column in task.slices if column in raw.columns)
    )
    labels = {task.name: task.labels for task in tasks}
    reader = RowReader(
        configs, labels, max_characters=10**6, columns=slices, strict=not choice.skip_bad
    )
    bad, found = list(raw.bad), []
    for line, row in zip(raw.lines, raw.rows, strict=True):
        try:
            found.append((line, reader.read(row)))
        except BadCell as error:
            bad.append(BadRow(raw.file, line, error.value, error.rule))
    bad.sort(key=lambda row: row.line)
    if bad and not choice.skip_bad:
        raise ValueError(
            f"{bad[0]} Correct the row, or leave out bad rows with --skip-bad ({len(bad)} in all)."
        )
    if not found:
        raise ValueError(f"{raw.file} holds no post that can be read.")
    report.set_aside.extend(bad)
    images: Sequence[bytes | str | None] = [None] * len(found)
    if image is not None:
        pictures = ImageReader(
            replace(predictor.exported.data_config, on_bad_image="text"), report, advice={}
        )
        cells, lines = [post.image for _, post in found], [line for line, _ in found]
        _, images = pictures.read(cells, file=raw.file, lines=lines, column=image)
    cut = any(task.name in predictor.as_words for task in tasks)
    return _posts(raw.file, found, images, tasks=predictor.exported.tasks, cut=cut), dict(
        reader.unfit
    )


def _posts(
    file: str,
    found: Sequence[tuple[int, LabelledPost]],
    images: Sequence[bytes | str | None],
    *,
    tasks: Sequence[Task],
    cut: bool,
) -> PostSplit:
    """One split; ``cut`` cuts plain texts into words, as the posts were in training."""
    posts = [post for _, post in found]
    return PostSplit(
        texts=[post.text for post in posts],
        pairs=[post.pair for post in posts],
        words=[
            split_words(post.text) if cut and post.words is None else post.words for post in posts
        ],
        labels={task.name: [post.labels.get(task.name) for post in posts] for task in tasks},
        confidences={},
        groups=np.zeros(len(posts), dtype=np.int64),
        group_names=("posts",),
        origins=[f"{file}:{line}" for line, _ in found],
        images=images,
        columns={name: [post.columns[name] for post in posts] for name in posts[0].columns},
    )


def _check_columns(raw: RawSplit, wanted: Mapping[str, Sequence[str | None]]) -> None:
    for option, names in wanted.items():
        for name in names:
            if name is not None and raw.rows and name not in raw.columns:
                guess = nearest(name, raw.columns)
                hint = f"; did you mean {guess}?" if guess else ""
                raise ValueError(
                    f"{raw.file} has no column {name!r}{hint} (columns: {', '.join(raw.columns)}) Set {option}."
                )
