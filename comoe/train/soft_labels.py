"""Soft labels of a run's posts: what teachers say of them, and what the data itself does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from comoe.config.recipe import Recipe
from comoe.data.posts import PostSplit
from comoe.data.soft_labels import SoftLabels, preferred
from comoe.data.tokens.split import TokenizedSplit, with_soft_labels
from comoe.inference.teacher import DISTILLED, find_teachers, soft_labels_of
from comoe.starter.registry import home
from comoe.tasks.task import Task


def soft_labelled(
    recipe: Recipe,
    splits: Mapping[str, TokenizedSplit],
    tasks: Sequence[Task],
    *,
    device: torch.device,
    bf16: bool,
) -> dict[str, TokenizedSplit]:
    """The splits with soft labels, of teachers and their own: training to learn from, validation to be compared with.

    Every rank must call it, before anything of DeepSpeed's construction.

    Args:
        recipe: resolved.
        splits: of the run.
        tasks: of the run.
        device: of this rank, where the teachers run.
        bf16: run them in bfloat16.
    """
    teachers = find_teachers(recipe.distill, tasks)
    found = [name for name in DISTILLED if name in splits]
    labels_of = {}
    if teachers:
        labels_of = soft_labels_of(
            recipe.distill,
            teachers,
            PostSplit.join([splits[name].posts for name in found]),
            device=device,
            bf16=bf16,
            cache_dir=home() / "teachers" if recipe.distill.cache else None,
        )
    made, start = {}, 0
    for name in found:
        posts = splits[name].posts
        numbers = np.arange(start, start + len(posts))
        start += len(posts)
        soft = {task: labels.take(numbers) for task, labels in labels_of.items()}
        for task in tasks:
            if (column := posts.soft_labels.get(task.name)) is not None:
                own = SoftLabels.from_rows(column, width=len(task.labels))
                soft[task.name] = preferred(own, soft[task.name]) if task.name in soft else own
        if soft:
            made[name] = with_soft_labels(splits[name], soft)
    return made
