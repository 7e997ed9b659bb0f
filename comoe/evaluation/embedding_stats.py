"""What the embeddings of a split look like: do posts of one label lie together, and do all spread over the sphere.

Measured where the contrastive loss works, and where it is switched off too: then it shows what is
missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comoe.losses.image_text import text_keys
from comoe.tasks.task import Task
from comoe.types import Batch, ModelOutput

MOST_POSTS = 1500
"""Posts per task that are compared with one another: enough for two digits, and a plot."""


@dataclass(frozen=True, slots=True)
class TaskEmbeddings:
    """One task's view of a split."""

    measures: Mapping[str, float]
    """``alignment``, ``uniformity``, ``retrieval_at_1``, ``retrieval_at_1/chance``; see
    ``measure_embeddings``."""
    points: np.ndarray
    """Embeddings (N, P), float32, in the order of the split."""
    labels: Sequence[Any]
    """The label of each post in the words of predictions: a name, a list of names, or a number."""


@dataclass(frozen=True, slots=True)
class EmbeddingSummary:
    """All tasks' views of a split; the same on every rank."""

    tasks: Mapping[str, TaskEmbeddings]
    """Task -> its view; tasks without labels to compare are left out."""
    retrieval: Mapping[str, float]
    """``image_to_text_at_1``, ``text_to_image_at_1`` and ``chance`` where posts have images, else
    empty."""


def measure_embeddings(embeddings_NP: Tensor, affinity_NN: Tensor) -> dict[str, float]:
    """How well embeddings follow labels.

    Args:
        embeddings_NP: unit-length rows, at least two.
        affinity_NN: how much two posts belong together, 0 to 1, symmetric; the diagonal is not
            read.

    Returns:
        alignment: mean squared distance of pairs that belong together, 0 to 4, lower is better;
            left out without such pairs. uniformity: log of the mean of exp(-2 squared distance)
            over all pairs, 0 when all are one point, lower is more spread. retrieval_at_1: mean
            affinity of a post and its nearest other post (accuracy of the nearest neighbor where
            labels exclude one another), and what a random other post would give.

    Source: Wang & Isola 2020, arXiv:2005.10242 (alignment, uniformity).
    """
    others_NN = ~torch.eye(len(embeddings_NP), dtype=torch.bool, device=embeddings_NP.device)
    cosine_NN = embeddings_NP @ embeddings_NP.T
    distance_NN = (2 - 2 * cosine_NN).clamp_min(0)
    affinity_NN = affinity_NN.to(cosine_NN) * others_NN
    nearest_N = cosine_NN.masked_fill(~others_NN, -torch.inf).argmax(dim=1)
    pairs = others_NN.sum()
    measures = {
        "uniformity": float(((-2 * distance_NN).exp() * others_NN).sum().div(pairs).log()),
        "retrieval_at_1": float(affinity_NN.gather(1, nearest_N[:, None]).mean()),
        "retrieval_at_1/chance": float(affinity_NN.sum() / pairs),
    }
    if affinity_NN.any():
        measures["alignment"] = float((affinity_NN * distance_NN).sum() / affinity_NN.sum())
    return measures


def measure_retrieval(
    text_NP: np.ndarray, image_NP: np.ndarray, keys_N: np.ndarray
) -> dict[str, float]:
    """Share of texts whose nearest image is their own, and of images whose nearest text is, among N pairs.

    Args:
        text_NP: unit-length rows.
        image_NP: row i belongs to text i.
        keys_N: equal for posts of equal content, whose images and texts are then as good as the
            own ones.
    """
    similarity_NN = text_NP @ image_NP.T
    _, counts = np.unique(keys_N, return_counts=True)
    return {
        "text_to_image_at_1": float((keys_N[similarity_NN.argmax(axis=1)] == keys_N).mean()),
        "image_to_text_at_1": float((keys_N[similarity_NN.argmax(axis=0)] == keys_N).mean()),
        "chance": float(((counts / len(keys_N)) ** 2).sum()),
    }


class EmbeddingStats:
    """Collects embeddings during an evaluation and measures them at its end.

    Args:
        tasks: all tasks; those whose labels define which posts belong together are used.
        labelled_NT: which post of the split has a label of which task, bool. Of many every n-th one
            is kept.
    """

    def __init__(self, tasks: Sequence[Task], *, labelled_NT: np.ndarray) -> None:
        self._tasks = [task for task in tasks if task.mode == "pooled" and not task.views]
        self._kept = {
            task.name: set(_every_nth(np.flatnonzero(labelled_NT[:, number])).tolist())
            for number, task in enumerate(tasks)
        }
        self._shown = set(_every_nth(np.arange(len(labelled_NT))).tolist())
        self._rows: dict[str, dict[int, tuple[np.ndarray, Tensor]]] = {
            task.name: {} for task in self._tasks
        }
        self._pairs: dict[int, tuple[np.ndarray, np.ndarray, int]] = {}

    def update(self, output: ModelOutput, batch: Batch) -> None:
        """Add one batch of this rank."""
        posts = batch.row_ids_B.tolist()
        for task in self._tasks:
            targets = batch.labels[task.name].cpu()
            labelled = task.rules.labelled(targets)
            embeddings = output.embeddings[task.name].detach().float().cpu().numpy()
            # A model that has lost its numbers must still be evaluated to the end.
            usable = labelled.numpy() & np.isfinite(embeddings).all(axis=1)
            self._rows[task.name] |= {
                post: (embeddings[row], targets[row])
                for row, post in enumerate(posts)
                if usable[row] and post in self._kept[task.name]
            }
        sides = output.image_text
        if (
            sides is not None
            and sides.text_embeddings_IP is not None
            and sides.image_embeddings_IP is not None
        ):
            text = sides.text_embeddings_IP.detach().float().cpu().numpy()
            image = sides.image_embeddings_IP.detach().float().cpu().numpy()
            keys = text_keys(batch).tolist()
            for number, row in enumerate(sides.rows_I.tolist()):
                if row >= 0 and posts[row] in self._shown:
                    self._pairs[posts[row]] = text[number], image[number], keys[row]

    def summary(self, gather: Callable[[Any], list[Any]]) -> EmbeddingSummary:
        """The measures over all ranks.

        Args:
            gather: object of this rank -> objects of all ranks; every rank must call it.
        """
        shares = gather((self._rows, self._pairs))
        found = {}
        for task in self._tasks:
            rows = {post: value for share, _ in shares for post, value in share[task.name].items()}
            if len(rows) > 1:
                points, targets = zip(*(rows[post] for post in sorted(rows)), strict=True)
                points, targets = np.stack(points), torch.stack(targets)
                keys = task.rules.keys(targets)
                affinity = task.rules.affinity(keys, keys, task)
                measures = measure_embeddings(torch.from_numpy(points), affinity)
                labels = task.rules.gold(targets, task)
                found[task.name] = TaskEmbeddings(measures, points, labels)
        pairs = {post: value for _, share in shares for post, value in share.items()}
        sides = [
            np.stack(side) for side in zip(*(pairs[post] for post in sorted(pairs)), strict=True)
        ]
        return EmbeddingSummary(found, measure_retrieval(*sides) if len(pairs) > 1 else {})


def _every_nth(posts: np.ndarray) -> np.ndarray:
    return posts[:: max(1, -(-len(posts) // MOST_POSTS))]
