"""Texts and pictures of posts on their way through the encoder, and the base of all fusions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from comoe.protocols import Routing


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
class Pictures:
    """Pictures of some rows of text, at most one per row."""

    tokens: Tensor
    """Image tokens (I, R, M) as ``Fusion.project`` gave them; pixels (I, 3, H, W) where the encoder reads these."""
    rows_I: Tensor
    """Row of each, int64; -1 is a blank one that no row may see."""

    @property
    def places_I(self) -> Tensor:
        """The rows, with row 0 for a blank one: it goes there times 0, so that every rank runs the same modules."""
        return self.rows_I.clamp_min(0)

    def real(self, like: Tensor) -> Tensor:
        """1 for a picture and 0 for a blank one, in the type of ``like`` and as many dimensions: (I, 1, ...)."""
        return (self.rows_I >= 0).to(like.dtype).view(-1, *[1] * (like.ndim - 1))

    def take(self, numbers_J: Tensor) -> Pictures:
        """Some of them, each as that of a row of its own."""
        return Pictures(self.tokens[numbers_J], torch.arange(len(numbers_J), device=self.rows_I.device))


@dataclass(frozen=True, slots=True)
class EncoderInputs:
    """What one pass of the encoder reads."""

    arguments: dict[str, Any]
    """By name, as the encoder's forward takes them."""
    mask_BL: Tensor
    """1 on real text tokens."""
    columns: int
    """Tokens per row that the encoder sees, N; text has the first L of them as far as it is real."""
    image_index_Z: Tensor | None = None
    """Positions of the image tokens of real pictures in the flattened (B * N), int64."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What one pass of the encoder made of texts and pictures."""

    states_BLM: Tensor
    """The encoder's last states of the text."""
    fused_BLM: Tensor
    """The states that the heads read; where no fusion follows the encoder the same."""
    routings: tuple[Routing, ...]
    """Per layer with experts; rows are text tokens."""
    token_rows_S: Tensor
    """Row of each of these."""
    picks: tuple[Tensor, ...]
    """Experts picked per layer, for all tokens that were routed."""


class ImageProjection(nn.Module):
    """Image tokens in the width of text: norm (towers differ in scale), then a linear layer."""

    def __init__(self, image_width: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(image_width)
        self.linear = nn.Linear(image_width, width)

    def forward(self, tokens_IRV: Tensor) -> Tensor:
        """(I, R, V) to (I, R, M)."""
        return self.linear(self.norm(tokens_IRV.to(self.linear.weight.dtype)))


class Fusion(nn.Module):
    """How text and picture come together. The base does nothing with a picture.

    Every fusion leaves the shape of the text alone: task heads pool, or label, text tokens that have seen the picture.
    A post without one comes out as its text alone would. ``before`` may change what the encoder reads, ``after`` what
    it answered; each fusion uses one of the two.

    Attributes:
        in_encoder: the encoder itself reads the image tokens; another text then takes another pass of it.
        image_width: width of projected image tokens, None where the encoder reads pixels.
    """

    in_encoder = False
    image_width: int | None = None

    def project(self, tokens: Tensor) -> Tensor:
        """What ``Pictures.tokens`` holds, from the tower's tokens or from pixels."""
        return tokens

    def before(self, inputs: EncoderInputs, pictures: Pictures) -> EncoderInputs:
        """What the encoder is to read."""
        return inputs

    def after(self, hidden_BLM: Tensor, mask_BL: Tensor, pictures: Pictures) -> Tensor:
        """The states that all task heads read, from the encoder's."""
        return hidden_BLM
