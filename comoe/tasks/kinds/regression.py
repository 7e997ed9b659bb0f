"""The kind of task whose head gives a post a number."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from comoe.deferred import Deferred
from comoe.tasks.kinds.base import Kind, PostOutput, TaskLike, weighted_sum
from comoe.tasks.labels import is_missing
from comoe.tasks.metrics import METRICS

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = Deferred("torch")

LARGEST = float(np.finfo(np.float32).max)

_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")


class Regression(Kind):
    """One number: squared error. Parsed: float. Alike: exp(-|difference| / width).

    Logits and loss are of the standardized label, (label - label_mean) / label_std; all else is in
    the unit of the labels.
    """

    soft = "a number"
    metrics = ("pearson", "spearman", "mae")

    def num_outputs(self, labels: Sequence[str]) -> int:
        return 1

    def num_keys(self, labels: Sequence[str]) -> int:
        return 1

    def keys(self, targets: Tensor) -> Tensor:
        return targets[:, None].float()

    def affinity(self, keys_NK: Tensor, keys_UK: Tensor, task: TaskLike) -> Tensor:
        distances_NU = (keys_NK - keys_UK[:, 0]).abs_()
        return distances_NU.mul_(-1.0 / (task.contrastive_width or 1.0)).exp_()

    def parse(self, value: object, labels: Sequence[str]) -> float | None:
        if is_missing(value):
            return None
        # float() would also take "nan", "inf", "1_000" and True.
        numeric = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
        try:
            number = float(value) if numeric or _NUMBER.fullmatch(str(value)) else math.nan
        except OverflowError:
            number = math.inf
        # Not NaN either.
        if not abs(number) <= LARGEST:
            raise ValueError(
                f"{value!r} is not a finite number of float32; a regression task wants numbers such as -1.5 or 2e-3."
            )
        return number

    def collate(
        self, values: Sequence[float | None], *, labels: Sequence[str], length: int
    ) -> Tensor:
        return torch.tensor(
            [math.nan if value is None else value for value in values], dtype=torch.float32
        )

    def labelled(self, targets: Tensor) -> Tensor:
        return ~targets.isnan()

    def loss(
        self, logits: Tensor, targets: Tensor, task: TaskLike, weights_B: Tensor | None = None
    ) -> Tensor:
        present = self.labelled(targets)
        targets_B = (targets.float() - task.label_mean) / task.label_std
        errors_B = logits.float()[:, 0] - torch.where(present, targets_B, 0.0)
        return weighted_sum(errors_B.square() * present, weights_B)

    def soft_labels(self, logits: Tensor, task: TaskLike) -> Tensor:
        return unstandardized(logits.detach().float(), task)

    def soft_losses(
        self, logits: Tensor, soft: Tensor, task: TaskLike, *, temperature: float = 1.0
    ) -> Tensor:
        """The squared difference to the teacher's number, as to a gold one: no temperature."""
        present = self.soft_present(soft)
        targets_B = torch.where(present, self.soft_logits(soft, task)[:, 0], 0.0).float()
        return (logits.float()[:, 0] - targets_B).square() * present

    def soft_logits(self, soft: Tensor, task: TaskLike) -> Tensor:
        return (soft - task.label_mean) / task.label_std

    def soft_divergences(self, logits: Tensor, soft: Tensor, task: TaskLike) -> Tensor:
        """Of two normal distributions of standard deviation ``label_std`` around the numbers."""
        return 0.5 * self.soft_losses(logits, soft, task)

    def disagreements(self, one: Tensor, other: Tensor) -> Tensor:
        """Of two normal distributions as in ``soft_divergences``."""
        return (one.float() - other.float())[..., 0].square()

    def probabilities(self, logits: Any) -> Any:
        return logits[:, 0]

    def decode(self, outputs: Sequence[PostOutput], task: TaskLike) -> list[dict[str, Any]]:
        """``{"value": number}``, in the unit of the labels."""
        values_N = unstandardized(self.scores(outputs, task), task)
        return [{"value": value} for value in values_N.tolist()]

    def gold_and_scores(self, outputs: Sequence[PostOutput], task: TaskLike) -> tuple[Any, Any]:
        gold, scores_N = super().gold_and_scores(outputs, task)
        return gold, unstandardized(scores_N, task)

    def gold(self, targets: Iterable[Any], task: TaskLike) -> list[float | None]:
        return [None if math.isnan(target) else float(target) for target in targets]

    def compared(
        self, rows: Sequence[Mapping[str, Any]], task: TaskLike
    ) -> tuple[np.ndarray, np.ndarray]:
        return tuple(
            np.array([row[key] for row in rows], dtype=np.float64) for key in ("gold", "value")
        )

    def score(self, gold: np.ndarray, scores: np.ndarray, task: TaskLike) -> dict[str, float]:
        """The baseline predicts the mean, which correlates with nothing: ``mae`` is given too."""
        mean = np.full_like(gold, gold.mean() if len(gold) else 0.0)
        baselines = {
            f"majority/{name}": METRICS[name](gold, mean, ())
            for name in dict.fromkeys((task.metric, "mae"))
        }
        return {name: METRICS[name](gold, scores, ()) for name in self.metrics} | baselines


def unstandardized(values: Any, task: TaskLike) -> Any:
    """Outputs of the head, an array or a tensor, in the unit of the task's labels."""
    return values * task.label_std + task.label_mean
