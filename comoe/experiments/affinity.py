"""Task affinity: cosines between the gradients of the tasks' losses by the shared weights.

Two tasks with opposed gradients undo each other's steps. A gradient over a few posts is mostly
noise: two gradients of one task look unrelated, and two tasks on the same posts look alike. The
posts are therefore split into parts, and only products of different parts count; for a task with
itself this is the highest cosine that the noise permits. The posts are held out, because the
gradients over the training posts add up to almost zero at the end of training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from comoe.config.files import read_json
from comoe.data.sampling.sampler import eval_batches
from comoe.data.tokens.split import TokenizedSplit
from comoe.experiments.finished_run import load_trained
from comoe.inference.predictor import Predictor
from comoe.models.model import MultiTaskModel
from comoe.tasks.task import Task
from comoe.types import Batch

SHARED = "encoder."
"""Prefix of the weights that all tasks share; the experts are inside the encoder's layers."""

PARTS = 16
"""Parts of the posts."""


@dataclass(frozen=True, slots=True)
class Affinity:
    """Cosines of the tasks' gradients at the end of a run."""

    tasks: tuple[str, ...]
    """Tasks with labels, in the order of the model's."""
    cosine_TT: np.ndarray
    """Cosines of the tasks' mean gradients, symmetric, without products of a post with itself. The
    diagonal is the share of a gradient's squared norm that is not noise: the cosine of two
    identical tasks with as many posts, at most 1; 0 where all is noise. NaN where a task has
    gradients in fewer than two parts."""
    norm_T: np.ndarray
    """Norm of each task's mean gradient."""
    posts_T: tuple[int, ...]
    limit: int
    """Maximum of posts per task."""
    weights: int
    """Number of trainable shared weights."""

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers; None for NaN."""
        return {
            "tasks": list(self.tasks), "cosine": [[_plain(value) for value in row] for row in self.cosine_TT.tolist()],
            "norm": [_plain(value) for value in self.norm_T.tolist()], "posts": list(self.posts_T),
            "limit": self.limit, "weights": self.weights,
        }  # fmt: skip


def read_affinity(file: Path) -> Affinity:
    """Read what ``Affinity.to_dict`` gives."""
    read = read_json(file)
    arrays = (np.array(read[name], dtype=np.float64) for name in ("cosine", "norm"))
    posts_T = tuple(read["posts"])
    return Affinity(tuple(read["tasks"]), *arrays, posts_T, read["limit"], read["weights"])


def measure_affinity(
    run_folder: Path,
    *,
    limit: int = 256,
    batch_size: int = 32,
    device: str = "auto",
    progress: bool = True,
    verify: bool = True,
) -> Affinity:
    """Cosines between the tasks' gradients at the end of a finished run, on its validation posts, without dropout.

    Holds two gradients per task in memory: 8 bytes per task and trainable shared weight.

    Args:
        run_folder: holds ``config.yaml`` and ``export/``.
        limit: maximum of posts per task, at least 2.
        batch_size: posts per forward pass; affects time and memory only.
        device: a torch device; auto is the first GPU, or the CPU.
        progress: show a progress bar.
        verify: compare the digests of the export's files.

    Raises:
        ValueError: no finished run there, fewer than two tasks with labels, no trainable shared
            weight, or a limit below 2.
    """
    if limit < 2:
        raise ValueError(f"the limit of posts per task is {limit}; it must be at least 2.")
    predictor, split = load_trained(run_folder, split="validation", device=device, verify=verify)
    tasks = predictor.tasks
    if len(tasks) < 2:
        raise ValueError(
            f"{run_folder} was trained on one task: there is no other gradient to compare with."
        )
    weights = shared_weights(predictor.exported.model)
    if not weights:
        raise ValueError(
            f"{run_folder} trained no shared weight (model.train_layers, model.moe): there is no gradient."
        )
    parts = [parts_of(split, predictor.exported.tasks.index(task), limit=limit) for task in tasks]
    posts_T = tuple(sum(map(len, of_task)) for of_task in parts)
    products = Products(len(tasks))
    with tqdm(total=sum(posts_T), unit="post", disable=not progress, dynamic_ncols=True) as bar:
        for part in range(PARTS):
            gradients = []
            for task, of_task in zip(tasks, parts, strict=True):
                batches = _batches(predictor, split, task, of_task[part], batch_size)
                loss = partial(_loss, predictor.exported.model, task)
                gradients.append(summed_gradient(loss, batches, weights))
                bar.update(len(of_task[part]))
            products.add(gradients)
    cosine_TT, norm_T = products.cosines()
    names, count = tuple(task.name for task in tasks), sum(weight.numel() for weight in weights)
    return Affinity(names, cosine_TT, norm_T, posts_T, limit, count)


def shared_weights(model: MultiTaskModel) -> list[torch.nn.Parameter]:
    """The trainable weights of the encoder and its experts; heads belong to one task each."""
    return [
        weight
        for name, weight in model.named_parameters()
        if name.startswith(SHARED) and weight.requires_grad
    ]


def parts_of(split: TokenizedSplit, task: int, *, limit: int) -> list[np.ndarray]:
    """Posts of one task in ``PARTS`` parts: rows of the split, int64; a post is in the same part for all of its tasks.

    Args:
        split: the posts.
        task: number of the task in the model.
        limit: maximum of posts in all parts together.
    """
    order_N = np.random.default_rng(0).permutation(len(split))
    part_N = np.empty(len(split), dtype=np.int64)
    part_N[order_N] = np.arange(len(split)) % PARTS
    chosen = order_N[split.labelled[order_N, task]][:limit]
    return [chosen[part_N[chosen] == part] for part in range(PARTS)]


def summed_gradient(
    loss_of: Callable[[Batch], tuple[Tensor, Tensor]],
    batches: Iterable[Batch],
    weights: Sequence[Tensor],
) -> tuple[list[Tensor], float]:
    """Gradient of the sum of losses over several batches, one tensor per weight, and the normalizer of its mean.

    Args:
        loss_of: batch -> (sum of the losses, normalizer).
        batches: each is run once.
        weights: a weight that a batch does not reach has the gradient 0 there.
    """
    total, normalizer = [torch.zeros_like(weight) for weight in weights], 0.0
    for batch in batches:
        loss, count = loss_of(batch)
        parts = torch.autograd.grad(loss, list(weights), allow_unused=True, materialize_grads=True)
        for whole, part in zip(total, parts, strict=True):
            whole += part
        normalizer += float(count)
    return total, normalizer


class Products:
    """Inner products of the tasks' mean gradients from different parts of the posts.

    With s_ta the gradient of task t's summed loss over part a and m_ta its normalizer, <t, u> is
    the sum of s_ta s_ub over the sum of m_ta m_ub, both over a != b: an unbiased estimate of the
    product of the true mean gradients.
    """

    def __init__(self, tasks: int) -> None:
        self._totals: list[list[Tensor]] = []
        self._normalizer_T = np.zeros(tasks)
        self._same_TT = np.zeros((tasks, tasks))
        self._same_normalizer_TT = np.zeros((tasks, tasks))

    def add(self, part: Sequence[tuple[list[Tensor], float]]) -> None:
        """Add one part: the result of ``summed_gradient`` for each task."""
        gradients = [gradient for gradient, _ in part]
        normalizer_T = np.array([normalizer for _, normalizer in part])
        self._same_TT += _products(gradients)
        self._same_normalizer_TT += np.outer(normalizer_T, normalizer_T)
        self._normalizer_T += normalizer_T
        if not self._totals:
            self._totals = gradients
            return
        for total, gradient in zip(self._totals, gradients, strict=True):
            for whole, more in zip(total, gradient, strict=True):
                whole += more

    def cosines(self) -> tuple[np.ndarray, np.ndarray]:
        """Cosines, (T, T), and norms of the mean gradients, (T,), float64; see ``Affinity``."""
        all_TT = _products(self._totals)
        pairs_TT = np.outer(self._normalizer_T, self._normalizer_T) - self._same_normalizer_TT
        with np.errstate(invalid="ignore", divide="ignore"):
            norm_T = np.sqrt(np.diagonal(all_TT)) / self._normalizer_T
            # All posts in one part leave no pair.
            product_TT = np.where(pairs_TT > 1e-9, (all_TT - self._same_TT) / pairs_TT, np.nan)
            norms_TT = np.outer(norm_T, norm_T)
            cosine_TT = np.where(norms_TT > 0, product_TT / norms_TT, np.nan)
        known_T = np.isfinite(np.diagonal(cosine_TT))
        # The ratio of two small estimates is unbounded; a negative squared norm is noise.
        cosine_TT = np.clip(np.where(np.outer(known_T, known_T), cosine_TT, np.nan), -1.0, 1.0)
        np.fill_diagonal(cosine_TT, np.maximum(np.diagonal(cosine_TT), 0.0))
        return cosine_TT, norm_T


def _batches(
    predictor: Predictor, split: TokenizedSplit, task: Task, rows: np.ndarray, batch_size: int
) -> Iterator[Batch]:
    number = predictor.exported.tasks.index(task)
    for places in eval_batches(split.lengths[rows], batch_size=batch_size):
        batch = predictor.collator(split, rows[places])
        # Where the gate reads the task, a post is a row per task; those of other tasks add nothing.
        own_R = torch.isin(batch.task_ids_B, torch.tensor([-1, number])).nonzero().squeeze(1)
        yield (batch if len(own_R) == len(batch.task_ids_B) else batch.take(own_R)).to(
            predictor.device
        )


def _loss(model: MultiTaskModel, task: Task, batch: Batch) -> tuple[Tensor, Tensor]:
    targets = batch.labels[task.name]
    logits = model(batch, decode=task.mode == "decoder").logits[task.name]
    return task.rules.loss(logits, targets, task), task.rules.normalizer(targets, task)


def _products(gradients: Sequence[Sequence[Tensor]]) -> np.ndarray:
    """Inner products of all pairs, (T, T), float64."""
    found_TT = np.zeros((len(gradients), len(gradients)))
    # Weight by weight: all of them at once in float64 take many times the memory of the model.
    for tensors in zip(*gradients, strict=True):
        flat_TX = torch.stack([tensor.reshape(-1) for tensor in tensors]).double()
        found_TT += (flat_TX @ flat_TX.T).cpu().numpy()
    return found_TT


def _plain(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None
