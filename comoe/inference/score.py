"""Scores an export on a labeled data set, in one process: what ``comoe eval`` calls."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from comoe.config.failure import sentence
from comoe.data.posts import PostSplit
from comoe.data.reading.inputs import DataChoice
from comoe.data.report import BadRow, DataReport
from comoe.data.sampling.sampler import eval_batches
from comoe.data.seen_posts import SEEN, count_seen
from comoe.data.tokens.split import TokenizedSplit, tokenize_split
from comoe.evaluation.calibration import ece_of
from comoe.evaluation.evaluate import Evaluation, evaluate, reporting
from comoe.evaluation.gaps import Gaps, gaps_of
from comoe.evaluation.tables import gap_lines
from comoe.inference.labeled import read_labeled
from comoe.inference.predictor import Predictor
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
    gaps: Mapping[str, Gaps] = field(default_factory=dict)
    """Task -> gaps between the values of its slices."""
    read: PostSplit | None = None
    """The posts."""
    seen: int = 0
    """About how many of them its run was trained on, by the filter of its export; 0 without a readable one."""


def score(
    predictor: Predictor,
    data: str | Path | DataChoice,
    *,
    tasks: Sequence[str] | None = None,
    by: Sequence[str] = (),
    batch_size: int = 64,
    progress: bool = False,
    **options: Any,
) -> Scores:
    """Score a model on labeled posts, by the path of training: same reader, tokenizer, collator and metrics.

    Args:
        predictor: the model.
        data: file, folder or hub name.
        tasks: names of the tasks to score; None is all of the model's.
        by: further slices, as of ``tasks.<name>.slices``.
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
    chosen = _with_slices(predictor.choose_tasks(tasks), by)
    report = DataReport()
    posts, unfit = read_labeled(choice, chosen, predictor=predictor, report=report, needed=by)
    exported = predictor.exported
    seen = _seen(exported.folder / SEEN, posts)
    about = {"tasks": exported.tasks, "config": exported.data_config, "lexicon": exported.lexicon}
    split = tokenize_split(posts, exported.tokenizer, **about)
    with tqdm(total=len(split), unit="post", disable=not progress, dynamic_ncols=True) as bar:
        passes = {"batch_size": batch_size, "progress": bar.update}
        evaluation = score_split(predictor, split, sliced=chosen, **passes)
    for name, error in ece_of(evaluation.outputs, chosen).items():
        evaluation.metrics[name]["ece"] = error
    if not evaluation.metrics:
        names = ", ".join(task.name for task in chosen)
        raise ValueError(f"{choice.path}: no post has a label of {names}.")
    return Scores(
        evaluation,
        chosen,
        len(split),
        tuple(report.set_aside),
        tuple(report.without_image),
        unfit,
        gaps_of(evaluation.outputs, chosen, split.posts.columns),
        split.posts,
        seen,
    )


def _seen(path: Path, posts: PostSplit) -> int:
    try:
        return count_seen(path, posts)
    except (ValueError, OSError) as error:  # a file for a warning is no reason to score nothing
        unknown = "whether the model was trained on these posts cannot be told"
        print(f"warning: {unknown} ({sentence(error)})", file=sys.stderr)
        return 0


def _with_slices(tasks: Sequence[Task], by: Sequence[str]) -> tuple[Task, ...]:
    return tuple(replace(task, slices=tuple(dict.fromkeys((*task.slices, *by)))) for task in tasks)


def score_split(
    predictor: Predictor,
    split: TokenizedSplit,
    *,
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
    sliced: Sequence[Task] = (),
) -> Evaluation:
    """Score the model, as it is now, on tokenized posts.

    Args:
        predictor: the model.
        split: posts with labels.
        batch_size: posts per forward pass.
        progress: called after each batch with its number of posts.
        sliced: tasks that have other slices than the model's.
    """
    changed = {task.name: task for task in sliced}
    batches = eval_batches(split.lengths, batch_size=batch_size)
    return evaluate(
        lambda batch: predictor.exported.model(batch.to(predictor.device)),
        split,
        collator=predictor.collator,
        tasks=[changed.get(task.name, task) for task in predictor.exported.tasks],
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
    lines += gap_lines({"scored": scores.gaps}, scores.tasks)
    return "\n".join(lines)
