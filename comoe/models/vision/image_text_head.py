"""Heads of the image-text losses; prediction does without them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comoe.config.recipe import ImageTextConfig
from comoe.models.encoder_io import Encoding, Texts
from comoe.models.pooling import mean_state
from comoe.models.vision.fusion import Fusion, Images
from comoe.types import ImageText


class ImageTextHead(nn.Module):
    """Projections of both sides into one space, and a classifier of whether they belong together.

    Args:
        text_width: M of the text encoder.
        image_width: width of the image's states; None where one stream reads both sides and no
            passes of either side alone are made for it: there is no space of two then.
        projection_width: P.
        contrast: build the projections.
        match: build the classifier.
    """

    def __init__(
        self,
        text_width: int,
        image_width: int | None,
        projection_width: int,
        *,
        contrast: bool,
        match: bool,
    ) -> None:
        super().__init__()
        contrast = contrast and image_width is not None
        self.text = _projection(text_width, projection_width) if contrast else None
        self.image = _projection(image_width, projection_width) if contrast else None
        self.match = nn.Linear(text_width, 2) if match else None

    @property
    def contrasts(self) -> bool:
        """Whether there is a space of both sides."""
        return self.text is not None

    def embed(
        self, hidden_ILM: Tensor, mask_IL: Tensor, image_IRM: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Unit-length projections, float32, of the mean states of texts alone and of images alone."""
        text_IP = self.text(mean_state(hidden_ILM, mask_IL))
        image_IP = self.image(image_IRM.mean(dim=1))
        return F.normalize(text_IP.float(), dim=1), F.normalize(image_IP.float(), dim=1)

    def match_logits(self, hidden_JLM: Tensor, mask_JL: Tensor) -> Tensor:
        """Logits of [another post's text, the image's own] from fused states: (J, 2), float32."""
        return self.match(mean_state(hidden_JLM, mask_JL)).float()


def build_image_text_head(
    config: ImageTextConfig | None, fusion: Fusion | None, text_width: int, projection_width: int
) -> ImageTextHead | None:
    """What ``loss.image_text`` trains; None where that is nothing, or no image is read."""
    if config is None or fusion is None:
        return None
    wanted = {"contrast": config.itc_weight > 0, "match": config.itm_weight > 0}
    image_width = fusion.image_width
    if image_width is None and config.separate_passes:
        image_width = text_width
    head = ImageTextHead(text_width, image_width, projection_width, **wanted)
    return head if head.contrasts or head.match is not None else None


def image_text_output(
    head: ImageTextHead,
    fusion: Fusion,
    encode: Callable[[Texts, Images | None], Encoding],
    texts: Texts,
    images: Images,
    encoding: Encoding,
) -> ImageText:
    """Both sides of the posts with images. Loads of the passes that are run for it are not counted.

    Args:
        head: of the model.
        fusion: of the model.
        encode: one pass of encoder and fusion.
        texts, images, encoding: of the micro-batch.
    """
    rows_I, in_encoder = images.places_I, fusion.in_encoder
    own = texts.take(rows_I)
    text_IP = image_IP = logits_I2 = None
    if head.contrasts:
        image_IRM = images.tokens
        # Where the encoder reads the image too, the text alone takes a pass of its own.
        if not in_encoder:
            alone_ILM = encoding.states_BLM[rows_I]
        elif fusion.image_width is not None:
            alone_ILM = encode(own, None).states_BLM
        else:
            # One stream: each side alone. The image's text is the sign that begins every text, so
            # the passes have something to read whatever the rank's posts are.
            alone_ILM = encode(own, images.without()).states_BLM
            numbers_I = torch.arange(len(rows_I), device=rows_I.device)
            image_IRM = encode(own.beginning(), images.take(numbers_I)).whole_BNM[:, 1:]
        text_IP, image_IP = head.embed(alone_ILM, own.mask_BL, image_IRM)
    if head.match is not None:
        logits_I2 = head.match_logits(encoding.fused_BLM[rows_I], own.mask_BL)
    if in_encoder:
        segments = () if own.segments_BL is None else (own.segments_BL,)
        given: tuple[Tensor, ...] = (own.mask_BL, own.ids_BL, *segments)
    else:
        given = (own.mask_BL, encoding.states_BLM[rows_I])

    def match(others: tuple[Tensor, ...], numbers_J: Tensor) -> Tensor:
        mask_JL, *what = others
        chosen = images.take(numbers_J)
        if in_encoder:
            ids_JL, *segments = what
            # Weighed as the image's own text is: else the weight would reveal which text is the own
            # one.
            weights_J = None if own.weights_B is None else own.weights_B[numbers_J]
            segments_JL = segments[0] if segments else None
            draws_J = None if own.draws_B is None else own.draws_B[numbers_J]
            paired = Texts(
                ids_JL, mask_JL, segments_JL, own.tasks_B[numbers_J], weights_J, None, draws_J
            )
            fused_JLM = encode(paired, chosen).fused_BLM
        else:
            fused_JLM = fusion.after(what[0], mask_JL, chosen)
        return head.match_logits(fused_JLM, mask_JL)

    return ImageText(images.rows_I, text_IP, image_IP, logits_I2, given, match)


def _projection(width: int, projection_width: int) -> nn.Linear:
    linear = nn.Linear(width, projection_width, bias=False)
    nn.init.normal_(linear.weight, std=width**-0.5)
    return linear
