"""The kind that learns from plain posts by finding words that are hidden from the encoder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from comoe.deferred import Deferred
from comoe.tasks.kinds.base import Kind, PostOutput, TaskLike, weighted_sum
from comoe.tasks.metrics import METRICS
from comoe.types import IGNORED

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = Deferred("torch")


class MaskedWords(Kind):
    """Hidden words of a post: cross-entropy of each of their tokens. Parsed: 0, whatever the cell.

    ``Batch.labels`` has the number of hidden tokens of each row, ``Batch.masked_ids_BL`` says which
    they are. Logits are (B, 2): the log-probability of a row's hidden tokens, summed, and how many
    of them are the likeliest ones. All that is measured follows from these sums, so that no
    evaluation keeps a vocabulary for each token.

    Source: BERT, arXiv:1810.04805, as adaptation to a domain: Gururangan et al. 2020,
    arXiv:2004.10964.
    """

    mode = "masked"
    predicts = False
    metrics = ("masked_accuracy",)

    def num_outputs(self, labels: Sequence[str]) -> int:
        return 0

    def parse(self, value: object, labels: Sequence[str]) -> int:
        return 0

    def normalizer(self, targets: Tensor, task: TaskLike) -> Tensor:
        """Hidden tokens."""
        return torch.where(self.labelled(targets), targets, 0).sum(dtype=torch.float64)

    def loss(
        self, logits: Tensor, targets: Tensor, task: TaskLike, weights_B: Tensor | None = None
    ) -> Tensor:
        """-log P(hidden tokens | the others), summed over tokens and rows; 0 in rows without any."""
        own_B = logits.float()[:, 0]
        return weighted_sum(-torch.where(self.labelled(targets), own_B, own_B * 0.0), weights_B)

    def stack(self, outputs: Sequence[PostOutput], task: TaskLike) -> tuple[Tensor, Tensor]:
        logits, targets = super().stack(outputs, task)
        return logits.reshape(-1, 2), targets  # also of no post

    def decode(self, outputs: Sequence[PostOutput], task: TaskLike) -> list[dict[str, Any]]:
        """``{"correct": hidden tokens that are found, "log_probability": of all of them, nats}``."""
        rows = [output.logits.tolist() for output in outputs]
        return [{"correct": round(right), "log_probability": logs} for logs, right in rows]

    def gold(self, targets: Iterable[Any], task: TaskLike) -> list[int | None]:
        """Hidden tokens of each post."""
        return [None if target == IGNORED else int(target) for target in targets]

    def gold_and_scores(
        self, outputs: Sequence[PostOutput], task: TaskLike
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of the posts with hidden tokens their number, (N,), and both logits, float64, (N, 2)."""
        present = [output for output in outputs if output.target != IGNORED]
        gold = np.array([int(output.target) for output in present], dtype=np.int64)
        scores = np.array([np.asarray(output.logits) for output in present], dtype=np.float64)
        return gold, scores.reshape(-1, 2)

    def decided(self, scores: np.ndarray, task: TaskLike) -> np.ndarray:
        return scores[:, 1]

    def compared(
        self, rows: Sequence[Mapping[str, Any]], task: TaskLike
    ) -> tuple[np.ndarray, np.ndarray]:
        return tuple(np.array([row[key] for row in rows]) for key in ("gold", "correct"))

    def score(self, gold: np.ndarray, scores: np.ndarray, task: TaskLike) -> dict[str, float]:
        """Accuracy, and the perplexity exp(mean loss); a constant prediction is not measured."""
        loss = -scores[:, 0].sum() / max(1, gold.sum())
        name = self.metrics[0]
        return {
            name: METRICS[name](gold, self.decided(scores, task), ()),
            "perplexity": float(np.exp(min(loss, MOST_NATS))),
        }


MOST_NATS = 700.0
"""Loss above which the perplexity is no number of float64."""
