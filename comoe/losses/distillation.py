"""Soft labels beside gold ones: what share each has of a task's loss.

Sources: Hinton et al. 2015, arXiv:1503.02531 (soft labels, temperature); Clark et al. 2019, BAM,
arXiv:1907.04829 (one student of several single-task teachers, annealing).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from comoe.config.recipe import DistillConfig
from comoe.tasks.task import Task
from comoe.types import Batch


@dataclass(frozen=True, slots=True)
class SoftLoss:
    """The loss of a task with soft labels: mean over posts with a soft label + w mean over posts with a gold one.

    Without annealing w is ``gold_weight``. With it w = p, the share of the steps that are done, and
    the soft loss of a post that has a gold label weighs 1 - p: so both together are BAM's mixture
    of targets, and a post without a gold label is learned from the teacher to the end.
    """

    config: DistillConfig

    def gold_weight(self, batch: Batch) -> float:
        """w."""
        return batch.progress if self._anneals else self.config.gold_weight

    def __call__(self, logits: Tensor, batch: Batch, task: Task) -> Tensor:
        """Sum over the rows (words, for tags) with a soft label of this micro-batch, scalar, float32."""
        weights_B = None
        if self._anneals:
            gold_B = task.rules.labelled(batch.labels[task.name])
            weights_B = 1.0 - batch.progress * gold_B.float()
        return task.rules.soft_loss(
            logits,
            batch.soft_labels[task.name],
            task,
            weights_B,
            temperature=self.config.temperature,
        )

    @property
    def _anneals(self) -> bool:
        return self.config.annealing == "linear"
