"""Encoders that read text and pixels in one stream (ViLT)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comoe.models.pictures import EncoderInputs, Fusion, Pictures


class SingleStream(Fusion):
    """ViLT: the encoder reads pixels beside the text. A row without picture masks all of its image tokens.

    Args:
        encoder: a ViLT.
    """

    in_encoder = True

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.patch = encoder.config.patch_size
        embeddings = encoder.embeddings
        # The library's own draws patches at random, and wants a mask of pixels.
        embeddings.visual_embed = partial(_embed_pictures, embeddings)

    def before(self, inputs: EncoderInputs, pictures: Pictures) -> EncoderInputs:
        """Pixels of every row, blank where it has none, and which rows have a picture."""
        B, L = inputs.mask_BL.shape
        count_I, channels, height, width = pictures.tokens.shape
        pixels = pictures.tokens * pictures.real(pictures.tokens)
        pixels_B3HW = pixels.new_zeros(B, channels, height, width).index_add(0, pictures.places_I, pixels)
        seen_B = inputs.mask_BL.new_zeros(B).index_add(0, pictures.places_I, (pictures.rows_I >= 0).long())
        added = 1 + (height // self.patch) * (width // self.patch)
        columns = L + added
        rows_X = pictures.rows_I[pictures.rows_I >= 0]
        index_Z = (rows_X[:, None] * columns + L + torch.arange(added, device=rows_X.device)).flatten()
        arguments = {**inputs.arguments, "pixel_values": pixels_B3HW, "pixel_mask": seen_B}
        return replace(inputs, arguments=arguments, columns=columns, image_index_Z=index_Z)


def _embed_pictures(
    embeddings: nn.Module, pixel_values: Tensor, pixel_mask: Tensor, max_image_length: int
) -> tuple[Tensor, Tensor, None]:
    """``ViltEmbeddings.visual_embed`` for square pictures: all patches in order; ``pixel_mask`` (B,): has a picture."""
    patches = embeddings.patch_embeddings(pixel_values)
    (B, width, *size), side = patches.shape, embeddings.config.image_size // embeddings.config.patch_size
    table = embeddings.position_embeddings[:, 1:].transpose(1, 2).reshape(1, width, side, side)
    if size != [side, side]:
        table = F.interpolate(table, size=size, mode="bilinear", align_corners=True)
    tokens = torch.cat([embeddings.cls_token.expand(B, -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
    places = torch.cat([embeddings.position_embeddings[:, :1], table.flatten(2).transpose(1, 2)], dim=1)
    mask = pixel_mask[:, None].expand(B, tokens.shape[1])
    return embeddings.dropout(tokens + places), mask, None
