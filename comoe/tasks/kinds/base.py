"""What a kind of task knows: its cells, targets, loss, rows of a batch, predictions and metrics."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np

from comoe.deferred import Deferred
from comoe.tasks.labels import is_missing, soft_cell
from comoe.tasks.metrics import METRICS
from comoe.types import IGNORED, Batch, ModelOutput

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
else:
    torch = Deferred("torch")
    F = Deferred("torch.nn.functional")

Mode = Literal["pooled", "tokens", "decoder", "masked"]

OWN_ROWS: tuple[Mode, ...] = ("decoder", "masked")
"""Modes in which a task has a row of its own of a post, which no other task reads."""

SMALLEST = 1e-30
"""Probability that a soft label of 0 counts as where its logarithm is needed."""


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
    def label_mean(self) -> float: ...
    @property
    def label_std(self) -> float: ...
    @property
    def temperature(self) -> float | None: ...
    @property
    def thresholds(self) -> tuple[float, ...] | None: ...


class PostOutput(NamedTuple):
    """What the model gives one post for one task; plain NumPy and text, to travel between ranks."""

    row: int
    """Index of the post in its split."""
    logits: Any
    """(Y,), (1,) for a number, (words, Y) for a kind that labels words, float32; ``GeneratedText``
    for a free text."""
    target: Any
    """The label as in ``Batch.labels``: (), (Y,) or (words,); of a free text (its tokens, the
    text), or None."""
    plain: bool = False
    """NumPy decodes it, in float64, instead of PyTorch in float32: it is of an ONNX file, which
    needs no PyTorch."""


Detokenize = Callable[["Tensor"], list[str]]
"""Token ids as in ``ModelOutput.generated`` -> texts."""


class Kind(ABC):
    """Rules of one kind of task. All methods are pure; an instance holds nothing.

    ``loss`` and ``normalizer`` are sums over rows: over any partition of the rows they add up to
    those of the whole. So a task's mean loss, ``sum of losses / sum of normalizers`` over all
    ranks, does not depend on how posts fall on ranks.
    """

    mode: ClassVar[Mode] = "pooled"
    """What gives the output. ``pooled``: a head on one vector per post, whose weights explain it;
    ``tokens``: a head on each word; ``decoder``: no head, but a decoder, with a row of its own
    per post and task, which has the task's prompt; ``masked``: a head on the words that are hidden
    from the encoder in a row of its own per post and task."""
    scored: ClassVar[bool] = True
    """False when there is no output: nothing to evaluate, to predict or to choose a checkpoint
    by."""
    predicts: ClassVar[bool] = True
    """False when nothing is said of a post: no column of labels is read, every post is learned
    from, and a prediction leaves the task out."""
    exclusive: ClassVar[bool] = False
    """True when a post has one label of several, so that posts can be drawn by it."""
    min_labels: ClassVar[int] = 0
    """Fewest labels that leave something to learn; 0 for kinds without labels, whose class weights
    and label smoothing would mean nothing."""
    soft: ClassVar[str] = ""
    """What a soft label is: a task can be distilled into one whose kind says the same. Empty where
    there is none."""
    metrics: ClassVar[tuple[str, ...]] = ()
    """Metrics that this kind can be measured by, keys of ``METRICS``; the first one is what
    ``metric: auto`` means."""

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        # A kind of a plugin that only says that nothing is scored has always predicted nothing too.
        own = vars(cls)
        if "scored" in own and "predicts" not in own:
            cls.predicts = cls.scored

    def num_outputs(self, labels: Sequence[str]) -> int:
        """Width of the head; 0 without one, but for labels that a decoder scores."""
        return len(labels)

    def serves(self, task_ids: Any, number: int) -> Any:
        """Whether rows of these ids (of ``Batch.task_ids_B``) are for the task with this number."""
        return (task_ids == number) | ((task_ids == -1) & (self.mode not in OWN_ROWS))

    def num_keys(self, labels: Sequence[str]) -> int:
        """Numbers in a key K, see ``keys``. Without any, the contrastive loss has two dropout views
        of one post as positives."""
        return 0

    def keys(self, targets: Tensor) -> Tensor:
        """What the contrastive loss must know of the labels of labeled rows, (N, K), float32.

        They travel between ranks as float32, so whole numbers must be below 2^24.
        """
        return targets.new_zeros((len(targets), 0), dtype=torch.float32)

    def affinity(self, keys_NK: Tensor, keys_UK: Tensor, task: TaskLike) -> Tensor:
        """How alike posts with these keys are, (N, U), in [0, 1]: the weight of a positive."""
        return (keys_NK[:, None] == keys_UK).all(dim=-1).to(keys_NK.dtype)

    @property
    def graded(self) -> bool:
        """True when posts with different keys can be alike."""
        return type(self).affinity is not Kind.affinity

    def discover(self, values: Iterable[object]) -> tuple[str, ...]:
        """Label names in the raw cells of the training split, in natural order."""
        return ()

    @abstractmethod
    def parse(self, value: object, labels: Sequence[str]) -> Any:
        """One raw cell as training wants it; None when it is missing (None, NaN, blank).

        Raises:
            ValueError: no such label (with the nearest name), or not a value of this kind.
        """

    def parse_soft(self, value: object, labels: Sequence[str]) -> np.ndarray | None:
        """One raw cell of soft labels, float32, (1, Y); None when it is missing.

        Raises:
            ValueError: not one number of at least 0 per label, or not what this kind takes.
        """
        return None if is_missing(value) else soft_cell(value, labels)[None]

    def fitted(self, parsed: Any, words: Sequence[str]) -> Any:
        """What ``parse`` gave, for a post of these words (none for a post as plain text).

        Raises:
            ValueError: it does not fit these words.
        """
        return parsed

    def at_tokens(self, value: Any, word_ids_L: np.ndarray, word_starts_L: np.ndarray) -> Any:
        """What ``fitted`` gave, as ``collate`` takes it for a row of these tokens.

        Args:
            value: of one post, not missing.
            word_ids_L: number of the word that each token belongs to, -1 for none.
            word_starts_L: True on the first piece of each word.
        """
        return value

    def collate(self, values: Sequence[Any], *, labels: Sequence[str], length: int) -> Tensor:
        """Parsed cells as the target tensor of ``Batch.labels``; ``length`` is L, for tags."""
        return torch.tensor(
            [IGNORED if value is None else value for value in values], dtype=torch.int64
        )

    def labelled(self, targets: Tensor) -> Tensor:
        """True for each row that has a label, bool, shape (B,)."""
        return targets != IGNORED

    def normalizer(self, targets: Tensor, task: TaskLike) -> Tensor:
        """What makes ``loss`` a mean, float64 scalar: the number of labeled rows (tags: words)."""
        return self.labelled(targets).sum(dtype=torch.float64)

    @abstractmethod
    def loss(
        self, logits: Tensor, targets: Tensor, task: TaskLike, weights_B: Tensor | None = None
    ) -> Tensor:
        """Sum over the labeled rows (words, for tags), scalar, float32, nats or squared label_std.

        ``weights_B`` multiplies each row's part of the sum, float32; ones give the same bits as
        None.

        Zero, finite and connected to ``logits`` when nothing is labeled: each rank must give each
        head a gradient.
        """

    def soft_labels(self, logits: Tensor, task: TaskLike) -> Tensor:
        """What a teacher with these logits, (..., Y), says: probabilities as it was trained to give
        them, before calibration, or numbers in the unit of the labels; of the same shape,
        float32."""
        return self.probabilities(logits.detach().float())

    def collate_soft(
        self, values: Sequence[np.ndarray | None], *, labels: Sequence[str], length: int
    ) -> Tensor:
        """Soft labels as in ``Batch.soft_labels``, NaN where there are none.

        Args:
            values: (1, Y) of each row; of a task that labels words (words, Y), at its first pieces.
            labels: of the task.
            length: L.
        """
        soft = torch.full((len(values), self.num_outputs(labels)), math.nan)
        for row, value in enumerate(values):
            if value is not None:
                soft[row] = torch.from_numpy(value[0])
        return soft

    def soft_present(self, soft: Tensor) -> Tensor:
        """Which rows (words, for tags) have a soft label, bool."""
        return ~soft.isnan().any(dim=-1)

    def soft_units(self, soft: Tensor) -> Tensor:
        """Number of rows (words) with a soft label, float64 scalar."""
        return self.soft_present(soft).sum(dtype=torch.float64)

    def soft_losses(
        self, logits: Tensor, soft: Tensor, task: TaskLike, *, temperature: float = 1.0
    ) -> Tensor:
        """Loss of each row (word) against its soft label, float32; 0, connected to ``logits``,
        where there is none.

        Cross-entropy with the soft label, both at a temperature T, times T^2, in nats: softmax(z/T)
        against p^(1/T), scaled to sum to 1. Class weights and smoothing are for gold labels.

        Source: Hinton et al. 2015, arXiv:1503.02531.
        """
        present = self.soft_present(soft)
        soft = torch.where(present[..., None], soft, 1.0).float()
        if temperature != 1.0:
            soft = (soft.clamp_min(SMALLEST).log() / temperature).softmax(dim=-1)
        losses = -(soft * F.log_softmax(logits.float() / temperature, dim=-1)).sum(dim=-1)
        return torch.where(present, losses, 0.0 * losses) * temperature**2

    def soft_logits(self, soft: Tensor, task: TaskLike) -> Tensor:
        """Logits that have these soft labels."""
        return soft.clamp_min(SMALLEST).log()

    def soft_loss(
        self,
        logits: Tensor,
        soft: Tensor,
        task: TaskLike,
        weights_B: Tensor | None = None,
        *,
        temperature: float = 1.0,
    ) -> Tensor:
        """Sum of ``soft_losses``, each times the weight of its row."""
        losses = self.soft_losses(logits, soft, task, temperature=temperature)
        return weighted_sum(losses.reshape(len(losses), -1).sum(dim=1), weights_B)

    def soft_divergences(self, logits: Tensor, soft: Tensor, task: TaskLike) -> Tensor:
        """Kullback-Leibler divergence of each row (word) from its soft label, nats, float32."""
        # Where there is no soft label its NaN must not come back as a logit.
        least = self.soft_losses(self.soft_logits(soft, task).nan_to_num(), soft, task)
        return self.soft_losses(logits, soft, task) - least

    def disagreements(self, one: Tensor, other: Tensor) -> Tensor:
        """KL(p || q) + KL(q || p) of two predictions of each row (word), nats, float32, not negative.

        Of logits a, b of one exponential family it is (mean(a) - mean(b)) (a - b): the normalizers
        cancel. Both get a gradient.

        Args:
            one, other: logits, (..., Y).
        """
        one, other = one.float(), other.float()
        return ((one.softmax(-1) - other.softmax(-1)) * (one - other)).sum(dim=-1)

    def outputs(
        self,
        output: ModelOutput,
        batch: Batch,
        rows: Sequence[int],
        *,
        task: TaskLike,
        detokenize: Detokenize | None = None,
    ) -> list[PostOutput]:
        """Some rows of a batch, in their order; of tags the first piece of each word. Free texts
        need ``detokenize``."""
        logits, posts = output.logits[task.name], batch.row_ids_B[rows].tolist()
        if isinstance(logits, np.ndarray):
            starts = batch.word_starts_BL[rows] if self.mode == "tokens" else [...] * len(rows)
            each = zip(posts, logits[rows], starts, strict=True)
            return [
                PostOutput(post, of_row[words], None, plain=True) for post, of_row, words in each
            ]
        logits, targets = self._of_rows(output, batch, rows, task)
        each = zip(posts, logits.numpy(), targets.numpy(), strict=True)
        if self.mode != "tokens":
            return [PostOutput(*row) for row in each]
        starts = batch.word_starts_BL[rows].cpu().numpy()
        return [
            PostOutput(post, logits_LY[words], targets_L[words])
            for (post, logits_LY, targets_L), words in zip(each, starts, strict=True)
        ]

    def _of_rows(
        self, output: ModelOutput, batch: Batch, rows: Sequence[int], task: TaskLike
    ) -> tuple[Tensor, Tensor]:
        """Logits, float32, and targets of some rows, on the CPU."""
        logits = output.logits[task.name].detach()[rows].float().cpu()
        return logits, batch.labels[task.name][rows].cpu()

    def stack(self, outputs: Sequence[PostOutput], task: TaskLike) -> tuple[Tensor, Tensor]:
        """Logits and targets as ``loss`` and ``normalizer`` take them; tags padded to the most words."""
        if not outputs:
            shape = (0, 0) if self.mode == "tokens" else (0,)
            empty = torch.zeros(*shape, self.num_outputs(task.labels))
            return empty, self.collate([], labels=task.labels, length=0)
        logits = [torch.as_tensor(output.logits) for output in outputs]
        targets = [torch.as_tensor(output.target) for output in outputs]
        if self.mode != "tokens":
            return torch.stack(logits), torch.stack(targets)
        pad_sequence = torch.nn.utils.rnn.pad_sequence
        return pad_sequence(logits, batch_first=True), pad_sequence(
            targets, batch_first=True, padding_value=IGNORED
        )

    def probabilities(self, logits: Any) -> Any:
        """What the metrics read of tempered logits, a tensor or an array: probabilities, or numbers as they are."""
        if isinstance(logits, np.ndarray):
            powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
            return powers / powers.sum(axis=-1, keepdims=True)
        return logits.softmax(-1)

    def scores(self, outputs: Sequence[PostOutput], task: TaskLike) -> np.ndarray:
        """``probabilities`` of some posts' tempered logits, float32: (N, Y), of tags (words, Y) of the only post."""
        if outputs and outputs[0].plain:
            join = np.concatenate if self.mode == "tokens" else np.stack
            logits = tempered(join([output.logits for output in outputs]), task)
            with np.errstate(over="ignore", invalid="ignore"):  # as in PyTorch
                return self.probabilities(logits).astype(np.float32)
        if self.mode == "tokens":
            logits = torch.as_tensor(outputs[0].logits)
        else:
            logits, _ = self.stack(outputs, task)
        return self.probabilities(tempered(logits, task)).numpy()

    @abstractmethod
    def decode(self, outputs: Sequence[PostOutput], task: TaskLike) -> list[dict[str, Any]]:
        """One plain dict per post, as users see it."""

    @abstractmethod
    def gold(self, targets: Iterable[Any], task: TaskLike) -> list[Any]:
        """Targets (of ``Batch.labels`` or ``PostOutput``) in the words of ``decode``, or None."""

    def gold_and_scores(self, outputs: Sequence[PostOutput], task: TaskLike) -> tuple[Any, Any]:
        """Gold and ``probabilities`` of the labeled posts; for tags lists of one array per post."""
        logits, targets = self.stack(outputs, task)
        present = self.labelled(targets)
        scores = self.probabilities(tempered(logits[present], task))
        return targets[present].numpy(), scores.numpy()

    @abstractmethod
    def compared(self, rows: Sequence[Mapping[str, Any]], task: TaskLike) -> tuple[Any, Any]:
        """(gold, predicted) of written predictions: ids, 0/1 rows, numbers or texts, or id arrays.

        Args:
            rows: of ``predictions/<split>/<task>.jsonl``: the dicts of ``decode``, and ``gold``,
                which is never None.
            task: the task.
        """

    def decided(self, scores: Any, task: TaskLike) -> Any:
        """Predictions of the scores of ``gold_and_scores``, as ``compared`` has them."""
        return scores

    def measure(self, gold: Any, predicted: Any, task: TaskLike) -> float:
        """The task's main metric of what ``compared`` gave, or of gold and ``decided``, or of a part of these."""
        return METRICS[task.metric](gold, predicted, task.labels)

    @abstractmethod
    def score(self, gold: Any, scores: Any, task: TaskLike) -> dict[str, float]:
        """Every metric of this kind, those per class, and ``majority/<metric>``, of a constant prediction.

        The same keys for any rows, also for none; no value is NaN on finite scores.
        """

    def label_ids(self, value: Any) -> tuple[int, ...]:
        """Labels of one parsed cell, for batches in which every label has a pair."""
        return ()

    def confusion(self, gold: Any, scores: Any, task: TaskLike) -> np.ndarray | None:
        """Counts of (gold, predicted), int64, (Y, Y); None where a post may have several labels."""
        return None


def weights_of(task: TaskLike, like: Tensor) -> Tensor | None:
    """The task's class weights, (Y,), on the device and in the dtype of ``like``; or None."""
    if task.class_weights is None:
        return None
    return torch.tensor(task.class_weights, dtype=like.dtype, device=like.device)


def tempered(logits: Any, task: TaskLike) -> Any:
    """Logits over the task's temperature, where one was fitted; float32, detached; an array in float64."""
    plain = isinstance(logits, np.ndarray)
    logits = logits.astype(np.float64) if plain else logits.detach().float()
    return logits if task.temperature is None else logits / task.temperature


def class_units(targets: Tensor, task: TaskLike) -> Tensor:
    """Sum of the class weights of the labeled targets, or their number. Scalar, float64."""
    present = targets != IGNORED
    weights_Y = weights_of(task, torch.empty(0, dtype=torch.float64, device=targets.device))
    if weights_Y is None:
        return present.sum(dtype=torch.float64)
    return (weights_Y[targets.clamp(min=0)] * present).sum()


def class_loss(
    logits: Tensor, targets: Tensor, task: TaskLike, weights_B: Tensor | None = None
) -> Tensor:
    """Sum of the weighted and smoothed cross-entropies of the labeled targets, float32, nats.

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
