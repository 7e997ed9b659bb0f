"""Fusions of text and image states, from a vision tower or in a single-stream encoder (ViLT)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comoe.config.recipe import VisionConfig
from comoe.models.encoder_io import EncoderInputs
from comoe.models.encoders.families import family_of, longest_input, reads_segments
from comoe.models.vision.tower import Tower


@dataclass(frozen=True, slots=True)
class Images:
    """Images of some rows of text, at most one per row."""

    tokens: Tensor
    """Image tokens (I, R, M) as ``Fusion.project`` gave them; pixels (I, 3, H, W) where the encoder
    reads these."""
    rows_I: Tensor
    """Row of each, int64; -1 is a blank one that no row may see."""

    @property
    def places_I(self) -> Tensor:
        """The rows, with row 0 for a blank one: it goes there times 0, so that every rank runs the same modules."""
        return self.rows_I.clamp_min(0)

    def real(self, like: Tensor) -> Tensor:
        """1 for an image and 0 for a blank one, in the type of ``like`` and as many dimensions: (I, 1, ...)."""
        return (self.rows_I >= 0).to(like.dtype).view(-1, *[1] * (like.ndim - 1))

    def take(self, numbers_J: Tensor) -> Images:
        """Some of them, each as that of a row of its own."""
        return Images(
            self.tokens[numbers_J], torch.arange(len(numbers_J), device=self.rows_I.device)
        )

    def without(self) -> Images:
        """A blank one in their place."""
        return Images(self.tokens[:1], self.rows_I.new_full((1,), -1))


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
    """How text and image come together. The base does nothing with an image.

    Every fusion leaves the shape of the text alone: task heads pool, or label, text tokens that
    have seen the image. A post without one comes out as its text alone would. ``before`` may
    change the encoder's inputs, ``after`` its output; each fusion uses one of the two.

    Attributes:
        in_encoder: the encoder itself reads the image tokens; another text then takes another pass
            of it.
        image_width: width of projected image tokens, None where the encoder reads pixels.
    """

    in_encoder = False
    image_width: int | None = None

    def project(self, tokens: Tensor) -> Tensor:
        """What ``Images.tokens`` holds, from the tower's tokens or from pixels."""
        return tokens

    def before(self, inputs: EncoderInputs, images: Images) -> EncoderInputs:
        """What the encoder is to read."""
        return inputs

    def after(self, hidden_BLM: Tensor, mask_BL: Tensor, images: Images) -> Tensor:
        """The states that all task heads read, from the encoder's."""
        return hidden_BLM


