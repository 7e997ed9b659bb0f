"""Which tasks pull the shared weights the same way: cosines between the gradients of their losses, in one process.

Two tasks whose gradients point apart undo each other's steps. A gradient over a few posts is mostly
noise: two of one task look unrelated, and of tasks on the same posts alike. So the posts are dealt
into parts, and only products of different parts count; of a task with itself that says how high a
cosine can get here. The posts are held out: the gradients of those that were learned from add up to
almost nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from comoe.data.sampling.sampler import eval_batches
from comoe.data.tokens.split import TokenizedSplit
from comoe.experiments.finished_run import load_trained
from comoe.inference.predictor import Predictor
from comoe.models.model import MultiTaskModel
from comoe.tasks.task import Task
from comoe.types import Batch

SHARED = "encoder."
"""Beginning of the names of the weights that all tasks share; the experts lie inside the encoder's
layers."""


PARTS = 16
"""Parts that the posts are dealt into."""


@dataclass(frozen=True, slots=True)
class Affinity:
    """How the tasks' gradients lie to one another at the end of a run."""

    tasks: tuple[str, ...]
    """Tasks with labels, in the order of the model's."""
    cosine_TT: np.ndarray
    """Cosines of the tasks' mean gradients, symmetric, without what products of a post with itself
    add. On the diagonal the share of a gradient's squared length that is not noise: what two tasks
    that want exactly the same would reach with as many posts, up to 1; 0 where all is noise. NaN
    where a task has no gradient in two parts."""
    norm_T: np.ndarray
    """Length of each task's mean gradient."""
    posts_T: tuple[int, ...]
    """Posts of each task that were used."""
    limit: int
    """At most so many posts per task were taken."""
    weights: int
    """Shared weights that train."""

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers; None for NaN."""
        return {
            "tasks": list(self.tasks), "cosine": [[_plain(value) for value in row] for row in self.cosine_TT.tolist()],
            "norm": [_plain(value) for value in self.norm_T.tolist()], "posts": list(self.posts_T),
            "limit": self.limit, "weights": self.weights,
        }  # fmt: skip


def read_affinity(file: Path) -> Affinity:
    """What ``Affinity.to_dict`` was written as."""
    found = json.loads(file.read_text(encoding="utf-8"))
    arrays = (np.array(found[name], dtype=np.float64) for name in ("cosine", "norm"))
    return Affinity(
        tuple(found["tasks"]), *arrays, tuple(found["posts"]), found["limit"], found["weights"]
    )


def measure_affinity(
    run_folder: Path,
    *,
    limit: int = 256,
    batch_size: int = 32,
    device: str = "auto",
    progress: bool = True,
) -> Affinity:
    """Cosines between the tasks' gradients at the end of a finished run, on its validation posts, without dropout.

    It holds two gradients per task in memory, 8 bytes per task and shared weight that trains.

    Args:
        run_folder: as training left it: ``config.yaml`` and ``export/``.
        limit: at most this many posts per task, at least 2.
        batch_size: posts per forward pass; changes nothing but time and memory.
        device: a torch device; auto is the first GPU, or the CPU.
        progress: show a progress bar.

    Raises:
        ValueError: no finished run there, fewer than two tasks with labels, no shared weight that
            trains, or a limit below 2.
    """
    if limit < 2:
        raise ValueError(f"the limit of posts per task is {limit}; it must be at least 2.")
    predictor, split = load_trained(run_folder, split="validation", device=device)
    tasks = predictor.tasks
    if len(tasks) < 2:
        raise ValueError(
            f"{run_folder} was trained on one task: there is no other one to hold its gradient against."
        )
    weights = shared_weights(predictor.exported.model)
    if not weights:
        raise ValueError(
            f"{run_folder} trained no shared weight (model.train_layers, model.moe): no gradient to hold."
        )
    parts = [parts_of(split, predictor.exported.tasks.index(task), limit=limit) for task in tasks]
    products = Products(len(tasks))
    with tqdm(
        total=sum(map(len, sum(parts, []))), unit="post", disable=not progress, dynamic_ncols=True
    ) as bar:
        for number in range(PARTS):
            products.add([
                _of_posts(predictor, split, task, mine[number], weights, batch_size, bar.update)
                for task, mine in zip(tasks, parts, strict=True)
            ])  # fmt: skip
    cosine_TT, norm_T = products.cosines()
    counts = tuple(sum(map(len, mine)) for mine in parts)
    names = tuple(task.name for task in tasks)
    return Affinity(
        names, cosine_TT, norm_T, counts, limit, sum(weight.numel() for weight in weights)
    )


def shared_weights(model: MultiTaskModel) -> list[torch.nn.Parameter]:
    """The weights of the encoder and its experts that train; heads, which belong to one task each, are left out."""
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
        limit: posts of all parts together.
    """
    turn_N = np.random.default_rng(0).permutation(len(split))
    part_N = np.empty(len(split), dtype=np.int64)
    part_N[turn_N] = np.arange(len(split)) % PARTS
    chosen = turn_N[split.labelled[turn_N, task]][:limit]
    return [chosen[part_N[chosen] == part] for part in range(PARTS)]


