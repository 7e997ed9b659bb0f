"""What a kind of task must know: how to read a cell, how to lose, how to answer, how to be scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from comoe.tasks.metrics import METRICS
from comoe.types import IGNORED, Batch, ModelOutput


class TaskLike(Protocol):
    """What a kind reads of a task; ``comoe.tasks.task.Task`` is one."""

    @property
    def name(self) -> str: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def metric(self) -> str: ...
    @property
    def class_weights(self) -> tuple[float, ...] | None: ...
    @property
    def label_smoothing(self) -> float: ...
    @property
    def contrastive_width(self) -> float | None: ...
    @property
    def temperature(self) -> float | None: ...
    @property
    def thresholds(self) -> tuple[float, ...] | None: ...


class PostOutput(NamedTuple):
    """What the model gives one post for one task: plain NumPy and text, so that it can travel between ranks."""

    row: int
    """Index of the post in its split."""
    logits: Any
    """(Y,), (1,) for a number, (words, Y) for a kind that labels words, float32; ``GeneratedText``
    for a free text."""
    target: Any
    """The label as in ``Batch.labels``: (), (Y,) or (words,); of a free text (its tokens, the
    text), or None."""


Detokenize = Callable[[Tensor], list[str]]
"""Token ids as in ``ModelOutput.generated`` -> texts."""


class Kind(ABC):
    """Rules of one kind of task. All methods are pure; an instance holds nothing.

    ``loss`` and ``units`` are sums over rows: over any partition of the rows they add up to those
    of the whole. So a task's mean loss, ``sum of losses / sum of units`` over all ranks, does not
    depend on how posts fall on ranks.
    """

    per_token: ClassVar[bool] = False
    """True when the head answers each word instead of the post."""
    scored: ClassVar[bool] = True
    """False when there is no answer: nothing to evaluate, to predict or to choose a checkpoint
    by."""
    contrastive: ClassVar[bool] = True
    """What ``tasks.<name>.contrastive: auto`` means."""
    views: ClassVar[bool] = False
    """True when the contrastive loss has two dropout views of one post as positives; then there are
    no keys."""
    graded: ClassVar[bool] = False
    """True when posts with different keys can be alike; else ``affinity`` is 1 for equal keys and 0
    for others."""
    exclusive: ClassVar[bool] = False
    """True when a post has one label of several, so that posts can be drawn by it."""
    generates: ClassVar[bool] = False
    """True when the decoder of an encoder-decoder answers: no head, and a row of its own per post,
    with its prompt."""
    ragged: ClassVar[bool] = False
    """True when answers and targets of two posts differ in length."""
    free_words: ClassVar[bool] = False
    """True when labels name words of the post and not its places, so that it can be split into
    words anyhow."""
    weighted: ClassVar[bool] = True
    """True when class weights have a meaning, and label smoothing too unless a decoder answers."""
    min_labels: ClassVar[int] = 0
    """Fewest labels that leave something to learn."""
    metrics: ClassVar[tuple[str, ...]] = ()
    """Metrics that this kind can be measured by, keys of ``METRICS``; the first one is what
    ``metric: auto`` means."""

    @property
    def pooled(self) -> bool:
        """True when the head reads one vector per post."""
        return not (self.per_token or self.generates)

    def num_outputs(self, labels: Sequence[str]) -> int:
        """Width of the head; 0 without one, but for labels that a decoder scores."""
        return len(labels)

    def num_keys(self, labels: Sequence[str]) -> int:
        """Numbers in a key K, see ``keys``."""
        return 0

    def keys(self, targets: Tensor) -> Tensor:
        """What the contrastive loss must know of the labels of labelled rows, (N, K), float32.

        They travel between ranks as float32, so whole numbers must be below 2^24.
        """
        return targets.new_zeros((len(targets), 0), dtype=torch.float32)

    def affinity(self, keys_NK: Tensor, keys_UK: Tensor, task: TaskLike) -> Tensor:
        """How alike posts with these keys are: (N, U), in [0, 1], symmetric; the weight of a positive."""
        return (keys_NK[:, None] == keys_UK).all(dim=-1).to(keys_NK.dtype)

    @abstractmethod
    def discover(self, values: Iterable[object]) -> tuple[str, ...]:
        """Label names in the raw cells of the training split, in natural order; none for numbers."""

    @abstractmethod
    def parse(self, value: object, labels: Sequence[str]) -> Any:
        """One raw cell as training wants it; None when it is missing (None, NaN, blank).

        Raises:
            ValueError: no such label (with the nearest name), or not a value of this kind.
        """

    def split(self, text: str) -> list[str]:
        """A text as the words that this kind answers."""
        return text.split()

    def fitted(self, parsed: Any, words: Sequence[str]) -> Any:
        """What ``parse`` gave, as it is learned for a post of these words (none for a post as plain text).

        Raises:
            ValueError: it does not fit these words.
        """
        return parsed

    def collate(self, values: Sequence[Any], *, labels: Sequence[str], length: int) -> Tensor:
        """Parsed cells as the target tensor that ``Batch.labels`` documents; ``length`` is L, for tags."""
        return torch.tensor(
            [IGNORED if value is None else value for value in values], dtype=torch.int64
        )

    def labelled(self, targets: Tensor) -> Tensor:
        """True for each row that has a label, bool, shape (B,)."""
        return targets != IGNORED

    def units(self, targets: Tensor, task: TaskLike) -> Tensor:
        """What ``loss`` is divided by to be a mean, float64 scalar: labelled rows (words, for tags), weighted alike."""
        return self.labelled(targets).sum(dtype=torch.float64)

    @abstractmethod
    def loss(
        self, logits: Tensor, targets: Tensor, task: TaskLike, weights_B: Tensor | None = None
    ) -> Tensor:
        """Sum of the losses of the labelled rows (words, for tags), scalar, float32, in nats or squared label units.

        ``weights_B`` multiplies each row's part of the sum, float32; ones give the same bits as
        None.

        Zero, finite and connected to ``logits`` when nothing is labelled: each rank must give each
        head a gradient.
        """

    def outputs(
        self,
        output: ModelOutput,
        batch: Batch,
        rows: Sequence[int],
        *,
        task: TaskLike,
        detokenize: Detokenize | None = None,
    ) -> list[PostOutput]:
        """Some rows of a batch, in their order; ``detokenize`` is needed for free texts alone."""
        logits, targets = self._of_rows(output, batch, rows, task)
        return [
            PostOutput(*each)
            for each in zip(
                batch.row_ids_B[rows].tolist(), logits.numpy(), targets.numpy(), strict=True
            )
        ]

    def _of_rows(
        self, output: ModelOutput, batch: Batch, rows: Sequence[int], task: TaskLike
    ) -> tuple[Tensor, Tensor]:
        """Logits, float32, and targets of some rows, on the CPU."""
        logits = output.logits[task.name].detach()[rows].float().cpu()
        return logits, batch.labels[task.name][rows].cpu()

    def stack(self, outputs: Sequence[PostOutput], task: TaskLike) -> tuple[Tensor, Tensor]:
        """Logits and targets as ``loss`` and ``units`` take them."""
        if not outputs:
            empty = torch.zeros(0, self.num_outputs(task.labels))
            return empty, self.collate([], labels=task.labels, length=0)
        logits = torch.stack([torch.as_tensor(output.logits) for output in outputs])
        return logits, torch.stack([torch.as_tensor(output.target) for output in outputs])

    def probabilities(self, logits: Tensor) -> Tensor:
        """What the metrics read of tempered logits: probabilities, or numbers as they are."""
        return logits.softmax(-1)

    @abstractmethod
    def decode(self, outputs: Sequence[PostOutput], task: TaskLike) -> list[dict[str, Any]]:
        """One plain dict per post, as users see it."""

    @abstractmethod
    def gold(self, targets: Iterable[Any], task: TaskLike) -> list[Any]:
        """Targets (of ``Batch.labels``, or of ``PostOutput``) in the words of ``decode``, None without a label."""

    def gold_and_scores(self, outputs: Sequence[PostOutput], task: TaskLike) -> tuple[Any, Any]:
        """Of the labelled posts, in order: gold and ``probabilities``; for tags lists of an array per post."""
        logits, targets = self.stack(outputs, task)
        present = self.labelled(targets)
        scores = self.probabilities(tempered(logits[present], task))
        return targets[present].numpy(), scores.numpy()

    @abstractmethod
    def compared(self, rows: Sequence[Mapping[str, Any]], task: TaskLike) -> tuple[Any, Any]:
        """(gold, predicted), decided, of written predictions: ids, 0/1 rows, or numbers; for tags one id array per row.

        Args:
            rows: of ``predictions/<split>/<task>.jsonl``: the dicts of ``decode``, and ``gold``,
                which is never None.
            task: the task.
        """

    def measure(self, gold: Any, predicted: Any, task: TaskLike) -> float:
        """The task's main metric of what ``compared`` gave, or of a part of it."""
        return METRICS[task.metric](gold, predicted, task.labels)

    @abstractmethod
    def score(self, gold: Any, scores: Any, task: TaskLike) -> dict[str, float]:
        """Every metric of this kind, those per class, and ``majority/<metric>``: its value for one answer to all posts.

        The same keys for any rows, also for none; no value is NaN on finite scores.
        """

    def label_ids(self, value: Any) -> tuple[int, ...]:
        """Labels of one parsed cell that other posts may share, for batches in which every label has a pair."""
        return ()

    def confusion(self, gold: Any, scores: Any, task: TaskLike) -> np.ndarray | None:
        """Counts of (gold, predicted), int64, shape (Y, Y); None where labels do not exclude one another."""
        return None