class SingleStream(Fusion):
    """ViLT: the encoder reads pixels beside the text. A row without image masks all of its image tokens.

    Args:
        encoder: a ViLT.
    """

    in_encoder = True

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.patch = encoder.config.patch_size
        embeddings = encoder.embeddings
        # The library's own draws patches at random, and wants a mask of pixels.
        embeddings.visual_embed = partial(_embed_images, embeddings)

    def before(self, inputs: EncoderInputs, images: Images) -> EncoderInputs:
        """Pixels of every row, blank where it has none, and which rows have an image."""
        B, L = inputs.mask_BL.shape
        count_I, channels, height, width = images.tokens.shape
        pixels = images.tokens * images.real(images.tokens)
        pixels_B3HW = pixels.new_zeros(B, channels, height, width).index_add(
            0, images.places_I, pixels
        )
        seen_B = inputs.mask_BL.new_zeros(B).index_add(
            0, images.places_I, (images.rows_I >= 0).long()
        )
        added = 1 + (height // self.patch) * (width // self.patch)
        columns = L + added
        rows_X = images.rows_I[images.rows_I >= 0]
        index_Z = (
            rows_X[:, None] * columns + L + torch.arange(added, device=rows_X.device)
        ).flatten()
        arguments = {**inputs.arguments, "pixel_values": pixels_B3HW, "pixel_mask": seen_B}
        return replace(inputs, arguments=arguments, columns=columns, image_index_Z=index_Z)


def _embed_images(
    embeddings: nn.Module, pixel_values: Tensor, pixel_mask: Tensor, max_image_length: int
) -> tuple[Tensor, Tensor, None]:
    """``ViltEmbeddings.visual_embed`` for square images: all patches in order; ``pixel_mask`` (B,): has an image."""
    patches = embeddings.patch_embeddings(pixel_values)
    B, width, *size = patches.shape
    side = embeddings.config.image_size // embeddings.config.patch_size
    table = embeddings.position_embeddings[:, 1:].transpose(1, 2).reshape(1, width, side, side)
    if size != [side, side]:
        table = F.interpolate(table, size=size, mode="bilinear", align_corners=True)
    tokens = torch.cat(
        [embeddings.cls_token.expand(B, -1, -1), patches.flatten(2).transpose(1, 2)], dim=1
    )
    places = torch.cat(
        [embeddings.position_embeddings[:, :1], table.flatten(2).transpose(1, 2)], dim=1
    )
    mask = pixel_mask[:, None].expand(B, tokens.shape[1])
    return embeddings.dropout(tokens + places), mask, None


ATTENTION_HEADS = 8
"""Heads of the text-to-image attention, or the largest smaller number that divides the width."""


class LateFusion(Fusion):
    """Adds an update from the image to each text token's state, after the encoder.

    Args:
        encoder: of the text; its width M counts.
        image_width: width V of the tower's tokens.
        dropout: probability on the update.
    """

    def __init__(self, encoder: nn.Module, image_width: int, *, dropout: float) -> None:
        super().__init__()
        self.image_width = encoder.config.hidden_size
        self.image = ImageProjection(image_width, self.image_width)
        self.text_norm = nn.LayerNorm(self.image_width)
        self.dropout = nn.Dropout(dropout)

    def project(self, tokens: Tensor) -> Tensor:
        """Tower tokens (I, R, V) to (I, R, M)."""
        return self.image(tokens)

    def after(self, hidden_BLM: Tensor, mask_BL: Tensor, images: Images) -> Tensor:
        """Text states plus the update of the rows with an image; elsewhere the text states."""
        update_ILM = self.update(hidden_BLM[images.places_I], images.tokens)
        update_ILM = self.dropout(update_ILM).to(hidden_BLM.dtype)
        return hidden_BLM.index_add(0, images.places_I, update_ILM * images.real(update_ILM))

    def update(self, hidden_ILM: Tensor, image_IRM: Tensor) -> Tensor:
        """What is added to each text token, (I, L, M)."""
        raise NotImplementedError


class Concat(LateFusion):
    """A feed-forward on [text token; mean of the image tokens]."""

    def __init__(self, encoder: nn.Module, image_width: int, *, dropout: float) -> None:
        super().__init__(encoder, image_width, dropout=dropout)
        self.hidden = nn.Linear(2 * self.image_width, 2 * self.image_width)
        self.output = nn.Linear(2 * self.image_width, self.image_width)

    def update(self, hidden_ILM: Tensor, image_IRM: Tensor) -> Tensor:
        """The feed-forward's output; nonlinear, so that neither side alone decides its sign."""
        text_ILM = self.text_norm(hidden_ILM)
        image_ILM = image_IRM.mean(dim=1, keepdim=True).expand_as(text_ILM)
        return self.output(F.gelu(self.hidden(torch.cat([text_ILM, image_ILM], dim=2))))


class CrossAttention(LateFusion):
    """Text tokens attend to image tokens, then a feed-forward: one decoder layer without self-attention.

    Source: the attention fusion of arXiv:2309.07794.
    """

    def __init__(self, encoder: nn.Module, image_width: int, *, dropout: float) -> None:
        super().__init__(encoder, image_width, dropout=dropout)
        width = self.image_width
        self.heads = next(heads for heads in range(ATTENTION_HEADS, 0, -1) if width % heads == 0)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.mixed = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, 2 * width)
        self.output = nn.Linear(2 * width, width)

    def update(self, hidden_ILM: Tensor, image_IRM: Tensor) -> Tensor:
        """The attention's output and a feed-forward on top of it."""
        query = self._split(self.query(self.text_norm(hidden_ILM)))
        key, value = (self._split(part) for part in self.key_value(image_IRM).chunk(2, dim=2))
        seen = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        seen_ILM = self.mixed(seen)
        return seen_ILM + self.output(F.gelu(self.hidden(self.norm(hidden_ILM + seen_ILM))))

    def _split(self, states: Tensor) -> Tensor:
        return states.unflatten(2, (self.heads, -1)).transpose(1, 2)


class Gated(LateFusion):
    """The image's state times a gate that each text token sets from both sides.

    Source: gated multimodal units, arXiv:1702.01992, as a residual.
    """

    def __init__(self, encoder: nn.Module, image_width: int, *, dropout: float) -> None:
        super().__init__(encoder, image_width, dropout=dropout)
        self.gate = nn.Linear(2 * self.image_width, self.image_width)
        self.value = nn.Linear(self.image_width, self.image_width)

    def update(self, hidden_ILM: Tensor, image_IRM: Tensor) -> Tensor:
        """Gate in (0, 1) times value in (-1, 1)."""
        text_ILM, image_I1M = self.text_norm(hidden_ILM), image_IRM.mean(dim=1, keepdim=True)
        both_ILX = torch.cat([text_ILM, image_I1M.expand_as(text_ILM)], dim=2)
        return torch.sigmoid(self.gate(both_ILX)) * torch.tanh(self.value(image_I1M))


