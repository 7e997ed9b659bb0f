"""Scores an export on a labeled data set, in one process: what ``comoe eval`` calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from comoe.config.recipe import TaskConfig
from comoe.data.images.check import ImageReader
from comoe.data.posts import PostSplit
from comoe.data.reading.files import RawSplit
from comoe.data.reading.inputs import (
    DataChoice,
    check_columns,
    choose_column,
    choose_labels,
    choose_pair,
    choose_text,
)
from comoe.data.reading.rows import RowReader, read_rows, settle
from comoe.data.reading.sources import read_input
from comoe.data.report import BadRow, DataReport
from comoe.data.sampling.sampler import eval_batches
from comoe.data.tokens.split import TokenizedSplit, tokenize_split
from comoe.evaluation.calibration import ece_of
from comoe.evaluation.evaluate import Evaluation, evaluate, reporting
from comoe.inference.predictor import Predictor
from comoe.tasks.labels import split_words
from comoe.tasks.prompts import wants_pair
from comoe.tasks.task import Task


@dataclass(frozen=True, slots=True)
class Scores:
    """Metrics of a model on a data set."""

    evaluation: Evaluation
    """Metrics and confusion matrices."""
    tasks: tuple[Task, ...]
    """The scored tasks."""
    posts: int
    """Posts read."""
    bad: tuple[BadRow, ...]
    """Rows left out."""
    without_image: tuple[BadRow, ...] = ()
    """Rows scored by their text alone, because their image is bad."""
    unfit: Mapping[str, int] = field(default_factory=dict)
    """Task -> posts without its label, because it does not fit their words (``skip_bad``)."""


def score(
    predictor: Predictor,
    data: str | Path | DataChoice,
    *,
    tasks: Sequence[str] | None = None,
    batch_size: int = 64,
    progress: bool = False,
    **options: Any,
) -> Scores:
    """Score a model on labeled posts, by the path of training: same reader, tokenizer, collator and metrics.

    Args:
        predictor: the model.
        data: file, folder or hub name.
        tasks: names of the tasks to score; None is all of the model's.
        batch_size: posts per forward pass.
        progress: show a progress bar.
        options: further fields of ``DataChoice``: format, split, columns, limit, skip_bad.

    Raises:
        ValueError: no such task, file or column; a row that cannot be read, with file and line; no
            labeled post.

    Example:
        >>> predictor = comoe.Predictor.from_pretrained("runs/smoke/export")
        >>> scores = comoe.score(predictor, "posts.jsonl", tasks=["mood"], label="feeling")
        >>> scores.evaluation.metrics["mood"]["macro_f1"]
        1.0
    """
    choice = data if isinstance(data, DataChoice) else DataChoice(str(data))
    choice = replace(choice, **options)
    chosen = tuple(predictor.choose_tasks(tasks))
    report = DataReport()
    posts, unfit = _read(choice, chosen, predictor=predictor, report=report)
    exported = predictor.exported
    split = tokenize_split(
        posts, exported.tokenizer, tasks=exported.tasks, config=exported.data_config
    )
    with tqdm(total=len(split), unit="post", disable=not progress, dynamic_ncols=True) as bar:
        evaluation = score_split(predictor, split, batch_size=batch_size, progress=bar.update)
    for name, error in ece_of(evaluation.outputs, chosen).items():
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
        tuple(report.without_image),
        unfit,
    )


def score_split(
    predictor: Predictor,
    split: TokenizedSplit,
    *,
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Score the model, as it is now, on tokenized posts.

    Args:
        predictor: the model.
        split: posts with labels.
        batch_size: posts per forward pass.
        progress: called after each batch with its number of posts.
    """
    batches = eval_batches(split.lengths, batch_size=batch_size)
    return evaluate(
        lambda batch: predictor.exported.model(batch.to(predictor.device)),
        split,
        collator=predictor.collator,
        tasks=predictor.exported.tasks,
        batches=batches if progress is None else reporting(batches, progress),
        gather=lambda outputs: [outputs],
        columns=split.posts.columns,
        predictions=False,
        detokenize=predictor.collator.detokenize,
    )


def format_scores(scores: Scores) -> str:
    """The scores as lines of text: per task its main metric beside the majority baseline, then every other number."""
    lines = [
        f"{scores.posts} posts" + (f", {len(scores.bad)} bad rows left out" if scores.bad else "")
    ]
    if scores.without_image:
        lines.append(
            f"{len(scores.without_image)} posts scored without their bad image; the first:"
        )
        lines.append(f"  {scores.without_image[0]}")
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
    raw = read_input("--data", choice.path, format=choice.format, split=choice.split)
    configs = _columns(choice, tasks, raw=raw, predictor=predictor)
    slices = dict.fromkeys(column for task in tasks for column in task.slices)
    slices = [column for column in slices if column in raw.columns]
    reader = RowReader(
        configs,
        {task.name: task.labels for task in tasks},
        max_characters=10**6,
        columns=slices,
        strict=not choice.skip_bad,
    )
    posts = settle(
        read_rows(raw, reader.read),
        file=raw.file,
        skip=choice.skip_bad,
        option="--skip-bad",
        report=report,
    )[: choice.limit]
    image = next(iter(configs.values())).image
    if image is not None:
        config = replace(predictor.exported.data_config, on_bad_image="text")
        posts = ImageReader(config, report, advice={}).read(posts, column=image)
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
    wanted = {"--text-column": text, "--pair-column": pair, "--image-column": image}
    check_columns(raw, wanted)
    for label in labels.values():
        check_columns(raw, {"--label-column": label})
    with_pair = [task.name for task in tasks if wants_pair(task.prompt)]
    if with_pair and pair is None:
        raise ValueError(
            f"The prompt of {', '.join(with_pair)} has {{pair}}; name its column with --pair-column."
        )
    shared = TaskConfig(text=text, pair=pair, image=image)
    return {
        task.name: replace(shared, kind=task.kind, label=labels[task.name], prompt=task.prompt)
        for task in tasks
    }
