"""The kind of task whose head gives a post one label of several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comoe.protocols import IGNORED
from comoe.tasks.base import Kind, TaskLike, class_loss, class_units, per_class, tempered
from comoe.tasks.kinds_multi_label import is_list
from comoe.tasks.labels import is_missing, label_id, label_name, natural_order
from comoe.tasks.metrics import METRICS, class_scores, confusion


class SingleLabel(Kind):
    """One label of several: cross-entropy. A cell is a label name or id; parsed: int. Alike: the same label."""

    exclusive = True
    min_labels = 2
    metrics = (
        "macro_f1",
        "accuracy",
        "macro_precision",
        "macro_recall",
        "micro_f1",
        "f1_class_1",
        "mean_f1_against_favor",
    )

    def num_keys(self, labels: Sequence[str]) -> int:
        return 1

    def keys(self, targets: Tensor) -> Tensor:
        return targets[:, None].float()

    def discover(self, values: Iterable[object]) -> tuple[str, ...]:
        return natural_order(label_name(value) for value in values if not is_missing(value))

    def parse(self, value: object, labels: Sequence[str]) -> int | None:
        if is_list(value):
            raise ValueError(f"{value!r} is a list; a single_label task has one label per post; use kind: multi_label.")
        return None if is_missing(value) else label_id(value, labels)

    def collate(self, values: Sequence[int | None], *, labels: Sequence[str], length: int) -> Tensor:
        return torch.tensor([IGNORED if value is None else value for value in values], dtype=torch.int64)

    def labelled(self, targets: Tensor) -> Tensor:
        return targets != IGNORED

    def units(self, targets: Tensor, task: TaskLike) -> Tensor:
        return class_units(targets, task)

    def loss(self, logits: Tensor, targets: Tensor, task: TaskLike, weights_B: Tensor | None = None) -> Tensor:
        return class_loss(logits, targets, task, weights_B)

    def decode(self, logits: Tensor, task: TaskLike) -> list[dict[str, Any]]:
        """``{"label": name, "scores": {name: probability}}``; the probabilities sum to 1.

        The label is the likeliest one; with a threshold the label with id 1 from that probability on, else id 0.
        """
        scores_BY = tempered(logits, task).softmax(-1)
        return [
            {"label": task.labels[label], "scores": dict(zip(task.labels, scores, strict=True))}
            for label, scores in zip(_decided(scores_BY.cpu().numpy(), task), scores_BY.tolist(), strict=True)
        ]

    def gold(self, targets: Tensor, task: TaskLike) -> list[str | None]:
        return [None if target == IGNORED else task.labels[target] for target in targets.tolist()]

    def answers(self, logits: Tensor, targets: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Label ids, int64, (N,), and probabilities, float32, (N, Y)."""
        present = self.labelled(targets)
        return targets[present].cpu().numpy(), logits.detach()[present].float().softmax(-1).cpu().numpy()

    def compared(self, rows: Sequence[Mapping[str, Any]], task: TaskLike) -> tuple[np.ndarray, np.ndarray]:
        ids = {name: number for number, name in enumerate(task.labels)}
        return tuple(np.array([ids[row[key]] for row in rows], dtype=np.int64) for key in ("gold", "label"))

    def label_ids(self, value: int) -> tuple[int, ...]:
        return (value,)

    def score(self, gold: np.ndarray, scores: np.ndarray, task: TaskLike) -> dict[str, float]:
        """The majority baseline answers the commonest label of ``gold``."""
        predicted, labels = _decided(scores, task), task.labels
        names = dict.fromkeys((task.metric, "accuracy", "macro_precision", "macro_recall", "macro_f1"))
        majority = np.full_like(gold, np.bincount(gold, minlength=len(labels)).argmax())
        return (
            {name: METRICS[name](gold, predicted, labels) for name in names}
            | {f"majority/{task.metric}": METRICS[task.metric](gold, majority, labels)}
            | per_class(labels, class_scores(gold, predicted, labels))
        )

    def confusion(self, gold: np.ndarray, scores: np.ndarray, task: TaskLike) -> np.ndarray:
        return confusion(gold, _decided(scores, task), task.labels)


def _decided(scores_NY: np.ndarray, task: TaskLike) -> np.ndarray:
    """Label ids that probabilities are answered with, int64, (N,)."""
    if task.thresholds is None:
        return scores_NY.argmax(axis=1)
    # In float64: a threshold must mean the same for a probability that was read back from JSON.
    return (scores_NY[:, 1].astype(np.float64) >= task.thresholds[0]).astype(np.int64)
