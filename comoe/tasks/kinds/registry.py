"""The table of all kinds; and the kind without labels: plain posts, which only the contrastive loss learns from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from comoe.deferred import Deferred
from comoe.tasks.kinds.base import Kind, PostOutput, TaskLike
from comoe.tasks.kinds.classification import MultiLabel, SingleLabel
from comoe.tasks.kinds.generation import LabelWords, Text
from comoe.tasks.kinds.masked import MaskedWords
from comoe.tasks.kinds.regression import Regression
from comoe.tasks.kinds.tagging import Phrases, Tags
from comoe.types import IGNORED

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = Deferred("torch")


class Unlabelled(Kind):
    """Posts without label: no loss of its own, no prediction, no score. Parsed: 0, whatever the
    cell. Alike: two dropout views of one post (SimCLR, arXiv:2002.05709)."""

    scored = False
    metrics = ("none",)

    def num_outputs(self, labels: Sequence[str]) -> int:
        return 0

    def parse(self, value: object, labels: Sequence[str]) -> int:
        return 0

    def normalizer(self, targets: Tensor, task: TaskLike) -> Tensor:
        """Nothing: the task counts as absent from every batch."""
        return torch.zeros((), dtype=torch.float64, device=targets.device)

    def loss(
        self, logits: Tensor, targets: Tensor, task: TaskLike, weights_B: Tensor | None = None
    ) -> Tensor:
        return logits.float().sum()

    def decode(self, outputs: Sequence[PostOutput], task: TaskLike) -> list[dict[str, Any]]:
        return [{} for _ in outputs]

    def gold(self, targets: Iterable[Any], task: TaskLike) -> list[str | None]:
        return [None if target == IGNORED else "no label" for target in targets]

    def compared(
        self, rows: Sequence[Mapping[str, Any]], task: TaskLike
    ) -> tuple[list[Any], list[Any]]:
        return [], []

    def score(self, gold: Any, scores: Any, task: TaskLike) -> dict[str, float]:
        return {}


KINDS: dict[str, Kind] = {
    "single_label": SingleLabel(),
    "multi_label": MultiLabel(),
    "regression": Regression(),
    "tags": Tags(),
    "phrases": Phrases(),
    "unlabelled": Unlabelled(),
    "masked_words": MaskedWords(),
    "text": Text(),
    "label_words": LabelWords(),
}
