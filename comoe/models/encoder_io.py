"""What one pass of the encoder reads and returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from comoe.types import Routing


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

    def take(self, rows: Tensor) -> Texts:
        """Some of them."""
        segments = None if self.segments_BL is None else self.segments_BL[rows]
        weights = None if self.weights_B is None else self.weights_B[rows]
        return Texts(self.ids_BL[rows], self.mask_BL[rows], segments, self.tasks_B[rows], weights)


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
    """Positions of the image tokens of real images in the flattened (B * N), int64."""


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
