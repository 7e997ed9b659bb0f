"""Classical models as arms of a comparison: fitted on a run's training posts in this process, without ranks.

They read the same posts, splits and limits as a trained arm, and what they predict is scored, calibrated and
written by the same code, so that reports set both side by side.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from comoe.config.files import write_atomic, write_json
from comoe.config.load import save_recipe
from comoe.config.recipe import NormalizeConfig, Recipe
from comoe.data.corpus import Corpus, load_corpus
from comoe.data.posts import PART_NAMES, PostSplit
from comoe.data.text.noise import NOISY, SEPARATOR, noisy
from comoe.data.text.normalize import normalize_post
from comoe.evaluation.calibration import Calibrator
from comoe.evaluation.evaluate import Evaluation, compute_metrics, mean_metric
from comoe.experiments.classical import BASELINES, Baseline, Examples, Predict
from comoe.starter.registry import resolve
from comoe.tasks.kinds.base import PostOutput
from comoe.tasks.task import Task
from comoe.train.results import write_predictions
from comoe.train.run_folder import MARK, refuse_taken


def run_baseline(recipe: Recipe, folder: Path, *, name: str, arguments: Sequence[str]) -> None:
    """Fit a classical model per task, score it, and write a run folder; ``results.json`` comes last.

    Args:
        recipe: of the run.
        folder: its run folder.
        name: key of ``BASELINES``.
        arguments: of its ``fit``.

    Raises:
        ValueError: posts that cannot be read, a model that can predict no task, or files of others
            in the folder.
    """
    refuse_taken(folder, overwrite=True)
    baseline = BASELINES[name]
    corpus = load_corpus(resolve(recipe, progress=False))
    scored = [task for task in corpus.tasks if task.rules.predicts]
    skipped = {task.name: why for task in scored if (why := baseline.fits(task))}
    tasks = [task for task in scored if task.name not in skipped]
    if not any(not task.auxiliary for task in tasks):
        reasons = "; ".join(f"{task}: {why}" for task, why in skipped.items())
        raise ValueError(f"the arm {name} can predict no task of this recipe ({reasons}).")
    began = time.monotonic()
    train = corpus.splits["train"]
    models, numbers = {}, 0
    for task in tasks:
        examples = _examples(train, task, recipe)
        models[task.name], count = baseline.fit(examples, *arguments)
        numbers += count
    seconds = time.monotonic() - began
    evaluations, posts_per_second = _evaluated(corpus, tasks, models, recipe, baseline)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / MARK, uuid.uuid4().hex)
    write_json(folder / "tasks.json", [task.to_dict() for task in tasks])
    save_recipe(recipe, folder / "config.yaml")
    clean = {split: one for split, one in evaluations.items() if split in corpus.splits}
    write_predictions(folder / "predictions", clean, corpus.splits)
    metrics = {split: found.metrics for split, found in evaluations.items()}
    write_json(
        folder / "results.json",
        {
            "run": recipe.run.name, "finished": "fitted", "baseline": [name, *arguments],
            "best_value": mean_metric(metrics["validation"], tasks), "metrics": metrics,
            "skipped": skipped, "seconds": seconds, "posts": len(train),
            "predicted_posts_per_second": posts_per_second,
            "parameters": {"experts": 0, "active": numbers, "total": numbers},
            "data": {"posts": corpus.report.posts, "notes": corpus.report.notes,
                     "warnings": corpus.report.warnings},
        },
    )  # fmt: skip


def _examples(train: PostSplit, task: Task, recipe: Recipe) -> Examples:
    values = train.labels[task.name]
    rows = [row for row, value in enumerate(values) if value is not None]
    gold = task.rules.collate([values[row] for row in rows], labels=task.labels, length=0)
    texts = documents(train, rows, recipe.data.normalize)
    return Examples(texts, gold.numpy().astype(np.int64), task.labels, recipe.train.seed)


def documents(posts: PostSplit, rows: Sequence[int], config: NormalizeConfig) -> list[str]:
    """Some posts as one text each, cleaned as a trained arm reads them; a second text stands behind the first."""
    found = []
    for row in rows:
        parts = [" ".join(posts.words[row] or ()) or posts.texts[row], posts.pairs[row]]
        found.append(" ".join(normalize_post(part, config) for part in parts if part))
    return found


def _evaluated(
    corpus: Corpus,
    tasks: Sequence[Task],
    models: dict[str, Predict],
    recipe: Recipe,
    baseline: Baseline,
) -> tuple[dict[str, Evaluation], float]:
    """Split -> its evaluation, calibrated as after training, with ``data.noise``; posts predicted per second."""
    options = recipe.train
    calibrator = Calibrator(
        tasks, temperatures=options.calibrate, thresholds=options.fit_thresholds
    )
    found, seconds, predicted = {}, 0.0, 0
    splits = {split: corpus.splits.get(split, ()) for split in PART_NAMES[1:]}
    for split, posts in [(split, posts) for split, posts in splits.items() if len(posts)]:
        cells = {"texts": posts.texts, "columns": posts.columns}
        began = time.monotonic()
        outputs = {task.name: _outputs(posts, task, models[task.name], recipe) for task in tasks}
        seconds, predicted = seconds + time.monotonic() - began, predicted + len(posts)
        found[split] = calibrator.take(split, compute_metrics(outputs, tasks, **cells), **cells)
        if split not in NOISY or not found[split].metrics:
            continue
        # The thresholds were chosen on the validation posts, where results would be too good.
        plain = [replace(task, thresholds=None) for task in calibrator.tasks]
        for noise in recipe.data.noise:
            rate, seed = recipe.data.noise_rate, recipe.train.seed
            other = noisy(posts, noise, rate=rate, seed=seed)
            outputs = {
                task.name: _outputs(other, task, models[task.name], recipe) for task in tasks
            }
            read_by = plain if split == NOISY[0] else calibrator.tasks
            scored = compute_metrics(outputs, read_by, columns=posts.columns, predictions=False)
            found[f"{split}{SEPARATOR}{noise}"] = scored
    for of_task in (one for some in found.values() for one in some.metrics.values()):
        if not baseline.probabilities:
            of_task.pop("loss")
    return found, predicted / seconds if seconds else math.inf


def _outputs(posts: PostSplit, task: Task, model: Predict, recipe: Recipe) -> list[PostOutput]:
    """For the posts with a label of the task, and those without any label."""
    values = posts.labels[task.name]
    bare = [all(value is None for value in row) for row in zip(*posts.labels.values(), strict=True)]
    rows = [row for row, value in enumerate(values) if value is not None or bare[row]]
    if not rows:
        return []
    logits = model(documents(posts, rows, recipe.data.normalize)).astype(np.float32)
    targets = task.rules.collate([values[row] for row in rows], labels=task.labels, length=0)
    return [
        PostOutput(row, scores, target)
        for row, scores, target in zip(rows, logits, targets.numpy(), strict=True)
    ]