def weights_of(task: TaskLike, like: Tensor) -> Tensor | None:
    """The task's class weights, shape (Y,), on the device and in the dtype of ``like``; None when it has none."""
    if task.class_weights is None:
        return None
    return torch.tensor(task.class_weights, dtype=like.dtype, device=like.device)


def tempered(logits: Tensor, task: TaskLike) -> Tensor:
    """Logits whose probabilities users see: over the task's temperature, where one was fitted; float32, detached."""
    logits = logits.detach().float()
    return logits if task.temperature is None else logits / task.temperature


def class_units(targets: Tensor, task: TaskLike) -> Tensor:
    """Sum of the class weights of the labelled targets, their number where there are none. Scalar, float64."""
    present = targets != IGNORED
    weights_Y = weights_of(task, torch.empty(0, dtype=torch.float64, device=targets.device))
    if weights_Y is None:
        return present.sum(dtype=torch.float64)
    return (weights_Y[targets.clamp(min=0)] * present).sum()


def class_loss(
    logits: Tensor, targets: Tensor, task: TaskLike, weights_B: Tensor | None = None
) -> Tensor:
    """Sum of the cross-entropies of the labelled targets, with class weights and smoothing, float32 scalar, in nats.

    Args:
        logits: shape (..., Y), any float type.
        targets: label ids or IGNORED, int64, shape (B, ...).
        task: the task.
        weights_B: of each row, None for all 1.
    """
    flat = logits.float().reshape(-1, logits.shape[-1])
    weights_Y, flat_targets = weights_of(task, flat), targets.reshape(-1)
    kwargs = {"weight": weights_Y, "ignore_index": IGNORED, "reduction": "sum"}
    if weights_B is None:
        return F.cross_entropy(flat, flat_targets, label_smoothing=task.label_smoothing, **kwargs)
    # What torch's cross-entropy is made of, in its order, so that weights of 1 change no bit: a
    # weighted row is one with weighted log-probabilities.
    rows = (
        weights_B.to(flat.dtype)
        .view(-1, *[1] * (targets.ndim - 1))
        .expand_as(targets)
        .reshape(-1, 1)
    )
    scores = F.log_softmax(flat, dim=1) * rows
    likely = F.nll_loss(scores, flat_targets, **kwargs)
    if not task.label_smoothing:
        return likely
    even = -(scores if weights_Y is None else scores * weights_Y).sum(dim=1)
    even = even.masked_fill(flat_targets == IGNORED, 0.0).sum()
    return likely * (1 - task.label_smoothing) + even * (task.label_smoothing / flat.shape[1])


def weighted_sum(losses_B: Tensor, weights_B: Tensor | None) -> Tensor:
    """Sum over rows, each times its weight where there are weights."""
    return (losses_B if weights_B is None else losses_B * weights_B).sum()


def per_class(
    names: Sequence[str], scores: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> dict[str, float]:
    """``precision/<label>``, ``recall/<label>``, ``f1/<label>`` from arrays of shape (Y,)."""
    return {
        f"{measure}/{name}": float(value)
        for measure, values in zip(("precision", "recall", "f1"), scores, strict=True)
        for name, value in zip(names, values, strict=True)
    }