class ImageTokens(Fusion):
    """The text encoder reads the image tokens right behind each post's text, as if they were words (MMBT).

    They take the positions that follow the text, segment 1 where the encoder knows segments, and a
    learned vector that distinguishes them from a second text. A row without image masks their
    places.

    Args:
        encoder: of the text; its word embeddings are looked up here.
        image_width: width V of the tower's tokens.
        dropout: probability on the projected image tokens.

    Source: Kiela et al. 2019, arXiv:1909.02950; the MMBT-like fusion of arXiv:2309.07794.
    """

    in_encoder = True

    def __init__(self, encoder: nn.Module, image_width: int, *, dropout: float) -> None:
        super().__init__()
        if not family_of(encoder.config.model_type).reads_embeddings:
            raise ValueError(
                f"model.vision.fusion: tokens puts image tokens among the words, but model.encoder, a "
                f"{encoder.config.model_type}, reads word ids alone; choose concat, attention or gated."
            )
        # Not a child: the encoder's weights have their own place in the model.
        self._words: Callable[[], nn.Module] = encoder.get_input_embeddings
        self.limit = longest_input(encoder.config)
        self.has_segments = reads_segments(encoder.config)
        self.image_width = encoder.get_input_embeddings().embedding_dim
        self.image = ImageProjection(image_width, self.image_width)
        self.mark = nn.Embedding(1, self.image_width)
        nn.init.normal_(self.mark.weight, std=0.02)
        self.dropout = nn.Dropout(dropout)

    def project(self, tokens: Tensor) -> Tensor:
        """Tower tokens (I, R, V) as word embeddings (I, R, E)."""
        tokens_IRE = self.image(tokens)
        mark = self.mark(torch.zeros(1, dtype=torch.long, device=tokens.device))
        return self.dropout(tokens_IRE + mark)

    def before(self, inputs: EncoderInputs, images: Images) -> EncoderInputs:
        """Word embeddings with the image tokens written behind each text.

        Raises:
            ValueError: more tokens than the encoder can number.
        """
        mask_BL, (count_I, R) = inputs.mask_BL, images.tokens.shape[:2]
        B, L = mask_BL.shape
        columns = L + R
        if columns > self.limit:
            raise ValueError(
                f"model.vision.fusion: tokens puts {R} image tokens behind a text of {L}, but model.encoder numbers at "
                f"most {self.limit}; set data.max_length to {max(self.limit - R, 1)} or less, take "
                "a tower with fewer image tokens, or another fusion."
            )
        starts_I = images.places_I * columns + mask_BL.sum(dim=1)[images.places_I]
        index_Z = (starts_I[:, None] + torch.arange(R, device=mask_BL.device)).flatten()
        real_Z = (images.rows_I >= 0).repeat_interleave(R, output_size=count_I * R)
        words_BLE = self._words()(inputs.arguments["input_ids"])
        # Padding becomes 0, so that adding writes; a blank image adds 0, which still ties its
        # modules to the loss.
        words_BLE = words_BLE * mask_BL.unsqueeze(2).to(words_BLE.dtype)
        added_IRE = (images.tokens * images.real(images.tokens)).to(words_BLE.dtype)
        longer_NE = F.pad(words_BLE, (0, 0, 0, R)).flatten(0, 1)
        longer_NE = longer_NE.index_add(0, index_Z, added_IRE.flatten(0, 1))
        arguments = dict(inputs.arguments)
        del arguments["input_ids"]
        arguments["inputs_embeds"] = longer_NE.view(B, columns, -1)
        arguments["attention_mask"] = _written(mask_BL, R, index_Z, real_Z)
        if self.has_segments:
            segments_BL = arguments.get("token_type_ids")
            segments_BL = 0 * mask_BL if segments_BL is None else segments_BL * mask_BL
            arguments["token_type_ids"] = _written(segments_BL, R, index_Z, real_Z)
        return replace(inputs, arguments=arguments, columns=columns, image_index_Z=index_Z[real_Z])


def _written(ids_BL: Tensor, added: int, index_Z: Tensor, real_Z: Tensor) -> Tensor:
    """The rows made longer, with 1 at the places of real image tokens."""
    longer = F.pad(ids_BL, (0, added))
    return longer.flatten().index_add(0, index_Z, real_Z.to(ids_BL.dtype)).view_as(longer)


def build_fusion(
    encoder: nn.Module, tower: Tower | None, config: VisionConfig, *, dropout: float
) -> Fusion | None:
    """How the model reads images; None where it reads none.

    Raises:
        ValueError: a decoder-only encoder would have to look behind the text.
    """
    family = family_of(encoder.config.model_type)
    if tower is None:
        return SingleStream(encoder) if family.single_stream else None
    assert not family.single_stream, (
        "image_side refuses a tower beside an encoder that reads images"
    )
    if family.causal and FUSIONS[config.fusion].in_encoder:
        raise ValueError(
            f"model.vision.fusion ({config.fusion}) puts images behind the text, where a "
            "decoder-only model.encoder does not look; choose concat, attention or gated."
        )
    return FUSIONS[config.fusion](encoder, tower.width, dropout=dropout)


FUSIONS: dict[str, Callable[..., Fusion]] = {
    "concat": Concat,
    "attention": CrossAttention,
    "tokens": ImageTokens,
    "gated": Gated,
}
"""``model.vision.fusion`` -> class, built with (encoder, width of image tokens, dropout)."""
