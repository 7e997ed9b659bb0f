"""What one pass of the encoder reads and returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from comoe.types import Routing


@dataclass(frozen=True, slots=True)
class FanOut:
    """Which of U distinct texts each of B rows reads.

    A gate that reads the task wants a row per (post, task). What lies below the first such gate is
    the same in all rows of a post, so it runs once per text.
    """

    texts_B: Tensor
    """Number of the text, int64."""
    num_texts: int
    """U, less than B."""

    def to_rows(self, value: Any) -> Any:
        """What is per text, per row: states (U, N, M), masks (U, N) or (U, ., N, N), position
        biases (U, heads, N, N). All else, such as what is per row already, as it is."""
        if not isinstance(value, Tensor) or value.ndim < 2 or len(value) != self.num_texts:
            return value
        # Two dimensions of floating-point numbers are a table of the encoder. DeBERTa's relative
        # positions (1, N, N) are of all texts; of a single one they only look like its own.
        is_table = value.ndim == 2 and value.is_floating_point()
        if is_table or (value.ndim == 3 and value.dtype == torch.int64):
            return value
        return value.index_select(0, self.texts_B)


@dataclass(frozen=True, slots=True)
class TaskRows:
    """Which of B rows go through the copy of a layer that each task has."""

    of_task: tuple[Tensor, ...]
    """Rows of each task, int64; the first row for a task that has none."""
    places_B: Tensor
    """Where each row's result lies among those of all tasks, one task behind the other, int64."""

    @classmethod
    def of(cls, tasks_B: Tensor, num_tasks: int) -> TaskRows:
        """Sort rows by their task."""
        order_B = tasks_B.argsort(stable=True)
        # A device-to-host wait: numbers of rows decide shapes.
        counts = tasks_B.bincount(minlength=num_tasks).tolist()
        of_task = [rows if len(rows) else rows.new_zeros(1) for rows in order_B.split(counts)]
        places, start = [], 0
        for count in counts:
            places.append(torch.arange(start, start + count, device=tasks_B.device))
            start += max(1, count)
        return cls(tuple(of_task), torch.cat(places)[order_B.argsort()])

    def together(self, parts: Sequence[Any]) -> Any:
        """The outputs of all copies as one of all rows; what is not per row is the first one's."""
        if isinstance(parts[0], tuple):
            return tuple(self.together(part) for part in zip(*parts, strict=True))
        per_row = isinstance(parts[0], Tensor) and all(
            len(part) == len(rows) for part, rows in zip(parts, self.of_task, strict=True)
        )
        return torch.cat(list(parts)).index_select(0, self.places_B) if per_row else parts[0]


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts as one pass of the encoder reads them."""

    ids_BL: Tensor
    """Token ids."""
    mask_BL: Tensor
    """1 on real tokens."""
    segments_BL: Tensor | None
    """Segment ids."""
    tasks_B: Tensor
    """Task of each row, -1 for all."""
    weights_B: Tensor | None = None
    """Weight of what the encoder reads of each row, None for all 1."""
    numbers_B: Tensor | None = None
    """Rows with the same number have the same ids and segments; None where each has its own."""
    draws_B: Tensor | None = None
    """As in ``RoutingContext``."""
    lexicon_BLK: Tensor | None = None
    """As in ``Batch``."""

    def take(self, rows: Tensor) -> Texts:
        """Some of them."""
        lexicon = None if self.lexicon_BLK is None else self.lexicon_BLK[rows]
        segments = None if self.segments_BL is None else self.segments_BL[rows]
        weights = None if self.weights_B is None else self.weights_B[rows]
        numbers = None if self.numbers_B is None else self.numbers_B[rows]
        draws = None if self.draws_B is None else self.draws_B[rows]
        own = (self.ids_BL[rows], self.mask_BL[rows], segments, self.tasks_B[rows])
        return Texts(*own, weights, numbers, draws, lexicon)

    def beginning(self) -> Texts:
        """The first token of each, which with encoders is a sign that all texts begin with."""
        segments = None if self.segments_BL is None else self.segments_BL[:, :1]
        first = (self.ids_BL[:, :1], self.mask_BL[:, :1], segments, self.tasks_B)
        return Texts(*first, self.weights_B, None, self.draws_B)

    def distinct(self) -> tuple[Texts, FanOut | None]:
        """Each text once, and which one each row has; themselves and None where each has its own.

        So too where rows have weights, which their embeddings are multiplied by.
        """
        if self.numbers_B is None or self.weights_B is not None:
            return self, None
        numbers_U, texts_B = self.numbers_B.unique(return_inverse=True)
        if len(numbers_U) == len(texts_B):
            return self, None
        rows_B = torch.arange(len(texts_B), device=texts_B.device)
        first_U = rows_B.new_zeros(len(numbers_U)).scatter_reduce(
            0, texts_B, rows_B, "amin", include_self=False
        )
        return self.take(first_U), FanOut(texts_B, len(numbers_U))


@dataclass(frozen=True, slots=True)
class EncoderInputs:
    """What one pass of the encoder reads."""

    arguments: dict[str, Any]
    """By name, as the encoder's forward takes them."""
    mask_BL: Tensor
    """1 on real text tokens."""
    columns: int
    """Tokens per row that the encoder sees, N; text has the first L of them as far as it is
    real."""
    image_index_Z: Tensor | None = None
    """Positions in the flattened (B * N), int64, of the image tokens of real images, or of the
    labels that a decoder-only model scores behind the texts."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """What one pass of the encoder made of texts and images."""

    states_BLM: Tensor
    """The encoder's last states of the text."""
    fused_BLM: Tensor
    """The states that the heads read; where no fusion follows the encoder the same."""
    routings: tuple[Routing, ...]
    """Per layer with experts; rows are text tokens."""
    token_rows_S: Tensor
    """Row of each of these."""
    selected: tuple[Tensor, ...]
    """Experts selected per layer, for all tokens that were routed."""
    whole_BNM: Tensor
    """The last states of all columns: texts, and what stands behind them."""
    shared_BLM: Tensor
    """The last states of the text that all tasks share: where tasks have layers of their own, what
    the first of these reads; else those of ``fused_BLM``."""
    lower: tuple[Tensor, ...] = ()
    """Where heads mix layers: the states of the text that each layer reads, (B, L, M)."""
    distance: Tensor | None = None
    """Of the tasks' own layers, the sum of ``OwnLayer.distance``; None where it is not measured."""
