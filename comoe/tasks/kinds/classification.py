"""Kinds whose head gives a post one label of several, or any number of labels."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from comoe.deferred import Deferred
from comoe.tasks.kinds.base import (
    Kind,
    PostOutput,
    TaskLike,
    class_loss,
    class_units,
    per_class,
    weighted_sum,
    weights_of,
)
from comoe.tasks.labels import is_missing, label_id, label_name, natural_order
from comoe.tasks.metrics import METRICS, class_scores, confusion
from comoe.types import IGNORED

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
else:
    torch = Deferred("torch")
    F = Deferred("torch.nn.functional")


class SingleLabel(Kind):
    """One label of several: cross-entropy. A cell is a label name or id; parsed: int.

    Alike: the same label.
    """

    exclusive = True
    min_labels = 2
    soft = "one label of several"
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
            raise ValueError(
                f"{value!r} is a list; a single_label task has one label per post; use kind: multi_label."
            )
        return None if is_missing(value) else label_id(value, labels)

    def parse_soft(self, value: object, labels: Sequence[str]) -> np.ndarray | None:
        """Counts become shares."""
        soft = super().parse_soft(value, labels)
        if soft is not None and not soft.sum():
            raise ValueError(f"{value!r} gives no label a share; one number must be above 0")
        return None if soft is None else soft / soft.sum()

    def normalizer(self, targets: Tensor, task: TaskLike) -> Tensor:
        return class_units(targets, task)

    def loss(
        self, logits: Tensor, targets: Tensor, task: TaskLike, weights_B: Tensor | None = None
    ) -> Tensor:
        return class_loss(logits, targets, task, weights_B)

    def decode(self, outputs: Sequence[PostOutput], task: TaskLike) -> list[dict[str, Any]]:
        """``{"label": name, "scores": {name: probability}}``; the probabilities sum to 1.

        The label is the likeliest one; with a threshold the label with id 1 from that probability
        on, else id 0.
        """
        scores_BY = self.scores(outputs, task)
        return [
            {"label": task.labels[label], "scores": dict(zip(task.labels, scores, strict=True))}
            for label, scores in zip(self.decided(scores_BY, task), scores_BY.tolist(), strict=True)
        ]

    def gold(self, targets: Iterable[Any], task: TaskLike) -> list[str | None]:
        return [None if target == IGNORED else task.labels[int(target)] for target in targets]

    def compared(
        self, rows: Sequence[Mapping[str, Any]], task: TaskLike
    ) -> tuple[np.ndarray, np.ndarray]:
        ids = {name: number for number, name in enumerate(task.labels)}
        return tuple(
            np.array([ids[row[key]] for row in rows], dtype=np.int64) for key in ("gold", "label")
        )

    def label_ids(self, value: int) -> tuple[int, ...]:
        return (value,)

    def score(self, gold: np.ndarray, scores: np.ndarray, task: TaskLike) -> dict[str, float]:
        """The majority baseline predicts the commonest label of ``gold``."""
        predicted, labels = self.decided(scores, task), task.labels
        names = dict.fromkeys(
            (task.metric, "accuracy", "macro_precision", "macro_recall", "macro_f1")
        )
        majority = np.full_like(gold, np.bincount(gold, minlength=len(labels)).argmax())
        return (
            {name: METRICS[name](gold, predicted, labels) for name in names}
            | {f"majority/{task.metric}": METRICS[task.metric](gold, majority, labels)}
            | per_class(labels, class_scores(gold, predicted, labels))
        )

    def confusion(self, gold: np.ndarray, scores: np.ndarray, task: TaskLike) -> np.ndarray:
        return confusion(gold, self.decided(scores, task), task.labels)

    def decided(self, scores: np.ndarray, task: TaskLike) -> np.ndarray:
        """Predicted label ids, int64, (N,)."""
        if task.thresholds is None:
            return scores.argmax(axis=1)
        # In float64: a threshold must mean the same for a probability that was read back from JSON.
        return (scores[:, 1].astype(np.float64) >= task.thresholds[0]).astype(np.int64)


_LABELS_PER_KEY = 20


class MultiLabel(Kind):
    """Any number of labels: binary cross-entropy, the mean over labels.

    A cell is a list of names or ids, or a text with , ; or | between them. An empty cell is
    missing; an empty list says that no label applies. Parsed: tuple of ids, ascending. Alike: the
    Jaccard overlap of the sets, 0 of empty ones.
    """

    min_labels = 1
    soft = "any number of labels"
    metrics = (
        "macro_f1",
        "micro_f1",
        "sample_f1",
        "jaccard",
        "accuracy",
        "macro_precision",
        "macro_recall",
    )

    def num_keys(self, labels: Sequence[str]) -> int:
        return -(-len(labels) // _LABELS_PER_KEY)

    def keys(self, targets: Tensor) -> Tensor:
        """The labels as the bits of whole numbers, 20 in each."""
        places_Y = torch.arange(targets.shape[1], device=targets.device)
        values_Y = 2.0 ** (places_Y % _LABELS_PER_KEY)
        columns = [
            targets.float()[:, part] @ values_Y[part].float()
            for part in places_Y.split(_LABELS_PER_KEY)
        ]
        return torch.stack(columns, dim=1)

    def affinity(self, keys_NK: Tensor, keys_UK: Tensor, task: TaskLike) -> Tensor:
        bits = torch.arange(_LABELS_PER_KEY, device=keys_NK.device)
        sets = [
            (keys.long()[..., None] >> bits & 1).flatten(1).to(keys.dtype)
            for keys in (keys_NK, keys_UK)
        ]
        both_NU = sets[0] @ sets[1].T
        return both_NU / (sets[0].sum(dim=1)[:, None] + sets[1].sum(dim=1) - both_NU).clamp_min(1)

    def discover(self, values: Iterable[object]) -> tuple[str, ...]:
        present = (value for value in values if is_list(value) or not is_missing(value))
        return natural_order(label_name(item) for value in present for item in _items(value))

    def parse(self, value: object, labels: Sequence[str]) -> tuple[int, ...] | None:
        if not is_list(value) and is_missing(value):
            return None
        whole = (
            isinstance(value, str) and value.strip() in labels
        )  # one name, be there a separator in it or not
        ids = [label_id(item, labels) for item in ([value] if whole else _items(value))]
        if len(set(ids)) < len(ids):
            raise ValueError(
                f"{value!r} names a label twice; give names or ids of the labels that apply, not a 0 or 1 per label."
            )
        return tuple(sorted(ids))

    def parse_soft(self, value: object, labels: Sequence[str]) -> np.ndarray | None:
        """A probability per label."""
        soft = super().parse_soft(value, labels)
        if soft is not None and soft.max() > 1:
            raise ValueError(f"{value!r} is no probability from 0 to 1 for each label")
        return soft

    def collate(
        self, values: Sequence[tuple[int, ...] | None], *, labels: Sequence[str], length: int
    ) -> Tensor:
        targets = torch.zeros(len(values), len(labels))
        for row, ids in enumerate(values):
            if ids is None:
                targets[row] = math.nan
            else:
                targets[row, list(ids)] = 1.0
        return targets

    def labelled(self, targets: Tensor) -> Tensor:
        return ~targets.isnan().any(dim=-1)

    def loss(
        self, logits: Tensor, targets: Tensor, task: TaskLike, weights_B: Tensor | None = None
    ) -> Tensor:
        """Class weights weigh the mean over labels; smoothing moves both targets towards 1/2."""
        present = self.labelled(targets)[:, None]
        # Masked before the loss as well as after it: the gradient of a masked NaN is NaN, not 0.
        targets = torch.where(present, targets, 0.0).float()
        targets = targets * (1.0 - task.label_smoothing) + 0.5 * task.label_smoothing
        losses = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none")
        weights_Y = weights_of(task, losses)
        losses_B = (
            losses.mean(dim=-1) if weights_Y is None else losses @ (weights_Y / weights_Y.sum())
        )
        return weighted_sum(losses_B * present[:, 0], weights_B)

    def soft_losses(
        self, logits: Tensor, soft: Tensor, task: TaskLike, *, temperature: float = 1.0
    ) -> Tensor:
        """The mean over labels of the binary cross-entropies."""
        present = self.soft_present(soft)
        soft = torch.where(present[..., None], soft, 0.5).float()
        if temperature != 1.0:
            soft = (self.soft_logits(soft, task) / temperature).sigmoid()
        losses = F.binary_cross_entropy_with_logits(
            logits.float() / temperature, soft, reduction="none"
        ).mean(dim=-1)
        return torch.where(present, losses, 0.0 * losses) * temperature**2

    def disagreements(self, one: Tensor, other: Tensor) -> Tensor:
        """The mean over labels, as the loss."""
        one, other = one.float(), other.float()
        return ((one.sigmoid() - other.sigmoid()) * (one - other)).mean(dim=-1)

    def soft_logits(self, soft: Tensor, task: TaskLike) -> Tensor:
        return torch.logit(soft, eps=1e-7)

    def probabilities(self, logits: Any) -> Any:
        return 1 / (1 + np.exp(-logits)) if isinstance(logits, np.ndarray) else logits.sigmoid()

    def decode(self, outputs: Sequence[PostOutput], task: TaskLike) -> list[dict[str, Any]]:
        """``{"labels": [names], "scores": {name: probability}}``; the probabilities are independent.

        A label is named at or above its threshold, 0.5 where the task has none.
        """
        scores_BY = self.scores(outputs, task)
        return [
            {
                "labels": [name for name, taken in zip(task.labels, row, strict=True) if taken],
                "scores": dict(zip(task.labels, scores, strict=True)),
            }
            for row, scores in zip(
                self.decided(scores_BY, task).tolist(), scores_BY.tolist(), strict=True
            )
        ]

    def gold(self, targets: Iterable[Any], task: TaskLike) -> list[list[str] | None]:
        rows = (target.tolist() for target in targets)
        return [
            None
            if any(map(math.isnan, row))
            else [name for name, value in zip(task.labels, row, strict=True) if value > 0]
            for row in rows
        ]

    def gold_and_scores(
        self, outputs: Sequence[PostOutput], task: TaskLike
    ) -> tuple[np.ndarray, np.ndarray]:
        """0/1, int64, and probabilities, float32, both (N, Y)."""
        gold, scores = super().gold_and_scores(outputs, task)
        return gold.astype(np.int64), scores

    def compared(
        self, rows: Sequence[Mapping[str, Any]], task: TaskLike
    ) -> tuple[np.ndarray, np.ndarray]:
        tables = (
            [[name in row[key] for name in task.labels] for row in rows]
            for key in ("gold", "labels")
        )
        return tuple(
            np.array(table, dtype=np.int64).reshape(len(rows), len(task.labels)) for table in tables
        )

    def label_ids(self, value: tuple[int, ...]) -> tuple[int, ...]:
        return value

    def score(self, gold: np.ndarray, scores: np.ndarray, task: TaskLike) -> dict[str, float]:
        """The majority baseline predicts the labels that more than half of the posts have."""
        predicted, labels = self.decided(scores, task), task.labels
        common_Y = (gold.sum(axis=0) * 2 > len(gold)).astype(np.int64)
        return (
            {name: METRICS[name](gold, predicted, labels) for name in self.metrics}
            | {
                f"majority/{task.metric}": METRICS[task.metric](
                    gold, np.broadcast_to(common_Y, gold.shape), labels
                )
            }
            | per_class(labels, class_scores(gold, predicted, labels))
        )

    def decided(self, scores: np.ndarray, task: TaskLike) -> np.ndarray:
        """0/1 decisions of probabilities, int64, (N, Y)."""
        # In float64: a threshold must mean the same for a probability that was read back from JSON.
        edges_Y = np.asarray(0.5 if task.thresholds is None else task.thresholds, dtype=np.float64)
        return (scores.astype(np.float64) >= edges_Y).astype(np.int64)


def is_list(value: object) -> bool:
    """True for a cell with several values."""
    return isinstance(value, (list, tuple, set, frozenset, np.ndarray))


def _items(value: Any) -> list[Any]:
    """The single labels in a multi-label cell."""
    if is_list(value):
        return list(value)
    return (
        [item for item in re.split(r"[,;|]", value) if item.strip()]
        if isinstance(value, str)
        else [value]
    )