def summed_gradient(
    share: Callable[[Batch], tuple[Tensor, Tensor]],
    batches: Iterable[Batch],
    weights: Sequence[Tensor],
) -> tuple[list[Tensor], float]:
    """Gradient of a sum of losses over several batches, one tensor per weight, and what it is divided by to be a mean.

    Args:
        share: batch -> (sum of the losses, their units), as ``Kind.loss`` and ``units`` give them.
        batches: each is run once.
        weights: what is derived by; one that a batch does not reach has the gradient 0 there.
    """
    total = [torch.zeros_like(weight) for weight in weights]
    units = 0.0
    for batch in batches:
        loss, count = share(batch)
        found = torch.autograd.grad(loss, list(weights), allow_unused=True, materialize_grads=True)
        for whole, part in zip(total, found, strict=True):
            whole += part
        units += float(count)
    return total, units


class Products:
    """Inner products of the tasks' mean gradients from different parts of the posts.

    With s_ta the gradient of task t's summed loss over part a and m_ta its units, <t, u> is the sum
    of s_ta s_ub over the sum of m_ta m_ub, both over a != b: expected to be the product of the true
    mean gradients, whatever the noise.

    Args:
        tasks: how many.
    """

    def __init__(self, tasks: int) -> None:
        self._totals: list[list[Tensor]] = []
        self._units_T = np.zeros(tasks)
        self._same_TT = np.zeros((tasks, tasks))
        self._same_units_TT = np.zeros((tasks, tasks))

    def add(self, part: Sequence[tuple[list[Tensor], float]]) -> None:
        """Count one part: per task what ``summed_gradient`` gave."""
        gradients = [gradient for gradient, _ in part]
        units_T = np.array([units for _, units in part])
        self._same_TT += _products(gradients)
        self._same_units_TT += np.outer(units_T, units_T)
        self._units_T += units_T
        if not self._totals:
            self._totals = gradients
            return
        for total, gradient in zip(self._totals, gradients, strict=True):
            for whole, more in zip(total, gradient, strict=True):
                whole += more

    def cosines(self) -> tuple[np.ndarray, np.ndarray]:
        """Products over lengths, (T, T), and lengths of the mean gradients, (T,), float64; see ``Affinity``."""
        all_TT = _products(self._totals)
        pairs_TT = np.outer(self._units_T, self._units_T) - self._same_units_TT
        with np.errstate(invalid="ignore", divide="ignore"):
            norm_T = np.sqrt(np.diagonal(all_TT)) / self._units_T
            # All posts in one part leave no pair.
            product_TT = np.where(pairs_TT > 1e-9, (all_TT - self._same_TT) / pairs_TT, np.nan)
            lengths_TT = np.outer(norm_T, norm_T)
            cosine_TT = np.where(lengths_TT > 0, product_TT / lengths_TT, np.nan)
        known_T = np.isfinite(np.diagonal(cosine_TT))
        # An estimate of a small product over a small length can be anything; what is less than
        # nothing is noise.
        cosine_TT = np.clip(np.where(np.outer(known_T, known_T), cosine_TT, np.nan), -1.0, 1.0)
        np.fill_diagonal(cosine_TT, np.maximum(np.diagonal(cosine_TT), 0.0))
        return cosine_TT, norm_T


def _of_posts(
    predictor: Predictor,
    split: TokenizedSplit,
    task: Task,
    rows: np.ndarray,
    weights: Sequence[Tensor],
    batch_size: int,
    done: Callable[[int], object],
) -> tuple[list[Tensor], float]:
    model, number = predictor.exported.model, predictor.exported.tasks.index(task)

    def batches() -> Iterable[Batch]:
        for places in eval_batches(split.lengths[rows], batch_size=batch_size):
            batch = predictor.collator(split, rows[places])
            # Where the gate reads the task, a post is a row per task, and those of the others add
            # nothing.
            mine_R = torch.isin(batch.task_ids_B, torch.tensor([-1, number])).nonzero().squeeze(1)
            yield (batch if len(mine_R) == len(batch.task_ids_B) else batch.take(mine_R)).to(
                predictor.device
            )
            done(len(places))

    def share(batch: Batch) -> tuple[Tensor, Tensor]:
        targets = batch.labels[task.name]
        logits = model(batch, decode=task.mode == "decoder").logits[task.name]
        return task.rules.loss(logits, targets, task), task.rules.units(targets, task)

    return summed_gradient(share, batches(), weights)


def _products(gradients: Sequence[Sequence[Tensor]]) -> np.ndarray:
    """Inner products of all pairs, (T, T), float64."""
    count = len(gradients)
    found_TT = np.zeros((count, count))
    # Weight by weight: all of them in float64 at once would be many times the model.
    for tensors in zip(*gradients, strict=True):
        flat_TX = torch.stack([tensor.reshape(-1) for tensor in tensors]).double()
        found_TT += (flat_TX @ flat_TX.T).cpu().numpy()
    return found_TT


def _plain(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None
